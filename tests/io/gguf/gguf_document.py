"""A GGUF file taken apart and put together again, with no check at all: for tests that damage one thing at a time."""

import math
import random
import struct
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
NUMBERS = (0, 1, 2, 3, 5, 31, 32, 255, 256, 65535, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40)
NUMBERS += ((1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (0.0, -1.0, 1e-38, 1e30, 3.4e38, math.inf, -math.inf, math.nan, 0.5)
TEXTS = (
    b"",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"a\nb",
    b"\0",
    b"\x1b[31m",
    b"\xe2\x80\xae",
    b"x" * 5000,
    b"llama",
    b"gpt2",
)
NAMES = (b"blk.0.attn_q.bias", b"blk.1.attn_q.weight", b"blk.99999999999.attn_q.weight", b"blk.-1.attn_q.weight")
NAMES += (b"blk.0.weight", b"rope_freqs.weight", b"output.weight", b"blk.0.ffn_up_exps.weight", b"\xd9\xa3.weight")
LARGEST = 1 << 16  # bytes of a tensor that is written whole


@dataclass
class Field:
    """`kind` and `value` as stored; strings are bytes, an array is (kind of its items, list)."""

    key: bytes
    kind: int
    value: Any


@dataclass
class Stored:
    """A tensor; `sizes` innermost first."""

    name: bytes
    sizes: list[int]
    kind: int
    data: bytes


@dataclass
class Document:
    fields: list[Field] = field(default_factory=list)
    tensors: list[Stored] = field(default_factory=list)


class Reader:
    """Goes through good bytes, and keeps where [start, end) each number is, and each string with its length."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 4
        self.numbers: list[tuple[int, int]] = []
        self.texts: list[tuple[int, int]] = []

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.numbers.append((self.at, self.at + struct.calcsize(form)))
        self.at += struct.calcsize(form)
        return value

    def text(self) -> bytes:
        start, length = self.at, self.number("<Q")
        self.at += length
        self.texts.append((start, self.at))
        return self.data[self.at - length : self.at]

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(FORMATS[kind])
        items, count = self.number("<I"), self.number("<Q")
        return items, [self.value(items) for _ in range(count)]

    def document(self) -> Document:
        self.number("<I")
        count, keys = self.number("<Q"), self.number("<Q")
        document = Document()
        for _ in range(keys):
            key, kind = self.text(), self.number("<I")
            document.fields.append(Field(key, kind, self.value(kind)))
        offsets = []
        for _ in range(count):
            name = self.text()
            sizes = [self.number("<Q") for _ in range(self.number("<I"))]
            document.tensors.append(Stored(name, sizes, self.number("<I"), b""))
            offsets.append(self.number("<Q"))
        start = -(-self.at // 32) * 32
        for tensor, offset in zip(document.tensors, offsets, strict=True):
            tensor.data = self.data[start + offset : start + offset + stored_bytes(tensor)]
        return document


def stored_bytes(tensor: Stored) -> int:
    """What the sizes and type of a tensor ask for, 0 where they make no sense."""
    if tensor.kind not in GGMLQuantizationType._value2member_map_:
        return 0
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    return math.prod(tensor.sizes) // block * size


def put_together(document: Document) -> bytes:
    """The bytes of a file; a tensor's data is cut or repeated to what its sizes ask for, when that is little."""
    data = struct.pack("<4sIQQ", b"GGUF", 3, len(document.tensors), len(document.fields))
    for entry in document.fields:
        data += text(entry.key) + struct.pack("<I", entry.kind) + value(entry.kind, entry.value)
    offset, body = 0, b""
    for tensor in document.tensors:
        data += text(tensor.name) + struct.pack(
            f"<I{len(tensor.sizes)}QIQ", len(tensor.sizes), *tensor.sizes, tensor.kind, offset
        )
        wanted = stored_bytes(tensor)
        content = tensor.data
        if wanted <= LARGEST:
            content = ((content or b"\0") * (wanted // max(1, len(content)) + 1))[:wanted]
        body += content + bytes(-len(content) % 32)
        offset = len(body)
    return data + bytes(-len(data) % 32) + body


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def value(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return text(content)
    if kind != ARRAY:
        return struct.pack(FORMATS[kind], content)
    items, values = content
    return struct.pack("<IQ", items, len(values)) + b"".join(value(items, item) for item in values)


# --- damage


def damage(document: Document, rng: random.Random) -> None:
    """Change one thing, to something that is well-formed and mostly wrong."""
    if document.tensors and rng.random() < 0.35:
        damage_tensor(document, rng.choice(document.tensors), rng)
    elif document.fields:
        damage_field(document, rng.choice(document.fields), rng)


def damage_field(document: Document, entry: Field, rng: random.Random) -> None:
    what, other = rng.randrange(8), rng.choice(document.fields)
    if what == 0:
        document.fields.remove(entry)
    elif what == 1:
        entry.kind, entry.value = other.kind, other.value
    elif what == 2:
        entry.key = rng.choice((other.key, entry.key + b"x", rng.choice(TEXTS), b"general.alignment", b"split.count"))
    elif entry.kind != ARRAY:
        entry.kind, entry.value = scalar(entry.kind, entry.value, rng)
    else:
        items, values = entry.value
        entry.value = (items, array(items, list(values), rng))
        if rng.random() < 0.1:
            entry.value = (5, list(range(len(values))))


def scalar(kind: int, old: Any, rng: random.Random) -> tuple[int, Any]:
    """Another value, sometimes of another type."""
    if kind == STRING:
        return kind, rng.choice(TEXTS)
    if kind == 7:
        return kind, not old
    if kind in (6, 12) or rng.random() < 0.1:
        return 6, rng.choice((*FLOATS, float(old) * 2))
    near = (old + 1, old - 1, old * 2, old // 2, -old)
    number = int(rng.choice((*NUMBERS, *near, *near)))
    signed = number < 0 or rng.random() < 0.1
    return (11, (number + (1 << 63)) % (1 << 64) - (1 << 63)) if signed else (10, number % (1 << 64))


def array(items: int, values: list[Any], rng: random.Random) -> list[Any]:
    what = rng.randrange(6)
    if what == 0 or not values:
        return []
    at = rng.randrange(len(values))
    if what == 1:
        return values[:at]
    if what == 2:
        return [*values, values[at]]
    if what == 3:
        values[at] = rng.choice(values)
    elif items == STRING:
        values[at] = rng.choice((*TEXTS, values[at] * 2, b"a b c", b"<0x00>"))
    elif items in (6, 12):
        values[at] = rng.choice(FLOATS)
    elif items != 7:
        values[at] = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 99, 127))
    return values


def damage_tensor(document: Document, tensor: Stored, rng: random.Random) -> None:
    what, other = rng.randrange(7), rng.choice(document.tensors)
    if what == 0:
        document.tensors.remove(tensor)
    elif what == 1:
        tensor.name = rng.choice((other.name, *NAMES, *TEXTS[:6]))
    elif what == 2:
        at = rng.randrange(len(tensor.sizes))
        old = tensor.sizes[at]
        tensor.sizes[at] = rng.choice((*NUMBERS, old + 1, old * 2, old // 2, old + 32, old + 256))
    elif what == 3:
        tensor.sizes = rng.choice((tensor.sizes[::-1], [math.prod(tensor.sizes)], [*tensor.sizes, 1], other.sizes[:]))
    elif what == 4:
        tensor.kind = rng.randrange(42)
    elif what == 5:
        tensor.data = rng.randbytes(len(tensor.data))
    else:
        document.tensors.append(Stored(rng.choice(NAMES), tensor.sizes[:], tensor.kind, tensor.data))
