"""A pretended GPU: tensors that say they are on ``cuda:0``, and compute on the CPU.

What a GPU refuses, operands on two devices, is refused. What makes the host wait for a GPU, and what is copied to it,
is logged with the line that asked for it. Autograd does not work on it, graphs cannot be captured, and where a build of
torch without CUDA misses its guard of devices, one that does nothing is compiled.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from selfspec.model import checkpoint, transfer
from selfspec.speculation import sampling

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
_ROOT = f"{Path(__file__).parents[1]}/"
_OURS = (f"{_ROOT}selfspec/", f"{_ROOT}tests/")  # an environment may lie in the checkout, too
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_READS = {"_local_scalar_dense", "equal", "is_nonzero"}
_SIZED_BY_VALUES = {"nonzero", "masked_select", "unique_dim", "_unique2", "bincount", "repeat_interleave"}
"""Operators whose result's size is known to the device alone."""


@cache
def problem() -> str | None:
    """Why there can be no pretended GPU here; ``None`` where there can."""
    if torch.cuda.is_available():
        return "there is a real GPU"
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no C++ compiler"
    home = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        flags = ("-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10")
        subprocess.run([compiler, str(source), "-o", str(library), *flags], check=True)
        ctypes.CDLL(str(library))
    return None


class Event(NamedTuple):
    """Something that a GPU's host does not get for nothing.

    Attributes:
        kind: ``wait``, for all that the device was asked to do so far; or ``copy``, from the host to the device.
        what: the operator.
        line: the innermost line of ours that asked for it, as ``file:number``.
    """

    kind: str
    what: str
    line: str


class PretendedTensor(torch.Tensor):
    """On the pretended GPU; ``inner`` holds its values, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "PretendedTensor":
        made: PretendedTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=CUDA
        )
        made.inner = inner
        return made

    def __repr__(self, **_: object) -> str:
        return f"PretendedTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert PretendedGPU.current is not None, "used after its GPU was taken away"
        return PretendedGPU.current.run(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """There while the ``with`` block lasts.

    Attributes:
        log: what happened, in that order.
    """

    current: "PretendedGPU | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Event] = []
        self._launched = self._done = 0  # kernels; a wait is for the launched ones

    def __enter__(self) -> "PretendedGPU":
        PretendedGPU.current = self
        with ExitStack() as stack:  # undone at once should one of these fail
            self._pretend(stack)
            self._stack = stack.pop_all()
        return super().__enter__()

    def _pretend(self, stack: ExitStack) -> None:
        cuda = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "synchronize": lambda *_: self.wait("synchronize"),
            "Event": _Moment,
        }
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # safetensors would ask a driver for memory, and no Triton kernel reads such tensors.
        stack.enter_context(mock.patch.object(checkpoint, "load_file", _load))
        stack.enter_context(mock.patch.object(sampling, "has_triton", lambda: False))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` is then a tensor and a copy
        stack.enter_context(_Calls())

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._stack.close()
        PretendedGPU.current = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        self._done = self._launched
        self.log.append(Event("wait", what, _line()))

    def copy(self, what: str, blocking: bool) -> None:
        """The host copies to the device; from pageable memory, or where nothing else is said, it waits for that."""
        self.log.append(Event("copy", what, _line()))
        if blocking:
            self.wait(f"{what}, blocking")

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on the values, if a GPU would run it."""
        if _is_composite(func):
            with self._again():  # in inference mode composites arrive whole
                return func.decompose(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        tensors = list(_tensors((args, kwargs.values())))
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        there = any(isinstance(x, PretendedTensor) for x in tensors)
        to = asked.type == "cuda" if asked is not None else there
        if name in ("_to_copy", "copy_"):
            to = self._check_copy(name, args, kwargs, to)
        elif there:
            self._check(func, name, args, tensors)
        values = _mapped(PretendedTensor, lambda x: x.inner, args)
        named = {key: _mapped(PretendedTensor, lambda x: x.inner, value) for key, value in kwargs.items()}
        if asked is not None:
            named["device"] = CPU
        for of_a_gpu in ("pin_memory", "non_blocking"):
            named.pop(of_a_gpu, None)
        found = func(*values, **named)
        if name == "_to_copy" and found is values[0]:
            found = found.clone()
        view = _is_view(func)
        self._launched += to and not view
        if not to or name in _READS:
            return found
        return self._there(found, tensors, view)

    def _again(self) -> Any:
        """This mode, for what an operator is made of."""
        stack = ExitStack()
        TorchDispatchMode.__enter__(self)
        stack.callback(TorchDispatchMode.__exit__, self, None, None, None)
        return stack

    def _check_copy(self, name: str, args: Any, kwargs: Any, to: bool) -> bool:
        """Logs a copy between the devices; whether its result is on the pretended one."""
        source = args[1 if name == "copy_" else 0]
        asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and True in args[2:])
        if name == "copy_":
            to = isinstance(args[0], PretendedTensor)
        if isinstance(source, PretendedTensor) and not to:
            self.wait(name)
        elif to and not isinstance(source, PretendedTensor):
            self.copy(name, blocking=not (asynchronous and getattr(source, "pinned", False)))
        return to

    def _check(self, func: Any, name: str, args: Any, tensors: list[torch.Tensor]) -> None:
        """Refuses what a GPU would, and logs the waits that are within operators."""
        if name in _READS or name in _SIZED_BY_VALUES:
            self.wait(name)
        if name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            for index in indices:
                if isinstance(args[0], PretendedTensor) and not isinstance(index, PretendedTensor):
                    self.copy(f"{name} by the host's numbers", blocking=True)
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait(f"{name} by truth values")
            tensors = [x for x in tensors if not any(x is index for index in indices)]
        elsewhere = [x for x in tensors if not isinstance(x, PretendedTensor)]
        # A number may be on the host, though not where tensors are joined.
        wrong = [x for x in elsewhere if x.dim() > 0 or name in ("cat", "stack")]
        if wrong or (name in _INDEXING and args[0] in elsewhere):
            shapes = [tuple(x.shape) for x in wrong]
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} with {shapes} of the CPU")

    def _there(self, found: Any, tensors: list[torch.Tensor], view: bool) -> Any:
        """Results as tensors of the device; what was changed in place is the tensor that it was."""
        known = {id(x.inner): x for x in tensors if isinstance(x, PretendedTensor)}
        ordinary = view and not any(x.is_inference() for x in tensors)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not ordinary):
            return _mapped(torch.Tensor, lambda x: known[id(x)] if id(x) in known else PretendedTensor(x), found)


class _Calls(TorchFunctionMode):
    """What does not reach operators as it does on a real GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", False)  # a build without CUDA has nobody to ask for such memory
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(map(_numbered, args))
        if args and isinstance(args[0], PretendedTensor):
            if func is torch.Tensor.tolist:
                assert PretendedGPU.current is not None
                PretendedGPU.current.wait("tolist")
                return args[0].inner.tolist()
            if func is torch.Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
        found = func(*args, **kwargs)
        if pinned:
            found.pinned = True
        return found


class _Moment:
    """A CUDA event: to wait for it is to wait, unless the host has waited for what was asked for before it."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._after = 0

    def record(self) -> None:
        assert PretendedGPU.current is not None
        self._after = PretendedGPU.current._launched

    def synchronize(self) -> None:
        gpu = PretendedGPU.current
        assert gpu is not None
        if self._after > gpu._done:
            gpu.wait("event")

    def elapsed_time(self, end: "_Moment") -> float:
        return 1e-3 * (1 + end._after - self._after)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _is_view(func: Any) -> bool:
    return all(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among an operator's arguments, which are lists at most."""
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, Iterable) and not isinstance(each, str):
            yield from _tensors(each)


def _mapped(kind: type, change: Callable[[Any], Any], arguments: Any) -> Any:
    """With every tensor of a kind changed."""
    if isinstance(arguments, kind):
        return change(arguments)
    if isinstance(arguments, list | tuple):
        return type(arguments)(_mapped(kind, change, each) for each in arguments)
    return arguments


def _numbered(device: Any) -> Any:
    """``cuda`` as ``cuda:0``: nobody else knows which one is the current one."""
    kind = device.type if isinstance(device, torch.device) else device if isinstance(device, str) else ""
    return CUDA if kind.startswith("cuda") else device


def _load(file: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    return {name: weight.to(device) for name, weight in load_file(file).items()}


def _line() -> str:
    """The innermost line of the program's or of the tests', but for this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS) and path not in (__file__, transfer.__file__):
            return f"{path.removeprefix(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
