"""quantool: an LLM checkpoint in, a quantized artifact that runtimes load as it is out, and the loss measured.

The public names are the stages and `load`; each is imported when it is first used, so that the command line's
`--help` needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantool.errors import QuantoolError
    from quantool.runtime.load import load
    from quantool.stages.calibrate import run as calibrate
    from quantool.stages.eval_ppl import run as evaluate
    from quantool.stages.inspect import run as inspect
    from quantool.stages.quantize import run as quantize

__all__ = ["QuantoolError", "calibrate", "evaluate", "inspect", "load", "quantize"]

__version__ = "0.1.0"

_WHERE = {
    "QuantoolError": ("quantool.errors", "QuantoolError"),
    "calibrate": ("quantool.stages.calibrate", "run"),
    "evaluate": ("quantool.stages.eval_ppl", "run"),
    "inspect": ("quantool.stages.inspect", "run"),
    "load": ("quantool.runtime", "load"),
    "quantize": ("quantool.stages.quantize", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'quantool' has no attribute '{name}'")
    from importlib import import_module

    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)
