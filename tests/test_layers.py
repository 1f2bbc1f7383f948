"""A lower layer never imports a higher one; the table is the architecture. Modules and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "quantool"
MODULES = sorted(ROOT.rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80

# layer -> what it may import from quantool, itself aside
BASE = {
    "errors",
    "scheme",
    "console",
    "io",
    "kernels",
    "data",
    "recipe",
    "quant",
    "model",
    "methods",
    "formats",
    "runtime",
}
MAY_IMPORT = {
    "errors": set(),
    "scheme": {"errors"},
    "console": {"errors"},
    "io": {"errors"},
    "kernels": {"errors"},
    "data": {"errors"},
    "recipe": {"errors", "scheme"},
    "quant": {"errors", "scheme", "kernels"},
    "model": {"errors", "io"},
    "methods": {"errors", "scheme", "quant", "model", "kernels"},
    "formats": {"errors", "scheme", "quant", "kernels", "io"},
    "runtime": {"errors", "scheme", "quant", "io", "model", "formats", "kernels"},
    "stages": BASE - {"console"},
    "cli": {"errors", "scheme", "recipe", "data", "console", "stages", "kernels"},
    "__init__": BASE - {"console"} | {"stages"},
    "__main__": {"cli"},
}
ONLY_IN = {"click": {"cli"}, "rich": {"console"}}
# What the command line imports at its own import: none of it may import these at module level.
LIGHT = ("errors", "scheme", "console", "data", "recipe", "cli", "__init__")
HEAVY = {"torch", "transformers", "datasets", "safetensors", "gguf", "numpy", "huggingface_hub", "rich", "yaml"}


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def violations(source: str, importer: str) -> list[str]:
    """What `importer` imports and must not."""
    found = []
    for name in imports(ast.parse(source)):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "quantool" and target not in {importer, "__version__"} and target not in MAY_IMPORT[importer]:
            found.append(name)
        if importer not in ONLY_IN.get(top, {importer}):
            found.append(name)
    return found


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_a_layer_imports_only_what_is_below_it(path: Path) -> None:
    assert not violations(path.read_text(encoding="utf-8"), layer(path))


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("io", "from quantool.scheme import QuantScheme"),
        ("io", "import quantool.quant"),
        ("io", "from quantool import quant"),
        ("methods", "def f():\n    from quantool.io import open_checkpoint"),
        ("stages", "from quantool import console"),
        ("stages", "from quantool.cli.options import Output"),
        ("recipe", "import click"),
        ("cli", "from rich.text import Text"),
        ("cli", "import quantool.quant"),
    ],
)
def test_the_check_sees_a_violation(importer: str, source: str) -> None:
    assert violations(source, importer)


@pytest.mark.parametrize("path", [p for p in MODULES if layer(p) in LIGHT], ids=ids)
def test_what_help_needs_imports_nothing_heavy(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {name.partition(".")[0] for name in imports(top_level)} & HEAVY


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_modules_and_functions_are_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
