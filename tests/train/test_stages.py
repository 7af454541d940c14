"""A run in three stages of other rows, blends and batches: stopped anywhere it goes on bit for bit; what may change."""

import json
from pathlib import Path

import pytest
import torch

from megatron_taipan.checkpoint.folder import find_newest
from megatron_taipan.config_loading import make_config
from megatron_taipan.errors import UserError
from megatron_taipan.train.dry_run import dry_run
from tests.checkpoint.test_loading import everything
from tests.distributed.launch import launch
from tests.train.runs import log, numbers, runs, with_options
from tests.train.toy import toy_tree, write_data

STOPS = (1, 3, 4)  # inside the first stage, at its end, inside the second; then to the end
CAPACITY = {"start": 0.9, "end": 0.3}


def staged(web: str, books: str, directory: Path) -> dict:
    blend = [{"prefix": web, "weight": 0.5}, {"prefix": books, "weight": 0.5}]
    tree = toy_tree(
        web, directory, optim={"ema_decay": 0.5}, train={"eval_every": 1, "eval_samples": 4},
        checkpoint={"save_every": 1},
    )  # fmt: skip
    tree["train"].pop("steps")
    return tree | {
        "stages": [
            {"steps": 3},
            {
                "name": "long", "steps": 2, "data": {"seq_len": 64, "train": blend},
                "train": {"global_batch": 5, "micro_batch": 1}, "parallel": {"recompute": "full"},
                "model": {"gate": {"capacity": CAPACITY}},
            },
            {
                "steps": 2, "train": {"global_batch": 6, "micro_batch": 6}, "data": {"train": blend},
                "optim": {"schedule": "linear", "lr": 5e-3, "min_lr": 0},
            },
        ]
    }  # fmt: skip


def watched(trees: list[dict]) -> list:
    """`runs`, noting in each folder which tokens every step took."""
    from megatron_taipan.train import loop

    step_of_loop = loop.train_step

    def step(engine, batches, *, step, **keywords):
        rows = [row for batch in batches for row in batch["tokens"].tolist()]
        numbers = [number for batch in batches for number in batch["sample"].tolist()]
        with open(Path(tree["checkpoint"]["dir"]) / "rows", "a") as file:
            file.write(json.dumps([step, len(batches), numbers, rows]) + "\n")
        return step_of_loop(engine, batches, step=step, **keywords)

    loop.train_step, results = step, []
    try:
        for tree in trees:
            results += runs([tree])
    finally:
        loop.train_step = step_of_loop
    return results


def rows_of(directory: Path) -> list:
    return [json.loads(line) for line in (directory / "rows").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All trainings of this file in one process: their folder, and each one's status or error by its name."""
    tmp = tmp_path_factory.mktemp("stages")
    web, books = write_data(tmp / "web"), write_data(tmp / "books", seed=1)

    def tree(name: str, **sections) -> dict:
        changed = with_options(staged(web, books, tmp / name), **sections)
        changed["checkpoint"]["dir"] = str(tmp / name)
        return changed

    def branch(name: str, step: int, number: int, **changes) -> dict:
        load = {"load": str(tmp / "whole" / f"step_{step:08d}"), "dir": str(tmp / name), "save_every": 0}
        one = tree(name, checkpoint=load)
        one["stages"][number] = {**one["stages"][number], **changes}
        return one

    decay = {"optim": {"schedule": "constant", "lr": 2e-3, "min_lr": 0}}
    plain = toy_tree(web, tmp / "plain", train={"steps": 4, "eval_every": 2})
    single = toy_tree(web, tmp / "single", train={"steps": 4, "eval_every": 2}) | {"stages": [{"data": {"train": web}}]}
    added = toy_tree(web, tmp / "added", train={"steps": 6}, checkpoint={"load": str(tmp / "plain")})
    added["stages"] = [{"steps": 4}, {"optim": {"schedule": "constant", "lr": 3e-3}, "train": {"global_batch": 4}}]
    jobs = {
        "whole": tree("whole"),
        **{f"parts {stop}": tree("parts", train={"stop_at": stop}) for stop in STOPS},
        "parts": tree("parts"),
        "plain": plain,
        "single": single,
        "added": added,
        "edited later": branch("edited later", 5, 2, **decay),
        "edited finished": branch("edited finished", 5, 1, train={"global_batch": 8}),
        "edited finished inside the next": branch("edited finished inside the next", 6, 0, steps=4),
        "other data under way": branch("other data under way", 4, 1, data={"seq_len": 64}),
        "too short": branch("too short", 2, 0, steps=1),
        "none left": branch("none left", 6, 0) | {"stages": [{"steps": 7}]},
    }
    return tmp, dict(zip(jobs, launch(1, watched, list(jobs.values()), timeout=300)[0], strict=True))


def test_each_stage_trains_with_its_own_options(done):
    tmp, status = done
    assert status["whole"] == 0
    seen = rows_of(tmp / "whole")
    assert [(n, len(rows), len(rows[0])) for _, n, _, rows in seen] == [(4, 8, 32)] * 3 + [(5, 5, 64)] * 2 + [
        (1, 6, 32)
    ] * 2
    assert [number for _, _, numbers, _ in seen for number in numbers] == list(range(3 * 8 + 2 * 5 + 2 * 6))
    assert [record["lr"] for record in log(tmp / "whole")][5:] == pytest.approx([2.5e-3, 0])
    assert [record["gate/capacity"] for record in log(tmp / "whole")] == pytest.approx(
        [0.15] * 3 + [0.9, 0.6] + [0.15] * 2
    )
    assert [record["tokens"] for record in log(tmp / "whole")] == [256] * 3 + [320] * 2 + [192] * 2


def test_stopped_anywhere_it_goes_on_bit_for_bit(done):
    tmp, status = done
    assert [status[f"parts {stop}"] for stop in STOPS] == [0] * 3 and status["parts"] == 0
    assert [record["step"] for record in log(tmp / "parts", "start")] == [0, *STOPS]
    assert numbers(tmp / "parts") == numbers(tmp / "whole") and len(numbers(tmp / "whole")) == 7
    assert rows_of(tmp / "parts") == rows_of(tmp / "whole")
    of_whole, of_parts = (
        [{k: v for k, v in record.items() if k not in ("time", "s")} for record in log(tmp / name, "valid")]
        for name in ("whole", "parts")
    )
    assert all(record in of_whole for record in of_parts)  # at a stop the parts validate twice
    ours, theirs = (everything(find_newest(tmp / name).path) for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_one_stage_is_the_run_without_stages(done):
    tmp, status = done
    assert status["plain"] == status["single"] == 0
    assert numbers(tmp / "plain") == numbers(tmp / "single")
    ours, theirs = (everything(find_newest(tmp / name).path) for name in ("single", "plain"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_finished_stages_are_on_record(done):
    tmp, _ = done
    progress = json.loads((tmp / "whole/step_00000007/metadata.json").read_text())["progress"]
    first, long = progress["finished"]
    assert [(first["step"], first["samples"], first["tokens"]), (long["step"], long["samples"], long["tokens"])] == [
        (3, 24, 768), (5, 34, 1408),
    ]  # fmt: skip
    assert (long["name"], len(first["read"]), len(long["read"])) == ("long", 1, 2)
    at_the_border = json.loads((tmp / "whole/step_00000003/metadata.json").read_text())["progress"]
    assert "finished" not in at_the_border  # the next stage may still be edited


def test_what_may_be_edited(done):
    tmp, status = done
    assert status["edited later"] == 0
    assert [record["lr"] for record in log(tmp / "edited later")] == pytest.approx([2e-3] * 2)
    said = [record["text"] for record in log(tmp / "edited later", "changed")]
    assert any("stages.2.optim.lr: 0.005, this run 0.002" in text for text in said), said
    for name, difference in (
        ("edited finished", "stages.1.train.global_batch: checkpoint has 5, this run 8"),
        ("edited finished inside the next", "stages.0.steps: checkpoint has 3, this run 4"),
        ("other data under way", "data.fingerprint"),
        ("too short", "ends at step 1, and checkpoint"),
        ("none left", "2 stages are done in checkpoint"),
    ):
        assert difference in str(status[name]), (name, status[name])


def test_a_dry_run_does_without_the_data_of_stages_that_are_done(done):
    tmp, _ = done
    tree = staged(str(tmp / "web"), str(tmp / "books"), tmp / "elsewhere")
    tree["checkpoint"]["load"] = str(tmp / "whole/step_00000004")
    tree["stages"][0]["data"] = {"train": str(tmp / "gone")}
    told = list(dry_run(make_config(tree), 1))
    assert f"goes on    from {tmp / 'whole/step_00000004'}: 3 steps are left" in told
    assert [line.split()[1:3] for line in told if line.startswith("sources")] == [["stage", "2"], ["stage", "3"]]
    tree["checkpoint"]["load"] = str(tmp / "whole/step_00000003")  # the first stage is under way until the next step
    with pytest.raises(UserError, match="gone.idx does not exist"):
        list(dry_run(make_config(tree), 1))


def test_stages_are_added_to_a_run_that_had_none(done):
    tmp, status = done
    assert status["added"] == 0, status["added"]
    assert [(record["step"], record["lr"]) for record in log(tmp / "added")] == [(5, 3e-3), (6, 3e-3)]
    [first] = json.loads((tmp / "added/step_00000006/metadata.json").read_text())["progress"]["finished"]
    assert (first["step"], first["samples"]) == (4, 32)
    assert [numbers[0] for _, _, numbers, _ in rows_of(tmp / "added")] == [32, 36]
