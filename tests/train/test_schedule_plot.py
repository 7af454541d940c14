"""The dry run's plots of the schedules."""

from megatron_taipan.config_loading import make_config
from megatron_taipan.stages import plan_stages
from megatron_taipan.train.schedule_plot import WIDTH, plot, schedule_plots
from tests.train.toy import toy_tree


def test_bars_follow_the_values_and_the_ends_are_told():
    assert plot([0.0, 1.0, 0.5, 0.0]) == "▁█▅▁ from 0 to 0, at most 1"
    assert plot([2.0, 2.0]) == "██ from 2 to 2"
    assert plot([0.0, 0.0]) == "▁▁ from 0 to 0"


def test_the_learning_rate_and_the_gates_schedules_are_drawn(tmp_path):
    tree = toy_tree("no/such/data", tmp_path / "run")
    tree["train"]["steps"] = 1000
    tree["optim"] = {"lr": 1.0, "min_lr": 0.0, "warmup_steps": 100, "schedule": "wsd", "wsd_decay_steps": 300}
    tree["model"] |= {"pattern": "M S", "gate": {"capacity": {"start": 0.5, "end": 0.1}}}
    rate, capacity = schedule_plots(plan_stages(make_config(tree))[0], 1000)
    bars = rate.split()[1]
    assert rate.startswith("optim.lr ▁") and len(bars) == WIDTH and rate.endswith(" from 0.01 to 0, at most 1")
    assert bars.count("█") in range(27, 32)  # 600 of 1000 steps
    assert capacity.startswith("model.gate.capacity █") and capacity.endswith("from 0.5 to 0.1004")
    tree["model"]["pattern"] = "M W"
    assert len(schedule_plots(plan_stages(make_config(tree))[0], 1000)) == 1
