"""What the tests of building the kernels share: an empty cache, scripts as compilers, other processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantool import kernels
from quantool.kernels import build

ROOT = Path(kernels.__file__).parents[2]
NOTHING_PREBUILT = "from quantool.kernels import build; build.PREBUILT = build.Path('/nowhere'); "


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in a directory with a space in its name, and a process that has not tried yet."""
    monkeypatch.setenv("QUANTOOL_CACHE", str(tmp_path / "a cache"))
    monkeypatch.delenv("QUANTOOL_KERNELS", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    return tmp_path / "a cache" / "quantool"


def program(path: Path, script: str) -> str:
    """A shell script, in the place of a compiler."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def python(code: str, **environment: str) -> "subprocess.Popen[str]":
    """A process that runs `code`, in which nothing is prebuilt; its stderr is with its stdout."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", NOTHING_PREBUILT + code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
