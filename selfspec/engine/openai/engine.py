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

from selfspec.engine.base import Engine
from selfspec.engine.openai.client import Server
from selfspec.engine.tokenizer import ModelTokenizer
from selfspec.engine.torch.ties import Float32Judge
from selfspec.engine.torch.weights import Weights
from selfspec.plan import Plan
from selfspec.types import Completion, Request

KEY = "OPENAI_API_KEY"
"""Of the environment: what the servers ask for, if anything."""


class OpenAIEngine(Engine):
    """Asks a server, whose memory and whatever it learns are not ours to see."""

    tokenizer: ModelTokenizer

    def __init__(self, plan: Plan) -> None:
        self.plan, weights = plan, Weights(plan)
        self.tokenizer = ModelTokenizer(plan.model, lambda: weights.folder)
        self.ties = Float32Judge(weights)

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
        end = self.tokenizer.end
        return [*self.tokenizer.encode_part(text), *([end] if stopped and end is not None else [])]

    def describe(self) -> Mapping[str, object]:
        """What the server calls its model; where it runs is not known."""
        return {"engine": "openai", "model": self._server.model}

    def generate(
        self, requests: Sequence[Request], *, plain: bool = False, k: int | None = None, max_batch: int | None = None
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
