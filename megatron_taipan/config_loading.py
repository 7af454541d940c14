"""Reading a configuration: a YAML file merged into what it extends, overrides on top, all of it validated."""

import re
from pathlib import Path

from pydantic import ValidationError

from megatron_taipan.config import Config
from megatron_taipan.config_errors import ConfigError, explain
from megatron_taipan.config_overrides import apply_override
from megatron_taipan.plain_yaml import read_yaml


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies dotted overrides such as `train.steps=100` (values are YAML).

    A file may extend another, `extends: other.yaml` (a path from its own folder), and then holds only what differs.
    Mappings are merged option by option, everything else is replaced.

    Raises:
        ConfigError: the file or one that it extends is missing or not a mapping, files extend each other in a circle,
            a key is unknown, a value does not fit.
    """
    tree = _read_tree(Path(path), ())
    for override in overrides:
        apply_override(tree, override)
    return make_config(tree, str(path))


def _read_tree(path: Path, extended_by: tuple[Path, ...]) -> dict:
    """The mapping of a file, merged into what it extends."""
    where = "".join(f" (extended by {file})" for file in reversed(extended_by))
    if path.resolve() in {file.resolve() for file in extended_by}:
        raise ConfigError(f"{path} extends itself: {' -> '.join(map(str, (*extended_by, path)))}")
    try:
        tree = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {path}{where} is not text: {error}") from error
    except ValueError as error:
        raise ConfigError(f"the configuration {path}{where} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}{where} must hold a mapping of sections (model, data, train, ...)")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends={base!r} must be the path of one file")
    return _merged(_read_tree(path.parent / base, (*extended_by, path)), tree)


def _merged(base: dict, tree: dict) -> dict:
    """`tree` merged into `base`, mappings recursively."""
    both = {k: _merged(base[k], v) for k, v in tree.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | tree | both


def make_config(tree: dict, origin: str = "configuration") -> Config:
    """Validates a nested dictionary; `origin` is named in errors.

    Raises:
        ConfigError: a key is unknown, a value does not fit; all of them at once.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {explain(error)}") from error


def refuse_unexpanded(config: Config) -> None:
    """A folder of checkpoints as only a shell would read it; what is read from such a path is missing and says so.

    Raises:
        ConfigError: checkpoint.dir begins with `~` or `$NAME`: the run would be saved in a folder of that name.
    """
    folder = config.checkpoint.dir
    if found := re.match(r"~|\$\w+|\$\{\w+\}", folder):
        raise ConfigError(
            f"checkpoint.dir={folder}: {found[0]} is not replaced here, nor by a shell within an override; write the"
            f' path out, or on the command line checkpoint.dir="$HOME/..." (a folder of that name: ./{folder})'
        )


def presets() -> Path:
    """The folder of the presets: launch/configs of a checkout, which a wheel puts into the package."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "launch" / "configs"
