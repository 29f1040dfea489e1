"""A plan's model on one device of this machine: loaded when it is first asked for, and what is known of the device."""

import resource
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from selfspec import config as schema
from selfspec.engine.base import Usage
from selfspec.errors import ConfigError
from selfspec.model import gguf, hf
from selfspec.model.base import Model
from selfspec.model.kernels import native
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
        model = hf.load(self.folder, self.device, self.dtype, self.plan.engine.layers, self._native)
        if self.plan.engine.weights is schema.Weights.int8:
            if not isinstance(model, Llama) or self.device.type != "cpu":
                raise ConfigError("engine.weights=int8: only our own layers have them (engine.layers=fast), on a CPU")
            model.quantise()
        return model

    @cached_property
    def _native(self) -> bool:
        """Whether our own kernels run.

        Raises:
            ConfigError: they were asked for, and cannot.
        """
        asked = self.plan.engine.kernels
        if asked is schema.Kernels.torch:
            return False
        problem = native.problem() if self.device.type == "cpu" else f"they are for the CPU, not for {self.device.type}"
        if problem and asked is schema.Kernels.native:
            raise ConfigError(f"engine.kernels=native: {problem}; allowed here are auto, torch")
        return problem is None

    def describe(self) -> Mapping[str, object]:
        """Device, dtype, threads, torch."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "device": name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": "native" if self._native else "torch",
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

    def usage(self) -> Usage:
        """The high-water mark of the device's memory on CUDA, else of what is resident of the process."""
        if self.device.type == "cuda":
            return Usage(torch.cuda.max_memory_allocated(self.device) / 2**20, _utilisation(self.device))
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
        return Usage(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def _utilisation(device: torch.device) -> float | None:
    """A GPU's busy share over its last sampling period."""
    try:
        return torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):  # NVML is an extra (`gpu`)
        return None


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
