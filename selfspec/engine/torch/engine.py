"""The torch engine: our decoder, drafts, gates and policies on one device."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from selfspec import heads
from selfspec.engine.base import Chooses, Limits, Opens, Probes, Profile, Profiles, Scores, Session, Usage
from selfspec.engine.tokenizer import ModelTokenizer
from selfspec.engine.torch.prices import cycle_ms, endless
from selfspec.engine.torch.profile import profiled
from selfspec.engine.torch.session import Scheduler
from selfspec.engine.torch.ties import Float32Judge
from selfspec.engine.torch.weights import Weights
from selfspec.errors import ConfigError
from selfspec.files import write_atomic
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.serve.config import Order
from selfspec.speculation import exits, fit, scoring
from selfspec.speculation.choice import Exit, choose
from selfspec.speculation.controller.base import Controller
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.draft.layerskip import EarlyExit, ExitOptions
from selfspec.speculation.gate.base import Gate
from selfspec.speculation.head import Head
from selfspec.speculation.policy.base import Policy
from selfspec.speculation.policy.longest_prefix import LongestPrefix
from selfspec.speculation.policy.rejection import Mixed
from selfspec.types import Completion, Request, Score, Signals

_ROOM = 256
"""A cache's slots come to a multiple of this."""


class TorchEngine(Opens, Chooses, Scores, Probes, Profiles):
    """Runs a plan's model with torch. Everything is lazy: what a stage does not ask for is not loaded."""

    def __init__(self, plan: Plan, weights: Weights | None = None) -> None:
        """``weights``: the plan's, as another engine has them; ``None``: as we do."""
        weights = weights or Weights(plan)
        self.plan, self.weights = plan, weights
        self.tokenizer = ModelTokenizer(plan.model, lambda: weights.folder)
        self.ties = Float32Judge(weights)
        self._gate: Gate = plan.gate.make(plan.seed)
        self._policy: Policy = plan.policy.make()
        self._controller: Controller = plan.controller.make(plan.seed)
        self._fixed_gates: dict[int, Gate] = {}
        self._head: Head | None = None
        self._seen: exits.Seen = {}
        self._caches: dict[tuple[int, int], KVCache] = {}

    @property
    def model(self) -> Model:
        """The weights, on the device."""
        return self.weights.model

    @cached_property
    def _plain(self) -> Speculation:
        """Decoding without a draft by the whole model: the reference."""
        model = self.model
        whole = Target(model, model.shape.layers, model.norm)
        exact = self._policy if self.plan.policy.samples else LongestPrefix()
        return Speculation(whole, Draft(model), Gate(), Controller(0), exact)

    @cached_property
    def _speculation(self) -> Speculation:
        """The plan's configuration; made when its head is known."""
        draft = self._make_draft()
        if self.plan.speculative:
            return replace(self._plain, draft=draft, gate=self._gate, controller=self._controller, policy=self._policy)
        if self.plan.policy.verify:
            return self._plain
        assert isinstance(draft, EarlyExit), "checked by the plan"
        exit = Target(self.model, draft.exit_layer, lambda hidden: draft.head(hidden, hidden))
        return replace(self._plain, target=exit)

    def _fixed(self, k: int) -> Speculation:
        """The configuration with another controller, and a gate that learns for itself."""
        own = self._fixed_gates.setdefault(k, self.plan.gate.make(self.plan.seed))
        return replace(self._speculation, controller=Controller(k), gate=own)

    def _make_draft(self) -> Draft:
        made: Draft = self.plan.draft.make(self.model, self._head)
        return made

    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, torch."""
        return {"engine": "torch", **self.weights.describe()}

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], *, plain: bool = False, k: int | None = None, max_batch: int | None = None
    ) -> list[Completion]:
        """Decodes requests as the plan says; see :meth:`Engine.generate <selfspec.engine.base.Engine.generate>`."""
        speculation = self._plain if plain else self._speculation if k is None else self._fixed(k)
        return self._decode(speculation, requests, k, max_batch)

    def _decode(
        self, speculation: Speculation, requests: Sequence[Request], k: int | None = None, max_batch: int | None = None
    ) -> list[Completion]:
        self.weights.check_tokens(token for request in requests for token in request.tokens)
        room = max(self.weights.check_room(len(r.tokens) + r.max_new_tokens) for r in requests)
        cache = self._cache(
            capacity=room + speculation.draft.nodes(k or self.plan.controller.max_k),
            rows=min(len(requests), max_batch or self.plan.engine.max_batch),
            extra_layers=speculation.draft.layers,
        )
        return Scheduler(speculation, cache).run(requests)

    def _cache(self, capacity: int, rows: int, extra_layers: int) -> KVCache:
        """An empty cache, the last one again where it is large enough: graphs are captured over one.

        Two are kept, for plain decoding and the configuration in turn: those of a fit's wide batches would fill memory.
        """
        key = rows, extra_layers
        known = self._caches.pop(key, None)
        if known is None or known.capacity < capacity:
            room = -(-capacity // _ROOM) * _ROOM  # so that the next request, a little longer, has room too
            known = self.model.new_cache(room, rows, extra_layers, lasts=True)
        self._caches = {**dict([*self._caches.items()][-1:]), key: known}
        known.clear()
        return known

    @torch.inference_mode()
    def open(self, rows: int, positions: int, order: Order) -> Session:
        """See :meth:`Opens.open <selfspec.engine.base.Opens.open>`; requests that sample do so by rejection."""
        limit = self.model.shape.max_positions
        if positions > limit:
            raise ConfigError(f"serve.max_model_len={positions}: {self.plan.model.name} has {limit}")
        made = self._speculation
        made = replace(made, policy=Mixed(made.policy))
        capacity = positions + made.draft.nodes(self.plan.controller.max_k)
        cache = self.model.new_cache(capacity, rows, made.draft.layers, lasts=True)
        return Scheduler(made, cache, order, self.plan.serve.chunk, positions)

    def state(self) -> Mapping[str, Any]:
        """What gate and controller have learned so far, as JSON values."""
        made = self._speculation
        return {"gate": made.gate.state(), "controller": made.controller.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what an earlier process had learned."""
        made = self._speculation
        made.gate.restore(state["gate"])
        made.controller.restore(state["controller"])

    @torch.inference_mode()
    def fit(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path, facts: Mapping[str, Any]) -> None:
        """See :meth:`Fits.fit <selfspec.engine.base.Fits.fit>`."""
        head = self._fitted(pairs)
        head.facts.update(facts, hidden=self.model.shape.hidden)
        write_atomic(path, head.to_bytes())

    def _fitted(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Head:
        draft = self.plan.draft
        if isinstance(draft, ExitOptions) and draft.open:
            self._seen = exits.states(self.model, pairs)
            return exits.fit(self.model, draft, {layer: fit.split(traces)[0] for layer, traces in self._seen.items()})
        if not draft.learned_from_states:  # a corpus is tokens only
            traces = [fit.unread(prompt, answer) for prompt, answer in pairs]
        elif (layer := draft.get("exit_layer")) in self._seen and isinstance(draft, ExitOptions):
            traces = self._seen[layer]  # it has just been chosen by them
        else:
            traces = []
            with progress("states", len(pairs)) as advance:
                for prompt, answer in pairs:
                    traces.append(fit.trace(self.model, prompt, answer, layer))
                    advance()
        made: Head = draft.fit(self.model, *fit.split(traces), self.plan.seed)
        return made

    @torch.inference_mode()
    def choose(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path | None) -> Mapping[str, Any]:
        """See :meth:`Chooses.choose <selfspec.engine.base.Chooses.choose>`."""
        draft, ks, gate = self.plan.draft, self.plan.possible_ks, self.plan.gate
        assert isinstance(draft, ExitOptions), "checked by the plan"
        known = gate.make(self.plan.seed) if gate.stops and not gate.learns else Gate()
        drafts = exits.drafts(self.model, draft, self._load(path) if path else None)
        heldout = {layer: fit.split(traces)[1] for layer, traces in self._seen.items()}
        heldout = heldout or exits.states(self.model, fit.split(pairs)[1])
        ways = {(0, 0): self._plain}
        for layer, made in drafts.items():
            for k in {min(ks), max(ks)}:
                ways[layer, k] = replace(self._plain, draft=made, gate=endless(known), controller=Controller(k))
        took = cycle_ms(ways, partial(self._decode, k=max(ks)), pairs, self.plan.engine.max_batch)
        candidates = {}
        for layer, made in drafts.items():
            costs = {k: ms for (of, k), ms in took.items() if of == layer}
            candidates[layer] = Exit(exits.odds(made, known, heldout[layer], max(ks)), costs)
        return choose(candidates, took[0, 0], ks, draft.width, draft.budget)

    def settle(self, plan: Plan) -> None:
        """See :meth:`Chooses.settle <selfspec.engine.base.Chooses.settle>`."""
        if plan is not self.plan:
            self.plan, self._controller = plan, plan.controller.make(plan.seed)
            self.__dict__.pop("_speculation", None)

    def use_head(self, path: Path) -> None:
        """See :meth:`Fits.use_head <selfspec.engine.base.Fits.use_head>`."""
        heads.check(path, {"hidden": self.model.shape.hidden})
        self._head, self._seen = self._load(path), {}
        self.__dict__.pop("_speculation", None)  # one made with another head

    def _load(self, path: Path) -> Head:
        return Head.load(path).to(self.weights.dtype, self.weights.device)

    @torch.inference_mode()
    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], *, plain: bool = False
    ) -> list[Score]:
        """See :meth:`Scores.score <selfspec.engine.base.Scores.score>`."""
        self.weights.check_room(len(context) + max(map(len, continuations)) - 1)  # the last token is not read
        self.weights.check_tokens([*context, *(token for tokens in continuations for token in tokens)])
        decides = self._plain if plain or self.plan.policy.verify else self._speculation
        step = self.plan.controller.max_k + 1 if self.plan.speculative and not plain else None
        return scoring.score(decides.target, context, continuations, step)

    @torch.inference_mode()
    def probe(self, prompt: Sequence[int], answer: Sequence[int], exits: Sequence[int] | None = None) -> list[Signals]:
        """See :meth:`Probes.probe <selfspec.engine.base.Probes.probe>`."""
        self.weights.check_room(len(prompt) + len(answer))
        layers, draft = self.model.shape.layers, self.plan.draft
        beyond = [layer for layer in exits or () if not 1 <= layer < layers]
        if beyond:
            raise ConfigError(f"quality.exits={beyond[0]}: the model has {layers} layers; must be 1 to {layers - 1}")
        if exits is None:
            exits = scoring.exits(layers, draft.get("exit_layer"))
        own = self._make_draft() if draft.fitted else None
        own = getattr(own, "learned", own)  # of a hybrid
        fitted = own if isinstance(own, EarlyExit) else None
        return scoring.probe(self.model, prompt, answer, exits, fitted, draft.get("learned", draft.name))

    def profile(self, requests: Sequence[Request], trace: Path) -> Profile:
        """See :meth:`Profiles.profile <selfspec.engine.base.Profiles.profile>`."""
        return profiled(lambda: self.generate(requests), self.weights.device, trace)

    def limits(self) -> Limits:
        """See :meth:`Opens.limits <selfspec.engine.base.Opens.limits>`."""
        return Limits(self.model.shape.max_positions, self.model.shape.vocab)

    def usage(self) -> Usage:
        """See :meth:`Weights.usage <selfspec.engine.torch.weights.Weights.usage>`."""
        return self.weights.usage()
