"""Requests decoded by one vLLM in this process: our :class:`~selfspec.engine.base.Session` over its engine.

A cycle is a step of vLLM's that brings a request tokens after its first; ``cycles.py`` says how vLLM's records
become ours. Drafts are made at the end of a step for the next: a cycle's ``draft_ms`` is of the step before, its
``verify_ms`` the rest of its own. Where layers are shared among processes (``engine.tensor_parallel``), drafting cannot
be seen, and is in ``verify_ms``.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from selfspec.engine.base import Load, RequestOutput, Session, check_room
from selfspec.engine.vllm import cycles as vllm_cycles
from selfspec.speculation.sequence import Seq, Status
from selfspec.types import Completion, Cycle, Logprob, Request, Score


@dataclass(slots=True, eq=False)
class VLLMSeq(Seq):
    """A request, and what vLLM knows of it.

    Attributes:
        record: vLLM's of its drafts; ``None`` where nothing drafts.
        drafts: how many of the record's entries have become cycles.
        asked: tokens that its next draft was asked for, and what the gate saw of those it looked at.
    """

    id: str = ""
    record: Any = None
    drafts: int = 0
    asked: tuple[int, tuple[float, ...]] = (0, ())


class VLLMSession(Session):
    """See the module's docstring. Up to ``rows`` requests are with vLLM, which batches them as it likes.

    A vLLM has one session at a time.
    """

    def __init__(self, core: Any, rows: int, positions: int, stops: frozenset[int], k: int) -> None:
        """Over ``core``, a ``vllm.v1.engine.llm_engine.LLMEngine``.

        Args:
            positions: the most of a request, prompt and answer.
            stops: the tokens that end an answer.
            k: the most tokens of a draft.
        """
        self.core, self.rows, self.positions, self.stops, self.k = core, rows, positions, stops, k
        self._waiting: deque[VLLMSeq] = deque()
        self._running: dict[str, VLLMSeq] = {}
        self._submitted = 0
        self._drafting = Drafting(core)
        _clear(core)

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or being decoded."""
        return bool(self._waiting or self._running)

    @property
    def load(self) -> Load:
        """How full it is."""
        used = self.core.engine_core.engine_core.scheduler.kv_cache_manager.usage
        return Load(len(self._waiting), len(self._running), float(used))

    def submit(self, request: Request) -> int:
        """See :meth:`Session.submit <selfspec.engine.base.Session.submit>`."""
        check_room(request, self.positions)
        self._waiting.append(VLLMSeq(request, self._submitted, time.perf_counter()))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> Completion | None:
        """Drops a request. What it had come to, if it was being decoded."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        for id, row in self._running.items():
            if row.number == number:
                self.core.abort_request([row.id], internal=True)
                del self._running[id]
                return row.finish("stop", time.perf_counter())
        return None

    def step(self) -> list[RequestOutput]:
        """One step of vLLM's: what is new, by request."""
        while self._waiting and len(self._running) < self.rows:
            self._admit(self._waiting.popleft())
        began, drafted = time.perf_counter(), self._drafting.take()
        with self._drafting.watched():
            outputs = self.core.step()
        step_ms = 1e3 * (time.perf_counter() - began) - self._drafting.ms
        heard = [(self._running[output.request_id], output) for output in outputs]
        sharing = sum(row.first_token is not None for row, _ in heard)
        for row in self._running.values():
            if row.admitted is None and (row.first_token is not None or self._read(row)):
                row.admitted = began
        told = [self._hear(row, output, drafted, step_ms, sharing) for row, output in heard]
        for row in self._running.values():
            row.asked = self._drafting.asked(row.id) or (self.k, ())
        return sorted((one for one in told if one is not None), key=lambda one: one.number)

    def _admit(self, row: VLLMSeq) -> None:
        id = str(row.number)
        row.id = self.core.add_request(
            id, {"prompt_token_ids": list(row.request.tokens)}, parameters(row.request, self.stops)
        )
        row.record = self._known(row).spec_decode_metrics
        row.status = Status.prefilling
        self._running[id] = row

    def _known(self, row: VLLMSeq) -> Any:
        """vLLM's own view of a request that it has not finished."""
        return self.core.engine_core.engine_core.scheduler.requests[row.id]

    def _read(self, row: VLLMSeq) -> bool:
        known = self.core.engine_core.engine_core.scheduler.requests.get(row.id)
        return known is None or known.num_computed_tokens > 0

    def _hear(self, row: VLLMSeq, output: Any, drafted_ms: float, verify_ms: float, batch: int) -> RequestOutput | None:
        (said,) = output.outputs
        new = list(said.token_ids)
        if row.first_token is not None and new:
            row.cycles.append(self._cycle(row, len(new), drafted_ms, verify_ms, batch))
        elif new:
            row.status, row.first_token = Status.running, time.perf_counter()
        row.tokens += new
        done = None
        if output.finished:
            del self._running[output.request_id]
            done = row.finish("stop" if said.finish_reason == "stop" else "length", time.perf_counter())
        return (
            RequestOutput(row.number, tuple(new), done, _logprobs(row.request, new, said.logprobs))
            if new or done
            else None
        )

    def _cycle(self, row: VLLMSeq, new: int, draft_ms: float, verify_ms: float, batch: int) -> Cycle:
        left, entry = row.remaining, None
        if row.record is not None and len(row.record.per_step_drafted) > row.drafts:
            entry = row.record.per_step_drafted[row.drafts], row.record.per_step_accepted[row.drafts]
            row.drafts += 1
        k, signals = row.asked
        return vllm_cycles.cycle(k, left, entry, new, draft_ms, verify_ms, batch, signals)


class Drafting:
    """What is to be seen of how drafts are made, where vLLM's runner is in this process."""

    def __init__(self, core: Any) -> None:
        worker = getattr(getattr(core, "model_executor", None), "driver_worker", None)
        self._runner = getattr(getattr(worker, "worker", worker), "model_runner", None)
        self.ms = 0.0

    def take(self) -> float:
        """Milliseconds of drafting since this was asked before."""
        ms, self.ms = self.ms, 0.0
        return ms

    @property
    def _plugin(self) -> Any:
        """Our plugin's proposer; ``None``: something else drafts, or nothing."""
        drafter = getattr(self._runner, "drafter", None)
        return drafter if hasattr(drafter, "record") else None

    def asked(self, id: str) -> tuple[int, tuple[float, ...]] | None:
        """How many tokens a request's draft was asked for, and the gate's signals; our plugin's drafts alone tell.

        Near the model's greatest length vLLM asks for none, and verifies zeros: what was drafted before is not those.
        """
        drafted = self._plugin.record.pending.get(id) if self._plugin is not None and self.ms else None
        return None if drafted is None else (drafted.k_asked, tuple(drafted.signals))

    def reset(self) -> None:
        """Forgets what our plugin's gate and controller have learned."""
        if self._plugin is not None:
            self._plugin.reset()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Times the drafts that are made meanwhile."""
        draft = getattr(self._runner, "propose_draft_token_ids", None)
        if self._runner is None or draft is None:
            yield
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return draft(*args, **kwargs)
            finally:
                self.ms += 1e3 * (time.perf_counter() - began)

        self._runner.propose_draft_token_ids = timed
        try:
            yield
        finally:
            del self._runner.propose_draft_token_ids


def parameters(request: Request, stops: frozenset[int]) -> Any:
    """A request's ``vllm.SamplingParams``: token ids come as they are made, and no text."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k or 0,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        seed=sampling.seed % 2**63 if sampling.temperature > 0 else None,  # of vLLM's own, -1 is none
        max_tokens=request.max_new_tokens,
        ignore_eos=request.ignore_eos,
        stop_token_ids=None if request.ignore_eos else sorted(stops),
        logprobs=request.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def score(core: Any, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
    """How likely each continuation is, each read in one go (vLLM gives probabilities of prompts that it reads)."""
    from vllm import SamplingParams

    _clear(core)
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    for number, continuation in enumerate(continuations):
        core.add_request(str(number), {"prompt_token_ids": [*context, *continuation]}, asked)
    done: dict[int, Any] = {}
    while core.has_unfinished_requests():
        done |= {int(output.request_id): output.prompt_logprobs for output in core.step() if output.finished}
    return [_score(done[number][len(context) :], tokens) for number, tokens in enumerate(continuations)]


def _clear(core: Any) -> None:
    """Drops what a session that broke has left."""
    core.abort_request(list(core.output_processor.request_states), internal=True)


def _score(read: Sequence[Any], tokens: Sequence[int]) -> Score:
    found = [at[token] for at, token in zip(read, tokens, strict=True)]
    return Score(tuple(float(one.logprob) for one in found), all(one.rank == 1 for one in found))


def _logprobs(request: Request, tokens: Sequence[int], given: Sequence[Any] | None) -> tuple[Logprob, ...]:
    if request.logprobs is None or not given:
        return ()
    likeliest = [sorted(at.items(), key=lambda item: item[1].rank)[: request.logprobs] for at in given]
    return tuple(
        Logprob(float(at[token].logprob), tuple((id, float(one.logprob)) for id, one in top))
        for token, at, top in zip(tokens, given, likeliest, strict=True)
    )
