"""The environment variables by which launchers make a process a rank of a run; a program that it starts is none."""

from collections.abc import Mapping

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "CROSS_RANK", "CROSS_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NTASKS",
)  # fmt: skip
PREFIXES = ("MASTER_", "TORCHELASTIC_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "PMIX_", "SLURM_STEP_")


def without_rank(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program of its own: `env` without what `find_place` reads, and its launcher's like."""
    return {name: value for name, value in env.items() if name not in NAMES and not name.startswith(PREFIXES)}
