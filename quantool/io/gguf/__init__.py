"""GGUF both ways: a file of llama.cpp seen as a Hugging Face checkpoint, and a checkpoint written as such a file.

    file.py            bytes -> metadata and named tensors, mapped and checked
    architectures.py   the table: one row per architecture, which both directions read
    keys.py            config.json <-> metadata
    tensors.py         tensor names and row order, Hugging Face <-> GGUF
    tokenizer.py       metadata -> tokenizer.json;  vocab.py  tokenizer.json -> metadata;  pre.py  the pre-tokenizers
    checkpoint.py      GgufCheckpoint
    writer.py          GgufWriter
"""

from quantool.io.gguf.checkpoint import GgufCheckpoint

__all__ = ["GgufCheckpoint"]
