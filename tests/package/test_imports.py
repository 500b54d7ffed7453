"""Imports within the package point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAZY = {
    "fused_adamp.tracing": "it imports torch._dynamo, which takes a second",
    "fused_adamp.kernels": "it imports Triton, which not everybody has",
    "fused_adamp._C": "it is compiled, which not everybody can",
}
"""Modules that may be imported within a function, and why."""


def modules() -> dict[str, Path]:
    """The package's modules by name."""
    found = {}
    for folder, package in ((ROOT / "fused_adamp", "fused_adamp"), (ROOT / "kernels", "fused_adamp.kernels")):
        for path in folder.rglob("*.py"):
            if folder.name == "fused_adamp" and "kernels" in path.relative_to(folder).parts:
                continue
            name = ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imports(name: str) -> dict[str, bool]:
    """The package's modules that a module imports, those for type checkers too; whether it does so in a function."""
    tree = ast.parse(MODULES[name].read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = f"{package}.{node.module}" if node.level else str(node.module)
            names = [m if (m := f"{origin}.{alias.name}") in MODULES else origin for alias in node.names]
        else:
            continue
        for imported in names:
            if imported.partition(".")[0] == "fused_adamp" and imported != name:
                found[imported] = found.get(imported, True) and id(node) in inside
    return found


def test_no_module_imports_one_that_imports_it() -> None:
    """Neither at run time nor for type checkers: who reads a module needs to know those below it alone."""
    left = {name: set(imports(name)) - {"fused_adamp"} for name in MODULES}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"import circles among {left}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_within_functions_have_a_reason(name: str) -> None:
    """A circle is not hidden by an import within a function."""
    lazy = [other for other, inside in imports(name).items() if inside]
    assert not [other for other in lazy if not other.startswith(tuple(LAZY))]


def test_the_words_that_both_sides_share_know_nothing_of_ours() -> None:
    assert not imports("fused_adamp.batch")
    assert not imports("fused_adamp.reference")


def test_flat_slices_are_known_in_one_module() -> None:
    """Others ask for the placement of a parameter, whatever it is."""
    allowed = {"fused_adamp.sharded.flat_slice", "fused_adamp.sharded"}
    users = {name for name, path in MODULES.items() if "FlatSlice" in path.read_text()}
    assert users <= allowed
