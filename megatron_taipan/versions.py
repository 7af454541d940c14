"""Under which releases of torch the trainer runs, and of transformers an export: the one place that says so.

An exported folder holds this file, the model card names its numbers, and setup.py reads them from its text.
tests/hf/test_versions.py runs the oldest release of transformers, the pinned one and the newest that there is.
"""

import warnings

TRANSFORMERS_OLDEST = "5.3"  # 5.0 rounds to bf16 what must stay float32; under 4.57 nothing loads
TRANSFORMERS_NEWEST = "5.24"  # that was run; a later one may rename what generate() passes, as 5.24 did

TORCH_OLDEST = "2.10"
# Every test ran under 2.13.0 on CPUs, those for GPUs under 2.11.0. On CPUs under 2.10.0, 2.12.0 (2026-11-30): the fast
# ones of tests/{engine,parallel,model,checkpoint,train,inference,distributed,ops,hf} and test_private_names.py.
TORCH_NEWEST = "2.13"


def untried_torch(version: str) -> list[str]:
    """A sentence where the trainer, which uses private names of torch, was never run under this one; else none.

    pip keeps to these releases, but users bring their own build.

    Args:
        version: `torch.__version__`, such as "2.13.0+cpu" or "2.14.0a0+git1234".
    """
    if release(TORCH_OLDEST) <= release(version) <= release(TORCH_NEWEST):
        return []
    side = "older" if release(version) < release(TORCH_OLDEST) else "newer"
    return [
        f"torch {version} is {side} than what was tried ({TORCH_OLDEST} to {TORCH_NEWEST}): run the tests first;"
        " tests/engine/test_internals.py and tests/test_private_names.py name what moved inside of it"
    ]


def check_transformers(version: str) -> None:
    """Warns of a release of transformers that was never run.

    Args:
        version: `transformers.__version__`, such as "5.24.0" or "5.25.0.dev0".

    Raises:
        ImportError: a release under which the model does not work.
    """
    accepted = f"this model works with {TRANSFORMERS_OLDEST} to {TRANSFORMERS_NEWEST}"
    if release(version) < release(TRANSFORMERS_OLDEST):
        raise ImportError(f"transformers {version} is too old, {accepted}: pip install -U transformers")
    if is_untested(version):
        warnings.warn(
            f"transformers {version} is newer than what was tested, {accepted}: compare generate(use_cache=False)",
            stacklevel=2,
        )


def is_untested(version: str) -> bool:
    """Whether a release is newer than the newest that was run."""
    return release(version) > release(TRANSFORMERS_NEWEST)


def release(version: str) -> tuple[int, int]:
    """Major and minor number."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
