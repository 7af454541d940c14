"""Of a checkpoint with a moving average: its weights are the average's, without thresholds found with others."""

import torch
from safetensors.torch import load_file, save_file

from megatron_taipan.checkpoint.calibration import write_thresholds
from megatron_taipan.checkpoint.weights import open_checkpoint
from tests.checkpoint.folders import rehash
from tests.checkpoints.made import memory_state, write_checkpoint

FILE, THRESHOLD = "state/rank_00000.safetensors", "layers.1.gate.threshold"


def test_the_average_has_no_calibrated_thresholds(tmp_path):
    state = memory_state("M S", gate={"threshold": 0.5})
    path = write_checkpoint(tmp_path, state.config, state.load)
    tensors = load_file(path / FILE)
    masters = {name: tensor for name, tensor in tensors.items() if name.endswith("|master")}
    tensors |= {name.replace("|master", "|ema"): 3 * tensor for name, tensor in masters.items()}
    save_file(tensors, path / FILE)
    rehash(path)
    write_thresholds(path, {THRESHOLD: 1 / 3}, capacity=0.3)
    weights, average = open_checkpoint(path), open_checkpoint(path, ema=True)
    assert (weights.load(THRESHOLD), average.load(THRESHOLD)) == (torch.tensor(1 / 3), 0.5)
    for name in weights.reader.table:
        assert torch.equal(weights.load(name), state.load(name))
        assert torch.equal(average.load(name), 3 * state.load(name))
