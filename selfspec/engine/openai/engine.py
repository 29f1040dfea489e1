"""The openai engine: any OpenAI-compatible server over HTTP, measured as our own engines are.

Prompts go out as token ids to ``/v1/completions``, streamed: so the same prompts are measured here and there, and
times are the caller's. The tokens of an answer are those the server names (vLLM and our gateway do), else its text
in the model's tokens. What was drafted is known where the server tells it, as our gateway does. Plain decoding is
another server's, at ``engine.plain_url``, that drafts nothing; what tells tokens from text, and a tie from an error,
is the model's tokenizer and, where there is something to look into, the model itself, here.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from selfspec import config as schema
from selfspec.engine.openai.client import Server
from selfspec.engine.torch.engine import TorchEngine
from selfspec.types import Completion, Request, Score, Signals

KEY = "OPENAI_API_KEY"
"""Of the environment: what the servers ask for, if anything."""


class OpenAIEngine(TorchEngine):
    """Asks a server; tokenizer and comparisons are the torch engine's, which loads no weights before it must."""

    @cached_property
    def _server(self) -> Server:
        return self._at("url")

    @cached_property
    def _plain_server(self) -> Server:
        return self._server if self.plan.engine.get("plain_url") is None else self._at("plain_url")

    def _at(self, key: str) -> Server:
        url, secret = getattr(self.plan.engine, key), os.environ.get(KEY)
        return Server(f"engine.{key}", url, secret, self._read)

    def _read(self, text: str, stopped: bool) -> list[int]:
        stop = self._tokenizer.eos_token_id
        return [*self.encode(text, chat=False), *([stop] if stopped and stop is not None else [])]

    def describe(self) -> Mapping[str, object]:
        """What the server calls its model; where it runs is not known."""
        return {"engine": "openai", "model": self._server.model}

    def generate(
        self,
        requests: Sequence[Request],
        *,
        plain: bool = False,
        k: int | None = None,
        max_batch: int | None = None,
    ) -> list[Completion]:
        """Asks for all, some at once; see :meth:`Engine.generate <selfspec.engine.base.Engine.generate>`.

        Raises:
            ConfigError: there is no server.
            StageError: it refused a request, or broke off.
        """
        assert k is None, "K is the server's own affair"
        server = self._plain_server if plain else self._server
        with ThreadPoolExecutor(max_batch or self.plan.engine.max_batch) as pool:
            return list(pool.map(server.answer, requests))

    def open(self, rows: int, positions: int, order: schema.Order) -> NoReturn:
        """A server keeps its own batch."""
        raise NotImplementedError

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], *, plain: bool = False
    ) -> list[Score]:
        """A server gives no probabilities of what it did not say."""
        raise NotImplementedError

    def probe(self, prompt: Sequence[int], answer: Sequence[int], exits: Sequence[int] | None = None) -> list[Signals]:
        """A server shows no states."""
        raise NotImplementedError

    def state(self) -> Mapping[str, Any]:
        """What has been learned is with the server."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What has been learned is with the server."""

    def fit(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path, facts: Mapping[str, Any]) -> None:
        """A server has its own heads."""
        raise NotImplementedError

    def use_head(self, path: Path) -> None:
        """A server has its own heads."""
        raise NotImplementedError

    def peak_memory_mb(self) -> float:
        """The server's is not ours to see."""
        return 0.0

    def device_utilisation(self) -> float | None:
        """The server's is not ours to see."""
        return None
