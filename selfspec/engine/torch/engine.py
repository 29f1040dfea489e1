"""The torch engine: our decoder, drafts, gates and policies on one device."""

import importlib
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfspec import config as schema
from selfspec import heads
from selfspec.engine.base import Limits, Session, Tie
from selfspec.engine.torch.session import Scheduler
from selfspec.errors import AssetError, ConfigError, one_line
from selfspec.files import write_atomic
from selfspec.model import gguf, hf
from selfspec.model.base import Model
from selfspec.model.cache import KVCache
from selfspec.model.kernels import native
from selfspec.model.llama import Llama
from selfspec.model.tree import Tree
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.speculation import controller, fit, gate, policy, scoring
from selfspec.speculation.decode import Speculation, Target
from selfspec.speculation.draft.base import Draft
from selfspec.speculation.draft.layerskip import EarlyExit
from selfspec.speculation.head import Head
from selfspec.types import Completion, Request, Score, Signals

_DTYPES = {schema.Dtype.bf16: torch.bfloat16, schema.Dtype.fp16: torch.float16, schema.Dtype.fp32: torch.float32}

_ROOM = 256
"""A cache's slots come to a multiple of this."""
_ALONE = (0, 1, 2, 4, 8, 16, 32)
"""Tokens before a tie that are read one by one, the others together: each of these ways rounds otherwise."""


class TorchEngine:
    """Runs a plan's model with torch. Everything is lazy: what a stage does not ask for is not loaded."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        if plan.hardware.threads is not None:
            torch.set_num_threads(plan.hardware.threads)
        self.device = _device(plan.hardware.device)
        self.dtype = _dtype(plan.hardware.dtype, self.device)
        if self.device.type == "cuda":
            _compute_exactly()
        self._gate, self._policy = gate.make(plan.gate, plan.seed), policy.make(plan.policy)
        self._controller = controller.make(plan.controller, plan.seed)
        self._fixed_gates: dict[int, gate.Gate] = {}
        self._head: Head | None = None
        self._caches: dict[tuple[int, int], KVCache] = {}
        self._peak_memory = 0.0

    @cached_property
    def folder(self) -> Path:
        """The model's folder on this disk, fetched and converted where that is still to do."""
        return gguf.model_folder(self.plan.model)

    @cached_property
    def model(self) -> Model:
        """The weights, on the device.

        Raises:
            ConfigError: the model has fewer layers than the plan counted on.
        """
        model = self._load()
        exit_layer, layers = self.plan.draft.exit_layer, model.shape.layers
        if exit_layer is not None and exit_layer >= layers:
            name = self.plan.model.name
            raise ConfigError(f"exit_layer={exit_layer}: {name} has {layers} layers; must be from 1 to {layers - 1}")
        return model

    def _load(self) -> Model:
        asked, cuda = self.plan.engine.graphs, self.device.type == "cuda"
        graphs = cuda and asked is not schema.Graphs.off
        native, fused = (self._kernels is kernels for kernels in (schema.Kernels.native, schema.Kernels.triton))
        model = hf.load(self.folder, self.device, self.dtype, self.plan.engine.layers, native, graphs, fused)
        if asked is schema.Graphs.on and not model.graphs:
            raise ConfigError("engine.graphs=on: only our own layers (engine.layers=fast) have them, on a GPU")
        if self.plan.engine.weights is schema.Weights.int8:
            if not isinstance(model, Llama) or self.device.type != "cpu":
                raise ConfigError("engine.weights=int8: only our own layers have them (engine.layers=fast), on a CPU")
            model.quantise()
        return model

    @cached_property
    def _kernels(self) -> schema.Kernels:
        """Which kernels run: our own, or torch's.

        Raises:
            ConfigError: some were asked for that cannot.
        """
        asked, kind = self.plan.engine.kernels, self.device.type
        own = schema.Kernels.torch
        problem: str | None = f"there are none for {kind}"
        if kind == "cpu":
            own, problem = schema.Kernels.native, native.problem()
        elif kind == "cuda":
            own, problem = schema.Kernels.triton, None if find_spec("triton") else "Triton is not installed"
        if asked not in (schema.Kernels.auto, schema.Kernels.torch) and (problem or asked is not own):
            reason = problem or f"they are not for {kind}"
            raise ConfigError(f"engine.kernels={asked.name}: {reason}; allowed here are auto, torch")
        return schema.Kernels.torch if problem or asked is schema.Kernels.torch else own

    @cached_property
    def _tokenizer(self) -> Any:
        # AutoTokenizer comes to the same, but imports model code for more than a second first.
        from transformers import PreTrainedTokenizerFast

        if not (self.folder / "tokenizer.json").is_file():
            raise AssetError(f"model.source={self.plan.model.source}: {self.folder} has no tokenizer.json")
        return PreTrainedTokenizerFast.from_pretrained(self.folder)

    @cached_property
    def _plain(self) -> Speculation:
        """Decoding without a draft by the whole model: the reference."""
        model = self.model
        whole = Target(model, model.shape.layers, model.norm)
        exact = self._policy if self.plan.policy.samples else policy.LongestPrefix()
        return Speculation(whole, Draft(model), gate.Gate(), controller.Fixed(0), exact)

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
        own = self._fixed_gates.setdefault(k, gate.make(self.plan.gate, self.plan.seed))
        return replace(self._speculation, controller=controller.Fixed(k), gate=own)

    def _make_draft(self) -> Draft:
        made: Draft = _draft_module(self.plan.draft.name).make(self.plan.draft, self.model, self._head)
        return made

    @cached_property
    def _float32(self) -> Model:
        return self.model.to(torch.float32)

    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, torch, kernels; of a GPU its capability, its driver and whether graphs are used."""
        return {
            "engine": "torch",
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": self._kernels.name,
            **(_gpu(self.device) | {"graphs": self.model.graphs} if self.device.type == "cuda" else {}),
        }

    @property
    def vocab(self) -> int:
        """Token ids are below this."""
        return self.model.shape.vocab

    def encode(self, text: str, chat: bool) -> list[int]:
        """Text -> token ids; with ``chat``, as a user's turn in the model's chat template.

        Raises:
            ConfigError: the model has none.
        """
        if not chat:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"workload.chat=true: {self.plan.model.name} has no chat template; use workload.chat=false"
            )
        return self.encode_chat([{"role": "user", "content": text}])

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """See :meth:`Engine.encode_chat <selfspec.engine.base.Engine.encode_chat>`."""
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ValueError(f"{self.plan.model.name} has no chat template")
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise ValueError(one_line(error)) from error
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """See :meth:`Engine.decode <selfspec.engine.base.Engine.decode>`."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        plain: bool = False,
        k: int | None = None,
        max_batch: int | None = None,
    ) -> list[Completion]:
        """Decodes requests as the plan says; see :meth:`Engine.generate <selfspec.engine.base.Engine.generate>`.

        Raises:
            ConfigError: prompt and new tokens are more than the model has positions.
        """
        speculation = self._plain if plain else self._speculation if k is None else self._fixed(k)
        room = max(self._room(len(r.tokens) + r.max_new_tokens) for r in requests)
        cache = self._cache(
            capacity=room + speculation.draft.nodes(k or self.plan.controller.max_k),
            rows=min(len(requests), max_batch or self.plan.engine.max_batch),
            extra_layers=speculation.draft.layers,
        )
        return Scheduler(speculation, cache).run(requests)

    def _cache(self, capacity: int, rows: int, extra_layers: int) -> KVCache:
        """An empty cache, the last one again where it is large enough: graphs are captured over one."""
        known = self._caches.get((rows, extra_layers))
        if known is None or known.capacity < capacity:
            room = -(-capacity // _ROOM) * _ROOM  # so that the next request, a little longer, has room too
            known = self._caches[rows, extra_layers] = self.model.new_cache(room, rows, extra_layers, lasts=True)
        known.clear()
        return known

    @torch.inference_mode()
    def open(self, rows: int, positions: int, order: schema.Order) -> Session:
        """See :meth:`Engine.open <selfspec.engine.base.Engine.open>`; requests that sample do so by rejection.

        Raises:
            ConfigError: the model has fewer positions.
        """
        limit = self.model.shape.max_positions
        if positions > limit:
            raise ConfigError(f"serve.max_model_len={positions}: {self.plan.model.name} has {limit}")
        made = self._speculation
        made = replace(made, policy=policy.Mixed(made.policy))
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
        """Fits the plan's head on (prompt, answer) token pairs; every fifth of them is held out.

        Writes a safetensors file with ``facts`` and what was measured in its metadata.
        """
        draft = self.plan.draft
        if draft.learned_from_states:
            traces = []
            with progress("states", len(pairs)) as advance:
                for prompt, answer in pairs:
                    traces.append(fit.trace(self.model, prompt, answer, draft.exit_layer))
                    advance()
        else:  # a corpus is tokens only
            traces = [fit.unread(prompt, answer) for prompt, answer in pairs]
        module = _draft_module(draft.name)
        head: Head = module.fit(self.model, *fit.split(traces), draft, self.plan.seed)
        head.facts.update(facts, hidden=self.model.shape.hidden)
        write_atomic(path, head.to_bytes())

    def use_head(self, path: Path) -> None:
        """Drafts through this fitted head from now on.

        Raises:
            HeadError: it is corrupt or of another size than the model.
        """
        heads.check(path, {"hidden": self.model.shape.hidden})
        self._head = Head.load(path).to(self.dtype, self.device)
        self.__dict__.pop("_speculation", None)  # one made with another head

    @torch.inference_mode()
    def compare(self, context: Sequence[int], a: int, b: int) -> Tie:
        """Two candidates for the token after ``context``, by the same weights in float32.

        What rounding explains is measured where it matters: by how much the working dtype moves these two
        logits, when the tokens before them are read together, as verification does, one by one, as plain
        decoding does, and in ways between. Each may err that far in either pass; at least two units in its last place.
        In float32 nothing is explained.
        """
        candidates = [a, b]
        self.peak_memory_mb()  # as it is without a second copy of the model
        exact = _next_logits(self._float32, context)[candidates]
        if self.device.type == "cuda":  # twice the model's own size, and no part of what decoding takes
            self._forget_float32()
        gap = float(exact.diff().abs())
        if self.dtype is torch.float32:
            return Tie(gap, 0.0)
        rounded = (_next_logits(self.model, context, alone)[candidates].float() for alone in _ALONE)
        moved = max(float((logits - exact).abs().max()) for logits in rounded)
        return Tie(gap, 2 * max(moved, torch.finfo(self.dtype).eps * float(exact.abs().max())))

    @torch.inference_mode()
    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], *, plain: bool = False
    ) -> list[Score]:
        """See :meth:`Engine.score <selfspec.engine.base.Engine.score>`."""
        self._room(len(context) + max(map(len, continuations)) - 1)  # the last token is not read
        decides = self._plain if plain or self.plan.policy.verify else self._speculation
        step = self.plan.controller.max_k + 1 if self.plan.speculative and not plain else None
        return scoring.score(decides.target, context, continuations, step)

    @torch.inference_mode()
    def probe(self, prompt: Sequence[int], answer: Sequence[int], exits: Sequence[int] | None = None) -> list[Signals]:
        """See :meth:`Engine.probe <selfspec.engine.base.Engine.probe>`."""
        self._room(len(prompt) + len(answer))
        layers, draft = self.model.shape.layers, self.plan.draft
        beyond = [layer for layer in exits or () if not 1 <= layer < layers]
        if beyond:
            raise ConfigError(f"quality.exits={beyond[0]}: the model has {layers} layers; must be 1 to {layers - 1}")
        if exits is None:
            exits = scoring.exits(layers, draft.exit_layer)
        own = self._make_draft() if draft.fitted else None
        own = getattr(own, "learned", own)  # of a hybrid
        fitted = own if isinstance(own, EarlyExit) else None
        return scoring.probe(self.model, prompt, answer, exits, fitted, draft.learned or draft.name)

    def limits(self) -> Limits:
        """See :meth:`Engine.limits <selfspec.engine.base.Engine.limits>`."""
        tokens = self._tokenizer
        prefix = tokens.bos_token_id if tokens.bos_token_id is not None else tokens.eos_token_id
        return Limits(self.model.shape.max_positions, prefix, tokens("a")["input_ids"][:1] == [prefix])

    def _forget_float32(self) -> None:
        """Gives the GPU's memory back, and leaves it out of its high-water mark."""
        del self.__dict__["_float32"]
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory_mb(self) -> float:
        """The device's high-water mark on CUDA, else the process's resident one, in MiB."""
        if self.device.type == "cuda":
            self._peak_memory = max(self._peak_memory, torch.cuda.max_memory_allocated(self.device) / 2**20)
            return self._peak_memory
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    def device_utilisation(self) -> float | None:
        """The GPU's busy share over its last sampling period; ``None`` elsewhere."""
        if self.device.type != "cuda":
            return None
        try:
            return torch.cuda.utilization(self.device) / 100
        except (ModuleNotFoundError, RuntimeError):  # NVML is an extra (`gpu`)
            return None

    def _room(self, positions: int) -> int:
        limit = self.model.shape.max_positions
        if positions > limit:
            raise ConfigError(f"workload: prompt and new tokens come to {positions} positions; the model has {limit}")
        return positions


def _draft_module(name: str) -> Any:
    return importlib.import_module(f"selfspec.speculation.draft.{name}")


def _next_logits(model: Model, context: Sequence[int], alone: int = 0) -> Tensor:
    """``[vocab]``, the context read in one pass, but for the last ``alone`` of its tokens: they have one each."""
    cache, together = model.new_cache(len(context)), max(1, len(context) - alone)
    row = cache.admit()
    for part in (context[:together], *([token] for token in context[together:])):
        at = cache.place([Tree.chain(part)], row=row)
        hidden = model.run(model.embed(part, at), cache, at, 0, model.shape.layers)
        cache.commit(row, range(len(part)))
    return model.logits(model.norm(hidden[-1:]))[0]


def _compute_exactly() -> None:
    """Products of float32 in float32, and sums of half-width ones too: what is lossless must not hang on a shape."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False


def _gpu(device: torch.device) -> dict[str, object]:
    """Facts of a GPU that change what is measured on it."""
    facts = torch.cuda.get_device_properties(device)
    driver = None
    with suppress(ModuleNotFoundError):  # NVML is an extra (`gpu`)
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
    capability = f"{facts.major}.{facts.minor}"
    return {"device": facts.name, "capability": capability, "cuda": torch.version.cuda, "driver": driver}


def _device(asked: schema.Device) -> torch.device:
    available = {
        schema.Device.cuda: torch.cuda.is_available(),
        schema.Device.mps: torch.backends.mps.is_available(),
        schema.Device.cpu: True,
    }
    if asked is schema.Device.auto:
        asked = next(device for device, there in available.items() if there)
    if not available[asked]:
        there = ", ".join(device.name for device, there in available.items() if there)
        raise ConfigError(f"hardware.device={asked.name}: not available on this machine; it has {there}")
    return torch.device(asked.name)


def _dtype(asked: schema.Dtype, device: torch.device) -> torch.dtype:
    """``auto``: half width where the hardware computes in it, float32 where it would be emulated."""
    if asked is not schema.Dtype.auto:
        return _DTYPES[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if _cpu_computes_bf16() else torch.float32


def _cpu_computes_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16 "))
