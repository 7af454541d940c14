"""Where a run came from: versions, git commit, layout, data. Written beside every checkpoint."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_taipan.config import Config
from megatron_taipan.parallel.groups import Groups

PACKAGES = (
    "megatron_taipan",
    "torch",
    "deepspeed",
    "numpy",
    "triton",
    "mamba_ssm",
    "causal_conv1d",
    "flash_attn",
    "liger_kernel",
    "cut_cross_entropy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect numbers; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpu"] = torch.cuda.get_device_name()
    return found


def git_commit(source: Path = Path(__file__)) -> str | None:
    """The commit of the tree that `source` is a file of, with "+changes" where tracked files differ from it.

    None where the file is not in a repository: an installed package may be inside one that does not track it. Who owns
    the repository does not matter here, though git checks it: the code in it is what runs.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-c", "safe.directory=*", *arguments],
            cwd=source.parent, capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip

    try:
        git("ls-files", "--error-unmatch", source.name)
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def layout(config: Config, groups: Groups) -> dict[str, Any]:
    """How the state is spread over processes."""
    return {
        "tensor": groups.mesh.tensor,
        "pipeline": groups.mesh.pipeline,
        "data": groups.mesh.data,
        "context": groups.mesh.context,
        "zero_stage": config.parallel.zero_stage,
        "processes": groups.mesh.size(),
    }
