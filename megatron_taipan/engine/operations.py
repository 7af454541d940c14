"""The operations of a run, from its configuration: what must be able to run, and what was chosen."""

from dataclasses import replace

import torch

from megatron_taipan.config import Config
from megatron_taipan.layer_kinds.registry import kinds_of
from megatron_taipan.ops.choices import RunFacts, check_choices
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.ops.operations import Ops


def run_facts(config: Config) -> RunFacts:
    """What decides which implementations can serve the run."""
    m, t, tensor = config.model.mamba, config.train, config.parallel.tensor
    attending = [kind for kind in kinds_of(config.model.letters) if kind.attends]
    groups = m.n_groups // tensor if m.n_groups % tensor == 0 else 1  # of a rank, see model/mamba2.py
    inner, states = config.model.d_inner // tensor, groups * m.d_state
    tokens = t.micro_batch * config.parallel.piece(config.data.seq_len)
    return RunFacts(
        precision=t.precision,
        tf32=t.tf32,
        deterministic=t.deterministic,
        tensor=tensor,
        packed=config.data.mask_documents and not config.data.one_document,
        in_pieces=config.parallel.context > 1,
        headdim=m.headdim,
        d_state=m.d_state,
        d_conv=m.d_conv,
        conv_channels=inner + 2 * states,
        conv_elements=tokens * (2 * inner + 2 * states + config.model.mamba_heads // tensor),
        scan_elements=tokens * max(inner + 2 * states, inner * m.d_state // m.chunk_size, groups * m.chunk_size),
        head_dim=config.model.head_dim if attending else RunFacts.head_dim,
        every_query={kind.letter: kind.windowed for kind in attending if not kind.gated},
        gated=tuple(kind.letter for kind in attending if kind.gated),
    )


def check_operations(config: Config) -> None:
    """Whether the chosen implementations can serve the run; needs neither a GPU nor their packages.

    Raises:
        UserError: with the reasons.
    """
    check_choices(
        {option: choice for option, choice in config.ops.choices().items() if choice != "auto"}, run_facts(config)
    )


def choose_operations(config: Config, *later: Config) -> Ops:
    """The operations on this machine of a run, and of its later stages: one choice that can serve all of them.

    Raises:
        UserError: what was chosen cannot serve the run or is not here.
    """
    p, facts = config.parallel, run_facts(config)
    each = [facts, *map(run_facts, later)]
    facts = replace(
        facts,
        packed=any(one.packed for one in each),
        in_pieces=any(one.in_pieces for one in each),
        conv_elements=max(one.conv_elements for one in each),
        scan_elements=max(one.scan_elements for one in each),
    )
    again = p.recompute_mixer if p.recompute == "none" else ()  # else a layer's tensors live only while it runs
    return pick_ops(config.ops.backend, config.ops.choices(), facts, again)


def describe_operations(config: Config, *later: Config) -> str:
    """Which implementations run here; without a GPU, where kernels are not looked for, which were asked for.

    Raises:
        UserError: as for `choose_operations`.
    """
    if torch.cuda.is_available():
        return choose_operations(config, *later).report
    asked = [f"ops.{name}={choice}" for name, choice in config.ops.choices().items() if choice != "auto"]
    return (
        " ".join([f"ops.backend={config.ops.backend}", *asked]) + " (no GPU here: whether they run shows at the start)"
    )
