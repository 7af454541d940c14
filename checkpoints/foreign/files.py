"""A folder that another library wrote: its config.json and its tensors. Files are read as data; none can run code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json, plain_name

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], Tensor]  # gives a tensor by its name, in float32


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json of the source.

    Raises:
        UserError: it cannot be read, or holds no settings.
    """
    settings = _read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise UserError(f"{folder}/config.json holds no settings but a {type(settings).__name__}")
    return settings


def open_tensors(folder: Path) -> tuple[Shapes, Read]:
    """Shapes by name, and a function that reads one tensor.

    Raises:
        UserError: no file holds weights, one cannot be read, or two hold the same tensor.
    """
    files = weight_files(folder)
    where: dict[str, Any] = {}
    shapes: Shapes = {}
    for file in files:
        opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
        twice = sorted(opened.keys() & where.keys())
        if twice:
            raise UserError(f"{folder}: {file.name} and another file both hold {twice[0]}; keep the right one")
        where |= opened
    for name, tensor in where.items():
        shapes[name] = tuple(tensor.shape) if isinstance(tensor, Tensor) else tuple(tensor.get_slice(name).get_shape())

    def read(name: str) -> Tensor:
        held = where[name]
        return (held if isinstance(held, Tensor) else held.get_tensor(name)).float()

    return shapes, read


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: what is beside them, such as another format's copy, is not opened.

    Raises:
        UserError: there is none, or an index names a file that is not there, or one in another folder.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            named = _read_json(index)
            if not isinstance(named, dict) or not isinstance(named.get("weight_map"), dict):
                raise UserError(f"{index} holds no weight_map")
            names = list(named["weight_map"].values())
            for name in names:
                if not plain_name(name):
                    raise UserError(
                        f"{index} names {str(name)[:200]!r} as a file of the folder, which is not the name of a file"
                        " beside it; the folder is damaged, or means harm"
                    )
            files = [folder / name for name in sorted(set(names))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{folder} lacks {len(missing)} of its {len(files)} files: {', '.join(missing[:5])}")
            return files
        loose = sorted(folder.glob(f"*{Path(whole).suffix}"))
        if loose:
            return loose
    raise UserError(f"{folder} holds neither .safetensors files nor pytorch_model.bin")


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _open_safetensors(file: Path) -> dict[str, Any]:
    try:
        opened = safe_open(file, framework="pt")
    except Exception as error:  # the library raises its own type for damaged files
        raise UserError(f"{file} is not a complete safetensors file: {error}") from error
    return dict.fromkeys(opened.keys(), opened)


def _open_pickle(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{file} is not a plain file of tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file} is not a plain file of tensors: it holds other things")
    return tensors
