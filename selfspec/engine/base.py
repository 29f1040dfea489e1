"""What a stage may ask of whatever runs the model: an :class:`Engine`, and what some engines can do besides.

An engine names what it can do among its bases (:class:`Opens`, :class:`Fits`, :class:`Chooses`, :class:`Scores`,
:class:`Probes`, :class:`Profiles`); who needs one of these asks ``isinstance(engine, Scores)``; before an engine is
made, its options say it too (``EngineOptions.can``).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from selfspec.plan import Plan
from selfspec.serve.config import Order
from selfspec.types import Completion, Logprob, Request, Score, Signals


class Tie(NamedTuple):
    """Two next-token candidates compared in float32.

    Attributes:
        gap: the difference of their logits.
        rounding: the largest difference that the working dtype's rounding explains.
    """

    gap: float
    rounding: float

    @property
    def explains(self) -> bool:
        """Whether either token could have come first."""
        return self.gap <= self.rounding


class RequestOutput(NamedTuple):
    """What a step brought one request.

    Attributes:
        number: the request's, from :meth:`Session.submit`.
        tokens: those that are new.
        completion: everything, where this was the last of it.
        logprobs: of those tokens, where the request asks for them.
    """

    number: int
    tokens: tuple[int, ...]
    completion: Completion | None = None
    logprobs: tuple[Logprob, ...] = ()


class Session(Protocol):
    """Requests decoded together as they come: whoever holds it calls :meth:`step` while it is busy. One thread."""

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or being decoded."""
        ...

    @property
    def load(self) -> "Load":
        """How full it is."""
        ...

    def submit(self, request: Request) -> int:
        """Puts a request in the queue: its number.

        Raises:
            ValueError: it has no token, or prompt and new tokens are more than a row has positions.
        """
        ...

    def cancel(self, number: int) -> Completion | None:
        """Drops a request; its row is free before the next cycle. One that is done or unknown is let be.

        Returns:
            What it had come to, if it was being decoded.
        """
        ...

    def step(self) -> list[RequestOutput]:
        """Admits what there is room for, runs one cycle: what is new, by request."""
        ...

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Decodes all of them, in the order given."""
        numbers = [self.submit(request) for request in requests]
        done: dict[int, Completion] = {}
        while self.busy:
            done |= {told.number: told.completion for told in self.step() if told.completion}
        return [done[number] for number in numbers]


def check_room(request: Request, positions: int) -> None:
    """Refuses a request that no row of a session can hold.

    Raises:
        ValueError: it has no token, or prompt and new tokens are more than a row has positions.
    """
    if not request.tokens or len(request.tokens) + request.max_new_tokens > positions:
        raise ValueError(f"{len(request.tokens)} tokens and {request.max_new_tokens} new ones of {positions}")


class Load(NamedTuple):
    """Of a session: requests waiting, rows in use, and the share of all key-value slots that hold tokens."""

    waiting: int
    rows: int
    kv_used: float


class Limits(NamedTuple):
    """Of a model: the most tokens of a text, and what token ids are below."""

    positions: int
    vocab: int


class Usage(NamedTuple):
    """Of the machine.

    Attributes:
        peak_memory_mb: the most memory in use so far, in MiB: the device's where there is one, else the process's.
        device_utilisation: the accelerator's now, in [0, 1]; ``None`` on a CPU.
    """

    peak_memory_mb: float = 0.0
    device_utilisation: float | None = None


class Prefix(NamedTuple):
    """The token that stands before a text without a context: of a text's beginning, else of its end.

    Attributes:
        always: whether the model's tokenizer puts it before every text.
    """

    token: int
    always: bool


class Tokenizer(Protocol):
    """Text <-> token ids, as the model has been taught them."""

    def encode(self, text: str, chat: bool) -> list[int]:
        """A prompt -> token ids, with the special tokens that the tokenizer puts around a text.

        Args:
            chat: as a user's turn in the model's chat template, whose special tokens are its own.

        Raises:
            ConfigError: the model has none, or it refuses the text.
        """
        ...

    def encode_part(self, text: str) -> list[int]:
        """A part of a text -> token ids, no special tokens added: an answer, a continuation."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Messages of ``role`` and ``content`` -> token ids, by the model's chat template, ready for an answer.

        Raises:
            ValueError: there is no template, or it refuses them.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids -> text, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        ...

    def piece(self, token: int) -> bytes:
        """A token by itself, as UTF-8 or a part of a character; a special one's name; none, where there is no such."""
        ...

    def prefix(self) -> Prefix:
        """What stands before a text without a context."""
        ...


class TieJudge(Protocol):
    """Tells a token that rounding explains from a wrong one."""

    def compare(self, context: Sequence[int], a: int, b: int) -> Tie:
        """How close two candidates for the token after ``context`` are."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Runs one plan's model. Nothing is loaded before it is asked for something."""

    tokenizer: Tokenizer
    ties: TieJudge

    @abstractmethod
    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, versions: what a timing depends on beyond the plan."""

    @abstractmethod
    def generate(
        self, requests: Sequence[Request], *, plain: bool = False, k: int | None = None, max_batch: int | None = None
    ) -> list[Completion]:
        """Decodes requests as the plan says.

        Args:
            plain: with no draft, by the whole model.
            k: with this K always, in the place of the plan's controller.
            max_batch: as many at once; ``None``: the plan's number.

        Raises:
            ConfigError: prompt and new tokens are more than there are positions.
        """

    def state(self) -> Mapping[str, Any]:
        """What gate and controller have learned so far, as JSON values, for the checkpoint; here, nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what an earlier process had learned."""
        return None

    def usage(self) -> Usage:
        """Memory and device; where none is ours to see, nothing."""
        return Usage()


@runtime_checkable
class Opens(Engine, Protocol):
    """Decodes requests as they come, which is what a gateway needs."""

    @abstractmethod
    def open(self, rows: int, positions: int, order: Order) -> Session:
        """A session that decodes up to ``rows`` requests at once, each of up to ``positions`` tokens in all.

        Raises:
            ConfigError: the model has fewer positions.
        """

    @abstractmethod
    def limits(self) -> Limits:
        """How long a text may be, and which tokens there are."""


@runtime_checkable
class Fits(Engine, Protocol):
    """Drafts through heads that are fitted to the model."""

    @abstractmethod
    def fit(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path, facts: Mapping[str, Any]) -> None:
        """Fits the plan's head on (prompt, answer) token pairs; every fifth of them is held out.

        Writes a safetensors file, atomically, with ``facts`` and what was measured in its metadata.
        """

    @abstractmethod
    def use_head(self, path: Path) -> None:
        """Drafts through this fitted head from now on.

        Raises:
            HeadError: it is corrupt or of another size than the model.
        """


@runtime_checkable
class Chooses(Fits, Protocol):
    """Tells what each exit layer would be worth; until one is chosen, it decodes plainly alone."""

    @abstractmethod
    def choose(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path | None) -> Mapping[str, Any]:
        """What is best here of what the plan leaves open: see :func:`selfspec.speculation.choice.choose`.

        Args:
            pairs: (prompt, answer) tokens; every fifth of them is held out.
            path: of what was :meth:`fit` for the open plan, where its draft has a head.
        """

    @abstractmethod
    def settle(self, plan: Plan) -> None:
        """Decodes as a plan says from now on, which is its own with what was open decided."""


@runtime_checkable
class Scores(Engine, Protocol):
    """Says how likely a given text is."""

    @abstractmethod
    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], *, plain: bool = False
    ) -> list[Score]:
        """How likely each continuation is after a context, both of at least one token.

        By whatever decides in the configuration, in passes of as many tokens as its verification has; so an exact
        one differs from plain by rounding only, and one that verifies nothing is scored by its exit.

        Args:
            plain: by the whole model, each in one pass.

        Raises:
            ConfigError: the model has fewer positions.
        """

    @abstractmethod
    def limits(self) -> Limits:
        """How long a text may be, and which tokens there are."""


@runtime_checkable
class Probes(Engine, Protocol):
    """Shows the states of its layers."""

    @abstractmethod
    def probe(self, prompt: Sequence[int], answer: Sequence[int], exits: Sequence[int] | None = None) -> list[Signals]:
        """What each exit would draft after every token of an answer but its last, and what gates would say of it.

        Args:
            answer: of at least two tokens; what is drafted stands where it is the answer's next one.
            exits: layers, read by the model's own head; ``None``: some evenly spaced ones, and the draft's own. An
                early-exit draft's fitted head comes in addition, at its own layer.

        Raises:
            ConfigError: the model lacks such a layer, or positions.
        """


class Operator(NamedTuple):
    """What one operator took in one part of all cycles, and not in operators that it calls."""

    phase: str
    name: str
    calls: int
    host_us: float
    device_us: float


class Profile(NamedTuple):
    """What decoding spent its time on.

    Attributes:
        operators: the dearest first.
        memory: samples of milliseconds since it began, and MiB resident, allocated on the device, reserved there.
    """

    operators: tuple[Operator, ...]
    memory: tuple[tuple[float, ...], ...]


@runtime_checkable
class Profiles(Engine, Protocol):
    """Decodes in this process and by torch, so that torch's profiler sees every operator."""

    @abstractmethod
    def profile(self, requests: Sequence[Request], trace: Path) -> Profile:
        """Decodes requests as the plan says, and writes a Chrome trace of it, compressed.

        Raises:
            StorageError: it cannot be written.
        """


LazyEngine = Callable[[], Engine]
"""Gives the engine, made at the first call: a stage whose units are all in the journal never asks."""
