"""A GPU without room: half the work at a time gives the same bytes, said once; or the bytes that would be enough."""

import filecmp
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from elsewhere import DEVICE, elsewhere
from transformers.models.llama.modeling_llama import LlamaMLP

from quantool import quant
from quantool.errors import QuantoolError
from quantool.formats.ggml import GGML_TYPES
from quantool.methods import WEIGHT_METHODS
from quantool.model import memory
from quantool.quant import QuantizedTensor
from quantool.scheme import MethodOptions, QuantScheme

NO_ROOM = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB."
NOTE = "note: the GPU has no room for {} at a time: taking fewer"


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_said", set())


def with_room_for(rows: int, function: Callable[..., Any], argument: int = 0) -> Callable[..., Any]:
    """The function, on a GPU that has room for so many rows of its argument."""

    def short(*args: Any, **kwargs: Any) -> Any:
        if len(args[argument]) > rows:
            raise torch.OutOfMemoryError(NO_ROOM)
        return function(*args, **kwargs)

    return short


@pytest.mark.parametrize("room", [1, 3, 4, 7, 100])
def test_pieces_cover_everything_once(room: int) -> None:
    numbers = list(range(23))
    copy = with_room_for(room, list)
    pieces = list(memory.in_pieces("numbers", len(numbers), 16, lambda part: copy(numbers[part])))
    assert [number for _, piece in pieces for number in piece] == numbers
    assert [first for first, _ in pieces] == [piece[0] for _, piece in pieces]
    assert all(len(piece) <= min(room, 16) for _, piece in pieces)


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("rtn", QuantScheme(4, 32)),
        ("rtn", QuantScheme(4, 32, sym=False)),
        ("nf4", QuantScheme(4, 64, dtype="nf4", double_quant=True)),
        ("llm-int8", QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0)),
    ],
    ids=str,
)
def test_weights_in_fewer_rows_have_the_same_codes(
    method: str, scheme: QuantScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))

    def quantize(w: torch.Tensor) -> QuantizedTensor:
        return WEIGHT_METHODS[method](w, scheme, lambda scales: scales.to(torch.bfloat16), options=MethodOptions())

    expected = quantize(weight)
    monkeypatch.setattr(torch.Tensor, "amax", with_room_for(8, torch.Tensor.amax))
    monkeypatch.setattr(quant, "group_range", with_room_for(8, quant.group_range))
    with elsewhere():
        found = quantize(weight.to(DEVICE))
        assert torch.equal(found.codes.cpu(), expected.codes)
        assert torch.equal(found.scales.cpu(), expected.scales)
        assert (found.zeros is None) == (expected.zeros is None)
        assert found.zeros is None or torch.equal(found.zeros.cpu(), expected.zeros)
    assert memory._said


def test_a_file_is_the_same_with_fewer_rows_at_a_time(
    tiny_llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    outtype = ("--outtype", "q8_0", "--device", "cpu")
    assert command("convert-gguf", tiny_llama, "-o", tmp_path / "plain.gguf", *outtype).code == 0
    kind = type(GGML_TYPES["Q8_0"])
    monkeypatch.setattr(kind, "quantize", with_room_for(50, kind.quantize, argument=1))
    done = command("convert-gguf", tiny_llama, "-o", tmp_path / "short.gguf", *outtype)
    assert (done.code, done.err) == (0, f"{NOTE.format('320 rows')}\n")
    assert filecmp.cmp(tmp_path / "plain.gguf", tmp_path / "short.gguf", shallow=False)


@pytest.mark.parametrize("name", ["calibrate", "quantize", "eval-ppl"])
def test_batches_are_halved(
    name: str, tiny_llama: Path, text_file: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: str, batch_size: int) -> Any:
        text = ("--dataset", text_file, "--num-samples", "5", "--seq-len", "48", "--batch-size", batch_size)
        method = ("--method", "gptq") if name == "quantize" else ()
        where = () if name == "eval-ppl" else ("-o", tmp_path / output)
        done = command(name, tiny_llama, *text, *method, *where, "--device", "cpu", "--json")
        assert done.code == 0, done.err
        return done

    plain = run("plain", 2)
    monkeypatch.setattr(LlamaMLP, "forward", with_room_for(3, LlamaMLP.forward, argument=1))
    short = run("short", 4)
    assert (plain.err, short.err) == ("", f"{NOTE.format('4 windows')}\n")
    if name == "eval-ppl":
        found = [re.search(r'"perplexity": ([\d.]+)', done.out) for done in (plain, short)]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0][1] == found[1][1]
        return
    left, right = ([tmp_path / output, *(tmp_path / output).glob("*")] for output in ("plain", "short"))
    for a, b in zip(left, right, strict=True):
        assert a.is_dir() or filecmp.cmp(a, b, shallow=False)


@pytest.mark.parametrize("name", ["calibrate", "quantize", "eval-ppl", "convert-gguf"])
def test_what_has_no_room_at_all_says_how_much_would_be_enough(
    name: str, tiny_llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", with_room_for(0, LlamaMLP.forward, argument=1))
    method = ("--method", "gptq") if name in ("quantize", "convert-gguf") else ()
    outtype = ("--outtype", "q8_0") if name == "convert-gguf" else ()
    where = () if name == "eval-ppl" else ("-o", tmp_path / "out")
    done = command(name, tiny_llama, *method, *outtype, *where, "--num-samples", "2", "--device", "cpu")
    assert done.code == 1
    assert "error: out of GPU memory: 2684354560 bytes of it would have been enough to go on\n" in done.err
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_nothing_of_what_was_computed() -> None:
    """Before less is tried, the memory of what did not fit is free."""
    alive: list[Any] = []

    class Held:
        pass

    def work(size: int) -> int:
        assert not any(reference() for reference in alive)
        held = Held()
        alive.append(weakref.ref(held))
        if size > 2:
            raise torch.OutOfMemoryError(NO_ROOM)
        return size

    assert memory.halving("rows", 16, work) == (2, 2)
    assert len(alive) == 4


def test_other_errors_are_not_taken_for_it() -> None:
    def work(_size: int) -> None:
        raise QuantoolError("something else")

    with pytest.raises(QuantoolError, match="something else"), memory.explained():
        memory.halving("rows", 8, work)
