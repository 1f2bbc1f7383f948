"""The process around the command line: signals, pipes, a full disk, a terminal; and what starting it imports.

Each test runs an interpreter of its own, in which the stage of `inspect` is replaced by one that waits, fails, or
returns at once.
"""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantool import __version__

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
ESCAPE = "\x1b"
MAIN = "from quantool.cli import main; main()"
TENSOR = {"name": "w", "dtype": "I32", "shape": [8, 2], "bytes": 64}
TENSOR |= dict.fromkeys(("bits_per_weight", "relative_error", "min", "max", "mean"))
INSPECT = {
    "artifact": "m",
    "format": "compressed-tensors",
    "parameters": 134_515_008,
    "bytes": 98_765_432,
    "bits_per_weight": 5.874,
    "by_dtype": {},
    "by_kind": {},
    "schemes": {},
    "metadata": {"format": "pt"},
    "linears": None,
    "activations": [],
}


def process(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the interpreter with `args` to its end."""
    command, env = [sys.executable, *args], ENVIRONMENT | (env or {})
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


# A stage that waits, in a process of its own; `ready` on stdout says that it has begun.
WAITING = """
import sys, time, types
import quantool.stages
def run(*args, progress, **kwargs):
    progress(1, 4, "model.layers.0")
    try:
        print("ready", flush=True)
        {body}
    finally:
        print("cleaned up", flush=True)
stub = types.SimpleNamespace(run=run)
quantool.stages.inspect = sys.modules["quantool.stages.inspect"] = stub
from quantool.cli import main
main()
"""


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "numpy", "rich", "yaml", "safetensors", "gguf")
    code = (
        "import sys\nfrom quantool.cli import main\ntry: main()\n"
        f"finally: print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    for args in (["--help"], ["quantize", "--help"], ["--version"]):
        done = process("-c", code, *args)
        assert (done.returncode, done.stderr) == (0, "[]\n")


def test_python_m() -> None:
    done = process("-m", "quantool", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"quantool {__version__}\n", "")


def stub_of_inspect(tensors: int) -> str:
    """A program whose inspect prints a result with so many tensors."""
    return (
        "import sys, types, dataclasses\nimport quantool.stages\n"
        f"values = {INSPECT!r}\nvalues['tensors'] = [{TENSOR!r}] * {tensors}\n"
        "Result = dataclasses.make_dataclass('Result', list(values))\n"
        "stub = types.SimpleNamespace(run=lambda *a, **k: Result(**values))\n"
        "quantool.stages.inspect = sys.modules['quantool.stages.inspect'] = stub\n"
        "from quantool.cli import main\nmain()"
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_the_stage(number: int, code: int) -> None:
    command = [sys.executable, "-c", WAITING.format(body="time.sleep(60)"), "inspect", "m"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    assert child.returncode == code
    assert out == "cleaned up\n"
    assert err.strip() == f"error: {'interrupted' if code == 130 else 'terminated'}"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-c", stub_of_inspect(3000), "inspect", "m", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as child:
        assert child.stdout
        assert child.stderr
        assert child.stdout.readline() == b"{\n"
        child.stdout.close()
        assert child.wait(timeout=30) == 0
        assert child.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_an_error() -> None:
    command = [sys.executable, "-c", stub_of_inspect(0), "inspect", "m"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=60, check=False
        )
    assert done.returncode == 1
    message = "error: the result cannot be written to standard output: No space left on device"
    assert done.stderr.splitlines()[0] == message


def test_a_narrow_encoding_loses_nothing() -> None:
    code = stub_of_inspect(0).replace("'pt'", "'± é'")
    done = process("-c", code, "inspect", "m", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert r"\xb1 \xe9" in done.stdout


def terminal(code: str, *args: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run with stdout and stderr on a terminal: exit code and everything that came out."""
    leader, follower = pty.openpty()
    environ = {**ENVIRONMENT, "TERM": "xterm-256color", **(env or {})}
    command = [sys.executable, "-c", code, *args]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environ) as child:
        os.close(follower)
        output = b"".join(read_all(leader))
    os.close(leader)
    return child.returncode, output.decode()


def read_all(leader: int) -> Iterator[bytes]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            return
        if not data:
            return
        yield data


FAILING = WAITING.format(
    body="time.sleep(0.3); from quantool.errors import QuantoolError; raise QuantoolError('x', hint='y')"
)


def test_progress_and_color_on_a_terminal() -> None:
    code, output = terminal(FAILING, "inspect", "m")
    assert code == 1
    assert "model.layers.0" in output
    assert "1/4" in output
    assert "left" in output
    assert f"{ESCAPE}[1;31merror: {ESCAPE}[0mx" in output
    assert output.count(f"{ESCAPE}[?25l") == output.count(f"{ESCAPE}[?25h")  # the cursor is back
    assert "1/4" not in terminal(FAILING, "inspect", "m", "-q")[1]


def test_no_color_is_no_color() -> None:
    code, output = terminal(MAIN, "inspekt", env={"NO_COLOR": "1"})
    assert code == 2
    assert ESCAPE not in output
    assert "error: no such command 'inspekt'" in output
    _, output = terminal(stub_of_inspect(1), "inspect", "m", env={"NO_COLOR": "1"})
    assert f"{ESCAPE}[1m" not in output
    _, output = terminal(FAILING, "inspect", "m", env={"NO_COLOR": "1"})
    assert not re.search(rf"{ESCAPE}\[[\d;]*m", output)


def test_a_pipe_gets_no_progress_and_no_escapes() -> None:
    done = process("-c", FAILING, "inspect", "m")
    assert (done.returncode, done.stdout, done.stderr) == (1, "ready\ncleaned up\n", "error: x\nhint: y\n")
