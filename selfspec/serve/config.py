"""What the gateway is told."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from selfspec.options import bounded

Order = Enum("Order", "fcfs decode_first chunked_prefill hrrn")
RouteName = Enum("RouteName", "fixed cost length")
CacheMode = Enum("CacheMode", "none exact same_words")


@dataclass
class BackendConfig:
    """Another back end of the gateway: any OpenAI-compatible server, or our own engine with int8 weights."""

    name: str = MISSING
    """Callers may ask for it by this name."""
    url: str | None = None
    """Its base URL, such as ``http://127.0.0.1:8001/v1``; ``None``: our engine, in this process."""
    model: str | None = None
    """The model's name there; callers may ask for that, too."""
    key_env: str | None = None
    """The environment variable that holds its API key."""
    input_price: float = bounded(0.0, 0)
    """US dollars for a million prompt tokens."""
    output_price: float = bounded(0.0, 0)
    """US dollars for a million tokens of an answer."""
    max_total_tokens: int | None = bounded(None, 1)
    """``policy=length``: the most tokens, prompt and answer, it is asked for; ``None``: any number."""
    connect_s: float = bounded(2.0, 0.001)
    first_s: float = bounded(60.0, 0.001)
    """How long its first token may take."""
    read_s: float = bounded(30.0, 0.001)
    """How long any other may."""
    retries: int = bounded(2, 0)
    """How often a call is tried again before its first token."""
    breaker_threshold: int = bounded(5, 1)
    """After so many in a row it is left alone for ``breaker_reset_s`` seconds, then tried with one call."""
    breaker_reset_s: float = bounded(30.0, 0.001)


@dataclass
class RouterConfig:
    """Which back end answers a call."""

    policy: RouteName = RouteName.fixed
    max_total_tokens: int | None = bounded(None, 1)
    """Of our own engine, as ``backends[].max_total_tokens``."""
    budget_s: float | None = bounded(None, 0)
    """``policy=cost``: how long a whole answer may take."""
    budget_usd: float | None = bounded(None, 0)
    """``policy=cost``: what a call may cost at most, its answer as long as allowed."""


@dataclass
class CacheConfig:
    """Answers given again."""

    mode: CacheMode = CacheMode.none
    """``same_words``: also to a chat whose last message has the same words (``docs/routing.md`` says which count)."""
    ttl_s: float = bounded(3600.0, 0.001)
    entries: int = bounded(1000, 1)
    """The most answers kept; the one unused for longest goes first."""


@dataclass
class Serve:
    """The gateway: where it listens, what it decodes at once, and what a request may ask for."""

    name: str = MISSING
    host: str = "127.0.0.1"
    port: int = bounded(8000, 0, 65535)
    """0 takes one that is free."""
    api_key: str | None = None
    """What callers must send; ``SELFSPEC_API_KEY`` in the environment wins. ``None``: everyone may call."""
    allowed_hosts: list[str] | None = None
    """By which names, besides this machine's own, callers may reach it; ``None``: with a key any, without one none."""
    model_name: str | None = None
    """What callers name our model; ``None``: ``model.name``."""
    scheduler: Order = Order.fcfs
    """Which request is admitted when, and in which chunks prompts are prefilled (see ``engine/admission.py``)."""
    chunk: int = bounded(64, 1)
    """``chunked_prefill``: the most tokens of a prompt read between two cycles."""
    max_batch: int = bounded(8, 1, 256)
    """Requests decoded at once."""
    max_model_len: int = bounded(1024, 2)
    """Prompt and answer together, in tokens; every row of the batch has room for so many."""
    max_prompt_tokens: int = bounded(896, 1)
    """Of a request; less than ``max_model_len``, or that limits it first."""
    max_tokens: int = bounded(512, 1)
    """The longest answer a caller may ask for; and, in a chat, what one that does not ask may get."""
    max_concurrent_requests: int = bounded(64, 1)
    """Requests running and waiting; more are told to try again."""
    max_connections: int = bounded(512, 1)
    """More take the place of those silent for longest; fewer where the system gives this process fewer descriptors."""
    max_connections_per_client: int = bounded(256, 1)
    """From one address: a proxy's are all from one."""
    max_body_bytes: int = bounded(1_000_000, 1)
    drain_s: float = bounded(30.0, 0)
    """How long a server that was told to stop waits for the answers it has begun, in seconds."""
    client_timeout_s: float = bounded(30.0, 0.01)
    """How long a client may take to send its request, or to read what it was sent, in seconds."""
    backends: list[BackendConfig] = field(default_factory=list)
    """Others than our own engine, in order of preference."""
    router: RouterConfig = field(default_factory=RouterConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
