"""What a text is about, as a vector: the mean of the served model's own token embeddings, in float32.

It needs no other model and no network, and costs a tenth of a millisecond. What it can and cannot tell apart is
measured by ``tests/benchmarks/routing.py``: it finds a prompt that was put a little differently among thousands, but a
mean does not know the order of words, and opposites are as near to each other as synonyms. So the cache lets the
words decide (``serve/words.py``), and asks for vectors of single words only to know a word by its inflections.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from selfspec.errors import AssetError

_TABLES = ("embed_tokens.weight", "wte.weight")


class Meaning:
    """Text -> vector, by a model folder in the Hugging Face layout; the table is mapped, not read.

    Raises:
        AssetError: the folder has no tokenizer or no table of token embeddings.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        if not (folder / "tokenizer.json").is_file():
            raise AssetError(f"serve.cache.mode=similar: {folder} has no tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._table = _table(folder)

    def __call__(self, text: str) -> NDArray[np.float32]:
        """``[D]``, of length 1; of an empty text, 0."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        mean = self._table[torch.tensor(ids, dtype=torch.long)].float().sum(0)
        vector: NDArray[np.float32] = (mean / mean.norm().clamp(min=1e-9)).numpy()
        return vector


def _table(folder: Path) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith(_TABLES):
                    table: torch.Tensor = file.get_tensor(name)
                    return table
    raise AssetError(f"serve.cache.mode=similar: {folder} has no table of token embeddings")
