"""Tests one wheel under several versions of Python, torch and Triton, and enters a row for each in docs/versions.md.

    python tests/support/versions.py WHEEL PYTHON:TORCH[:TRITON] ...

PYTHON is an interpreter: a name or a path. TORCH and TRITON are versions; without TRITON, the row has the one that
torch asks for, if any. uv installs packages, or pip if there is no uv. Their own variables (``UV_CACHE_DIR``,
``PIP_INDEX_URL``, ...) say where packages come from and where they are kept.

Each row has a new virtual environment. In it:

1. The wheel and torch are installed, and nothing else.
2. Without a compiler, ``doctor``, ``verify --quick`` and a short training run. The training stops, and goes on bit for
   bit from its checkpoint in another process.
3. What the tests need is installed, and the tests run. They run in a copy, beside which there is no checkout of the
   package that Python could import in place of the wheel.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "versions.md"
TESTS = {
    "usual": ["tests/numerics", "tests/options", "tests/contract"],
    "few": [  # what depends most on torch and on the binary, in a third of the time
        "tests/numerics/test_backends.py",
        "tests/numerics/test_oracle.py",
        "tests/contract/test_torch_contract.py",
        "tests/contract/test_compile.py",
        "tests/contract/test_checkpoint_formats.py",
        "tests/contract/test_modes.py",
    ],
    "triton": ["tests/ptx/test_triton_compile.py"],
    "none": [],
}
NEEDED = ("numpy<2.4", "adamp==0.3.0", "expecttest", "hypothesis", "pytest", "pytorch_optimizer", "rich")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""On a busy machine, threads mostly wait for each other. Tests of threads ask for as many as they need."""
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc")


class Row(NamedTuple):
    """A row of the page: versions, what ran, and how it ended."""

    python: str
    torch: str
    triton: str
    tests: str
    smoke: str
    passed: int
    failed: int
    skipped: int
    date: str

    def __str__(self) -> str:
        return f"| {' | '.join(map(str, self))} |"


def smoke(python: Path, folder: Path) -> str:
    """Runs the package where no compiler can be found. Returns what failed, or "passed"."""
    environment = ONE_THREAD | {"PATH": str(python.parent), "HOME": str(folder)}
    found = [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]
    assert not found, f"compilers can be found: {found}"
    training = str(ROOT / "tests" / "support" / "train_and_resume.py")
    failed = []
    for name, arguments in {
        "doctor": ("-m", "fused_adamp", "doctor", "--json"),
        "verify": ("-m", "fused_adamp", "verify", "--quick"),
        "training": (training, "first"),
        "resumed training": (training, "second"),
    }.items():
        run = subprocess.run([python, *arguments], env=environment, cwd=folder, stdout=subprocess.PIPE, check=False)
        print(f"{name}: exit code {run.returncode}\n{run.stdout.decode()}", flush=True)
        failed += [name] * (run.returncode != 0)
        if name == "doctor" and not failed:
            facts = json.loads(run.stdout)
            assert facts["extension"]["missing"] is None, facts["extension"]["missing"]
            assert facts["devices"][0]["default"] == "cpu"
    return f"failed: {', '.join(failed)}" if failed else "passed"


def tested(python: Path, folder: Path, tests: str) -> tuple[int, int, int]:
    """Runs tests of a copy of the project without the package. Returns how many passed, failed and were skipped."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ONE_THREAD
    environment["FUSED_ADAMP_COMPILE_CACHE"] = str(folder / "compiled")  # kernels are compiled, not looked up
    environment["FUSED_ADAMP_VARIANTS"] = "few"
    code = "import fused_adamp; print(fused_adamp.__file__)"
    where = subprocess.check_output([python, "-c", code], env=environment, cwd=folder, text=True)
    assert "site-packages" in where, f"not the installed wheel: {where}"
    command = [str(python), "-m", "pytest", "-q", "--junitxml", "counts.xml", *TESTS[tests]]
    subprocess.run(command, env=environment, cwd=folder, check=False)
    (suite,) = ElementTree.parse(folder / "counts.xml").getroot().iter("testsuite")
    total, failures, errors, skipped = (int(suite.attrib[n]) for n in ("tests", "failures", "errors", "skipped"))
    return total - failures - errors - skipped, failures + errors, skipped


def version(python: Path, package: str) -> str:
    """The version of an installed package, "none" if it is missing."""
    code = f"from importlib import metadata; print(metadata.version({package!r}))"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "none"


def test(wheel: Path, python: str, torch: str, triton: str | None, tests: str) -> Row:
    """Makes the environment, uses it and removes it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        uv = shutil.which("uv")
        subprocess.run([python, "-m", "venv", *["--without-pip"] * bool(uv), folder / "venv"], check=True)
        inside = folder / "venv/bin/python"
        if uv:
            install = [uv, "pip", "install", "--quiet", "--python", str(inside)]
        else:
            install = [str(inside), "-m", "pip", "install", "--quiet", "--no-compile", "--no-cache-dir"]
        subprocess.run([*install, f"torch=={torch}", str(wheel)], check=True)
        ran = smoke(inside, folder)
        if TESTS[tests]:
            subprocess.run([*install, *NEEDED], check=True)
        if triton:  # last, since torch may ask for another one
            subprocess.run([*install, "--no-deps", f"triton=={triton}"], check=True)
        name = subprocess.check_output([inside, "--version"], text=True).split()[1]
        versions = name, version(inside, "torch"), version(inside, "triton")
        counts = tested(inside, folder, tests) if TESTS[tests] else (0, 0, 0)
        return Row(*versions, tests, ran, *counts, f"{datetime.now(timezone.utc):%Y-%m-%d}")


def enter(row: Row, page: Path) -> None:
    """Puts a row into the page's table, in the place of one with the same versions and tests."""
    lines = page.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| Python |"))
    end = next((i for i in range(head, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = {tuple(map(str.strip, line.split("|")[1:5])): line for line in lines[head + 2 : end]}
    lines[head + 2 : end] = (rows | {row[:4]: str(row)}).values()
    page.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("rows", nargs="+", metavar="PYTHON:TORCH[:TRITON]")
    parser.add_argument("--tests", choices=TESTS, default="usual", help="default usual")
    parser.add_argument("--page", type=Path, default=PAGE, help="a file with the table")
    given = parser.parse_args()
    for wanted in given.rows:
        python, torch, triton = (*wanted.split(":"), None)[:3]
        row = test(given.wheel.resolve(), python, torch, triton, given.tests)
        print(row, flush=True)
        enter(row, given.page)


if __name__ == "__main__":
    main()
