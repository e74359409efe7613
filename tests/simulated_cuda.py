"""A CUDA device for machines without one: tensors that say `cuda:0`, compute on the CPU and refuse what CUDA refuses.

    with simulated_cuda():
        torch.zeros(3, device="cuda") + torch.ones(3)     # RuntimeError, as on a GPU

The unit is one call of torch as it is written in our code: its operands are looked at, it is done whole by the CPU, and
its results are marked. So autograd, optimizers and mixed precision (by the CPU's rules) are torch's own, and what a
kernel does differently on a GPU, in numbers, speed or memory, is not seen here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

COPIES = ("copy_", "to", "tensor", "_has_compatible_shallow_copy_type")
"""Calls that take operands of two devices."""
PRODUCTS = ("matmul", "__matmul__", "mm", "bmm", "addmm", "addmm_", "linear", "__rmatmul__")
"""Calls for which CUDA has no kernels of integers."""


class Simulated(Tensor):
    """A tensor on the simulated device. To torch's own code, inside of a call, it is the CPU tensor that it is made
    of."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return CUDA if torch._C._is_torch_function_enabled() else CPU

    @property
    def is_cuda(self) -> bool:
        return self.device == CUDA

    @property
    def is_cpu(self) -> bool:
        return self.device == CPU

    def get_device(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied


class Generator(torch.Generator):
    """A random generator that says it is on the device it was made for."""

    device = CPU

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls)
        made.device = _checked(device)
        return made


class _Mode(TorchFunctionMode):
    """Sees the calls without a simulated operand as well, which may make one."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def simulated_cuda() -> Iterator[None]:
    """Let torch have one CUDA device, simulated, in this thread and until the block ends."""
    real_autocast, real_export = torch.autocast, torch.onnx.export

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return real_autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def export(*args: Any, **kwargs: Any) -> Any:
        with _pop_mode_temporarily():  # what is traced is on the CPU, and the tracer has modes of its own
            return real_export(*args, **kwargs)

    def is_available() -> bool:
        # torch itself would ask the device for its streams, properties and random state
        return not sys._getframe(1).f_globals["__name__"].startswith("torch.")

    replaced: list[tuple[Any, str, Any]] = [
        (torch, "Generator", Generator),
        (torch, "autocast", autocast),
        (torch.onnx, "export", export),
        (torch.cuda, "is_available", is_available),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "get_device_name", lambda device=None: "simulated"),
        (torch.cuda, "memory_allocated", lambda device=None: 0),
        (torch.cuda, "max_memory_allocated", lambda device=None: 0),
        (torch.cuda, "reset_peak_memory_stats", lambda device=None: None),
    ]
    real = [getattr(owner, name) for owner, name, _ in replaced]
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    # a module's parameter that moves becomes another object, since a CPU tensor cannot become a simulated one
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        with _Mode():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
        for (owner, name, _), value in zip(replaced, real, strict=True):
            setattr(owner, name, value)


def _call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = func.__name__
    # neither what a module has copied before nor a tensor that stands for its device is an operand
    leaves = list(_leaves(args[:1] if name in ("__deepcopy__", "to") else (*args, *kwargs.values())))
    ours = any(isinstance(leaf, Simulated) for leaf in leaves)
    asked = _asked_for(name, args, kwargs)
    # a tensor made of a list is made of numbers, wherever those were
    there = CUDA if ours and not (name == "tensor" and not isinstance(args[0], Tensor)) else CPU
    target = there if asked is None else asked
    for generator in (leaf for leaf in leaves if isinstance(leaf, torch.Generator)):
        if generator.device.type != target.type:
            raise RuntimeError(f"{name}: expected a {target.type} generator but found a {generator.device.type} one")
    if asked == CUDA:
        args = [_for_the_cpu(value) for value in args]
        kwargs = {key: _for_the_cpu(value) for key, value in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        if ours:
            _refuse(name, args, kwargs, target)
        result = func(*args, **kwargs)
        if asked is not None and asked != there and args and result is args[0]:
            result = result.clone()  # what moves to another device is a copy
    return result if any(result is leaf for leaf in leaves) else _marked(result) if target == CUDA else result


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what is in the arguments of a call, also inside of lists."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _asked_for(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device | None:
    """Give the device that a call names for its result; None where it follows from the operands."""
    if name == "cpu":
        return CPU
    if name == "to":
        for value in (*args[1:], kwargs.get("other")):
            if isinstance(value, Tensor):
                return value.device
            if isinstance(value, str | torch.device):
                return _checked(value)
    return None if kwargs.get("device") is None else _checked(kwargs["device"])


def _checked(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type != "cuda":
        return device
    if device.index:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({device}; there is one, simulated)")
    return CUDA


def _for_the_cpu(value: Any) -> Any:
    """Give an argument of a call, or the CPU in the place of CUDA."""
    return CPU if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value


def _refuse(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], target: torch.device) -> None:
    """Raise what CUDA raises for a call that has a simulated operand and comes to lie on `target`."""
    if name in ("numpy", "__array__"):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
    if name == "pin_memory":
        raise RuntimeError("cannot pin a CUDA tensor; only CPU tensors can be pinned")
    if name == "to" and target == CPU and kwargs.get("non_blocking"):
        raise RuntimeError("with non_blocking a copy to the CPU may be read before it is there")
    if name in PRODUCTS and not all(leaf.is_floating_point() for leaf in args if isinstance(leaf, Tensor)):
        raise RuntimeError(f"{name}: no CUDA kernel is implemented for integers")
    if name in ("__getitem__", "__setitem__"):
        indices = [leaf for leaf in _leaves([args[1]]) if isinstance(leaf, Tensor)]
        if any(isinstance(index, Simulated) for index in indices) and not isinstance(args[0], Simulated):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if name == "__getitem__" or not indices:  # what is assigned to a slice is copied, from wherever it is
            return
        args = (args[0], args[2])
    if name in COPIES:
        return
    for value in (*args, *kwargs.values()):
        # a single number may come from the CPU, but not as one of a list
        few = value if isinstance(value, list | tuple) else [value] if isinstance(value, Tensor) and value.dim() else []
        if any(isinstance(leaf, Tensor) and not isinstance(leaf, Simulated) for leaf in few):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")


def _marked(result: Any) -> Any:
    """Give the tensors of a call's result as simulated ones."""
    if isinstance(result, tuple | list) and any(isinstance(part, Tensor | tuple | list) for part in result):
        return type(result)([_marked(part) for part in result])
    if not isinstance(result, Tensor) or isinstance(result, Simulated):
        return result
    # as_subclass would make an inner node of the graph of what has to stay a leaf
    if result.is_leaf:
        return Tensor._make_subclass(Simulated, result, result.requires_grad)
    return result.as_subclass(Simulated)
