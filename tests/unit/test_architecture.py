"""The house rules that a machine can check: layers, cycles, sizes, and which packages load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "saddle"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 100

# A package imports only from lower rows; in its own row only itself. Parts of a row stand in order.
ROWS: dict[str, float] = {
    **dict.fromkeys(["__main__"], 10),
    "cli": 9,
    "perf": 8.8,
    "__init__": 8.6,
    "llm": 8.4,
    "launch": 8,
    **dict.fromkeys(["eval"], 7),
    **dict.fromkeys(["server", "bench"], 6),
    **dict.fromkeys(["engine"], 5),
    **dict.fromkeys(["executor"], 4),
    **dict.fromkeys(["runner", "grammar", "plan"], 3),
    **dict.fromkeys(["model"], 2),
    **dict.fromkeys(["kernels", "parallel", "parsing"], 1),
    "metrics": 0.4,
    **dict.fromkeys(["config", "protocol", "env", "log"], 0.2),
    **dict.fromkeys(["errors", "version"], 0),
}
# Narrower than the rows: from that package only these modules.
ONLY: dict[tuple[str, str], set[str]] = {
    ("server", "engine"): {"saddle.engine.client"},
    ("engine", "executor"): {"saddle.executor.base"},
    ("plan", "model"): {"saddle.model.config"},
    ("plan", "parallel"): {"saddle.parallel.layout"},
}
NEVER: set[tuple[str, str]] = {
    ("bench", "engine"), ("server", "executor"), ("server", "runner"), ("server", "model"), ("server", "kernels"),
    ("engine", "runner"), ("engine", "model"), ("engine", "kernels"), ("engine", "parsing"), ("plan", "kernels"),
    ("eval", "engine"), ("runner", "parsing"),
}  # fmt: skip
TORCH_FREE = ["engine", "server", "plan", "parsing", "bench", "cli", "config", "protocol", "launch"]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """Names of Saddle's modules that a file imports, anywhere in it, type-only imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else str(node.module)
                      for a in node.names}  # fmt: skip
    return {name for name in found if name == "saddle" or name.startswith("saddle.")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module: str) -> None:
    here = room(module)
    assert here in ROWS, f"{here} has no row in the layer table"
    for name in imports(MODULES[module]):
        there = room(name)
        if there == here or (there == "__init__" and name == "saddle"):
            continue
        assert ROWS[there] < ROWS[here], f"{module} (row {ROWS[here]}) imports {name} (row {ROWS[there]})"
        assert (here, there) not in NEVER, f"{module} imports {name}"
        allowed = ONLY.get((here, there))
        assert allowed is None or name in allowed, f"{module} imports {name}, may import {sorted(allowed or ())}"


def test_no_import_cycle() -> None:
    graph = {module: {n for n in imports(path) if n in MODULES and n != module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join([*trail, module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", sorted({*SOURCE.rglob("*.py"), *(ROOT / "demo").rglob("*.py")}), ids=str)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES, f"{path.name} has more than {MAX_FILE_LINES} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path.name}:{node.lineno} {node.name} has {lines} lines"


def test_package_init_files_are_empty() -> None:
    for path in SOURCE.rglob("*/__init__.py"):
        assert path.read_text() == "", f"{path} must stay empty: importing one module must not load its neighbours"


@pytest.mark.parametrize("package", TORCH_FREE)
def test_imports_without_torch(package: str) -> None:
    names = [m for m in MODULES if room(m) == package]
    assert names, package
    code = f"import sys, {', '.join(names)}; sys.exit(int('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{package} loads torch or fails to import: {done.stderr}"


def test_only_env_reads_the_environment() -> None:
    for module, path in MODULES.items():
        if module == "saddle.env":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in ("environ", "getenv"), f"{path.name}:{node.lineno} reads the environment"
