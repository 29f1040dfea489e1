"""The torch engine: our decoder, drafts, gates and policies on one device."""

import importlib
import resource
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfspec import config as schema
from selfspec import heads
from selfspec.engine import controller, fit, gate, gguf, policy
from selfspec.engine.base import Tie
from selfspec.engine.decode import Target, decode
from selfspec.engine.draft.base import Draft
from selfspec.engine.draft.layerskip import EarlyExit
from selfspec.engine.draft.none import NoDraft
from selfspec.engine.head import Head
from selfspec.engine.llama import Llama
from selfspec.errors import AssetError, ConfigError
from selfspec.plan import Plan
from selfspec.progress import progress
from selfspec.provenance import write_atomic
from selfspec.types import Completion, Request

_DTYPES = {schema.Dtype.bf16: torch.bfloat16, schema.Dtype.fp16: torch.float16, schema.Dtype.fp32: torch.float32}


class TorchEngine:
    """Runs a plan's model with torch. Everything is lazy: what a stage does not ask for is not loaded."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        if plan.hardware.threads is not None:
            torch.set_num_threads(plan.hardware.threads)
        self.device = _device(plan.hardware.device)
        self.dtype = _dtype(plan.hardware.dtype, self.device)
        self._gate, self._policy = gate.make(plan.gate), policy.make(plan.policy)
        self._controller = controller.make(plan.controller)
        self._head: Head | None = None

    @cached_property
    def folder(self) -> Path:
        """The model's folder on this disk, fetched and converted where that is still to do."""
        return gguf.model_folder(self.plan.model)

    @cached_property
    def model(self) -> Llama:
        """The weights, on the device.

        Raises:
            ConfigError: the model has fewer layers than the plan counted on.
        """
        model = Llama.load(self.folder, self.device, self.dtype)
        exit_layer, layers = self.plan.draft.exit_layer, model.shape.layers
        if exit_layer is not None and exit_layer >= layers:
            name = self.plan.model.name
            raise ConfigError(f"exit_layer={exit_layer}: {name} has {layers} layers; must be from 1 to {layers - 1}")
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        # AutoTokenizer comes to the same, but imports model code for more than a second first.
        from transformers import PreTrainedTokenizerFast

        if not (self.folder / "tokenizer.json").is_file():
            raise AssetError(f"model.source={self.plan.model.source}: {self.folder} has no tokenizer.json")
        return PreTrainedTokenizerFast.from_pretrained(self.folder)

    @property
    def _draft(self) -> Draft:
        module = importlib.import_module(f"selfspec.engine.draft.{self.plan.draft.name}")
        made: Draft = module.make(self.plan.draft, self.model, self._head)
        return made

    @cached_property
    def _plain(self) -> Target:
        return Target(self.model, self.model.shape.layers, self.model.norm)

    @property
    def _target(self) -> Target:
        if self.plan.policy.verify:
            return self._plain
        exit = self._draft
        assert isinstance(exit, EarlyExit), "checked by the plan"
        return Target(self.model, exit.exit_layer, lambda hidden: exit.head(hidden, hidden))

    @cached_property
    def _float32(self) -> Llama:
        return self.model.to(torch.float32)

    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, torch."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "engine": "torch",
            "device": name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

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
        turn = [{"role": "user", "content": text}]
        templated: list[int] = self._tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return templated

    @torch.inference_mode()
    def generate(self, request: Request, *, plain: bool = False) -> Completion:
        """Decodes one request as the plan says; ``plain``: greedily, with no draft, by the whole model.

        Raises:
            ConfigError: prompt and new tokens are more than the model has positions.
        """
        capacity = self._room(len(request.tokens) + request.max_new_tokens)
        cache = self.model.new_cache(capacity)
        if plain or not self.plan.speculative:
            target = self._plain if plain else self._target
            return decode(target, NoDraft(self.model), _OPEN, controller.Fixed(0), self._policy, request, cache)
        return decode(self._target, self._draft, self._gate, self._controller, self._policy, request, cache)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[tuple[int, ...]]:
        """The model's own greedy answers, all prompts in one batch; rows leave it as they finish.

        Returns:
            One tuple of token ids a prompt, the stop token included where it came.
        """
        model, eos = self.model, self.model.shape.eos
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        width = int(lengths.max())
        cache = model.new_cache(self._room(width + max_new_tokens), rows=len(prompts))
        padded = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=self.device)
        # Padding stands to the right: causality hides it from the prompt, and answers overwrite it.
        hidden = self._plain.model.run(model.embed(padded.flatten()), cache, 0, 0, model.shape.layers)
        last = hidden.view(len(prompts), width, -1)[torch.arange(len(prompts)), lengths - 1]
        answers: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        while True:
            tokens = model.logits(model.norm(last)).argmax(-1)
            for row, token in zip(active, tokens.tolist(), strict=True):
                answers[row].append(token)
            going = [i for i, row in enumerate(active) if answers[row][-1] not in eos]
            if not going or len(answers[active[going[0]]]) == max_new_tokens:
                return [tuple(answer) for answer in answers]
            if len(going) < len(active):
                keep = torch.tensor(going, device=self.device)
                cache.keep_rows(keep)
                tokens, lengths, active = tokens[keep], lengths[keep], [active[i] for i in going]
            last = model.run(model.embed(tokens), cache, lengths, 0, model.shape.layers)
            lengths = lengths + 1

    @torch.inference_mode()
    def fit(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], path: Path, facts: Mapping[str, Any]) -> None:
        """Fits the plan's head on (prompt, answer) token pairs; every fifth of them is held out.

        Writes a safetensors file with ``facts`` and what was measured in its metadata.
        """
        draft = self.plan.draft
        assert draft.exit_layer is not None, "checked by the plan"
        parts = []
        with progress("states", len(pairs)) as advance:
            for prompt, answer in pairs:
                parts.append(fit.collect(self.model, (*prompt, *answer), len(prompt), draft.exit_layer))
                advance()
        head = fit.fit_head(self.model, *fit.split(parts), draft, self.plan.seed)
        head.facts.update(facts, hidden=self.model.shape.hidden)
        write_atomic(path, head.to_bytes())

    def use_head(self, path: Path) -> None:
        """Drafts through this fitted head from now on.

        Raises:
            HeadError: it is corrupt or of another size than the model.
        """
        heads.check(path, {"hidden": self.model.shape.hidden})
        self._head = Head.load(path).to(self.dtype, self.device)

    @torch.inference_mode()
    def compare(self, context: Sequence[int], a: int, b: int) -> Tie:
        """Two candidates for the token after ``context``, by the same weights in float32.

        What rounding explains is measured where it matters: by how much the working dtype moves these two
        logits, each of which may err that far in either pass; at least two units in its last place.
        In float32 nothing is explained.
        """
        candidates = [a, b]
        exact, rounded = (_next_logits(model, context)[candidates].float() for model in (self._float32, self.model))
        gap = float(exact.diff().abs())
        if self.dtype is torch.float32:
            return Tie(gap, 0.0)
        error = max(float((rounded - exact).abs().max()), torch.finfo(self.dtype).eps * float(exact.abs().max()))
        return Tie(gap, 2 * error)

    def peak_memory_mb(self) -> float:
        """The device's high-water mark on CUDA, else the process's resident one, in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
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


def _next_logits(model: Llama, context: Sequence[int]) -> Tensor:
    """``[vocab]``, from one pass over the context."""
    hidden = model.run(model.embed(tuple(context)), model.new_cache(len(context)), 0, 0, model.shape.layers)
    return model.logits(model.norm(hidden[-1:]))[0]


_OPEN = gate.make(schema.Gate())


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
