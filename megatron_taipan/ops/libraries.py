"""The packages of others whose kernels a user may ask for: how each is found, and what is said where it is not.

They are imported when they were asked for, never before.
"""

import importlib
from importlib import metadata
from typing import Any, NamedTuple

from megatron_taipan.errors import UserError


class Library(NamedTuple):
    """A package as pip knows it, and the oldest release whose functions are as the wrappers call them."""

    package: str
    oldest: str
    compiles: bool = False  # against the torch that is installed


# mamba-ssm 2.3.2, causal-conv1d 1.7, flash-attn 2.8.3, liger-kernel 0.8.5 and cut-cross-entropy 25.1.1 were read for
# this. liger-kernel before 0.8.2 ignores the weights of single tokens in its gradients, without a word.
LIBRARIES = {
    "mamba_ssm": Library("mamba-ssm", "2.3.2", compiles=True),
    "causal_conv1d": Library("causal-conv1d", "1.7", compiles=True),
    "flash_attn": Library("flash-attn", "2.8", compiles=True),
    "liger": Library("liger-kernel", "0.8.2"),
    "cce": Library("cut-cross-entropy", "25.1.1"),
}


def load_library(choice: str, module: str, option: str) -> tuple[Any, str]:
    """The module of a library, and the library's version.

    Args:
        choice: its name in the configuration; option: the option that asked for it, both for the error.

    Raises:
        UserError: it is not installed, too old, or does not import.
    """
    from packaging.version import Version

    library = LIBRARIES[choice]
    build = "--no-build-isolation " if library.compiles else ""
    fix = f"run: pip install {build}'{library.package}>={library.oldest}', or choose another ops.{option}"
    needs = f"ops.{option}={choice} needs the package {library.package} {library.oldest} or later, and"
    try:
        found = metadata.version(library.package)
    except metadata.PackageNotFoundError:
        raise UserError(f"{needs} it is not installed; {fix}") from None
    if Version(found) < Version(library.oldest):
        raise UserError(f"{needs} {found} is installed; {fix}")
    try:
        return importlib.import_module(module), found
    except Exception as error:  # an extension built for another torch raises more than ImportError
        raise UserError(
            f"{needs} {found}, which is installed, does not import ({type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else 'no reason given'}); was it built for another torch?"
            f" Remove it (pip uninstall {library.package}), then {fix}"
        ) from error
