"""The README's help blocks, from `quantool COMMAND --help`.

Usage: help_blocks.py [--check]

Rewrites what stands between `<!-- help:COMMAND -->` and `<!-- /help -->` in README.md (`<!-- help: -->` is the help of
quantool itself). With --check nothing is written, and the exit code is 1 when a block is not what --help prints.
"""

import os
import re
import subprocess
import sys

from measure import QUANTOOL, ROOT

BLOCK = re.compile(r"(<!-- help:([\w-]*) -->\n).*?(<!-- /help -->)", re.DOTALL)
WIDTH = "80"


def help_of(command: str) -> str:
    """What `quantool COMMAND --help` prints in a terminal of 80 columns."""
    words = (*QUANTOOL, *command.split(), "--help")
    env = {**os.environ, "COLUMNS": WIDTH, "NO_COLOR": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    if done.returncode:
        raise SystemExit(f"error: quantool {command} --help: exit code {done.returncode}\n{done.stderr.strip()}")
    text = done.stdout.strip()
    return f"```console\n$ quantool {command + ' ' if command else ''}--help\n{text}\n```\n"


def main() -> None:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = BLOCK.sub(lambda block: block[1] + help_of(block[2]) + block[3], before)
    if after == before:
        return
    if sys.argv[1:] == ["--check"]:
        raise SystemExit("error: README.md: a help block is not what --help prints\nhint: make docs")
    readme.write_text(after)


if __name__ == "__main__":
    main()
