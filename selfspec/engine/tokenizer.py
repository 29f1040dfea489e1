"""A model's own tokenizer, read from its folder when it is first asked for something."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from selfspec.config import Model
from selfspec.engine.base import Prefix, Tokenizer
from selfspec.errors import AssetError, ConfigError, one_line

_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
"""A byte, as SentencePiece names it."""


def _byte_names() -> Iterator[tuple[str, int]]:
    """GPT-2's names of bytes: printable characters of Latin-1 are themselves, the others follow U+0100."""
    other = 0x100
    for byte in range(256):
        own = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE
        yield chr(byte if own else other), byte
        other += not own


_BYTES = dict(_byte_names())


class ModelTokenizer(Tokenizer):
    """See the module's docstring."""

    def __init__(self, model: Model, folder: Callable[[], Path]) -> None:
        """``folder``: gives the model's folder on this disk."""
        self._model, self._folder = model, folder

    @cached_property
    def _own(self) -> Any:
        # AutoTokenizer comes to the same, but imports model code for more than a second first.
        from transformers import PreTrainedTokenizerFast

        folder = self._folder()
        if not (folder / "tokenizer.json").is_file():
            raise AssetError(f"model.source={self._model.source}: {folder} has no tokenizer.json")
        try:
            return PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # a file of another kind fails in as many ways as there are kinds
            raise AssetError(f"{folder}: its tokenizer cannot be read: {one_line(error)}") from error

    def encode(self, text: str, chat: bool) -> list[int]:
        """See :meth:`Tokenizer.encode <selfspec.engine.base.Tokenizer.encode>`."""
        if not chat:
            ids: list[int] = self._own(text)["input_ids"]
            return ids
        if not self._own.chat_template:
            raise ConfigError(f"workload.chat=true: {self._model.name} has no chat template; use workload.chat=false")
        try:
            return self.encode_chat([{"role": "user", "content": text}])
        except ValueError as error:
            what = f"the chat template of {self._model.name} refuses a prompt: {error}"
            raise ConfigError(f"workload.chat=true: {what}; use workload.chat=false") from error

    def encode_part(self, text: str) -> list[int]:
        """See :meth:`Tokenizer.encode_part <selfspec.engine.base.Tokenizer.encode_part>`."""
        ids: list[int] = self._own(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """See :meth:`Tokenizer.encode_chat <selfspec.engine.base.Tokenizer.encode_chat>`."""
        if not self._own.chat_template:
            raise ValueError(f"{self._model.name} has no chat template")
        try:
            ids: list[int] = self._own.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(one_line(error)) from error
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """See :meth:`Tokenizer.decode <selfspec.engine.base.Tokenizer.decode>`."""
        text: str = self._own.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def piece(self, token: int) -> bytes:
        """See :meth:`Tokenizer.piece <selfspec.engine.base.Tokenizer.piece>`."""
        name: str | None = self._own.convert_ids_to_tokens(token)
        if name is None or token in self._own.added_tokens_decoder:
            return (name or "").encode()
        if "ByteLevel" in self._decoders and all(char in _BYTES for char in name):
            return bytes(_BYTES[char] for char in name)
        if "ByteFallback" in self._decoders and (found := _FALLBACK.fullmatch(name)):
            return bytes.fromhex(found[1])
        space = {"Metaspace", "Replace"} & self._decoders.keys()
        return (name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ") if space else name).encode()

    @cached_property
    def _decoders(self) -> dict[str, Any]:
        """The steps by which tokens become text, by their type."""
        decoder = self._own.backend_tokenizer.decoder
        if decoder is None:
            return {}
        made = json.loads(decoder.__getstate__())
        return {step["type"]: step for step in made.get("decoders", [made])}

    @property
    def end(self) -> int | None:
        """The token that ends a text, where there is one."""
        end: int | None = self._own.eos_token_id
        return end

    def prefix(self) -> Prefix:
        """See :meth:`Tokenizer.prefix <selfspec.engine.base.Tokenizer.prefix>`."""
        token = self._own.bos_token_id if self._own.bos_token_id is not None else self._own.eos_token_id
        return Prefix(token, self._own("a")["input_ids"][:1] == [token])
