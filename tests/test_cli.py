"""The command line: what reaches a stage, what is printed where, and the exit code of each failure.

Stages are replaced by a recorder here, for what they compute is tested beside them.
"""

import errno
import importlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import quantool.stages
from quantool import __version__, cli, console
from quantool.cli import options
from quantool.data import TextOptions
from quantool.errors import CheckFailed, QuantoolError
from quantool.recipe import Override, Recipe
from quantool.scheme import METHOD_NAMES, GgufOptions, MethodOptions

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("calibrate", "quantize", "convert-gguf", "inspect", "eval-ppl")
ESCAPE = "\x1b"

# What each stage returns, as --json promises it.
RESULTS: dict[str, dict[str, Any]] = {
    "calibrate": {
        "output": "calibration.safetensors",
        "linears": 210,
        "tokens": 16384,
        "num_samples": 32,
        "seq_len": 512,
        "dataset": "builtin",
        "seed": 0,
        "bytes": 1_234_567,
        "seconds": 12.34,
        "peak_memory_bytes": 2_500_000_000,
        "starved_experts": 0,
        "least_expert": None,
        "least_tokens": None,
    },
    "quantize": {
        "output": "m-rtn-w4-g64",
        "method": "rtn",
        "format": "compressed-tensors",
        "scheme": "W4A16 sym g64",
        "group_size": 64,
        "bytes": 98_765_432,
        "bits_per_weight": 4.56789,
        "quantized": 210,
        "copied": 62,
        "folded": 1,
        "dropped": 2,
        "seconds": 123.4,
        "peak_memory_bytes": 900_000_000,
        "plan": [],
        "notes": ["group size 64: the largest of 128, 64, 32 that divides every row"],
        "bound": None,
        "busy_seconds": {},
    },
    "convert_gguf": {
        "output": "m-Q4_K_M.gguf",
        "architecture": "llama",
        "outtype": "q4_k_m",
        "method": "rtn",
        "bytes": 98_765_432,
        "bits_per_weight": 4.56789,
        "quantized": 210,
        "copied": 62,
        "folded": 0,
        "dropped": 1,
        "fallbacks": 3,
        "types": {"F32": 61, "Q4_K": 150},
        "seconds": 12.3,
        "peak_memory_bytes": 500_000_000,
        "plan": [],
        "notes": ["rows of 576 are not whole Q4_K blocks"],
        "bound": "disk",
        "busy_seconds": {"reading": 11.5, "copying": 0.4, "computing": 6.2, "writing": 9.8},
    },
    "inspect": {
        "artifact": "m",
        "format": "compressed-tensors",
        "parameters": 134_515_008,
        "bytes": 98_765_432,
        "bits_per_weight": 5.874,
        "by_dtype": {"BF16": {"tensors": 61, "parameters": 28_000_000, "bytes": 56_000_000}},
        "by_kind": {"mlp": {"parameters": 80_000_000, "bytes": 45_000_000, "bits_per_weight": 4.5}},
        "schemes": {"W4A16 sym g64": 210},
        "metadata": {"format": "pt"},
        "tensors": [],
        "linears": None,
        "activations": [],
        "gguf": None,
        "notes": [],
    },
    "eval_ppl": {
        "model": "m",
        "protocol": "hf",
        "perplexity": 36.123456,
        "perplexity_error": 0.5,
        "tokens": 6132,
        "num_samples": 12,
        "seq_len": 512,
        "dataset": "builtin",
        "seconds": 9.9,
        "peak_memory_bytes": 1_000_000_000,
        **dict.fromkeys(
            (
                *("reference_perplexity", "reference_perplexity_error", "kl_divergence", "kl_divergence_error"),
                *("kl_divergence_percentiles", "top1_agreement", "top1_agreement_error", "perplexity_ratio"),
                *("perplexity_ratio_error", "perplexity_difference", "perplexity_difference_error"),
                *("ln_perplexity_ratio", "ln_perplexity_ratio_error", "ln_perplexity_correlation", "delta_p"),
                *("delta_p_error", "delta_p_rms", "delta_p_rms_error", "delta_p_percentiles"),
            )
        ),
    },
}
TENSOR = {"name": "w", "dtype": "I32", "shape": [8, 2], "bytes": 64, "bits_per_weight": 4.25, "relative_error": 0.0812}
TENSOR |= {"min": None, "max": None, "mean": None}
PLAN_ROW = {"name": "w", "shape": [8, 2], "dtype": "I32", "action": "quantized", "scheme": "W4A16 sym g64", "bytes": 64}


def result(stage: str, **changes: Any) -> Any:
    values = {**RESULTS[stage], **changes}
    return make_dataclass("Result", values)(**values)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@dataclass
class Stages:
    """Stands for the stages: keeps the arguments, returns `results` or raises `error`."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None

    def runner(self, name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if self.error:
                raise self.error
            return result(name, **self.changes)

        return run

    @property
    def recipe(self) -> Recipe:
        recipe = self.calls[-1][1][2]
        assert isinstance(recipe, Recipe)
        return recipe

    @property
    def text(self) -> TextOptions:
        text = self.calls[-1][2]["text"]
        assert isinstance(text, TextOptions)
        return text


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of ours from outside, and what a command sets for the libraries is undone."""
    for name in [name for name in os.environ if name.startswith("QUANTOOL_")]:
        monkeypatch.delenv(name)
    for name, value in cli.QUIET_LIBRARIES.items():
        monkeypatch.setenv(name, os.environ.get(name, value))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    recorder = Stages()
    for name in RESULTS:
        stub = SimpleNamespace(run=recorder.runner(name))
        monkeypatch.setattr(quantool.stages, name, stub, raising=False)
        monkeypatch.setitem(sys.modules, f"quantool.stages.{name}", stub)
    return recorder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*args: object) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Outcome(caught.value.code, out, err)  # type: ignore[arg-type]

    return run


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Callable[..., Outcome], command: str) -> None:
    for spelling in ("-h", "--help"):
        outcome = run(command, spelling)
        assert outcome.code == 0
        assert outcome.err == ""
        assert outcome.out.startswith(f"Usage: quantool {command} [OPTIONS] ")
    parameters = cli.cli.commands[command].params
    for option in [p for p in parameters if isinstance(p, click.Option)]:
        assert option.help, f"{option.name} has no help"
        assert all(not name.startswith("--") or "_" not in name for name in option.opts)
    names = {option for p in parameters for option in p.opts}
    assert {"--json", "-v", "-q"} <= names
    assert ({"-c", "--config", "--dry-run", "--overwrite"} <= names) == (
        command in ("calibrate", "quantize", "convert-gguf")
    )


def test_only_what_works_is_offered(run: Callable[..., Outcome]) -> None:
    assert set(cli.cli.commands) == set(COMMANDS)
    text = run("quantize", "--help").out
    assert "--method [rtn|gptq|awq|awq+gptq|smoothquant|nf4|fp4|llm-int8]" in text
    assert "--format [compressed-tensors|gptq|awq|bitsandbytes]" in text


def test_the_examples_in_the_help_are_accepted(
    run: Callable[..., Outcome], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "calibration.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    stages.changes = {"kl_divergence": 0.1}
    seen = 0
    for command in (cli.cli, *cli.cli.commands.values()):
        for line in (command.epilog or "").splitlines()[2:]:
            program, *args = line.split()
            assert program == "quantool"
            assert run(*args).code == 0, line
            seen += 1
    assert seen >= 7


def test_no_command_is_help_and_wrong_usage(run: Callable[..., Outcome]) -> None:
    outcome = run()
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Commands:" in outcome.err


def test_version(run: Callable[..., Outcome]) -> None:
    assert run("--version") == Outcome(0, f"quantool {__version__}\n", "")
    for args in (("--version", "-v"), ("-v", "--version")):
        lines = run(*args).out.splitlines()
        assert lines[0] == f"quantool {__version__}"
        words = ["python", "platform", "torch", "transformers", "safetensors", "gguf", "datasets"]
        assert [line.split()[0] for line in lines[1:]] == [*words, "compressed-tensors", "cuda", "kernels", "kernels"]


# What reaches a stage


def test_defaults(run: Callable[..., Outcome], stages: Stages) -> None:
    assert run("quantize", "hub/model").code == 0
    _, args, kwargs = stages.calls[-1]
    assert args == ("hub/model", None, Recipe())
    progress = kwargs.pop("progress")
    assert callable(progress)
    assert kwargs == {
        "calibration": None,
        "text": TextOptions(),
        "batch_size": None,
        "max_shard_size": 5_000_000_000,
        "dtype": "auto",
        "device": "auto",
        "dry_run": False,
        "overwrite": False,
        "repack_to": None,
    }
    assert run("quantize", "m", "--method", "awq").code == 0
    assert stages.recipe == Recipe(method="awq", sym=False)
    assert run("calibrate", "m").code == 0
    assert stages.calls[-1][1] == ("m", None)
    assert stages.text == TextOptions()
    assert run("eval-ppl", "m").code == 0
    assert stages.text == TextOptions(split="test", num_samples=None)
    assert run("inspect", "m").code == 0
    del stages.calls[-1][2]["progress"]
    assert stages.calls[-1][1:] == (
        ("m",),
        {"tensors": False, "filter": None, "stats": False, "against": None, "verify": False},
    )


def test_every_option_of_quantize(run: Callable[..., Outcome], stages: Stages) -> None:
    words = (
        "quantize m.gguf -o out --method awq --bits 3 --group-size -1 --sym --format compressed-tensors "
        "--dataset t.txt --split s --text-column c --num-samples 5 --seq-len 64 --seed 7 --ignore a --ignore re:.*b "
        "--n-grid 9 --min-expert-tokens 1 --starved-experts rtn "
        "--max-shard-size 2GiB --batch-size 4 --dtype bfloat16 --device cuda:1 --dry-run --overwrite -q"
    )
    assert run(*words.split()).code == 0
    _, args, kwargs = stages.calls[-1]
    own = MethodOptions(n_grid=9, min_expert_tokens=1, starved_experts="rtn")
    recipe = Recipe("awq", "compressed-tensors", 3, -1, sym=True, ignore=("a", "re:.*b"), options=own)
    assert args == ("m.gguf", Path("out"), recipe)
    assert stages.text == TextOptions("t.txt", "s", "c", 5, 64, 7)
    del kwargs["progress"], kwargs["text"]
    assert kwargs == {
        "calibration": None,
        "batch_size": 4,
        "max_shard_size": 2 * 2**30,
        "dtype": "bfloat16",
        "device": "cuda:1",
        "dry_run": True,
        "overwrite": True,
        "repack_to": None,
    }


def test_every_option_of_the_readers(run: Callable[..., Outcome], stages: Stages) -> None:
    assert run("inspect", "a", "--tensors", "--filter", "^x", "--stats", "--against", "r", "--verify").code == 0
    del stages.calls[-1][2]["progress"]
    expected = {"tensors": True, "filter": "^x", "stats": True, "against": "r", "verify": True}
    assert stages.calls[-1][2] == expected
    words = "eval-ppl m --dataset d --num-samples 3 --seq-len 8 --stride 4 --protocol hf --reference r --dtype float32"
    assert run(*words.split(), "--batch-size", 2).code == 0
    kwargs = stages.calls[-1][2]
    assert kwargs.pop("text") == TextOptions("d", "test", "text", 3, 8)
    del kwargs["progress"]
    expected = {"stride": 4, "protocol": "hf", "reference": "r", "batch_size": 2, "dtype": "float32", "device": "auto"}
    assert kwargs == expected


def test_every_option_of_convert_gguf(run: Callable[..., Outcome], stages: Stages) -> None:
    assert run("convert-gguf", "m").code == 0
    _, args, kwargs = stages.calls[-1]
    assert args == ("m", None, GgufOptions())
    assert kwargs["method"] == "rtn"
    words = (
        "convert-gguf m --outfile o.gguf --outtype Q4_K_M --tensor-type attn_v=q8_0 --tensor-type a=b$=F16 --pure "
        "--token-embedding-type q6_k --output-tensor-type f16 --pre gpt-2 --no-fallback --allow-requantize "
        "--method gptq --split-max-size 2GB --damp-percent 0.02 --starved-experts rtn --num-samples 3"
    )
    assert run(*words.split()).code == 0
    _, args, kwargs = stages.calls[-1]
    rules = (("attn_v", "Q8_0"), ("a=b$", "F16"))
    assert args == (
        "m",
        Path("o.gguf"),
        GgufOptions("q4_k_m", rules, "q6_k", "f16", pure=True, fallback=False, pre="gpt-2", allow_requantize=True),
    )
    assert kwargs["method_options"] == MethodOptions(damp_percent=0.02, starved_experts="rtn")
    assert kwargs["split_max_size"] == 2_000_000_000
    assert kwargs["text"].num_samples == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "gptq", "--imatrix", __file__], "--imatrix belongs to method 'rtn', the method is 'gptq'"),
        (
            ["--calibration", __file__],
            "--calibration belongs to method 'gptq', 'awq' or 'awq+gptq', the method is 'rtn'",
        ),
        (["--method", "gptq", "--n-grid", "3"], "--n-grid belongs to method 'awq' or 'awq+gptq', the method is 'gptq'"),
        (["--tensor-type", "attn_v"], "--tensor-type: 'attn_v' is not REGEX=TYPE, expected such as attn_v=q8_0"),
        (["--tensor-type", "(=q8_0"], "--tensor-type: '(' is not a regular expression"),
        (["--outtype", "q9"], "--outtype: 'q9' is not one of"),
    ],
)
def test_wrong_use_of_convert_gguf(run: Callable[..., Outcome], stages: Stages, args: list[str], message: str) -> None:
    outcome = run("convert-gguf", "m", *args)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}")
    assert not stages.calls


def test_presets_take_any_case_and_their_own_options_win(run: Callable[..., Outcome], stages: Stages) -> None:
    assert run("quantize", "m", "--scheme", "w3a16").code == 0
    assert stages.recipe == Recipe(bits=3, group_size=64, sym=False)
    assert run("quantize", "m", "--scheme", "W3a16", "--group-size", "auto", "--bits", 5, "--sym").code == 0
    assert stages.recipe == Recipe(bits=5, group_size=None, sym=True)


def test_ignore_replaces_the_default(run: Callable[..., Outcome], stages: Stages) -> None:
    run("quantize", "m", "--ignore", "embed")
    assert stages.recipe == Recipe(ignore=("embed",))
    run("quantize", "m", "--ignore", "")
    assert stages.recipe == Recipe(ignore=())


def test_flag_beats_environment_beats_recipe_beats_default(
    run: Callable[..., Outcome], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "r.yaml"
    config.write_text(
        "quantize:\n  bits: 3\n  group_size: 32\n  mse: true\n  device: cpu\n  max_shard_size: 1000\n  ignore: []\n"
        "  overrides: [{match: down_proj, bits: 8}]\n"
    )
    args = ("quantize", "m", "-c", config)
    assert run(*args).code == 0
    overrides = (Override("down_proj", bits=8),)
    assert stages.recipe == Recipe(
        bits=3, group_size=32, ignore=(), overrides=overrides, options=MethodOptions(mse=True)
    )
    assert stages.calls[-1][2]["max_shard_size"] == 1000
    assert stages.calls[-1][2]["device"] == "cpu"

    monkeypatch.setenv("QUANTOOL_QUANTIZE_BITS", "5")
    monkeypatch.setenv("QUANTOOL_QUANTIZE_GROUP_SIZE", "auto")
    monkeypatch.setenv("QUANTOOL_QUANTIZE_MSE", "0")
    monkeypatch.setenv("QUANTOOL_QUANTIZE_IGNORE", "a b")
    monkeypatch.setenv("QUANTOOL_DEVICE", "cuda")
    assert run(*args).code == 0
    assert stages.recipe == Recipe(bits=5, group_size=None, ignore=("a", "b"), overrides=overrides)
    assert stages.calls[-1][2]["device"] == "cuda"

    monkeypatch.setenv("QUANTOOL_QUANTIZE_DEVICE", "cuda:2")
    assert run(*args).code == 0
    assert stages.calls[-1][2]["device"] == "cuda:2"
    assert run("eval-ppl", "m").code == 0
    assert stages.calls[-1][2]["device"] == "cuda"

    assert run(*args, "--bits", 6, "--group-size", 64, "--ignore", "c", "--device", "cuda:3").code == 0
    assert stages.recipe == Recipe(bits=6, group_size=64, ignore=("c",), overrides=overrides)
    assert stages.calls[-1][2]["device"] == "cuda:3"


def test_the_recipe_file_can_come_from_the_environment(
    run: Callable[..., Outcome], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTOOL_QUANTIZE_CONFIG", str(ROOT / "configs" / "w8a16-rtn-channel.yaml"))
    assert run("quantize", "m").code == 0
    assert stages.recipe == Recipe(bits=8, group_size=-1)


def test_eval_ppl_reads_its_own_environment(
    run: Callable[..., Outcome], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTOOL_EVAL_PPL_SEQ_LEN", "77")
    assert run("eval-ppl", "m").code == 0
    assert stages.text.seq_len == 77


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_published_recipes_run(run: Callable[..., Outcome], stages: Stages, path: Path) -> None:
    of_gguf = path.name.startswith("gguf-")
    assert run("convert-gguf" if of_gguf else "quantize", "m", "--config", path).code == 0
    method = stages.calls[-1][2]["method"] if of_gguf else stages.recipe.method
    assert method in path.read_text(encoding="utf-8")


# Values


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("2GiB", 2_147_483_648),
        ("1.5kb", 1500),
        ("1 TB", 10**12),
        ("123", 123),
        (123, 123),
        ("7B", 7),
        ("3mib", 3 * 2**20),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert options.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "0", "-1", "5XB", "5GBB", "1e9", "0.5B", "nan", "１GB5", "5 G B"])
def test_what_is_not_a_size(run: Callable[..., Outcome], text: str) -> None:
    outcome = run("quantize", "m", f"--max-shard-size={text}")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: --max-shard-size: '{text}' is not a size, expected ")


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["quantise", "m"], "no such command 'quantise'", "did you mean 'quantize'?"),
        (["xyz"], "no such command 'xyz'", "see quantool --help"),
        (["quantize", "m", "--grop-size", "4"], "no such option '--grop-size'", "did you mean '--group-size'?"),
        (["quantize", "m", "--group_size", "4"], "no such option '--group_size'", "did you mean '--group-size'?"),
        (["quantize"], "missing argument 'MODEL'", "see quantool quantize --help"),
        (["quantize", "m", "n"], "got unexpected extra argument (n)", "see quantool quantize --help"),
        (["quantize", "m", "--bits"], "option '--bits' requires an argument", "see quantool --help"),
        (["quantize", "m", "--bits", "9"], "--bits: 9 is not in the range 2<=x<=8", "see quantool quantize --help"),
        (["quantize", "m", "--method", "gtpq"], "--method: 'gtpq' is not one of 'rtn', 'gptq', 'awq'", "see "),
        (["quantize", "m", "--format", "gguf"], "--format: 'gguf' is not one of 'compressed-tensors', 'gptq'", "see "),
        (["quantize", "m", "--act-bits", "4"], "act_bits is 4, expected 8 or 16", "use --act-bits 8"),
        (["quantize", "m", "--act-bits", "12"], "act_bits is 12, expected 8 or 16", "use --act-bits 8"),
        (["quantize", "m", "--act-dyn"], "no such option '--act-dyn'", "did you mean '--act-dynamic'?"),
        (
            ["quantize", "m", "--method", "gptq", "--damp-percent", "0"],
            "--damp-percent: 0.0 is not in the range",
            "see ",
        ),
        (
            ["quantize", "m", "--method", "gptq", "--damp-percent", "nan"],
            "damp_percent is nan, expected more than 0 and at most 1",
            "use --damp-percent 0.01",
        ),
        (["quantize", "m", "--method", "gptq", "--actorder", "weight"], "--actorder: 'weight' is not one of", "see "),
        (
            ["quantize", "m", "--method", "smoothquant", "--smoothing-strength", "1.5"],
            "--smoothing-strength: 1.5 is not in the range 0<=x<=1",
            "see ",
        ),
        (
            ["quantize", "m", "--method", "smoothquant", "--smoothing-strength", "nan"],
            "smoothing_strength is nan, expected 0 to 1",
            "use --smoothing-strength 0.5",
        ),
        (
            ["quantize", "m", "--method", "llm-int8", "--outlier-threshold", "-1"],
            "--outlier-threshold: -1.0 is not in the range x>=0",
            "see ",
        ),
        (
            ["quantize", "m", "--method", "llm-int8", "--outlier-threshold", "nan"],
            "outlier_threshold is nan, expected a number of at least 0",
            "use --outlier-threshold 6",
        ),
        (
            ["quantize", "m", "--method", "gptq", "--min-expert-tokens", "0"],
            "--min-expert-tokens: 0 is not in the range x>=1",
            "see ",
        ),
        (
            ["quantize", "m", "--method", "gptq", "--starved-experts", "no"],
            "--starved-experts: 'no' is not one of",
            "see ",
        ),
        (["quantize", "m", "--group-size", "-2"], "--group-size: '-2' is not a group size, expected auto", "see "),
        (["quantize", "m", "--device", "gpu"], "--device: 'gpu' is not a device, expected auto, cpu", "see "),
        (["quantize", "m", "--ignore", "re:("], "module pattern 're:(': missing )", "regular expression"),
        (["quantize", "m", "--calibration", "none"], "--calibration: File 'none' does not exist", "see "),
        (["quantize", "m", "-c", "none.yaml"], "--config: File 'none.yaml' does not exist", "see "),
        (["inspect", "m", "--filter", "("], "--filter: '(' is not a regular expression: missing )", "see "),
        (["eval-ppl", "m", "--max-kld", "1"], "--max-kld needs a model to compare with", "add --reference MODEL"),
        (["eval-ppl", "m", "--protocol", "x"], "--protocol: 'x' is not", "see "),
        (["inspect", "m", "-q", "-v"], "-q and -v exclude each other", "leave one of them out"),
    ],
)
def test_wrong_usage_is_two_lines_on_stderr(
    run: Callable[..., Outcome], stages: Stages, args: list[str], message: str, hint: str
) -> None:
    outcome = run(*args)
    assert outcome.code == 2
    assert outcome.out == ""
    first, second = outcome.err.splitlines()
    assert first.startswith(f"error: {message}")
    assert second.startswith("hint: ")
    assert hint in second
    assert not first.endswith(".")
    assert not stages.calls


def test_a_wrong_value_is_named_by_where_it_came_from(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "r.yaml"
    config.write_text("quantize: {bits: 12}")
    assert run("quantize", "m", "-c", config).err.startswith(f"error: {config}: quantize: bits: 12 is not in the range")
    monkeypatch.setenv("QUANTOOL_QUANTIZE_BITS", "13")
    assert run("quantize", "m").err.startswith("error: QUANTOOL_QUANTIZE_BITS: 13 is not in the range")
    monkeypatch.setenv("QUANTOOL_DEVICE", "tpu")
    assert run("inspect", "m", "--verbos").code == 2
    assert run("eval-ppl", "m").err.startswith("error: QUANTOOL_DEVICE: 'tpu' is not a device")


# Options that belong to another method


CALIBRATED = "'gptq', 'awq', 'awq+gptq' or 'smoothquant'"
INTEGER = "'rtn', 'gptq', 'awq', 'awq+gptq' or 'smoothquant'"


@pytest.mark.parametrize(
    ("method", "args", "owners"),
    [
        ("rtn", ["--n-grid", "20"], "'awq' or 'awq+gptq'"),
        ("gptq", ["--n-grid", "20"], "'awq' or 'awq+gptq'"),
        ("awq", ["--mse"], "'rtn'"),
        ("rtn", ["--damp-percent", "0.01"], "'gptq', 'awq+gptq' or 'smoothquant'"),
        ("awq", ["--actorder", "static"], "'gptq', 'awq+gptq' or 'smoothquant'"),
        ("gptq", ["--smoothing-strength", "0.5"], "'smoothquant'"),
        ("llm-int8", ["--double-quant"], "'nf4' or 'fp4'"),
        ("rtn", ["--no-double-quant"], "'nf4' or 'fp4'"),
        ("nf4", ["--outlier-threshold", "6"], "'llm-int8'"),
        ("nf4", ["--scheme", "W4A16"], INTEGER),
        ("fp4", ["--act-bits", "8"], INTEGER),
        ("llm-int8", ["--act-static"], INTEGER),
        ("nf4", ["--act-asym"], INTEGER),
        ("rtn", ["--min-expert-tokens", "1"], CALIBRATED),
        ("nf4", ["--starved-experts", "rtn"], CALIBRATED),
        ("rtn", ["--dataset", "builtin"], CALIBRATED),
        ("rtn", ["--split", "train"], CALIBRATED),
        ("rtn", ["--text-column", "t"], CALIBRATED),
        ("rtn", ["--num-samples", "8"], CALIBRATED),
        ("rtn", ["--seq-len", "8"], CALIBRATED),
        ("llm-int8", ["--seed", "0"], CALIBRATED),
        ("rtn", ["--batch-size", "1"], CALIBRATED),
        ("nf4", ["--dtype", "auto"], CALIBRATED),
        ("rtn", ["--calibration", __file__], CALIBRATED),
    ],
)
def test_an_option_of_another_method_is_an_error(
    run: Callable[..., Outcome], stages: Stages, method: str, args: list[str], owners: str
) -> None:
    first = owners.split("'")[1]
    assert run("quantize", "m", "--method", method, *args) == Outcome(
        2,
        "",
        f"error: {args[0]} belongs to method {owners}, the method is '{method}'\n"
        f"hint: use --method {first}, or leave it out\n",
    )
    assert not stages.calls


def test_an_option_of_an_overrides_method_is_welcome(
    run: Callable[..., Outcome], stages: Stages, tmp_path: Path
) -> None:
    config = tmp_path / "r.yaml"
    config.write_text("quantize: {overrides: [{match: down_proj, method: gptq}]}")
    assert run("quantize", "m", "-c", config, "--damp-percent", "0.1", "--num-samples", 4).code == 0
    assert stages.recipe == Recipe(
        overrides=(Override("down_proj", method="gptq"),), options=MethodOptions(damp_percent=0.1)
    )
    assert stages.text.num_samples == 4
    assert run("quantize", "m", "-c", config, "--n-grid", "4").code == 2


def test_every_option_belongs_to_a_method() -> None:
    known = {option.name for option in cli.cli.commands["quantize"].params}
    assert set(options.METHOD_OPTIONS) <= known
    assert {field.name for field in fields(MethodOptions)} <= set(options.METHOD_OPTIONS)
    assert {method for owners in options.METHOD_OPTIONS.values() for method in owners} == set(METHOD_NAMES)


def test_also_from_the_environment_and_the_recipe(
    run: Callable[..., Outcome], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "r.yaml"
    config.write_text("quantize: {method: awq, n_grid: 5}")
    assert run("quantize", "m", "-c", config).code == 0
    outcome = run("quantize", "m", "-c", config, "--method", "rtn")
    assert outcome.code == 2
    words = "n_grid belongs to method 'awq' or 'awq+gptq', the method is 'rtn'\n"
    assert outcome.err.startswith(f"error: {config}: quantize: {words}")
    monkeypatch.setenv("QUANTOOL_QUANTIZE_MSE", "1")
    outcome = run("quantize", "m", "--method", "awq")
    assert outcome.code == 2
    assert outcome.err.startswith("error: QUANTOOL_QUANTIZE_MSE belongs to method 'rtn', the method is 'awq'\n")
    assert len(stages.calls) == 1


# A quantized MODEL


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], None),
        (["--format", "awq"], "awq"),
        (["--format", "awq", "-o", "out", "--overwrite", "--max-shard-size", "1GB", "--json"], "awq"),
        (["--format", "gptq", "--dry-run", "--device", "cpu"], "gptq"),
        (["--format", "awq", "--bits", "4"], None),
        (["--format", "awq", "--method", "rtn"], None),
        (["--format", "awq", "--sym"], None),
        (["--format", "awq", "--ignore", "lm_head"], None),
    ],
)
def test_format_alone_allows_a_repack(
    run: Callable[..., Outcome], stages: Stages, args: list[str], expected: str | None
) -> None:
    assert run("quantize", "m", *args).code == 0
    assert stages.calls[-1][2]["repack_to"] == expected


@pytest.mark.parametrize("option", options.INLINE_TEXT)
def test_a_calibration_file_and_inline_text_exclude_each_other(
    run: Callable[..., Outcome], stages: Stages, option: str
) -> None:
    name = f"--{option.replace('_', '-')}"
    args = ("quantize", "m", "--method", "awq", "--calibration", __file__)
    outcome = run(*args, name, "4")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {name} has no effect with --calibration, whose text is fixed\nhint: ")
    assert run(*args, "--batch-size", 2).code == 0
    assert stages.calls[-1][2]["calibration"] == Path(__file__)


# Output


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_with_the_results_keys_in_order(
    run: Callable[..., Outcome], stages: Stages, command: str
) -> None:
    outcome = run(command, "m", "--json")
    assert outcome.err == ""
    expected = RESULTS[command.replace("-", "_")]
    found = json.loads(outcome.out)
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize(
    ("stage", "name"), [*zip(RESULTS, ("Calibrate", "Quantize", "Convert", "Inspect", "Eval"), strict=True)]
)
def test_the_stages_return_the_keys_that_json_promises(stage: str, name: str) -> None:
    module = importlib.import_module(f"quantool.stages.{stage}")
    assert [field.name for field in fields(getattr(module, f"{name}Result"))] == list(RESULTS[stage])
    for row, example in (("PlanRow", PLAN_ROW), ("TensorRow", TENSOR)):
        if hasattr(module, row):
            assert {field.name for field in fields(getattr(module, row))} == set(example)


def test_json_has_null_for_nan_and_infinity(run: Callable[..., Outcome], stages: Stages) -> None:
    stages.changes = {"perplexity": math.nan, "perplexity_error": math.inf, "dataset": "\x1b\ud800é"}
    outcome = run("eval-ppl", "m", "--json")
    found = json.loads(outcome.out, parse_constant=pytest.fail)
    assert found["perplexity"] is None
    assert found["perplexity_error"] is None
    assert ESCAPE not in outcome.out
    stages.changes = {"tensors": [{**TENSOR, "relative_error": -math.inf}]}
    assert json.loads(run("inspect", "m", "--json").out)["tensors"][0]["relative_error"] is None


def test_tables(run: Callable[..., Outcome], stages: Stages) -> None:
    out = run("quantize", "m").out
    for line in (
        "output           m-rtn-w4-g64",
        "size             98.8 MB",
        "bits per weight  4.568",
        "tensors          210 quantized, 62 copied, 1 folded, 2 dropped",
        "time             2 min 03 s",
        "peak memory      900.0 MB",
        "note             group size 64: the largest of 128, 64, 32 that divides every row",
    ):
        assert f"{line}\n" in out
    assert re.search(r"^time +12\.3 s, bound by disk$", run("convert-gguf", "m").out, re.MULTILINE)
    out = run("calibrate", "m").out
    assert re.search(r"^text +builtin, 32 windows of 512 tokens$", out, re.MULTILINE)
    assert re.search(r"^peak memory +2\.50 GB$", out, re.MULTILINE)
    assert re.search(r"^size +1\.2 MB$", out, re.MULTILINE)
    assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_table_of_eval_ppl(run: Callable[..., Outcome], stages: Stages) -> None:
    out = run("eval-ppl", "m").out
    assert re.search(r"^perplexity +36\.1235 ± 0\.5000$", out, re.MULTILINE)
    assert "KL" not in out
    stages.changes = {
        "reference_perplexity": 34.54,
        "kl_divergence": 0.15604,
        "kl_divergence_error": 0.00123,
        "top1_agreement": 0.7654,
    }
    out = run("eval-ppl", "m", "--reference", "r").out
    assert re.search(r"^reference perplexity +34\.5400$", out, re.MULTILINE)
    assert re.search(r"^KL divergence +0\.15604 ± 0\.00123$", out, re.MULTILINE)
    assert re.search(r"^top-1 agreement +76\.54 %$", out, re.MULTILINE)


def test_table_of_inspect(run: Callable[..., Outcome], stages: Stages) -> None:
    out = run("inspect", "m").out
    assert re.search(r"^parameters +134,515,008$", out, re.MULTILINE)
    assert re.search(r"^BF16 +61 +28,000,000 +56\.0 MB$", out, re.MULTILINE)
    assert re.search(r"^mlp +80,000,000 +45\.0 MB +4\.500$", out, re.MULTILINE)
    assert re.search(r"^W4A16 sym g64 +210$", out, re.MULTILINE)
    assert "\ntensor " not in out
    stages.changes = {"tensors": [TENSOR, {**TENSOR, "name": "b", "shape": [], "relative_error": None}]}
    out = run("inspect", "m", "--against", "r").out
    assert re.search(r"^tensor +dtype +shape +size +bits per weight +relative error$", out, re.MULTILINE)
    assert re.search(r"^w +I32 +8x2 +64 B +4\.25 +0\.0812$", out, re.MULTILINE)
    assert re.search(r"^b +I32 +scalar +64 B +4\.25 +-$", out, re.MULTILINE)


def test_dry_run_prints_the_plan(run: Callable[..., Outcome], stages: Stages) -> None:
    stages.changes = {"plan": [PLAN_ROW, {**PLAN_ROW, "name": "norm", "action": "copied", "scheme": ""}]}
    out = run("quantize", "m", "--dry-run").out
    assert re.search(r"^tensor +shape +dtype +action +scheme +size$", out, re.MULTILINE)
    assert re.search(r"^w +8x2 +I32 +quantized +W4A16 sym g64 +64 B$", out, re.MULTILINE)
    assert re.search(r"^norm +8x2 +I32 +copied +- +64 B$", out, re.MULTILINE)
    assert re.search(r"^bits per weight +4\.568$", out, re.MULTILINE)
    for command in ("quantize", "calibrate"):
        assert re.search(
            r"^output .*, not written: this is a dry run$", run(command, "m", "--dry-run").out, re.MULTILINE
        )
        assert "dry run" not in run(command, "m").out
        assert "dry run" not in run(command, "m", "--dry-run", "--json").out


def test_names_are_never_cut_nor_wrapped(
    run: Callable[..., Outcome], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    name = "model.layers." + "experts." * 60 + "down_proj.weight"
    stages.changes = {"tensors": [{**TENSOR, "name": name}], "metadata": {"k" * 90: "v" * 1000}}
    out = run("inspect", "m").out
    assert re.search(rf"^{name}  I32", out, re.MULTILINE)
    assert re.search(r"^k{90}  v{100}\.\.\. \(1,000 characters\)$", out, re.MULTILINE)
    stages.error = QuantoolError(name, hint=name)
    assert run("inspect", "m").err == f"error: {name}\nhint: {name}\n"


def test_text_from_files_is_printed_escaped_and_never_as_markup(run: Callable[..., Outcome], stages: Stages) -> None:
    hostile = "[red]x[/red] [rtn|awq] :smile: \x1b]0;owned\x07\r\n\u202eabc\x9b2J\ud800"
    shown = r"[red]x[/red] [rtn|awq] :smile: \x1b]0;owned\x07\r\n\u202eabc\x9b2J\ud800"
    stages.changes = {"tensors": [{**TENSOR, "name": hostile}], "metadata": {hostile: hostile}}
    out = run("inspect", "m").out
    assert out.count(shown) == 3
    stages.error = QuantoolError(hostile, hint=hostile)
    assert run("inspect", "m").err == f"error: {shown}\nhint: {shown}\n"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345_678, "12.3 MB"),
        (10**9, "1.00 GB"),
        (5 * 10**12, "5000.00 GB"),
    ],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert console.size(nbytes) == text


def test_log_levels(run: Callable[..., Outcome], stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("quantool.stages.inspect")

    def chatty(*args: Any, **kwargs: Any) -> Any:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            log.log(level, "layer %s", "\x1b0")
        return result("inspect")

    monkeypatch.setattr(sys.modules["quantool.stages.inspect"], "run", chatty)
    lines = [rf"{level}: layer \x1b0" for level in ("debug", "info", "warning")]
    assert run("inspect", "m").err.splitlines() == lines[2:]
    assert run("inspect", "m", "-v").err.splitlines() == lines[1:]
    assert run("inspect", "m", "-vv").err.splitlines() == lines
    assert run("inspect", "m", "-v", "-v").err.splitlines() == lines
    assert run("-v", "inspect", "m", "-v").err.splitlines() == lines
    assert run("inspect", "m", "-q").err == ""
    assert logging.getLogger("quantool").handlers == []


# Exit codes


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (QuantoolError("a: b", hint="c"), 1, "error: a: b\nhint: c\n"),
        (QuantoolError("a: b"), 1, "error: a: b\n"),
        (CheckFailed("offsets overlap"), 3, "error: offsets overlap\n"),
        (
            TypeError("x\ny"),
            1,
            "error: internal error: TypeError: x\nhint: run again with -vv and report what it prints\n",
        ),
        (KeyError(), 1, "error: internal error: KeyError: no message\nhint: run again"),
        (MemoryError(), 1, "error: out of memory\nhint: use a smaller --batch-size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: "),
            1,
            "error: out of memory\nhint: ",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission denied\nhint: check"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\nhint: check"),
        (OSError("Can't load tokenizer.\nSee"), 1, "error: Can't load tokenizer\nhint: "),
        (KeyboardInterrupt(), 130, "\nerror: interrupted\n"),
        (cli.Terminated(), 143, "\nerror: terminated\n"),
    ],
)
def test_exit_codes(run: Callable[..., Outcome], stages: Stages, error: BaseException, code: int, message: str) -> None:
    stages.error = error
    outcome = run("inspect", "m", "--json")
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.startswith(message)
    assert len(outcome.err.strip().splitlines()) <= 2


def test_traceback_only_with_vv(run: Callable[..., Outcome], stages: Stages) -> None:
    stages.error = TypeError("bug \x1b")
    for flags in ([], ["-v"]):
        assert "Traceback" not in run("inspect", "m", *flags).err
    err = run("inspect", "m", "-vv").err
    assert "Traceback (most recent call last)" in err
    assert "line " in err
    assert err.splitlines()[-2] == r"error: internal error: TypeError: bug \x1b"
    assert ESCAPE not in err


@pytest.mark.parametrize(
    ("args", "changes", "code"),
    [
        (["--max-ppl", "36.2"], {}, 0),
        (["--max-ppl", "36.123456"], {}, 0),
        (["--max-ppl", "36.1"], {}, 3),
        (["--max-ppl", "99"], {"perplexity": math.nan}, 3),
        (["--max-ppl", "99"], {"perplexity": math.inf}, 3),
        (["--reference", "r", "--max-kld", "0.2"], {"kl_divergence": 0.2}, 0),
        (["--reference", "r", "--max-kld", "0.2"], {"kl_divergence": 0.21}, 3),
        (["--reference", "r", "--max-kld", "0.2"], {"kl_divergence": math.nan}, 3),
        (["--reference", "r", "--max-kld", "0.2"], {"kl_divergence": None}, 3),
    ],
)
def test_checks_fail_after_the_result_is_printed(
    run: Callable[..., Outcome], stages: Stages, args: list[str], changes: dict[str, Any], code: int
) -> None:
    stages.changes = changes
    outcome = run("eval-ppl", "m", "--json", *args)
    assert outcome.code == code
    assert json.loads(outcome.out)["model"] == "m"
    assert outcome.err.startswith("error: ") == (code == 3)
    if code:
        assert f"{args[-2]} allows {args[-1]}" in outcome.err


def test_libraries_are_quiet_unless_asked(run: Callable[..., Outcome], stages: Stages, monkeypatch: Any) -> None:
    for name in cli.QUIET_LIBRARIES:
        monkeypatch.delenv(name, raising=False)
    run("inspect", "m", "-v")
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    monkeypatch.setenv("DATASETS_VERBOSITY", "debug")
    run("inspect", "m")
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert os.environ["DATASETS_VERBOSITY"] == "debug"


def test_of_many_notes_the_table_shows_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    record = {**RESULTS["quantize"], "notes": [f"note {i} of a block" for i in range(48)]}
    console.print_quantize(record)
    out = capsys.readouterr().out
    assert out.count("of a block") == 8
    assert "40 more notes, see --json" in out
