"""The compiled CUDA kernels: their library, why there is none, and the call of a launcher.

A launcher of csrc/cuda/*.cu queues one or a few kernels on a stream and returns at once:

    int quantool_NAME(void* tensors..., int64_t numbers..., double numbers..., void* stream);

0, or a cudaError_t, or -1 when no kernel is compiled for the numbers. It neither allocates nor waits, so that it may be
captured in a CUDA graph: outputs and workspaces are tensors of the caller. What it is given has been checked before, by
its operator and by `call`: a kernel that reads where it must not ends the CUDA of the whole process.
"""

import ctypes
import functools
from typing import Any

import torch

from quantool.errors import QuantoolError
from quantool.kernels import build, outcome_of

__all__ = ["ALIGNMENT", "OLDEST", "aligned", "call", "described", "is_available", "library", "outcome", "why_not"]

ALIGNMENT = 16  # bytes: what a thread loads at once
OLDEST = (7, 5)  # compute capability of Turing, the oldest that CUDA 13 compiles for
# of what is no tensor
C_TYPES: dict[type, Any] = {
    int: ctypes.c_int64,
    bool: ctypes.c_int64,
    float: ctypes.c_double,
    type(None): ctypes.c_void_p,
}


def is_available() -> bool:
    """Whether the kernels for CUDA are used. Builds them if that was not done yet."""
    return library() is not None


def why_not() -> str | None:
    """Why they are not used, in one line; None when they are. Builds them if that was not done yet."""
    found = outcome()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL | None:
    """The library of them, or None: torch does their work, and the log has said once why."""
    found = outcome()
    return None if isinstance(found, str) else found


def outcome() -> ctypes.CDLL | str:
    """The library of them, or why there is none."""
    return outcome_of(_load)


def call(name: str, *arguments: Any) -> None:
    """Queue the kernels of launcher `name` on the current stream of its tensors' device.

    A tensor is passed as the address of its data and None as null; int is int64_t and float is double. Tensors on the
    CPU are for the tests, where g++ has compiled the launchers.

    Raises ValueError when the tensors are on several devices, not contiguous or not aligned, and RuntimeError when the
    launcher fails.
    """
    kernels = library()
    if kernels is None:
        raise RuntimeError(f"{name}: {why_not()}")
    device = None
    values: list[Any] = []
    for argument in arguments:
        if type(argument) in C_TYPES:
            values.append(argument)
            continue
        address = argument.data_ptr()
        if device is None:
            device = argument.device
        if argument.device != device or address % ALIGNMENT or not argument.is_contiguous():
            raise ValueError(f"{name}: {_what_is_wrong(argument, device, len(values) + 1)}")
        values.append(address)
    function = _launcher(kernels, name, tuple(map(type, arguments)))
    if device is None or device.type == "cpu":
        code = function(*values, None)
    elif device.index == torch.cuda.current_device():
        code = function(*values, torch.cuda.current_stream(device).cuda_stream)
    else:
        with torch.cuda.device(device):
            code = function(*values, torch.cuda.current_stream(device).cuda_stream)
    if code:
        raise RuntimeError(f"{name}: {_explain(kernels, code)}")


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, as `call` takes it: contiguous, and from a multiple of ALIGNMENT on."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def described(tensor: torch.Tensor) -> str:
    """Its dtype and shape for a message: "float32 [3, 4]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _what_is_wrong(tensor: torch.Tensor, device: torch.device, position: int) -> str:
    if tensor.device != device:
        return f"argument {position} is on {tensor.device} and an earlier one on {device}"
    which = f"argument {position}, {described(tensor)},"
    if not tensor.is_contiguous():
        return f"{which} is not contiguous: its strides are {list(tensor.stride())}"
    return f"{which} starts {tensor.data_ptr() % ALIGNMENT} bytes after a multiple of {ALIGNMENT}"


@functools.cache
def _launcher(kernels: ctypes.CDLL, name: str, types: tuple[type, ...]) -> Any:
    """The launcher with the C types that arguments of these types have; its result is an int."""
    function = kernels[name]
    function.argtypes = [C_TYPES.get(kind, ctypes.c_void_p) for kind in (*types, type(None))]
    return function


def _explain(kernels: ctypes.CDLL, code: int) -> str:
    if code < 0:
        return "no kernel is compiled for these numbers"
    function = kernels["quantool_cuda_error_string"]
    function.restype = ctypes.c_char_p
    return f"CUDA error {code}: {function(code).decode()}"


def _load() -> ctypes.CDLL:
    """The library for the cards of this machine."""
    if torch.version.cuda is None:
        raise QuantoolError(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise QuantoolError(f"no GPU that torch {torch.__version__} can use")
    cards = {
        torch.cuda.get_device_capability(i): torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    }
    usable = [card for card in cards if card >= OLDEST]
    if not usable:
        card, name = next(iter(cards.items()))
        raise QuantoolError(f"{name} has compute capability {card[0]}.{card[1]}, the kernels need 7.5")
    kernels = build.cuda(usable, torch.version.cuda)
    if code := kernels.quantool_cuda_probe():
        raise QuantoolError(_explain(kernels, code))
    return kernels
