"""Compiles the CUDA C++ kernels by NVRTC, without a GPU, and prints their properties beside the Triton kernels'.

python tests/support/cuda_table.py [VARIANT ...]
python tests/support/cuda_table.py --instructions     # what the emulator executes for each element
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import compile_table
from compile_table import DTYPES, RULES, Variant
from rich import box
from rich.console import Console
from rich.table import Table

from fused_adamp.backends import cuda

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
KERNELS = ("measure", "dot", "update", "one_pass", "share")
SHAPES = {(512, 64): "rows of 64", (128, 768): "rows of 768", (16, 4096): "rows of 4096", (65536,): "a vector"}
_PTX = Path(__file__).parents[1] / "ptx"


class Row(NamedTuple):
    """Properties of a compiled kernel.

    Attributes:
        registers, spill_bytes: of a thread.
        shared_bytes: of a block.
        barriers: instructions of PTX that wait for the block.
        loads, stores: bytes of an access to a tensor's elements -> instructions of PTX.
        arithmetic: floating-point operations, in the words of PTX.
        code_bytes: the size of what is loaded on a GPU.
        seconds: of compiling it.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    barriers: int
    loads: dict[int, int]
    stores: dict[int, int]
    arithmetic: dict[str, int]
    code_bytes: int
    seconds: float


def variants() -> list[Variant]:
    """Those of the Triton kernels that exist here, and the usual ones for one more target."""
    found = [v for v in compile_table.variants() if v.kernel in KERNELS and v.target in TARGETS]
    found = [v for v in found if v.rounding != compile_table.FIRST]  # no kernel of its own here
    return [*found, *(Variant(kernel, "sm_120", shared=kernel == "share") for kernel in KERNELS)]


def spec_of(variant: Variant) -> cuda.Spec:
    adaptive, buffer = RULES[variant.rule]
    p, g, state = (DTYPES[dtype] for dtype in variant.dtypes)
    return cuda.Spec(p, g, state, variant.layout.lower(), adaptive, buffer, variant.rounding, variant.shared)


def blocks(variant: Variant) -> int:
    """Blocks of the kernel that a multiprocessor is to have registers for."""
    return int(cuda.options(f"{variant.kernel}_kernel", spec_of(variant))["FUSED_ADAMP_BLOCKS"])


def row_of(variant: Variant) -> Row:
    """From the cache, if the variant has been compiled from the same source."""
    from cuda.bindings import nvrtc

    macros = cuda.options(f"{variant.kernel}_kernel", spec_of(variant))
    key = hashlib.sha256(repr((cuda.source(), macros, variant.target, nvrtc.nvrtcVersion())).encode())
    key.update(Path(__file__).read_bytes())
    path = compile_table._place(variant).with_name(f"cuda-{key.hexdigest()[:32]}.json")
    if path.exists():
        return Row(**json.loads(path.read_text(), object_hook=compile_table._with_numbers))
    row = _compile(variant, macros)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(row._asdict()))
    unfinished.replace(path)
    return row


def _compile(variant: Variant, macros: dict[str, Any]) -> Row:
    sys.path.append(str(_PTX))
    import compiler

    began = perf_counter()
    defined = [f"{name}={value}" for name, value in macros.items()]
    made = compiler.made(cuda.source(), "cuda_step.cu", *defined, target=variant.target)
    seconds = perf_counter() - began
    used, spilled, _ = compile_table._ptxas_usage(made.log)
    shared = re.search(r"(\d+) bytes smem", made.log)
    assert shared is not None, made.log
    loads, stores = _accesses(made.ptx)
    arithmetic = dict(Counter(compile_table._ARITHMETIC.findall(made.ptx)))
    barriers = len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?(?:sync|red)", made.ptx))
    return Row(used, spilled, int(shared[1]), barriers, loads, stores, arithmetic, len(made.cubin), seconds)


_LINE = re.compile(r"\s*\.loc\s+\d+\s+(\d+)")
_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d+))?\.[bfsu](\d+)\b")


def _accesses(ptx: str) -> tuple[dict[int, int], dict[int, int]]:
    """Loads and stores of elements, which the lines of the source tell from those of tables: cuda_tile.h, Elements."""
    source = cuda.source().splitlines()
    counted: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    elements = False
    for line in ptx.splitlines():
        if place := _LINE.match(line):
            elements = re.search(r"word\[i\]", source[int(place[1]) - 1]) is not None
        elif elements and (access := _ACCESS.search(line)):
            counted[access[1]][int(access[2] or 1) * int(access[3]) // 8] += 1
    return dict(counted["ld"]), dict(counted["st"])


def print_table(chosen: list[Variant]) -> None:
    table = Table(title="CUDA C++ kernels; loads and stores: instructions x bytes of one thread", box=box.SIMPLE_HEAD)
    for heading in ("kernel", "target", "layout", "p/g/state", "rule", "rounding", "shared"):
        table.add_column(heading, no_wrap=True)
    for heading in ("registers", "Triton's", "spill bytes", "shared bytes", "barriers", "code KB", "s"):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for heading in ("loads", "stores"):
        table.add_column(heading, no_wrap=True)
    for variant in chosen:
        row = row_of(variant)
        triton = compile_table.cached(variant) if variant.target in compile_table.TARGETS else None
        names = variant.kernel, variant.target, variant.layout, "/".join(variant.dtypes), variant.rule, variant.rounding
        numbers = (row.registers, triton.registers if triton else "", row.spill_bytes, row.shared_bytes, row.barriers)
        sizes = (
            " ".join(f"{n}x{size}" for size, n in sorted(accesses.items(), reverse=True))
            for accesses in (row.loads, row.stores)
        )
        code = f"{row.code_bytes / 1024:.0f}"
        table.add_row(*names, "shared" * variant.shared, *map(str, numbers), code, f"{row.seconds:.1f}", *sizes)
    Console(width=None if sys.stdout.isatty() else 215).print(table)


# Instructions for each element.

_COUNT = """
import json, os, sys
import torch
import harness
from collections import defaultdict
from fused_adamp import AdamP
from fused_adamp.backends import cuda, jobs
from fused_adamp.reference import Decision
from fused_adamp.verify import make_gradient
from torch.nn import Parameter
tile, block, found = cuda._TILE, cuda.CudaBackend.block, {}
for plan in ("split", "one_pass"):
    os.environ[jobs.PLAN] = plan
    machine = harness.Harness(harness.Schedule(seed=1, resident=2, programs=2, idle_redo=False))
    executed, original = defaultdict(int), harness.Emulated.start
    def start(it):
        before = machine.instructions
        original(it)
        executed[it.kernel.name] += machine.instructions - before
    with machine.installed():
        cuda._TILE, cuda.CudaBackend.block = tile, block  # as on a GPU
        harness.Emulated.start = start
        for shape in map(tuple, json.loads(sys.argv[1])):
            for decision in ("NONE", "CHANNEL")[: len(shape)]:
                generator = torch.Generator().manual_seed(0)
                p = Parameter(torch.randn(shape, generator=generator))
                p.grad = make_gradient(p.detach().double(), Decision[decision], generator).float()
                optimizer = AdamP([p], lr=1e-9, backend=harness.BACKEND)
                optimizer.step()
                executed.clear()
                optimizer.step()
                assert optimizer.decisions()[p] == Decision[decision]
                for kernel, warps in executed.items():
                    name = kernel.removesuffix("_kernel"), *map(str, shape), decision.lower()
                    found[" ".join(name)] = warps * harness.WARP / p.numel()
        harness.Emulated.start = original
    assert not machine.take()
print(json.dumps(found))
"""


def print_instructions() -> None:
    """Instructions of PTX that a thread executes for each element, of both backends."""
    found = {}
    for backend in ("triton", "cuda"):
        path = os.pathsep.join([str(_PTX), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"FUSED_ADAMP_EMULATED": backend, "PYTHONPATH": path}
        run = subprocess.run(
            [sys.executable, "-c", _COUNT, json.dumps([*SHAPES])], env=environment, check=True, stdout=subprocess.PIPE
        )
        found[backend] = json.loads(run.stdout.splitlines()[-1])
    table = Table(title="instructions of PTX for each element, float32 AdamP", box=box.SIMPLE_HEAD)
    for heading in ("kernel, shape, decision", *found):
        table.add_column(heading, justify="left" if "kernel" in heading else "right")
    for name in found["cuda"]:
        table.add_row(name, *(f"{numbers[name]:.1f}" if name in numbers else "" for numbers in found.values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {str(variant): variant for variant in variants()}
    parser.add_argument("names", nargs="*", metavar="VARIANT", help="such as one_pass-sm_90-...; all by default")
    parser.add_argument("--instructions", action="store_true", help="count in the emulator instead")
    arguments = parser.parse_args()
    if reason := cuda.load():
        parser.error(reason)
    if arguments.instructions:
        print_instructions()
    else:
        print_table([names[name] for name in arguments.names or names])


if __name__ == "__main__":
    main()
