"""Under which releases of transformers an export gives the trainer's text: the one place that says so.

An exported folder holds this file, the model card names its numbers, and setup.py reads them from its text.
tests/hf/test_versions.py runs the oldest release, the pinned one and the newest that there is.
"""

import warnings

TRANSFORMERS_OLDEST = "5.3"  # 5.0 rounds to bf16 what must stay float32; under 4.57 nothing loads
TRANSFORMERS_NEWEST = "5.24"  # that was run; a later one may rename what generate() passes, as 5.24 did


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
