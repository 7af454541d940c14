"""What a rank sends to those with the other pieces of its rows: exactly the calls and bytes of the formula."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.comm import measure_piece_traffic
from megatron_taipan.config_loading import make_config
from megatron_taipan.parallel.context_traffic import describe_pieces
from tests.distributed.launch import launch
from tests.parallel.test_traffic import network
from tests.train.toy import toy_tree

BATCH, LENGTH, WINDOW = 2, 24, 9  # pieces of 12 and of 6 tokens: the window reaches over one and two
CASES = [
    *[(pattern, True, "none") for pattern in ("M", "S", "W", "A", "M*2 S W A")],
    *[("M*2 S W A", False, recompute) for recompute in ("none", "selective", "full")],
]


def count_all(context: int) -> list:
    options = {"context": context, "batch": BATCH, "length": LENGTH, "device": torch.device("cpu")}
    sequences = (False, True) if dist.get_world_size() > context else (False,)
    return [
        (case, sequence, *measure_piece_traffic(network(*case[:2]), sequence=sequence, recompute=case[2], **options))
        for case in CASES
        for sequence in sequences
    ]


@pytest.fixture(scope="module", params=[(2, 2), (4, 4), (4, 2)], ids=["context 2", "context 4", "tensor 2 context 2"])
def counted(request) -> tuple[int, int, list]:
    processes, context = request.param
    return processes, context, launch(processes, count_all, context)


def test_formula_matches_what_each_rank_sent(counted):
    for rank, found in enumerate(counted[2]):
        for case, sequence, sent, expected in found:
            assert (sent.calls, sent.bytes) == (expected.calls, expected.bytes), (rank, case, sequence)
            assert sent.bytes.total()


def test_numbers_of_layers_written_out(counted):
    """8 heads of 8 channels and 8 states, d_conv 4, 4 query heads and one key-value head of 8 channels; float32."""
    processes, context, ranks = counted
    tensor, piece = processes // context, LENGTH // context
    by_rank = [{case[0]: sent for case, _, sent, _ in found if case[1:] == (True, "none")} for found in ranks]
    for number, sent in enumerate(by_rank):
        rank = number // tensor
        state, tail = BATCH * 8 // tensor * 8 * 8 * 4, BATCH * 3 * (64 // tensor + 2 * 8) * 4
        assert sent["M"].bytes["all_gather"] == 2 * state + BATCH * 8 // tensor * 4
        assert sent["M"].bytes["all_to_all"] == tail * ((rank < context - 1) + (rank > 0))
        token = BATCH * 2 * 8 * 4  # a key and a value of each row
        behind, before = context - 1 - rank, rank
        assert sent["A"].bytes["all_to_all"] == token * piece * (behind + before)
        near = [min(piece, max(0, WINDOW - 1 - piece * distance)) for distance in range(context)]
        assert sent["W"].bytes["all_to_all"] == token * (sum(near[:behind]) + sum(near[:before]))
        assert sent["S"].bytes == {**sent["W"].bytes, "all_reduce": 2 * 4 * BATCH}


def test_the_dry_run_adds_up_a_step():
    tree = toy_tree("unused", parallel={"context": 4, "recompute": "full"}, directory="unused", data={"seq_len": 4096},
                    train={"precision": "bf16"}, model={"pattern": "M"})  # fmt: skip
    # micro-batches of 2 rows, 3 a step; 4 heads of 16 channels and 16 states; two forward passes and one backward
    gathered = 3 * 2 * 4 * (2 * (16 * 16 + 1) + 16 * 16) * 4
    tail = 3 * 2 * 3 * (64 + 2 * 16) * 2 * 3  # bf16; a rank in the middle
    line = describe_pieces(make_config(tree), 3)
    assert line.startswith("rows of 4,096 tokens in 4 pieces of 1,024; a rank sends at most")
    assert f"all_gather {gathered / 1e6:.2f} MB, all_to_all {tail / 1e6:.2f} MB" in line
    assert f"{(gathered + tail) / 1e6:.2f} MB a step" in line and line.endswith("in 18 calls")
