"""A GPU that is none: tensors that say they are on cuda:0, whose numbers are on the CPU.

Every function is computed by torch on the CPU. One that gets tensors of both places raises as CUDA would, unless torch
allows it there: a number on the CPU, an index on the CPU, a copy. So code that makes a tensor and forgets where is
found without a GPU, and what it computes is compared bit for bit. No kernel of ours runs here, and nothing is
asynchronous.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
COPIES = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.copy_)
BY_INDEX = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
SAYS = {torch.Tensor.device.__get__: DEVICE, torch.Tensor.is_cuda.__get__: True}  # type: ignore[attr-defined]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on DEVICE."""


class _Everywhere(TorchFunctionMode):
    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
        if there and function in SAYS:
            return SAYS[function]
        if there and function is torch.Tensor.numpy:
            raise TypeError("cannot convert a tensor of cuda:0 to numpy")
        if there and function not in COPIES and not (function in BY_INDEX and isinstance(args[0], Elsewhere)):
            _require_one_place(function, tensors)
        asked = _device_asked_for(function, args, kwargs)
        if asked is not None:
            there = asked == "cuda"
            args = tuple("cpu" if _is_device(arg) else arg for arg in args)
            kwargs = {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs
        elif function is torch.Tensor.copy_:
            there = isinstance(args[0], Elsewhere)
        result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        return tree_map(_moved, result) if there else result


def _require_one_place(function: Any, tensors: list[torch.Tensor]) -> None:
    places = [(list(t.shape), "cuda:0" if isinstance(t, Elsewhere) else "cpu") for t in tensors]
    if any(shape and place == "cpu" for shape, place in places):
        raise RuntimeError(f"{getattr(function, '__name__', function)}: tensors on several devices: {places}")


def _device_asked_for(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """ "cpu" or "cuda" where the function is told where its result is to be."""
    if function is torch.Tensor.cpu:
        return "cpu"
    if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
        return "cuda" if isinstance(args[1], Elsewhere) else "cpu"
    asked = [kwargs.get("device"), *args[1:]] if function is torch.Tensor.to else [kwargs.get("device")]
    return next((torch.device(device).type for device in asked if _is_device(device)), None)


def _is_device(value: Any) -> bool:
    return isinstance(value, str | torch.device)


def _held(leaf: Any) -> Any:
    return leaf.as_subclass(torch.Tensor) if isinstance(leaf, Elsewhere) else leaf


def _moved(leaf: Any) -> Any:
    return leaf.as_subclass(Elsewhere) if isinstance(leaf, torch.Tensor) else leaf


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside, torch computes on cuda:0 too."""
    with _Everywhere():
        yield
