"""A model folder as transformers reads it: its config with its class's defaults, stop tokens, tensors; or all of it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from selfspec.errors import AssetError, ConfigError, one_line
from selfspec.model.gguf import silence

_MOST = 100_000
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def config(folder: Path) -> dict[str, Any]:
    """``config.json`` with what its class says of absent keys; stop tokens as ``generation_config.json`` has them.

    A kind of model that transformers does not know is returned as it stands.

    Raises:
        AssetError: it cannot be read, or makes no sense to its class.
    """
    from transformers import CONFIG_MAPPING, GenerationConfig

    written = _settings(folder)
    kind = written.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
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
    named = json_object(folder / _INDEX).get("weight_map")
    files = named.values() if isinstance(named, dict) else [None]
    if not isinstance(named, dict) or not all(isinstance(file, str) and Path(file).name == file for file in files):
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


def model(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A model folder as ``transformers`` reads it: safetensors only, no code but its own.

    Raises:
        AssetError: a file is missing or corrupt.
        ConfigError: the architecture is unknown, has an encoder, or is quantised.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _settings(folder)
    try:
        with silence():
            config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise AssetError(f"{folder}: config.json cannot be read: {one_line(error)}") from error
    if config.is_encoder_decoder:
        raise ConfigError(f"model: architecture {config.model_type!r} has an encoder; only decoders are run")
    plainly = _plainly(config)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"model: architecture {config.model_type!r} is not a causal language model")
    try:
        with silence():
            lm, seen = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **plainly
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AssetError(f"{folder}: cannot be read as a model: {one_line(error)}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"model: architecture {config.model_type!r}: {one_line(error).split('. ')[0]}") from error
    lost = sorted(seen["missing_keys"])
    if lost:
        raise AssetError(f"{folder}: the weights lack {lost[0]}" + f" and {len(lost) - 1} more" * (len(lost) > 1))
    return lm.to(device)


def _plainly(config: Any) -> dict[str, Any]:
    """What makes plain weights of quantised ones as they are read.

    Raises:
        ConfigError: nothing does.
    """
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return {}
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if kind != "mxfp4":  # GPT-OSS; of the others, few are read without a GPU, and most by packages of their own
        raise ConfigError(f"model: its weights are quantised ({kind}); plain ones, GGUF and mxfp4 are run")
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


def stop_tokens(lm: Any) -> frozenset[int]:
    """The end-of-sequence tokens that ``generate`` stops at: of the generation config, or what it is made from."""
    eos = lm.generation_config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])


def _settings(folder: Path) -> dict[str, Any]:
    """``config.json`` as it is written.

    Raises:
        AssetError: it cannot be read, or counts more of something than any model has.
    """
    path = folder / "config.json"
    written = json_object(path)
    for settings in (written, *(each for each in written.values() if isinstance(each, dict))):
        for key, value in settings.items():
            # Of so many layers, or classes, transformers would make a list as long, in all the memory that there is.
            if key.startswith(("num_", "n_layer", "n_head")) and isinstance(value, int | float) and value > _MOST:
                raise AssetError(f"{path}: {key}={value:g}: no model has more than {_MOST}")
    return written


def _file(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AssetError(f"{path}: cannot be read as weights: {one_line(error)}") from error


def json_object(path: Path) -> dict[str, Any]:
    """A file of a model folder, which may be anybody's.

    Raises:
        AssetError: it cannot be read, or is no JSON object.
    """
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(read, dict):
        raise AssetError(f"{path}: must be a JSON object")
    return read
