"""Run a command in its own process and say what it cost: wall seconds and peak memory.

Memory is what the process allocated, polled every 20 ms from /proc/PID/status: RssAnon + RssShmem. Pages of mapped
files are left out, because the kernel takes them back whenever it likes; `max_rss_bytes` (getrusage) includes them.
Linux only. One process is measured, not its children.
"""

import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"
QUANTOOL = (sys.executable, "-m", "quantool")


@dataclass(frozen=True, slots=True)
class Run:
    """What one command printed on stdout and what it cost."""

    command: str
    stdout: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    max_rss_bytes: int

    def json(self) -> dict[str, Any]:
        """The last JSON object on stdout; what a library logs before it is passed over."""
        text = "\n" + self.stdout
        if (start := text.rfind("\n{")) < 0:
            raise SystemExit(f"error: no JSON on stdout of: {self.command}")
        return dict(json.loads(text[start:]))


def measure(
    command: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None, log: Path | None = None
) -> Run:
    """Run `command` to its end; stderr goes to `log`, or where ours goes. Ends this program if the command fails."""
    errors = None if log is None else log.open("wb")
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, env={**os.environ, **(env or {})}, stdout=out, stderr=errors)
        try:
            peak, status, usage = poll(process.pid)
        except BaseException:
            process.kill()
            raise
        finally:
            if errors is not None:
                errors.close()
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        stdout = out.read().decode(errors="replace")
    if process.returncode != 0:
        raise SystemExit(failure(command, process.returncode, log))
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Run(shlex.join(command), stdout, seconds, cpu_seconds, peak, usage.ru_maxrss * 1024)


def poll(pid: int) -> tuple[int, int, resource.struct_rusage]:
    """Peak of RssAnon + RssShmem in bytes, wait status and resource usage, once `pid` has ended."""
    peak = 0
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return peak, status, usage
        peak = max(peak, allocated_bytes(pid))
        time.sleep(POLL_SECONDS)


def allocated_bytes(pid: int) -> int:
    """RssAnon + RssShmem of a process; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))


def failure(command: Sequence[str], code: int, log: Path | None) -> str:
    tail = "" if log is None else "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return f"error: exit code {code} from: {shlex.join(command)}{tail}"


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, load before the run, python, versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    names = ("quantool", "torch", "transformers", "compressed-tensors")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], *rows]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()
