"""A model folder as transformers reads it: its config with its class's defaults, its stop tokens, its tensors."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from selfspec.errors import AssetError, one_line
from selfspec.model.gguf import silence

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def config(folder: Path) -> dict[str, Any]:
    """``config.json`` with what its class says of absent keys; stop tokens as ``generation_config.json`` has them.

    A kind of model that transformers does not know is returned as it stands.

    Raises:
        AssetError: it cannot be read, or makes no sense to its class.
    """
    from transformers import CONFIG_MAPPING, GenerationConfig

    written = _json(folder / "config.json")
    kind = written.get("model_type")
    if kind not in CONFIG_MAPPING:
        return written
    try:
        with silence():
            known = CONFIG_MAPPING[kind].from_dict(written)
            has_own = (folder / "generation_config.json").is_file()
            stops = GenerationConfig.from_pretrained(folder) if has_own else known
    except Exception as error:  # a value of another kind fails in as many ways as there are keys
        raise AssetError(f"{folder / 'config.json'}: cannot be read: {one_line(error)}") from error
    return {**known.to_dict(), "eos_token_id": stops.eos_token_id}


def tensors(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of ``model.safetensors``, or of the files that its index names, and of no other.

    Raises:
        AssetError: a file is missing or corrupt.
    """
    if (folder / _WHOLE).is_file():
        return _file(folder / _WHOLE, device)
    if not (folder / _INDEX).is_file():
        raise AssetError(f"{folder}: holds neither {_WHOLE} nor {_INDEX}")
    named = _json(folder / _INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise AssetError(f"{folder / _INDEX}: has no weight_map of tensors to files")
    found: dict[str, Tensor] = {}
    for file in sorted(set(named.values())):
        held = _file(folder / file, device)
        found |= {name: tensor for name, tensor in held.items() if named.get(name) == file}
    lost = sorted(named.keys() - found.keys())
    if lost:
        raise AssetError(f"{folder}: {named[lost[0]]} lacks {lost[0]}, which {_INDEX} names")
    return found


def check_shapes(folder: Path, wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Refuses a tensor of another shape than the config makes it.

    Args:
        wanted: shapes, by what a tensor's name ends with.

    Raises:
        AssetError: naming the tensor and both shapes.
    """
    for name, tensor in weights.items():
        shape = next((shape for end, shape in wanted.items() if name.endswith(end)), None)
        if shape is not None and tuple(tensor.shape) != shape:
            raise AssetError(f"{folder}: {name} is {tuple(tensor.shape)}; by config.json it must be {shape}")


class Stored(Mapping[str, Tensor]):
    """A file's tensors, each read when it is asked for: where it is copied and let go, its pages are given back."""

    def __init__(self, path: Path) -> None:
        """Raises an ``AssetError`` where the file is missing or corrupt."""
        self._path = path
        with self._open() as file:
            self._names = frozenset(file.keys())  # type: ignore[no-untyped-call]

    @contextmanager
    def _open(self) -> Iterator[safe_open]:
        try:
            with safe_open(self._path, "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise AssetError(f"{self._path}: cannot be read as weights: {one_line(error)}") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _file(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AssetError(f"{path}: cannot be read as weights: {one_line(error)}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(read, dict):
        raise AssetError(f"{path}: must be a JSON object")
    return read
