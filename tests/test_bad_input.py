"""Bad input through the command line: the exit code, one `error:` line, one `hint:` line, and nothing left behind.

Every command runs under an alarm and a memory limit, so that a hang or a huge allocation is a failure, not the end.
"""

import contextlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantool.cli.options import CALIBRATED
from quantool.scheme import METHOD_NAMES

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SECONDS = 10
MEMORY = 4 << 30  # beyond what the process has mapped already

Fails = Callable[..., str]
Edit = Callable[[Path], Any]


class StillRunning(BaseException):
    """No Exception, for these are turned into error lines."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise StillRunning(f"after {SECONDS} seconds")

    mapped = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def everything_in(path: Path) -> dict[str, int]:
    """Every file and directory below `path`, hidden ones too, and the sizes of the files."""
    return {str(p.relative_to(path)): p.stat().st_size if p.is_file() else -1 for p in path.rglob("*")}


@pytest.fixture
def fails(command: Callable[..., Any], tmp_path: Path) -> Fails:
    """Run a command that must fail with `code`; returns what it wrote to stderr."""
    import transformers  # noqa: F401 - so that the limits hold for the command alone

    def run(*args: object, code: int = 1) -> str:
        before = everything_in(tmp_path)
        with guarded():
            outcome = command(*args)
        err: str = outcome.err
        assert outcome.code == code, err
        assert [line.partition(": ")[0] for line in err.splitlines()] == ["error", "hint"], err
        assert not any(words in err for words in ("Traceback", "internal error", "out of memory")), err
        assert len(err) < 1000
        assert outcome.out == ""
        assert everything_in(tmp_path) == before
        return err

    return run


@pytest.fixture
def commands(text_file: Path, tmp_path: Path) -> dict[str, Callable[[Path], list[object]]]:
    """Every command that reads a model, as a function from MODEL to arguments."""
    text = ["--dataset", text_file, "--num-samples", 2, "--seq-len", 32]
    out, file = tmp_path / "out", tmp_path / "calibration.safetensors"
    return {
        "rtn": lambda model: ["quantize", model, "-o", out],
        "awq": lambda model: ["quantize", model, "-o", out, "--method", "awq", *text],
        "calibrate": lambda model: ["calibrate", model, "-o", file, *text],
        "eval-ppl": lambda model: ["eval-ppl", model, *text],
        "inspect": lambda model: ["inspect", model],
    }


WRITERS = ("rtn", "awq", "calibrate")
RUNNERS = ("rtn", "awq", "calibrate", "eval-ppl")
Commands = dict[str, Callable[[Path], list[object]]]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(tiny_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sharded, tmp_path / "model"))


# --- damaged weights


def a_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[1]


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def largest(header: dict[str, Any]) -> dict[str, Any]:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    found: dict[str, Any] = max(entries, key=lambda entry: entry["data_offsets"][1])
    return found


def truncate(model: Path) -> None:
    shard = a_shard(model)
    os.truncate(shard, shard.stat().st_size - 10)


def long_header(model: Path) -> None:
    shard = a_shard(model)
    shard.write_bytes((shard.stat().st_size + 1).to_bytes(8, "little") + shard.read_bytes()[8:])


def huge_header(model: Path) -> None:
    a_shard(model).write_bytes(b"\xff" * 7 + b"\x7f" + a_shard(model).read_bytes()[8:])


def overlap(model: Path) -> None:
    def shift(header: dict[str, Any]) -> None:
        offsets = largest(header)["data_offsets"]
        offsets[:] = [offset - 64 for offset in offsets]

    edit_header(a_shard(model), shift)


def beyond(model: Path) -> None:
    def shift(header: dict[str, Any]) -> None:
        offsets = largest(header)["data_offsets"]
        offsets[:] = [offset + (1 << 40) for offset in offsets]

    edit_header(a_shard(model), shift)


def negative_offsets(model: Path) -> None:
    edit_header(a_shard(model), lambda header: largest(header).update(data_offsets=[-8, 8]))


def unknown_dtype(model: Path) -> None:
    edit_header(a_shard(model), lambda header: largest(header).update(dtype="BF17"))


def huge_shape(model: Path) -> None:
    edit_header(a_shard(model), lambda header: largest(header).update(shape=[1 << 40, 1 << 40]))


def header_of_noise(model: Path) -> None:
    data = a_shard(model).read_bytes()
    a_shard(model).write_bytes(data[:8] + b"\x80" * 50 + data[58:])


def point_outside(model: Path, name: str) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shutil.copy(a_shard(model), model.parent / "secret.safetensors")
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))


def pickle_instead(model: Path) -> None:
    for shard in model.glob("*.safetensors*"):
        shard.unlink()
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": 1}, file)


def directory_instead(model: Path) -> None:
    shard = a_shard(model)
    shard.unlink()
    shard.mkdir()


def pipe_instead(model: Path) -> None:
    shard = a_shard(model)
    shard.unlink()
    os.mkfifo(shard)


DAMAGES: dict[str, tuple[Edit, str]] = {
    "missing shard": (lambda model: a_shard(model).unlink(), "model-00002-of-"),
    "truncated shard": (truncate, "truncated"),
    "header longer than the file": (long_header, "the header needs"),
    "header of exabytes": (huge_header, "the header claims"),
    "overlapping offsets": (overlap, "before the tensor in front of it ends"),
    "offsets beyond the file": (beyond, "starts at byte 1099"),
    "negative offsets": (negative_offsets, "data_offsets is [-8, 8]"),
    "unknown dtype": (unknown_dtype, "unknown dtype 'BF17'"),
    "huge shape": (huge_shape, "1099511627776"),
    "header of noise": (header_of_noise, "bad header"),
    "index beside the directory": (lambda m: point_outside(m, "../secret.safetensors"), "../secret.safetensors"),
    "index at the root": (lambda m: point_outside(m, str(m.parent / "secret.safetensors")), "secret.safetensors"),
    "index that is no JSON": (lambda m: (m / "model.safetensors.index.json").write_text("{"), "not a JSON object"),
    "pickle": (pickle_instead, "pytorch_model.bin"),
    "directory in place of a file": (directory_instead, "is a directory"),
    "pipe in place of a file": (pipe_instead, "not a regular file"),
    "no weights": (lambda model: [path.unlink() for path in model.glob("*.safetensors*")], "no model.safetensors"),
    "no config": (lambda model: (model / "config.json").unlink(), "no config.json"),
    "config that is no JSON": (lambda model: (model / "config.json").write_text("{'a': 1}"), "config.json"),
    "config that is a list": (lambda model: (model / "config.json").write_text("[1]"), "config.json"),
    "config of binary": (lambda model: (model / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(fails: Fails, commands: Commands, sharded: Path, damage: str) -> None:
    edit, words = DAMAGES[damage]
    edit(sharded)
    for name in commands:
        assert words in fails(*commands[name](sharded)), name


def test_paths_that_are_no_model(fails: Fails, commands: Commands, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    data = tiny_gguf.read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[: len(data) // 2])
    (tmp_path / "shorter.gguf").write_bytes(data[:30])
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "noise.gguf").write_bytes(data[:24] + b"\xff" * 5000)
    (tmp_path / "model.bin").write_bytes(pickle.dumps({}))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, words in (
        ("nothing", "no such file or directory"),
        ("empty", "the directory is empty"),
        ("file", "is not a model"),
        ("short.gguf", "short.gguf"),
        ("shorter.gguf", "shorter.gguf"),
        ("empty.gguf", "empty.gguf"),
        ("noise.gguf", "noise.gguf"),
        ("model.bin", "model.bin"),
        ("loop", "loop"),
        ("pipe.gguf", "not a regular file"),
    ):
        for name in commands:
            assert words in fails(*commands[name](tmp_path / path)), (path, name)


# --- configs


def write_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": None}, "model_type"),
        ({"model_type": 7}, "model_type"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, the checkpoint holds 2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": "x"}, "quant_method"),
    ],
    ids=str,
)
def test_configs_that_are_no_float_decoder(
    fails: Fails, commands: Commands, model: Path, changes: dict[str, Any], words: str
) -> None:
    write_config(model, **changes)
    for name in RUNNERS:
        assert words in fails(*commands[name](model)), name


BAD_SIZES = {
    "hidden_size": (0, -128, 10**9, "128x"),
    "intermediate_size": (0, -1, 10**12),
    "num_attention_heads": (0, -4, 10**9, 3),
    "num_key_value_heads": (0, -2, 3),
    "head_dim": (0, -32, 10**9),
    "vocab_size": (0, -1, 10**12),
    "num_hidden_layers": (1e9, "2", [2]),
    "model_type": ("nope", "t5", "../../etc"),
    "rope_parameters": ("x", {"rope_type": "nope"}),
    "hidden_act": ("nope",),
}


@pytest.mark.parametrize("key", BAD_SIZES)
def test_configs_that_contradict_the_weights(fails: Fails, commands: Commands, model: Path, key: str) -> None:
    for value in BAD_SIZES[key]:
        write_config(model, **{key: value})
        for name in ("awq", "eval-ppl"):
            fails(*commands[name](model))


@pytest.mark.parametrize("value", [10**12, 0, -1, "x", None])
def test_the_window_limit_of_a_config(command: Callable[..., Any], model: Path, text_file: Path, value: Any) -> None:
    """A limit that makes no sense is refused in one line or ignored."""
    write_config(model, max_position_embeddings=value)
    with guarded():
        outcome = command("eval-ppl", model, "--dataset", text_file, "--num-samples", 1)
    assert "internal error" not in outcome.err
    assert outcome.code in (0, 1, 2)
    assert outcome.err.count("\n") == (0 if outcome.code == 0 else 2)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_layer": 10**9, "hidden_size": 128},
        {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "n_layer": 10**9, "n_embd": 128},
        {"model_type": "mpt", "architectures": ["MptForCausalLM"], "n_layers": 10**9, "d_model": 128},
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"num_hidden_layers": 10**9, "hidden_size": 128},
        },
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_a_depth_by_any_name(fails: Fails, commands: Commands, model: Path, config: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps(config))
    for name in ("awq", "eval-ppl"):
        fails(*commands[name](model))


# --- weights that are not finite


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant", "nf4", "llm-int8"])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("model.layers.1.mlp.up_proj.weight", math.nan),
        ("model.layers.0.self_attn.q_proj.weight", -math.inf),
        ("model.layers.1.input_layernorm.weight", math.inf),
        ("model.norm.weight", math.nan),
        ("model.embed_tokens.weight", math.nan),
        ("lm_head.weight", math.inf),
    ],
)
def test_weights_that_are_not_finite(
    fails: Fails, commands: Commands, model: Path, method: str, name: str, bad: float
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[77] = bad
    save_file(tensors, model / "model.safetensors")
    err = fails(*commands["awq" if method in CALIBRATED else "rtn"](model), "--method", method)
    assert f"'{name}'" in err
    assert "NaN or Inf" in err


# --- weights and activations at the edge


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_weights_of_zeros_and_of_one_value(
    command: Callable[..., Any], commands: Commands, model: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    """Groups without a range: the artifact computes about what the model does."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
    tensors["model.layers.1.mlp.gate_proj.weight"].fill_(0.01)
    tensors["model.layers.1.self_attn.o_proj.weight"][5] = -0.03
    save_file(tensors, model / "model.safetensors")
    args = [*commands["awq" if method in CALIBRATED else "rtn"](model), "--method", method]
    with guarded():
        done = command(*args)
    assert done.code == 0, done.err
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in written.values() if tensor.is_floating_point())
    text = ["--dataset", text_file, "--num-samples", 2, "--seq-len", 32]
    lost = command("eval-ppl", tmp_path / "out", *text, "--reference", model, "--max-kld", "0.15")
    assert lost.code == 0, lost.err


@pytest.mark.parametrize("method", CALIBRATED)
def test_one_window_of_two_tokens(
    command: Callable[..., Any], tiny_llama: Path, text_file: Path, tmp_path: Path, method: str
) -> None:
    """A second moment of rank two: little to calibrate on, and no reason to fail."""
    text = ["--dataset", text_file, "--num-samples", 1, "--seq-len", 2]
    with guarded():
        done = command("quantize", tiny_llama, "-o", tmp_path / "out", "--method", method, *text)
    assert done.code == 0, done.err
    text = ["--dataset", text_file, "--num-samples", 2, "--seq-len", 32]
    lost = command("eval-ppl", tmp_path / "out", *text, "--reference", tiny_llama, "--max-kld", "0.05")
    assert lost.code == 0, lost.err


@pytest.mark.parametrize("method", [*CALIBRATED, "calibrate"])
def test_activations_that_overflow_float16(fails: Fails, commands: Commands, model: Path, method: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].fill_(60_000)
    save_file(tensors, model / "model.safetensors")
    args = [*commands["awq"](model), "--method", method] if method in CALIBRATED else commands[method](model)
    err = fails(*args, "--dtype", "float16")
    assert "model.layers.1.mlp." in err
    assert "NaN or Inf, expected finite activations" in err
    assert "use --dtype float32" in err


def test_a_weight_that_llm_int8_cannot_hold(fails: Fails, commands: Commands, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70_000
    save_file(tensors, model / "model.safetensors")
    err = fails(*commands["rtn"](model), "--method", "llm-int8")
    assert "'model.layers.1.mlp.up_proj': weight [3, 5] is 70144, expected at most 65504" in err
    assert "hint: use --method nf4, or leave this linear in float: --ignore NAME" in err


# --- options that do not go together


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method nf4 --bits 8", "method nf4 has no --bits 8"),
        ("--method nf4 --group-size 48", "has blocks of 32, 64, 128,"),
        ("--method nf4 --format compressed-tensors", "cannot hold 'model.layers.0.mlp.down_proj'"),
        ("--method nf4 --outlier-threshold 6", "--outlier-threshold belongs to method 'llm-int8'"),
        ("--method fp4 --asym", "method fp4 has no --asym"),
        ("--method llm-int8 --asym", "method llm-int8 has no --asym"),
        ("--method llm-int8 --group-size 64", "method llm-int8 has no --group-size 64"),
        ("--method llm-int8 --format gptq", "cannot hold 'model.layers.0.mlp.down_proj'"),
        ("--method smoothquant --act-bits 16", "smoothquant is for 8-bit activations, found --act-bits 16"),
        ("--method smoothquant --bits 4", "needs symmetric 8-bit weights per channel or tensor with 8-bit activations"),
        ("--method smoothquant --group-size 128", "not W8A8 sym g128"),
        ("--method smoothquant --asym", "not W8A8 asym channel"),
        ("--method smoothquant --format gptq", "cannot hold 'model.layers.0.mlp.down_proj'"),
        ("--method smoothquant --act-static --ignore=", "'lm_head' is in no decoder block"),
        ("--act-bits 8", "needs symmetric 8-bit weights per channel or tensor with 8-bit activations, not W4A8"),
        (
            "--bits 8 --act-bits 8 --act-static",
            "a stored activation scale needs calibration, and method rtn looks at none",
        ),
        ("--scheme W8A8_STATIC", "a stored activation scale needs calibration"),
        ("--method awq --act-static", "--act-static has no effect on float activations"),
        ("--method gptq --act-asym", "--act-asym has no effect on float activations"),
        ("--method awq --smoothing-strength 0.5", "--smoothing-strength belongs to method 'smoothquant'"),
        ("--method gptq --actorder group", "refuses groups in activation order"),
        ("--method gptq --actorder group --format awq", "no place for groups in activation order"),
        ("--method awq+gptq --actorder group --bits 5", "refuses groups in activation order"),
        ("--bits 5 --format gptq", "format gptq holds integer weights of 2, 3, 4, 8 bits only"),
        ("--bits 8 --format awq", "cannot hold 'model.layers.0.mlp.down_proj'"),
        ("--format bitsandbytes", "holds weights of the methods nf4, fp4 and llm-int8 only"),
        ("--damp-percent 0.1", "--damp-percent belongs to method 'gptq', 'awq+gptq' or"),
        ("--group-size 100", "group size 100 does not divide"),
    ],
)
def test_the_hint_can_be_pasted(
    fails: Fails,
    command: Callable[..., Any],
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    options: str,
    words: str,
) -> None:
    args: list[object] = ["quantize", tiny_llama, "-o", tmp_path / "out", *options.split()]
    err = fails(*args, code=2)
    assert words in err
    remedy = re.search(r"^hint: use (--.+?)(,| or |$)", err, re.MULTILINE)
    assert remedy, err
    args += [*remedy[1].split(), "--dry-run"]
    method = re.findall(r"--method (\S+)", f"{options} {remedy[1]}")
    if method and method[-1] in CALIBRATED:
        args += ["--dataset", text_file, "--num-samples", 2, "--seq-len", 16]
    done = command(*args)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("format_", "overrides", "words"),
    [
        ("gptq", "{match: o_proj, sym: false}", "symmetric weights as v1 and asymmetric or 3-bit ones as v2, not both"),
        ("gptq", "{match: o_proj, bits: 5}", "cannot hold 'model.layers.0.self_attn.o_proj'"),
        ("awq", "{match: o_proj, group_size: 32}", "one group size for all modules"),
    ],
)
def test_a_format_of_one_scheme_refuses_several(
    fails: Fails,
    command: Callable[..., Any],
    tiny_llama: Path,
    tmp_path: Path,
    format_: str,
    overrides: str,
    words: str,
) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(f"quantize: {{group_size: 64, overrides: [{overrides}]}}")
    args = ["quantize", tiny_llama, "-c", config, "-o", tmp_path / "out"]
    err = fails(*args, "--format", format_, code=2)
    assert words in err
    assert "hint: use --format compressed-tensors" in err
    done = command(*args, "--format", "compressed-tensors", "--json")
    assert done.code == 0, done.err
    assert "," in json.loads(done.out)["scheme"]


def test_statistics_and_perplexity_that_are_not_finite(
    fails: Fails, command: Callable[..., Any], commands: Commands, model: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(math.nan)
    save_file(tensors, model / "model.safetensors")
    assert "model.layers.1.mlp.down_proj" in fails(*commands["calibrate"](model))
    outcome = command(*commands["eval-ppl"](model), "--max-ppl", "1e9", "--json")
    assert outcome.code == 3, "NaN is not below a limit"
    assert json.loads(outcome.out)["perplexity"] is None


# --- outputs


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond `limit` bytes: what a full disk is to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("limit", [1000, 20_000])
def test_no_room_for_the_output(fails: Fails, commands: Commands, tiny_llama: Path, name: str, limit: int) -> None:
    with small_files(limit):
        err = fails(*commands[name](tiny_llama))
    assert "File too large" in err
    assert "free some space" in err


@pytest.mark.parametrize("spare", [-100_000, 4096])
def test_a_full_disk(tiny_llama: Path, tmp_path: Path, command: Callable[..., Any], spare: int) -> None:
    """A real small file system: too small for the weights, then large enough for these and not for the tokenizer."""
    dry = json.loads(command("quantize", tiny_llama, "--dry-run", "--json").out)
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (dry["bytes"] + 4096 + spare) // 4096 * 4096
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=$1 none "$2" && shift 2 && exec "$@"', "sh"]
    mount += [str(size), str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    script = '"$0" -m quantool quantize "$1" -o "$2/new/out"; code=$?; ls -A "$2"; exit $code'
    args = ["sh", "-c", script, sys.executable, str(tiny_llama), str(disk)]
    done = subprocess.run([*mount, *args], capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 1
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["error", "hint"], done.stderr
    assert ("No space left" in done.stderr) or ("bytes, the file system has" in done.stderr)
    assert done.stdout == "", "nothing is left on the disk"


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_exists(fails: Fails, commands: Commands, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    args = commands[name](tiny_llama)
    output = Path(str(args[args.index("-o") + 1]))
    output.write_text("mine")
    assert "xists" in fails(*args, code=2)
    if name != "calibrate":
        assert "not a directory" in fails(*args, "--overwrite", code=2)
    output.unlink()
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    assert "xists" in fails(*args, code=2)
    words = "is not a file" if name == "calibrate" else "is not a checkpoint"
    assert words in fails(*args, "--overwrite", code=2)
    assert (output / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_below_a_file(fails: Fails, commands: Commands, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    args = commands[name](tiny_llama)
    args[args.index("-o") + 1] = tmp_path / "file" / "out"
    assert "file" in fails(*args)


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_run_keeps_what_it_would_replace(
    fails: Fails, command: Callable[..., Any], commands: Commands, model: Path, name: str
) -> None:
    assert command(*commands[name](model)).code == 0
    truncated = model / "model.safetensors"
    os.truncate(truncated, truncated.stat().st_size - 10)
    fails(*commands[name](model), "--overwrite")


# --- tokenizers and text


@pytest.mark.parametrize("content", [None, "", "{}", "[" * 5000, '{"version": "1.0", "model": {"type": "Nope"}}'])
def test_a_tokenizer_that_is_missing_or_broken(
    fails: Fails, command: Callable[..., Any], commands: Commands, model: Path, content: str | None
) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    for name in ("awq", "calibrate", "eval-ppl"):
        assert "okenizer" in fails(*commands[name](model)), name
    assert command(*commands["rtn"](model)).code == 0, "rtn has no use for one"


@pytest.mark.parametrize("name", ["awq", "calibrate", "eval-ppl"])
def test_text_that_cannot_be_used(
    fails: Fails, commands: Commands, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "some words", "id": 1}\n' * 50)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words only")
    (tmp_path / "folder").mkdir()
    for dataset, code, words in (
        ("rows.jsonl", 2, "no column 'text', it has body, id"),
        ("empty.txt", 1, "the text has 0 (0 tokens)"),
        ("short.txt", 1, "2 windows of 32 tokens asked for, the text has 0"),
        ("nothing.txt", 1, "no such file"),
        ("folder", 1, "folder"),
    ):
        args = commands[name](tiny_llama)
        args[args.index("--dataset") + 1] = tmp_path / dataset
        assert words in fails(*args, code=code), dataset


@pytest.mark.parametrize(
    ("name", "content"), [("broken.jsonl", b'{"text": "some words"\n' * 50), ("noise.parquet", b"PAR1" + b"\xff" * 100)]
)
def test_files_that_are_no_dataset(tiny_llama: Path, tmp_path: Path, name: str, content: bytes) -> None:
    """In a process of its own: the datasets library has a log of its own, which is set up once."""
    (tmp_path / name).write_bytes(content)
    args = ["calibrate", str(tiny_llama), "-o", str(tmp_path / "c"), "--dataset", str(tmp_path / name)]
    command = [sys.executable, "-m", "quantool", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 1
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["error", "hint"], done.stderr
    assert name in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_split_that_does_not_exist(fails: Fails, tiny_llama: Path) -> None:
    assert "no split 'dev'" in fails("eval-ppl", tiny_llama, "--split", "dev", code=2)


# --- usage that only the model decides


def test_wrong_usage(fails: Fails, tiny_llama: Path, tmp_path: Path) -> None:
    quantize = ["quantize", tiny_llama, "-o", tmp_path / "out"]
    for options, words in (
        (["--n-grid", "5"], "--n-grid belongs to method 'awq'"),
        (["--method", "awq", "--mse"], "--mse belongs to method 'rtn'"),
        (["--calibration", tiny_llama / "model.safetensors"], "--calibration belongs to method 'gptq', 'awq'"),
        (["--num-samples", "5"], "--num-samples belongs to method 'gptq', 'awq'"),
        (["--group-size", "100"], "group size 100 does not divide"),
        (["--format", "awq", "--bits", "8"], "cannot hold"),
        (["--ignore", "nothing_proj"], "'nothing_proj' matches no linear"),
        (["--ignore", "re:["], "re:["),
        (["--bits", "9"], "9"),
        (["--method", "awq", "--device", "cuda:99", "--num-samples", "1", "--seq-len", "9"], "cuda:99"),
    ):
        assert words in fails(*quantize, *options, code=2), options


def test_an_artifact_that_is_quantized_again(
    fails: Fails, command: Callable[..., Any], commands: Commands, tiny_llama: Path, tmp_path: Path
) -> None:
    assert command("quantize", tiny_llama, "-o", tmp_path / "first").code == 0
    for name in ("rtn", "awq"):
        assert "already quantized" in fails(*commands[name](tmp_path / "first"))


# --- signals


LONG = {
    "awq": ["--n-grid", "100000", "--num-samples", "2", "--seq-len", "32"],
    "gptq": ["--num-samples", "800", "--seq-len", "256"],
}


@contextlib.contextmanager
def at_work(method: str, model: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that would take long, once its first bytes are on the disk."""
    args = ["quantize", str(model), "-o", str(output), "--method", method, *LONG[method]]
    command = [sys.executable, "-m", "quantool", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        deadline = time.monotonic() + 60
        while not list(output.parent.glob(".out.tmp-*/tokenizer.json")):
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # on to the work itself
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("method", "number", "code"),
    [("awq", signal.SIGINT, 130), ("awq", signal.SIGTERM, 143), ("gptq", signal.SIGINT, 130)],
)
def test_signals_leave_nothing(tiny_llama: Path, tmp_path: Path, method: str, number: int, code: int) -> None:
    with at_work(method, tiny_llama, tmp_path / "new" / "out") as child:
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    assert child.returncode == code
    assert out == ""
    assert err.strip() == f"error: {'interrupted' if code == 130 else 'terminated'}"
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_that_looks_finished(
    tiny_llama: Path, tmp_path: Path, command: Callable[..., Any], commands: Commands
) -> None:
    with at_work("awq", tiny_llama, tmp_path / "out") as child:
        child.kill()
        child.communicate(timeout=20)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("**/config.json")), "what is left is no checkpoint"
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert command(*commands["rtn"](tiny_llama)).code == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
