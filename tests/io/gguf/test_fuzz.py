"""Damaged files, by the thousand: whatever the bytes, reading ends soon, in little memory, in a result or in one line.

    python tests/io/gguf/test_fuzz.py SECONDS [FILE ...]      the same for as long as you like, FILEs as further seeds

A seed is a small good file. Half of the mutations change one thing of what it says and write it well-formed again, so
that they get as far as the config and the tokenizer; the others change its bytes, mostly where numbers and strings are.
Everything follows from the number of the mutation.
"""

import contextlib
import itertools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_document import NUMBERS, TEXTS, Reader, damage, put_together, text

from quantool.errors import QuantoolError
from quantool.io.gguf.architectures import find_architecture
from quantool.io.gguf.checkpoint import GgufCheckpoint
from quantool.io.gguf.file import Array, GgufFile
from quantool.io.gguf.keys import metadata_of
from quantool.io.gguf.tensors import targets
from quantool.io.gguf.vocab import general_metadata, tokenizer_metadata
from quantool.io.imatrix import Imatrix, Importance, read_imatrix, write_imatrix
from quantool.model.views import as_linears

MEMORY = 512 << 20  # what one file of some kilobytes may take
SECONDS = 5.0  # of processor time: what is slower never ends
LONGEST_MESSAGE = 1000


# --- seeds


def model(path: Path, architecture: str, tokenizer: str) -> None:
    """A model of one block that GgufCheckpoint takes, with most of what a file's metadata can say."""
    writer = gguf.GGUFWriter(path, architecture)
    hidden, inner, heads, experts = 32, 64, 4, 3 if architecture.endswith("moe") else 0
    writer.add_name("seed")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(1e4)
    tensors = {"token_embd": (16, hidden), "output_norm": (hidden,), "output": (16, hidden)}
    block = {"attn_norm": (hidden,), "attn_q": (32, hidden), "attn_k": (16, hidden), "attn_v": (16, hidden)}
    block |= {"attn_output": (hidden, 32), "ffn_norm": (hidden,)}
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(inner)
        block |= {"attn_q_norm": (8,), "attn_k_norm": (8,), "ffn_gate_inp": (experts, hidden)}
        block |= {"ffn_gate_exps": (experts, inner, hidden), "ffn_up_exps": (experts, inner, hidden)}
        block |= {"ffn_down_exps": (experts, hidden, inner)}
    else:
        block |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    if architecture == "gemma2":
        del tensors["output"]
        block |= {"post_attention_norm": (hidden,), "post_ffw_norm": (hidden,)}
        writer.add_sliding_window(64)
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    elif architecture == "llama":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)
    add_tokenizer(writer, tokenizer)
    random = np.random.default_rng(0)
    kinds = ["Q8_0", "F16", "Q4_0", "Q5_1", "BF16", "Q4_1"]
    for i, (name, shape) in enumerate([*tensors.items(), *((f"blk.0.{name}", shape) for name, shape in block.items())]):
        kind = "F32" if len(shape) == 1 or "gate_inp" in name else kinds[i % len(kinds)]
        data = gguf.quantize(random.standard_normal(shape).astype(np.float32), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, kind: str) -> None:
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([*"abcdefghijkl", "\u0120", "ab", "\u0120a", "<|end|>"])
        writer.add_token_types([1] * 15 + [3])
        writer.add_token_merges(["a b", "\u0120 a"])
    else:
        writer.add_tokenizer_pre("default")
        pieces = ["<unk>", "<s>", "</s>", "<0x41>", "\u2581", "a", "b", "\u2581a", "ab", *"cdefg", "<user>", "[PAD]"]
        writer.add_token_list(pieces)
        writer.add_token_scores([-float(i) for i in range(16)])
        writer.add_token_types([2, 3, 3, 6, *[1] * 10, 4, 5])
        writer.add_add_space_prefix(False)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def seeds(directory: Path) -> list[Path]:
    """The files that are damaged; the last two are an imatrix in both forms."""
    paths = []
    for architecture, tokenizer in (("llama", "gpt2"), ("qwen3moe", "gpt2"), ("gemma2", "llama")):
        paths.append(directory / f"{architecture}.gguf")
        model(paths[-1], architecture, tokenizer)
    entries = {
        "blk.0.attn_q.weight": Importance(torch.rand(1, 8), torch.tensor([5])),
        "blk.0.ffn_up_exps.weight": Importance(torch.rand(3, 8), torch.tensor([5, 0, 2])),
    }
    paths.append(directory / "imatrix.gguf")
    write_imatrix(paths[-1], Imatrix(entries, "text", 3), overwrite=True)
    paths.append(directory / "imatrix.dat")
    name = struct.pack("<i", 4) + b"blk."
    entry = name + struct.pack("<ii3f", 2, 3, 1.0, 2.0, 3.0)
    paths[-1].write_bytes(struct.pack("<i", 2) + entry + entry.replace(b"blk.", b"out.") + struct.pack("<ii", 7, 0))
    return paths


# --- mutations


@dataclass(frozen=True)
class Seed:
    """A file; `numbers` and `texts` are the bytes [start, end) of its numbers, and of its strings with lengths."""

    name: str
    data: bytes
    numbers: list[tuple[int, int]]
    texts: list[tuple[int, int]]

    @property
    def is_gguf(self) -> bool:
        return self.data[:4] == b"GGUF"


def seed_of(path: Path) -> Seed:
    data, reader = path.read_bytes(), Reader(path.read_bytes())
    if not data.startswith(b"GGUF"):
        return Seed(path.name, data, [(at, at + 4) for at in range(0, len(data) - 3, 4)], [(0, len(data))])
    assert put_together(reader.document()) == data.ljust(-(-len(data) // 32) * 32, b"\0")
    return Seed(path.name, data, reader.numbers, reader.texts)


def mutate(seed: Seed, others: Sequence[Seed], number: int) -> bytes:
    """One to three changes, all from the number; the later ones may hit what the first has moved."""
    rng = random.Random(number)
    changes = rng.choice((1, 1, 1, 2, 3))
    if seed.is_gguf and rng.random() < 0.6:
        document = Reader(seed.data).document()
        for _ in range(changes):
            damage(document, rng)
        return put_together(document)
    data = seed.data
    for _ in range(changes):
        data = change(bytearray(data), seed, rng.choice(others).data, rng)
    return data


def change(data: bytearray, seed: Seed, other: bytes, rng: random.Random) -> bytes:
    """Change some bytes, within the header but for the last ways."""
    if not data:
        return rng.randbytes(rng.randrange(64))
    kind, header = rng.randrange(9), min(len(data), seed.numbers[-1][1])
    start, length = rng.randrange(header), rng.choice((1, 4, 8, rng.randrange(64)))
    if kind < 3:
        first, end = rng.choice(seed.numbers)
        old = int.from_bytes(data[first:end], "little")
        value = rng.choice((*NUMBERS, old + 1, old - 1, old * 2, old ^ 1, len(data), rng.randrange(14)))
        data[first:end] = (value % (1 << (8 * (end - first)))).to_bytes(end - first, "little")
    elif kind == 3:
        (first, end), (from_, to) = rng.choice(seed.texts), rng.choice(seed.texts)
        data[first:end] = rng.choice((seed.data[from_:to], text(rng.choice(TEXTS))))
    elif kind == 4:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif kind == 5:
        del data[rng.choice((start, rng.randrange(len(data)))) :]
    elif kind == 6:
        data[start : start + rng.choice((0, length))] = rng.choice((b"", bytes(length), rng.randbytes(length)))
    elif kind == 7:
        first = rng.randrange(len(other))
        data[rng.randrange(len(data)) :] = other[first : first + rng.randrange(256)]
    else:
        first = rng.randrange(len(data))
        data[start : start + length] = data[first : first + length]
    return bytes(data)


# --- one execution


def read_everything(path: Path, directory: Path) -> None:
    """What quantool does with such files; the first error ends it."""
    if path.name.startswith("imatrix"):
        read_imatrix(path)
        return
    file = GgufFile(path)
    for key, value in file.fields.items():
        if isinstance(value, Array):
            file.values(key)
    for tensor in file.tensors.values():
        file.rows(tensor)
    checkpoint = GgufCheckpoint(path)
    assert all(isinstance(key, str) for key in checkpoint.config)
    for name, info in checkpoint.infos.items():
        tensor = checkpoint.read(name)
        assert tuple(tensor.shape) == info.shape
        checkpoint.drop(name)
    checkpoint.write_aux(directory)
    linears = as_linears(checkpoint)  # and what writing it again asks of it
    architecture = find_architecture(linears.config)
    wanted, _ = targets(architecture, linears.infos, linears.config)
    metadata_of(architecture, linears.config, linears.infos)
    general_metadata(checkpoint)
    vocabulary = next(target.shape[0] for target in wanted if target.name == "token_embd.weight")
    tokenizer_metadata(checkpoint, vocab_size=vocabulary)


class TooSlow(BaseException):
    """No Exception, so that nothing takes it for an error of its own."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """MemoryError for what needs too much, TooSlow for what takes too long."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def stop(number: int, frame: object) -> None:
        raise TooSlow(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def outcome(path: Path, directory: Path) -> tuple[str, str]:
    """ "read", "refused", or "finding" and what happened."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        with limits():
            read_everything(path, directory)
    except QuantoolError as error:
        said = f"{error.message} {error.hint or ''}"
        if len(said) > LONGEST_MESSAGE or "MemoryError" in said:  # the console escapes what is not printable
            return "finding", f"a message of {len(said)} characters: {said[:200]!r}"
        return "refused", error.message
    except (Exception, TooSlow):  # noqa: BLE001 - whatever else comes out is what is looked for
        return "finding", traceback.format_exc()
    return "read", ""


def run(directory: Path, numbers: Iterator[int], extra: Sequence[Path] = ()) -> tuple[Counter[str], dict[str, bytes]]:
    """Outcomes by kind, and the findings with the bytes that made them; each traceback once."""
    paths = [*seeds(directory), *extra]
    found = [seed_of(path) for path in paths]
    for path in paths:
        assert outcome(path, directory / "aux") == ("read", ""), path
    counts: Counter[str] = Counter()
    findings: dict[str, bytes] = {}
    for number in numbers:
        seed = found[number % len(found)]
        target = directory / "mutated" / ("imatrix.bin" if seed.name.startswith("imatrix") else "model.gguf")
        target.parent.mkdir(exist_ok=True)
        data = mutate(seed, found, number)
        target.write_bytes(data)  # what kills the process is still there afterwards
        kind, trace = outcome(target, directory / "aux")
        counts[kind] += 1
        if kind == "finding":
            lines = [line for line in trace.splitlines() if line.startswith("  File ")]
            findings.setdefault("\n".join([*lines[-3:], trace.splitlines()[-1][:200]]), data)
    return counts, findings


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    counts, findings = run(tmp_path, iter(range(600)))
    assert not findings, "\n\n".join(findings)
    assert counts["read"] > 20  # some changes are harmless; if all were refused, nothing got far
    assert counts["refused"] > 300


def test_limits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError), limits():
        bytearray(4 * MEMORY)
    bytearray(MEMORY // 4)
    monkeypatch.setattr(f"{__name__}.SECONDS", 0.05)
    with pytest.raises(TooSlow), limits():
        sum(1 for _ in itertools.count())


def until(deadline: float) -> Iterator[int]:
    number = 1 << 32
    while time.monotonic() < deadline:
        yield number
        number += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(name) for name in sys.argv[2:]]
        total, found = run(Path(scratch), until(time.monotonic() + float(sys.argv[1])), files)
    sys.stdout.write(f"{dict(total)} {len(found)} findings\n")
    for index, (trace, data) in enumerate(found.items()):
        Path(f"finding-{index}.gguf").write_bytes(data)
        sys.stdout.write(f"\nfinding-{index}.gguf\n{trace}\n")
