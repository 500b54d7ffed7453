"""The installed package, with and without a compiler, and the cost of importing it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fused_adamp

ROOT = Path(__file__).parents[2]


def _wheel(directory: Path, **environment: str) -> zipfile.ZipFile:
    """Builds a wheel from a copy of what the build reads."""
    source = directory / "source"
    source.mkdir()
    for name in ("fused_adamp", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", directory, source]
    clean = {name: value for name, value in os.environ.items() if name != "FUSED_ADAMP_REQUIRE_EXTENSION"}
    run = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = directory.glob("*.whl")
    return zipfile.ZipFile(wheel)


def _texts(names: list[str], folder: Path) -> str:
    """The sources of the CUDA kernels, one after the other."""
    return "".join((folder / name).read_text() for name in names if "/csrc/" in name)


def test_without_a_compiler_the_reference_works_and_one_warning_says_how_to_get_the_fast_path(tmp_path: Path) -> None:
    with _wheel(tmp_path, CC="/nonexistent", CXX="/nonexistent") as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    assert not [name for name in names if name.endswith((".so", ".pyd"))]
    assert {"fused_adamp/py.typed", "fused_adamp/kernels/__init__.py"} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/", "csrc/"))]
    included = re.findall(r'^#include "(.*)"$', _texts(names, tmp_path / "site"), flags=re.MULTILINE)
    assert {Path(name).name for name in names if "/csrc/" in name} == {"cuda_step.cu", *included}
    script = """
import torch, fused_adamp, warnings
p = torch.nn.Parameter(torch.ones(2, 3)); p.grad = torch.ones(2, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        fused_adamp.AdamP([p]).step(); fused_adamp.SGDP([p], lr=0.1).step()
from fused_adamp.backends import cuda
assert '#include "' not in cuda.source()
print(fused_adamp.__file__, p.detach().sum().item() < 6, [str(w.message) for w in caught])
"""
    # -S keeps the editable installation's finder out; torch comes from where this interpreter has it.
    site = [str(tmp_path / "site"), *[path for path in sys.path if "site-packages" in path]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(site)}
    run = subprocess.run(
        [sys.executable, "-S", "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    where, moved, messages = run.stdout.split(" ", 2)
    assert where.startswith(str(tmp_path))
    assert moved == "True"
    assert messages.count("slow reference path") == 1
    assert "install a C++17 compiler" in messages


COMPILERS = {
    # Which symbols there are does not depend on optimization; minutes of compiling do.
    "compiled": 'exec c++ "${@/#-O3/-O0}"',
    # Copies the extension that `make build` has compiled from the same sources to the compiler's output path.
    "built before": f"""
while [ "$1" != -o ]; do shift; done
case "$2" in *.so) cp {ROOT}/fused_adamp/_C.abi3.so "$2";; *) touch "$2";; esac
""",
}


PYTHON = """
    PyArg_ParseTuple PyBool_FromLong PyByteArray_AsString PyByteArray_FromStringAndSize PyByteArray_Size
    PyByteArray_Type PyCapsule_GetPointer PyDict_GetItemWithError PyDict_Next PyDict_Type PyErr_Clear
    PyErr_ExceptionMatches PyErr_Occurred PyExc_KeyError PyImport_ImportModule PyList_Append PyList_GetItem PyList_New
    PyList_SetItem PyList_Size PyLong_AsLongLong PyModule_AddFunctions PyModule_AddIntConstant PyModule_Create2
    PyObject_CallMethodObjArgs PyObject_GetAttr PyObject_GetAttrString PyObject_GetItem PyObject_IsInstance
    PyTuple_GetItem PyTuple_Pack PyTuple_Size PyType_GetFlags PyType_IsSubtype PyUnicode_InternFromString
    Py_BuildValue Py_DecRef Py_IncRef _Py_Dealloc _Py_FalseStruct _Py_NoneStruct _Py_TrueStruct
"""
"""Functions of Python's stable ABI, by its documentation: since 3.10 or earlier."""


@pytest.mark.parametrize("how", ["built before", pytest.param("compiled", marks=pytest.mark.exhaustive)])
def test_one_wheel_serves_every_later_torch_and_python(how: str, tmp_path: Path) -> None:
    """The stable ABI of torch and the limited API of Python, and nothing beyond them."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    if how == "built before" and not (ROOT / "fused_adamp/_C.abi3.so").exists():
        pytest.skip("the extension is not built")
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/usr/bin/env bash\n{COMPILERS[how]}\n")
    compiler.chmod(0o755)
    with _wheel(tmp_path, FUSED_ADAMP_REQUIRE_EXTENSION="1", CC=str(compiler), CXX=str(compiler)) as wheel:
        assert "-cp310-abi3-" in str(wheel.filename)
        wheel.extract("fused_adamp/_C.abi3.so", tmp_path)
    path = tmp_path / "fused_adamp/_C.abi3.so"
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"\b[Uw] (\w+)", listing)
    foreign = [s for s in symbols if re.search(r"at[0-9]|c10|torch|aten", s)]
    assert foreign, "the extension uses torch"
    assert all(s.startswith(("aoti_torch_", "torch_")) for s in foreign), foreign
    assert {s for s in symbols if s.startswith(("Py", "_Py"))} <= {*PYTHON.split()}


def test_a_wheel_installs_and_runs_where_there_is_no_compiler(tmp_path: Path) -> None:
    """By pip, in an environment of its own, which takes torch from this one."""
    if not (ROOT / "fused_adamp/_C.abi3.so").exists():
        pytest.skip("the extension is not built")
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/usr/bin/env bash\n{COMPILERS['built before']}\n")
    compiler.chmod(0o755)
    with _wheel(tmp_path, FUSED_ADAMP_REQUIRE_EXTENSION="1", CC=str(compiler), CXX=str(compiler)) as wheel:
        path, names = str(wheel.filename), {*wheel.namelist()}
    sources = {f"fused_adamp/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    sources |= {f"fused_adamp/csrc/{file.name}" for file in (ROOT / "csrc").glob("cuda_*")}
    assert {"fused_adamp/_C.abi3.so", *sources} <= names
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", path]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    run = subprocess.run(
        [python, "-m", "fused_adamp", "doctor", "--json"],
        env={"PATH": str(environment / "bin"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found = json.loads(run.stdout)
    assert found["fused_adamp"] == fused_adamp.__version__
    assert found["extension"]["missing"] is None
    assert found["devices"][0]["default"] == "cpu"


def test_one_version_everywhere() -> None:
    """pyproject.toml, CITATION.cff and the newest heading of the changelog have the package's version and its date."""
    (project,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    cited = re.search(r"^version: (.*)\ndate-released: (.*)$", citation, re.MULTILINE)
    released = re.search(r"^## (\d.*) - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited
    assert released
    assert project == fused_adamp.__version__
    assert released.groups() == cited.groups() == (project, cited[2])


def test_import_brings_nothing_but_this_package() -> None:
    """Importing the package imports no other package but torch, which keeps the import fast."""
    script = "import sys, torch; before = set(sys.modules); import fused_adamp; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in run.stdout.split()} == {"fused_adamp"}
