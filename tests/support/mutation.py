"""Plants small faults, one at a time, in a copy of the project, and tells which tests find them.

    python tests/support/mutation.py LIST... [PART OF A NAME...]

A list is a file: ``tests/support/host_mutants.py`` (front end, CPU, ranks), ``tests/ptx/kernel_mutants.py`` (GPU).
A mutant that no test finds needs a reason: ``equivalent`` says why it is no fault, or why no test can see it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ROOT", "Mutant", "Tests", "wrong"]

ROOT = Path(__file__).parents[2]
_COPIED = ("fused_adamp", "kernels", "csrc", "tests", "bench")


class Tests(NamedTuple):
    """Tests that should find a fault: a file, and what of it for pytest's ``-k``; with environment variables."""

    file: str
    which: str = ""
    environment: tuple[tuple[str, str], ...] = ()


class Mutant(NamedTuple):
    """A fault: text of a file that is there once, or so many ``times``, and what takes its place."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[Tests, ...]
    times: int = 1
    equivalent: str = ""


def copied(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in _COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    if not (folder / "fused_adamp" / "kernels").exists():
        (folder / "fused_adamp" / "kernels").symlink_to("../kernels")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


class Compiler:
    """Builds the extension of a copy: little optimized, for the instructions that every processor of its kind has."""

    def __init__(self) -> None:
        self._objects = tempfile.TemporaryDirectory()
        self._made: dict[tuple[str, str], Path] = {}

    def build(self, folder: Path) -> None:
        import torch

        home = Path(torch.__file__).parent
        headers = "".join(path.read_text() for path in sorted((folder / "csrc").glob("*.h")))
        command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
        command += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]
        command += ["-DFUSED_ADAMP_INSTRUCTIONS=baseline", f"-I{home / 'include'}", f"-I{folder / 'csrc'}"]
        command += [f"-I{sysconfig.get_path('include')}"]
        objects = []
        for source in sorted((folder / "csrc").glob("*.cpp")):
            key = source.name, headers + source.read_text()
            if key not in self._made:
                path = Path(self._objects.name) / f"{len(self._made)}.o"
                subprocess.run([*command, "-c", source, "-o", path], check=True, capture_output=True, text=True)
                self._made[key] = path
            objects.append(self._made[key])
        (folder / "fused_adamp" / "_C.abi3.so").unlink(missing_ok=True)
        library = [f"-L{home / 'lib'}", "-ltorch_cpu", "-ltorch"]
        link = [command[0], "-shared", "-o", folder / "fused_adamp" / "_C.abi3.so", *objects, *library]
        subprocess.run(link, check=True, capture_output=True, text=True)


def wrong(output: str) -> str:
    """How a fault was found, from pytest's output: "wrong" if a test failed, else "error"."""
    return "wrong numbers" if re.search(r"^E\s+\w*(Error|assert)", output, re.MULTILINE) else "error"


def run(mutant: Mutant, compiler: Compiler, cause: Callable[[str], str]) -> str:
    """Which tests find the mutant, and how; empty if none does."""
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name))
        path = folder / mutant.file
        text = path.read_text()
        found = text.count(mutant.old)
        if found != mutant.times:
            raise ValueError(f"{mutant.name}: {mutant.old!r} is {found} times in {mutant.file}, not {mutant.times}")
        path.write_text(text.replace(mutant.old, mutant.new))
        if path.parent.name == "csrc" and not path.name.startswith("cuda_"):  # these the tests compile by themselves
            compiler.build(folder)
        for tests in mutant.tests:
            environment = os.environ | {"PYTHONPATH": str(folder)} | dict(tests.environment)
            environment.pop("TRITON_INTERPRET", None)
            which = ["-k", tests.which] if tests.which else []
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
            done = subprocess.run(
                [*command, tests.file, *which], env=environment, cwd=folder, capture_output=True, text=True, check=False
            )
            if done.returncode == 1:
                test = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE)
                where = "".join(f"{value}: " for name, value in tests.environment if name == "FUSED_ADAMP_PLAN")
                return f"{where}{cause(done.stdout)} ({test[1] if test else '?'})"
            if done.returncode < 0:
                return f"crash (signal {-done.returncode})"
            if done.returncode:
                raise RuntimeError(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return ""


def main(arguments: Sequence[str]) -> int:
    """Runs the mutants of the lists whose names have all parts that are given, and prints a table.

    Returns:
        1 if a mutant survives without a reason, or is found in spite of one; else 0.
    """
    began, counts, unexplained, compiler = perf_counter(), Counter[str](), [], Compiler()
    lists = [Path(argument) for argument in arguments if argument.endswith(".py")]
    parts = [argument for argument in arguments if not argument.endswith(".py")]
    print("| mutant | killed by |\n|---|---|")
    for path in lists:
        sys.path.append(str(path.parent))
        module = importlib.import_module(path.stem)
        for mutant in module.MUTANTS:
            if not all(part in mutant.name for part in parts):
                continue
            killed = run(mutant, compiler, getattr(module, "cause", wrong))
            said = killed or f"survives: {mutant.equivalent or 'NOT EXPLAINED'}"
            print(f"| {mutant.name} | {said} |", flush=True)
            counts["killed" if killed else "explained" if mutant.equivalent else "survived"] += 1
            if bool(killed) == bool(mutant.equivalent):
                unexplained.append(mutant.name)
    print(f"\n{dict(counts)} in {(perf_counter() - began) / 60:.0f} minutes")
    if unexplained:
        print(f"Not as said: {', '.join(unexplained)}")
    return len(unexplained) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
