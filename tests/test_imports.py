"""Imports run one way: the core stands alone, no circle, nothing imported within a function without need."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("minidrag", "weights_convert")
CORE = ("edit", "model", "config", "points", "window", "images", "method", "networks")
BELOW = ("weights", "system", "app", "page", "course", "tiny", "bench")
# A package may import those before it, and itself; what is on a line does not import its neighbors.
LAYERS = (
    {"config", "networks"},
    {"method"},
    {"model", "points", "window", "images"},
    {"edit"},
    {"weights", "system"},
    {"tiny"},
    {"app"},
    {"page", "course", "bench"},
    {"__main__"},
)
EXTRAS = {"diffusers", "transformers", "peft", "lpips"}  # not needed at run time
LATE = {"minidrag/page/site.py"}  # the page opens before PyTorch is imported


def modules() -> dict[str, Path]:
    """Files of the product by module name."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {name_of(file): file for file in files if "exercises" not in file.parts}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the product that a file imports, for types too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names if node.module in known)


def part_of(module: str) -> str:
    """The part of minidrag that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def rank(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(file, known)) - {name} for name, file in known.items()}


def test_the_core_imports_nothing_below_its_line(graph: dict[str, set[str]]) -> None:
    core = [name for name in graph if name.startswith("minidrag.") and part_of(name) in CORE]
    assert len(core) > 15
    assert not [(name, other) for name in core for other in graph[name] if part_of(other) in BELOW]


def test_imports_run_one_way(graph: dict[str, set[str]]) -> None:
    """Top-level modules that are doors (minidrag itself, __main__) may import anything."""
    ranked = [name for name in graph if any(part_of(name) in layer for layer in LAYERS)]
    pairs = [(name, other) for name in ranked for other in graph[name] if other in ranked]
    assert len(pairs) > 100
    assert not [pair for pair in pairs if rank(part_of(pair[0])) < rank(part_of(pair[1]))]


def test_no_circle(graph: dict[str, set[str]]) -> None:
    """Take away modules that import nothing that is left: what remains lies on circles or imports one."""
    left = {name: others - {"minidrag"} for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_nothing_is_imported_within_a_function() -> None:
    """But by the page, once, and but for packages that an installation may lack."""
    late = []
    for file in [*modules().values(), ROOT / "demo.py"]:
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for node in ast.walk(function):
                    if isinstance(node, (ast.Import, ast.ImportFrom)):
                        module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                        if str(module).partition(".")[0] not in EXTRAS:
                            late.append((file.relative_to(ROOT).as_posix(), module))
    assert {file for file, _ in late} <= LATE and len(late) <= 1
