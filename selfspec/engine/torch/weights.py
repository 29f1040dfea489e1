"""A plan's model on one device of this machine: loaded when it is first asked for, and what is known of the device."""

import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import torch

from selfspec import config as schema
from selfspec.engine.base import Usage
from selfspec.errors import ConfigError
from selfspec.model import blocks, gguf, hf
from selfspec.model.base import Graphs, Kernels, Layers, Model, Width
from selfspec.model.kernels import has_triton, native
from selfspec.model.llama import Llama
from selfspec.plan import Plan

_DTYPES = {schema.Dtype.bf16: torch.bfloat16, schema.Dtype.fp16: torch.float16, schema.Dtype.fp32: torch.float32}


class Weights:
    """See the module's docstring."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        if plan.hardware.threads is not None:
            torch.set_num_threads(plan.hardware.threads)
        self.device = _device(plan.hardware.device)
        self.dtype = _dtype(plan.hardware.dtype, self.device)
        self._peak_memory = 0.0
        if self.device.type == "cuda":
            _compute_exactly()

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
        exit_layer, layers = self.plan.draft.get("exit_layer"), model.shape.layers
        if isinstance(exit_layer, int) and exit_layer >= layers:
            name = self.plan.model.name
            raise ConfigError(f"exit_layer={exit_layer}: {name} has {layers} layers; must be from 1 to {layers - 1}")
        return model

    def _load(self) -> Model:
        engine, kernels = self.plan.engine, self._kernels
        asked, layers = engine.get("graphs", Graphs.auto), engine.get("layers", Layers.auto)
        graphs = self.device.type == "cuda" and asked is not Graphs.off
        native, fused = kernels is Kernels.native, kernels is Kernels.triton
        keep_packed = self._width is Width.packed
        model = hf.load(self.folder, self.device, self.dtype, layers, native, graphs, fused, keep_packed)
        if asked is Graphs.on and not model.graphs:
            raise ConfigError("engine.graphs=on: only our own layers (engine.layers=fast) have them, on a GPU")
        width: Width = engine.get("weights", Width.auto)
        if width in (Width.int8, Width.packed):
            if not isinstance(model, Llama) or self.device.type != "cpu":
                reason = "only our own layers have them (engine.layers=fast), on a CPU"
                raise ConfigError(f"engine.weights={width.name}: {reason}")
            if width is Width.int8:
                model.quantise()
        return model

    @cached_property
    def _width(self) -> Width:
        """How weights are kept; packed wherever that can be: it pays for up to 8 tokens a pass (``docs/weights.md``).

        Raises:
            ConfigError: packed ones were asked for, and are not to be had.
        """
        asked: Width = self.plan.engine.get("weights", Width.auto)
        if asked not in (Width.auto, Width.packed):
            return asked
        problem = None
        if self._kernels is not Kernels.native or not native.multiplies_bf16():
            problem = "only our own kernels have them (engine.kernels=native), on a CPU that multiplies bf16"
        elif self.dtype is not torch.bfloat16:
            problem = "they are made bf16 (hardware.dtype=bf16)"
        elif not (self.folder / blocks.FILE).is_file():
            problem = f"model={self.plan.model.name} does not come from a GGUF file of {', '.join(blocks.KINDS)}"
        if asked is Width.packed and problem:
            raise ConfigError(f"engine.weights=packed: {problem}; allowed here are auto, bf16, int8")
        return Width.bf16 if problem else Width.packed

    @cached_property
    def _kernels(self) -> Kernels:
        """Which kernels run: our own, or torch's.

        Raises:
            ConfigError: some were asked for that cannot.
        """
        asked, kind = self.plan.engine.get("kernels", Kernels.auto), self.device.type
        if asked is Kernels.torch:
            return Kernels.torch  # and nothing is built
        own = Kernels.torch
        problem: str | None = f"there are none for {kind}"
        if kind == "cpu":
            own, problem = Kernels.native, native.problem()
        elif kind == "cuda":
            own, problem = Kernels.triton, None if has_triton() else "Triton is not installed"
        if asked is not Kernels.auto and (problem or asked is not own):
            reason = problem or f"they are not for {kind}"
            raise ConfigError(f"engine.kernels={asked.name}: {reason}; allowed here are auto, torch")
        return Kernels.torch if problem else own

    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, torch, kernels, weights where packed; of a GPU capability, driver, graphs too."""
        width = self._width
        if width is Width.packed and not isinstance(self.model, Llama):
            width = Width.bf16
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": self._kernels.name,
            **({} if width is Width.bf16 else {"weights": width.name}),
            **(_gpu(self.device) | {"graphs": self.model.graphs} if self.device.type == "cuda" else {}),
        }

    def check_room(self, positions: int) -> int:
        """``positions``, which a text is to have.

        Raises:
            ConfigError: the model has fewer.
        """
        limit = self.model.shape.max_positions
        if positions > limit:
            raise ConfigError(f"workload: prompt and new tokens come to {positions} positions; the model has {limit}")
        return positions

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Refuses token ids that the model does not have.

        Raises:
            ConfigError: the tokenizer has more.
        """
        vocab, most = self.model.shape.vocab, max(tokens, default=0)
        if most >= vocab:
            raise ConfigError(f"model: its tokenizer gives token {most}; the model has {vocab}, from 0 to {vocab - 1}")

    def usage(self) -> Usage:
        """The high-water mark of the device's memory on CUDA, else of what is resident of the process."""
        if self.device.type == "cuda":
            self._peak_memory = max(self._peak_memory, torch.cuda.max_memory_allocated(self.device) / 2**20)
            return Usage(self._peak_memory, _utilisation(self.device))
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
        return Usage(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)

    @contextmanager
    def float32(self) -> Iterator[Model]:
        """The same weights in float32, to judge by.

        On a GPU they are given back at once, and left out of its high-water mark: they take twice the model's own
        memory, and are no part of what decoding takes.
        """
        if self.device.type != "cuda":
            yield self._float32
            return
        self.usage()
        yield self.model.to(torch.float32)
        torch.cuda.reset_peak_memory_stats(self.device)

    @cached_property
    def _float32(self) -> Model:
        return self.model.to(torch.float32)


def _utilisation(device: torch.device) -> float | None:
    """A GPU's busy share over its last sampling period."""
    try:
        return torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):  # NVML is an extra (`gpu`)
        return None


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
