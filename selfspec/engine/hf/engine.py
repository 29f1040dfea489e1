"""The hf engine: Hugging Face's own ``generate``, as a peer to measure against.

Drafts are what it offers: prompt lookup (``draft=ngram``), its early exit (``layerskip``), an assistant model
(``draft_model``), each with K draft tokens a cycle (its "constant" schedule). One request is decoded at a time.
What comes with the first token is of no cycle; here a first pass verifies drafts too.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from selfspec import config as schema
from selfspec.engine.base import Limits, Probes, Scores, Usage
from selfspec.engine.torch.engine import TorchEngine
from selfspec.engine.torch.weights import Weights
from selfspec.errors import ConfigError, StageError
from selfspec.model import checkpoint, gguf
from selfspec.model.hf import HFModel
from selfspec.plan import Plan
from selfspec.speculation.draft import draft_model
from selfspec.speculation.sampling import NOT_FINITE
from selfspec.types import Completion, Cycle, Request, Score, Signals

_IN_USE: WeakValueDictionary[tuple[Path, torch.device, torch.dtype], HFModel] = WeakValueDictionary()
"""Weights that an engine of this process holds: several references beside one plan read them once."""


class HFWeights(Weights):
    """A plan's model as ``transformers`` has it."""

    def _load(self) -> HFModel:
        key = (self.folder, self.device, self.dtype)
        model = _IN_USE.get(key) or HFModel.load(*key)
        _IN_USE[key] = model
        return model


class HFEngine(Scores, Probes):
    """Decodes a plan's model with ``transformers``; scores and probes by our own passes over it."""

    def __init__(self, plan: Plan) -> None:
        """Raises ``ConfigError`` for what ``generate`` does not have."""
        plan.engine.refuse(plan)
        self.plan, self.weights = plan, HFWeights(plan)
        self._ours = TorchEngine(plan, self.weights)
        self.tokenizer, self.ties = self._ours.tokenizer, self._ours.ties

    @cached_property
    def _lm(self) -> Any:
        """The target, as ``transformers`` has it."""
        from transformers.utils import logging

        logging.set_verbosity_error()  # its advice on how generate is called, printed among our results
        model = self.weights.model
        assert isinstance(model, HFModel)
        return model.lm

    @cached_property
    def _assistant(self) -> Any:
        """The model that drafts.

        Raises:
            AssetError: it cannot be had.
            ConfigError: its token ids mean something else than the target's.
        """
        source, sha256 = self.plan.draft.get("source"), self.plan.draft.get("sha256")
        folder = gguf.model_folder(schema.Model(name="draft", source=source, sha256=sha256))
        if draft_model.vocabulary(folder) != draft_model.vocabulary(self.weights.folder):
            raise ConfigError(f"draft.source={source}: its tokenizer's vocabulary is not the target's")
        return checkpoint.model(folder, self.weights.device, self.weights.dtype).eval()

    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, torch, transformers."""
        import transformers

        return {"engine": "hf", **self.weights.describe(), "transformers": transformers.__version__}

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], *, plain: bool = False, k: int | None = None, max_batch: int | None = None
    ) -> list[Completion]:
        """Decodes requests one after the other; see :meth:`Engine.generate <selfspec.engine.base.Engine.generate>`."""
        for request in requests:
            self.weights.check_room(len(request.tokens) + request.max_new_tokens)
        self.weights.check_tokens(token for request in requests for token in request.tokens)
        depth = 0 if plain or self.plan.draft.name == "none" else k or self.plan.controller.k
        return [self._decode(request, depth) for request in requests]

    def _decode(self, request: Request, k: int) -> Completion:
        """One request, with ``k`` draft tokens a cycle; 0 is plain decoding."""
        from transformers import GenerationConfig

        lm, sampling, stops = self._lm, request.sampling, self.weights.model.shape.eos
        settings: dict[str, Any] = {
            "max_new_tokens": request.max_new_tokens,
            "eos_token_id": None if request.ignore_eos or not stops else sorted(stops),
            "pad_token_id": 0,
            "do_sample": sampling.temperature > 0,
        }
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
            settings |= {"temperature": sampling.temperature}
            settings |= {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}  # 0 and 1: all tokens
        arguments: dict[str, Any] = {}
        drafts_as = GenerationConfig()
        if k and self.plan.draft.name == "ngram":
            settings |= {"prompt_lookup_num_tokens": k, "max_matching_ngram_size": self.plan.draft.get("max_match")}
        elif k:
            # An assistant (for an early exit, the model itself) has its own settings for these, on itself.
            schedule = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
            drafts_as = GenerationConfig(num_assistant_tokens=k, **schedule)
            if self.plan.draft.name == "layerskip":
                settings["assistant_early_exit"] = self.plan.draft.get("exit_layer")
            else:
                arguments["assistant_model"] = self._assistant
                self._assistant.generation_config = drafts_as
        lm.generation_config = drafts_as  # the file's own would be mixed in: stop tokens, temperatures
        ids = torch.tensor([request.tokens], device=self.weights.device)
        arguments |= {"attention_mask": torch.ones_like(ids), "generation_config": GenerationConfig(**settings)}
        arguments["logits_processor"] = [_finite]

        arrival = time.perf_counter()
        watch = Watch(k, request.max_new_tokens)
        layers = lm.config.num_hidden_layers
        try:
            with watch.over(lm):
                out = lm.generate(ids, streamer=watch, **arguments)
        finally:  # an early exit that raises would leave the model, which others share, as short as its draft
            lm.config.num_hidden_layers = layers
        total = time.perf_counter() - arrival
        tokens = tuple(out[0, len(request.tokens) :].tolist())
        return Completion(
            tokens=tokens,
            cycles=tuple(watch.cycles()),
            ttft_s=watch.times[0] - arrival,
            total_s=total,
            finish="stop" if not request.ignore_eos and tokens[-1] in stops else "length",
        )

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], *, plain: bool = False
    ) -> list[Score]:
        """See :meth:`Scores.score <selfspec.engine.base.Scores.score>`."""
        return self._ours.score(context, continuations, plain=plain)

    def probe(self, prompt: Sequence[int], answer: Sequence[int], exits: Sequence[int] | None = None) -> list[Signals]:
        """See :meth:`Probes.probe <selfspec.engine.base.Probes.probe>`."""
        return self._ours.probe(prompt, answer, exits)

    def limits(self) -> Limits:
        """See :meth:`Scores.limits <selfspec.engine.base.Scores.limits>`."""
        return self._ours.limits()

    def usage(self) -> Usage:
        """See :meth:`Weights.usage <selfspec.engine.torch.weights.Weights.usage>`."""
        return self.weights.usage()


def _finite(ids: Tensor, logits: Tensor) -> Tensor:
    """The logits ``[1, vocab]`` as they are.

    Raises:
        StageError: the largest is not finite, so no token can be told from them.
    """
    if not math.isfinite(logits.max()):
        raise StageError(NOT_FINITE)
    return logits


class Watch:
    """What ``generate`` shows of its cycles: a streamer for the tokens, and an eye on whatever drafts.

    Attributes:
        times: when each pass's tokens came, in seconds of ``perf_counter``.
        counts: how many they were.
        drafts: for each pass, how many tokens were proposed to it, and the milliseconds that took.
    """

    def __init__(self, k: int, budget: int) -> None:
        self.k, self.budget = k, budget
        self.times, self.counts = list[float](), list[int]()
        self.drafts = list[tuple[int, float]]()
        self._seen_prompt = False

    def put(self, tokens: Tensor) -> None:
        """Takes the prompt first, then every pass's new tokens."""
        if self._seen_prompt:
            self.times.append(time.perf_counter())
            self.counts.append(tokens.numel())
        self._seen_prompt = True

    def end(self) -> None:
        """All tokens have been put."""

    @contextmanager
    def over(self, lm: Any) -> Iterator[None]:
        """Also watches the candidate generator that ``lm.generate`` makes, if it makes one."""
        make = lm._get_candidate_generator

        def watched(*args: Any, **kwargs: Any) -> Any:
            generator = make(*args, **kwargs)
            propose = generator.get_candidates

            def timed(ids: Tensor, **more: Any) -> Any:
                began = time.perf_counter()
                candidates = propose(ids, **more)
                self.drafts.append((candidates[0].shape[1] - ids.shape[1], 1e3 * (time.perf_counter() - began)))
                return candidates

            generator.get_candidates = timed
            return generator

        lm._get_candidate_generator = watched
        try:
            yield
        finally:
            del lm._get_candidate_generator

    def cycles(self) -> Iterator[Cycle]:
        """One for each pass after the first."""
        drafts = self.drafts or [(0, 0.0)] * len(self.counts)
        remaining = self.budget
        for i, (count, (proposed, draft_ms)) in enumerate(zip(self.counts, drafts, strict=True)):
            if i:
                yield Cycle(
                    k_asked=min(self.k, remaining - 1),
                    proposed=proposed,
                    depth=proposed,
                    accepted=count - 1,
                    new_tokens=count,
                    signals=(),
                    draft_ms=draft_ms,
                    verify_ms=1e3 * (self.times[i] - self.times[i - 1]) - draft_ms,
                )
            remaining -= count
