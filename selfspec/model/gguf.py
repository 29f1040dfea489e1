"""GGUF -> a plain model folder: bf16 safetensors, config.json, tokenizer, chat template.

transformers reads a GGUF in about 15 s, and everything else here reads safetensors: so it is converted once.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfspec.config import Model
from selfspec.data import assets, folders
from selfspec.errors import AssetError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 3
"""Raise it when the same GGUF would convert to something else: the old folder is then not taken."""
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A Llama's matrices, as GGUF calls them and as transformers does."""


def model_folder(model: Model) -> Path:
    """The model as a folder that transformers and vLLM load: fetched, and converted where it is a GGUF file.

    Raises:
        AssetError: the source cannot be had, or is not a model.
        StorageError: the cache cannot be written.
    """
    path = assets.fetch(model.source, model.sha256)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AssetError(f"model.source={model.source}: {path} has no config.json, so it is not a model folder")
        return path
    if path.suffix != ".gguf":
        raise AssetError(f"model.source={model.source}: must be a model folder or a .gguf file")
    key = folders.fingerprint(path, _VERSION)
    return folders.derived(re.sub(r"[^\w.-]", "-", path.stem), key, lambda folder: to_safetensors(path, folder))


def to_safetensors(gguf: Path, folder: Path) -> None:
    """Dequantises ``gguf`` into ``folder``, as bf16; beside it, tiles of what our own kernels read packed.

    Raises:
        AssetError: a file that is damaged, or of an architecture that transformers does not know.
        StorageError: ``folder`` cannot be written.
    """
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise AssetError(f"{gguf}: is not a GGUF file")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from selfspec.model import blocks

    with silence():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file fails in as many ways as there are fields in it
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AssetError(f"{gguf}: cannot be read as a model: {reason}") from error
        kept = _kept(gguf, model)
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if kept:
                save_file(kept, folder / blocks.FILE)
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror or error}") from error
        except Exception as error:  # safetensors has an error of its own for a full disk
            raise StorageError(f"{folder}: {error}") from error


def _kept(gguf: Path, model: Any) -> dict[str, "Tensor"]:
    """Tiles of a Llama's matrices, as transformers names them; of those only that come to the weights it read."""
    import torch
    from gguf import GGUFReader

    from selfspec.model import blocks

    exact, config, kept = model.state_dict(), model.config, {}
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    for tensor in GGUFReader(gguf).tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)", tensor.name.removesuffix(".weight")).groups()  # type: ignore[union-attr]
        full = f"{f'model.layers.{layer}.' if layer else ''}{_NAMES.get(name)}.weight"
        if tensor.tensor_type.name not in blocks.KINDS or full not in exact:
            continue
        rows = torch.from_numpy(tensor.data.copy())
        orders = [rows]
        if name in heads:  # llama.cpp stores a Llama's heads with the two halves of each interleaved
            count = getattr(config, heads[name])
            orders.append(rows.view(count, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape))
        for order in orders:
            tiles = blocks.laid_out(order, tensor.tensor_type.name)
            if tiles is not None and blocks.values(tiles).equal(exact[full]):
                kept[full] = tiles
    return kept


@contextmanager
def silence() -> Iterator[None]:
    """Neither bars, nor advice, nor warnings from transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.ERROR)
    logging.disable_progress_bar()
    try:
        # The GGUF reader draws a bar of its own, which no switch of transformers' turns off.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
