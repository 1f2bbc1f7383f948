"""quantool: an LLM checkpoint in, a quantized artifact that common runtimes load as it is out, and the loss measured."""

__version__ = "0.1.0"
