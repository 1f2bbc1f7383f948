"""GGUF both ways: a file of llama.cpp seen as a Hugging Face checkpoint, and a checkpoint written as such a file.

file.py                          bytes -> metadata and named tensors, mapped and checked; fields.py single values
architectures.py, families.py    the table: one row (row.py) per architecture, which both directions read
keys.py, rope.py, hooks.py       config.json <-> metadata; rotary settings; what a table cannot say
tensors.py                       tensor names and row order, Hugging Face <-> GGUF
tokenizer.py                     metadata -> tokenizer.json
vocab.py, special.py, pre.py     tokenizer.json -> metadata; special tokens; the pre-tokenizers
checkpoint.py                    GgufCheckpoint
writer.py                        bytes of a file, planned and atomic
"""

from quantool.io.gguf.checkpoint import GgufCheckpoint

__all__ = ["GgufCheckpoint"]
