"""Packages that only some inputs need."""

from importlib import import_module
from types import ModuleType

from megatron_taipan.errors import UserError


def require(package: str, what: str) -> ModuleType:
    """The package.

    Args:
        what: what takes it, as the beginning of the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(f"{what} takes the package {package}; `pip install {package}`") from error
