"""What tensors say about their device, and what names one: every call of torch from Python passes here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.simcuda.ledger import muted, record
from tests.simcuda.tags import CPU, CUDA, UNKNOWN, is_pinned, set_pinned, set_tag, tag_of, tensors_in
from tests.simcuda.transfers import check_arrived, fault, transfer

_HOST = torch.device("cpu")
_DEVICE_GET, _IS_CUDA_GET = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
#: Functions that read data of the host.
_FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer)
_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class Current:
    """The number of this process's device."""

    number = 0


def current_device() -> torch.device:
    return torch.device("cuda", Current.number)


def is_device(value: object) -> bool:
    """Whether an argument names a device; numbers are not asked about here."""
    if isinstance(value, str):
        return value.split(":")[0] in ("cpu", "cuda", "meta")
    return isinstance(value, torch.device)


def wanted(device: Any) -> str | None:
    """CPU or CUDA for what a caller named; None for another kind of device. Raises DeviceFault for another GPU."""
    named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if named.type == "cuda" and named.index not in (None, Current.number):
        fault(f"{named} is not this process's device, cuda:{Current.number}")
    return {"cpu": CPU, "cuda": CUDA}.get(named.type)


class NamedDevices(TorchFunctionMode):
    """Reads and writes of device names; the arithmetic stays in CPU memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):  # called by a dispatch mode, with the devices as they are
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":
            return self._property(func, args)
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, *args, **kwargs)
        if kwargs.get("device") is not None:
            return _on_named_device(func, args, kwargs)
        pinned = bool(kwargs.pop("pin_memory", False))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            if pinned:
                set_pinned(result)
            if func in _FROM_HOST or (tag_of(result) == UNKNOWN and not any(tensors_in((args, kwargs)))):
                set_tag(result, CPU)
        return result

    @staticmethod
    def _property(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if func == _DEVICE_GET:
            device = func(*args)
            return current_device() if device.type == "cpu" and tag_of(args[0]) == CUDA else device
        if func == _IS_CUDA_GET:
            return tag_of(args[0]) == CUDA
        return func(*args)


def _on_named_device(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    where = wanted(kwargs["device"])
    if where is None:
        return func(*args, **kwargs)
    if func in (torch.as_tensor, torch.asarray) and isinstance(args[0], Tensor):
        return move(args[0], where, dtype=kwargs.get("dtype"))
    pinned = bool(kwargs.pop("pin_memory", False))
    result = func(*args, **{**kwargs, "device": _HOST})
    sources = list(tensors_in((args, {name: value for name, value in kwargs.items() if name != "device"})))
    for tensor in tensors_in((result,)):
        set_tag(tensor, where)
        if pinned:
            set_pinned(tensor)
    if where == CUDA and isinstance(result, Tensor):
        name = getattr(func, "__name__", "")
        if func in _FROM_HOST or func is torch.Tensor.new_tensor:
            transfer(result, to_host=False, non_blocking=False, operation=name)
        elif name not in _EMPTY and not any(tag_of(x) == CUDA for x in sources):  # otherwise dispatch has counted it
            record("launches", name)
    return result


class _Moved(torch.autograd.Function):
    """A copy on the other device, whose gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, where: str, non_blocking: bool) -> Tensor:
        ctx.origin, ctx.non_blocking = tag_of(tensor), non_blocking
        return _copied(tensor, where, non_blocking)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _copied(gradient, ctx.origin, ctx.non_blocking), None, None


def _copied(tensor: Tensor, where: str, non_blocking: bool) -> Tensor:
    with muted():
        result = tensor.detach().clone()
    set_tag(result, where)
    transfer(result, to_host=where == CPU, non_blocking=non_blocking, operation=f"to {where}")
    return result


def move(
    tensor: Tensor, where: str, *, dtype: torch.dtype | None = None, copy: bool = False, non_blocking: bool = False
) -> Tensor:
    """``tensor.to(where, dtype)`` between host and pretended device."""
    have = tag_of(tensor)
    if have == where or (have == UNKNOWN and where == CPU):
        return tensor.to(dtype, copy=copy) if dtype is not None or copy else tensor
    if have == CPU:
        check_arrived([tensor])
    if dtype is not None and have == CUDA:  # torch converts on the device
        tensor = tensor.to(dtype)
    if tensor.requires_grad and torch.is_grad_enabled():
        moved = _Moved.apply(tensor, where, non_blocking)
    else:
        moved = _copied(tensor, where, non_blocking)
    return moved if dtype is None else moved.to(dtype)


def _to(mode: NamedDevices, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype, flags = kwargs.get("device"), kwargs.get("dtype"), []
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, current_device() if tag_of(value) == CUDA else _HOST
        elif isinstance(value, bool):
            flags.append(value)
        elif is_device(value) or isinstance(value, int):
            device = value
    non_blocking = flags[0] if flags else kwargs.get("non_blocking", False)
    copy = flags[1] if len(flags) > 1 else kwargs.get("copy", False)
    where = None if device is None else wanted(device)
    if where is None:
        rest = {name: value for name, value in kwargs.items() if name != "device" or value is not None}
        return tensor.to(*args, **rest)
    return move(tensor, where, dtype=dtype, copy=copy, non_blocking=non_blocking)


def _cuda(
    mode: NamedDevices, tensor: Tensor, device: Any = "cuda", non_blocking: bool = False, **unused: Any
) -> Tensor:
    wanted("cuda" if device is None else device)
    return move(tensor, CUDA, non_blocking=non_blocking)


def _cpu(mode: NamedDevices, tensor: Tensor, **unused: Any) -> Tensor:
    return move(tensor, CPU)


def _type(mode: NamedDevices, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = tensor.type(*args, **kwargs)
    named = isinstance(result, str) and tag_of(tensor) == CUDA
    return result.replace("torch.", "torch.cuda.") if named else result


def _type_as(mode: NamedDevices, tensor: Tensor, other: Tensor) -> Tensor:
    return move(tensor, tag_of(other), dtype=other.dtype)


def _get_device(mode: NamedDevices, tensor: Tensor) -> int:
    return Current.number if tag_of(tensor) == CUDA else -1


def _numpy(mode: NamedDevices, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if tag_of(tensor) == CUDA:
        fault(f"can't convert {current_device()} device type tensor to numpy: {list(tensor.shape)}")
    check_arrived([tensor])
    return tensor.numpy(*args, **kwargs)


def _array(mode: NamedDevices, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if tag_of(tensor) == CUDA:
        fault(f"can't convert {current_device()} device type tensor to numpy: {list(tensor.shape)}")
    check_arrived([tensor])
    return tensor.__array__(*args, **kwargs)


def _tolist(mode: NamedDevices, tensor: Tensor) -> Any:
    if tag_of(tensor) == CUDA:
        transfer(tensor, to_host=True, non_blocking=False, operation="tolist")
    check_arrived([tensor])
    with muted():
        return tensor.tolist()


def _new_tensor(mode: NamedDevices, tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
    device = kwargs.pop("device", None)
    where = device if device is not None else (current_device() if tag_of(tensor) == CUDA else _HOST)
    return _on_named_device(torch.Tensor.new_tensor, (tensor, data), {**kwargs, "device": where})


def _deepcopy(mode: NamedDevices, tensor: Tensor, memo: Any) -> Tensor:
    result = tensor.__deepcopy__(memo)
    set_tag(result, tag_of(tensor))
    return result


def _pin_memory(mode: NamedDevices, tensor: Tensor, *args: Any) -> Tensor:
    if tag_of(tensor) == CUDA:
        fault(f"cannot pin a tensor of {current_device()}: {list(tensor.shape)}")
    result = tensor.clone()
    set_pinned(result)
    return result


def _is_pinned(mode: NamedDevices, tensor: Tensor, *args: Any) -> bool:
    return is_pinned(tensor)


def _record_stream(mode: NamedDevices, tensor: Tensor, stream: Any) -> None:
    return None


def _attention(mode: NamedDevices, *args: Any, **kwargs: Any) -> Tensor:
    """One kernel on a GPU; the CPU's may be several operations."""
    inputs = list(tensors_in((args, kwargs)))
    with muted():
        result = torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
    if any(tag_of(x) == CUDA for x in inputs):
        record("launches", "scaled_dot_product_attention")
    return result


class _RmsNorm(torch.autograd.Function):
    """One kernel each way, as on a GPU; the CPU has several operations for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
        ctx.sizes, ctx.eps = sizes, eps
        ctx.save_for_backward(tensor, *([] if weight is None else [weight]))
        with muted():
            return torch.nn.functional.rms_norm(tensor, sizes, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch._C.DisableTorchFunction(), muted(), torch.enable_grad():  # a mode would come here again
            result = torch.nn.functional.rms_norm(saved[0], ctx.sizes, *saved[1:] or [None], ctx.eps)
            grads = torch.autograd.grad(result, saved, gradient)
        for tensor in grads:
            set_tag(tensor, tag_of(gradient))
        record("launches", "_fused_rms_norm_backward")
        return grads[0], None, grads[1] if len(grads) > 1 else None, None


def _rms_norm(
    mode: NamedDevices, tensor: Tensor, sizes: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    one_kernel = tag_of(tensor) == CUDA and (weight is None or weight.dtype == tensor.dtype)  # as torch decides
    if not one_kernel:
        return torch.nn.functional.rms_norm(tensor, sizes, weight, eps)
    record("launches", "_fused_rms_norm")
    result: Tensor = _RmsNorm.apply(tensor, sizes, weight, eps)
    return result


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to, torch.Tensor.cuda: _cuda, torch.Tensor.cpu: _cpu, torch.Tensor.type: _type,
    torch.Tensor.type_as: _type_as, torch.Tensor.get_device: _get_device, torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _array, torch.Tensor.tolist: _tolist, torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.__deepcopy__: _deepcopy, torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.is_pinned: _is_pinned, torch.Tensor.record_stream: _record_stream,
    torch.nn.functional.scaled_dot_product_attention: _attention,
    torch.rms_norm: _rms_norm, torch.nn.functional.rms_norm: _rms_norm,
}  # fmt: skip


def loaded_to_device(load: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.load`` whose ``map_location`` may name the device."""

    def load_and_move(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        if not is_device(map_location) or wanted(map_location) != CUDA:
            return load(file, map_location=map_location, **kwargs)
        result = load(file, map_location="cpu", **kwargs)
        for tensor in tensors_in((result,)):
            set_tag(tensor, CUDA)
            transfer(tensor, to_host=False, non_blocking=False, operation="load")
        return result

    return load_and_move


def seen_in_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd engine's start with a mode on, which a call of ``backward`` takes off: its formulas in Python, and
    what is recomputed, name devices."""

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(mode, NamedDevices) for mode in torch.overrides._get_current_function_mode_stack()):
            return run(*args, **kwargs)
        with NamedDevices():
            return run(*args, **kwargs)

    return run_backward
