"""Compiles the kernels, without a GPU, and prints registers, spills and widths of memory accesses.

    python tests/support/compile_table.py [--cached] [VARIANT ...]

The speed of these kernels depends on properties of the compiled code: whether a program's elements stay in registers,
how many programs fit on a multiprocessor, and whether loads and stores are as wide as possible.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import linecache
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fused_adamp.backends import triton as backend

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

KERNELS = ("measure", "dot", "update", "one_pass")
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
RULES = {"AdamP": (True, True), "SGDP": (False, True), "SGDP without buffer": (False, False)}
"""For each rule: whether it is adaptive, and whether it keeps a momentum buffer."""
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

_TENSORS = {
    "table": torch.int64,
    "addresses": torch.int64,
    "strides": torch.int64,
    "owners": torch.int32,
    "scalars": torch.float64,
    "scale": torch.float64,
    "found_inf": torch.float64,
    "coefficients": torch.float64,
    "sums": torch.float64,
    "findings": torch.float64,
    "counters": torch.int64,
    "decisions": torch.uint8,
    "results": torch.float64,
    "parts": torch.int64,
    "tickets": torch.int64,
    "replays": torch.int64,
    "active": torch.int32,
    "jobs": torch.int32,
}
_NUMBERS = {"epoch": 1, "n_active": 16, "n_jobs": 16, "n_blocks": 1}
"""Those that Triton would compile a kernel of their own for, if the kernels let it."""
_PROCESSES = 2
WIDEST = 16
"""Bytes: the widest load of one thread on all targets but sm_100, where there are twice as wide ones."""


FIRST = "remainder to come"


class Variant(NamedTuple):
    """One kernel, compiled for one target and one kind of parameter."""

    kernel: str
    target: str = "sm_90"
    layout: str = "ALIGNED"
    dtypes: tuple[str, str, str] = ("fp32", "fp32", "fp32")
    """The dtypes of weight, gradient and state."""
    rule: str = "AdamP"
    rounding: str = "nearest"
    """Or FIRST: weights will have remainders, but have none before the first step."""
    shared: bool = False
    """Whether parameters may lie on several ranks."""

    def __str__(self) -> str:
        names = self.kernel, self.target, self.layout, "/".join(self.dtypes), self.rule, self.rounding
        return "-".join((*names, *["shared"] * self.shared))


ENVIRONMENT = "FUSED_ADAMP_VARIANTS"
"""Environment variable that says which variants there are: "all" or "few"."""
CACHE = "FUSED_ADAMP_COMPILE_CACHE"
"""Environment variable with the folder where rows are kept."""


def variants() -> list[Variant]:
    """Every target in the most usual case and every case on one target.

    With FUSED_ADAMP_VARIANTS=few, a handful for another version of Triton.
    """
    if os.environ.get(ENVIRONMENT) == "few":
        remainder: dict[str, Any] = {"dtypes": ("bf16", "bf16", "fp32"), "rounding": "remainder"}
        found = [Variant(kernel, **more) for kernel in ("measure", "dot", "update") for more in ({}, remainder)]
        found += [Variant("one_pass"), Variant("dot", layout="FLAT"), Variant("dot", "gfx942")]
        return [*found, Variant("redo"), Variant("redo_ahead", shared=True)]
    found = [Variant(kernel, target) for target in TARGETS for kernel in KERNELS]
    for kernel in KERNELS:
        found += [Variant(kernel, layout=layout) for layout in ("FLAT", "STRIDED")]
        found += [Variant(kernel, rule=rule) for rule in RULES if rule != "AdamP"]
        found += [Variant(kernel, dtypes=("bf16", "bf16", state)) for state in ("fp32", "bf16")]
        found += [Variant(kernel, dtypes=(dtype, dtype, dtype)) for dtype in ("fp16", "fp64")]
        found += [Variant(kernel, dtypes=("fp32", "fp32", "bf16"))]
        found += [Variant(kernel, dtypes=("bf16", "bf16", state), rounding="remainder") for state in ("fp32", "bf16")]
    for kernel in ("update", "one_pass"):  # the others round nothing
        stochastic = ("bf16", "bf16", "bf16"), ("bf16", "bf16", "fp32"), ("fp32", "fp32", "bf16")
        found += [Variant(kernel, dtypes=dtypes, rounding="stochastic") for dtypes in stochastic]
    for target in ("sm_80", "sm_90"):  # what a row that is cut in two most often is
        flat = {"target": target, "layout": "FLAT"}
        found += [Variant(k, dtypes=("bf16", "bf16", "fp32"), rounding="remainder", **flat) for k in KERNELS]
        found += [Variant(k, dtypes=("bf16",) * 3, rounding="stochastic", **flat) for k in ("update", "one_pass")]
    for kernel in (*KERNELS, "share"):
        found += [Variant(kernel, target, shared=True) for target in TARGETS]
    for kernel in ("update", "share"):
        found += [Variant(kernel, layout=layout, shared=True) for layout in ("FLAT", "STRIDED")]
        found += [Variant(kernel, rule=rule, shared=True) for rule in RULES if rule != "AdamP"]
        found += [Variant(kernel, dtypes=(dtype, dtype, dtype), shared=True) for dtype in ("bf16", "fp64")]
        found += [Variant(kernel, dtypes=("bf16", "bf16", "fp32"), rounding="remainder", shared=True)]
    found += [Variant("update", dtypes=("bf16", "bf16", "bf16"), rounding="stochastic", shared=True)]
    first: dict[str, Any] = {"dtypes": ("bf16",) * 3, "rule": "SGDP without buffer", "rounding": FIRST}
    found += [Variant("measure", layout="FLAT", target="sm_100", **first)]
    found += [Variant(k, shared=shared, **first) for k, shared in (("measure", False), ("share", True))]
    for kernel in ("redo", "redo_ahead"):
        found += [Variant(kernel, target) for target in TARGETS]
        found += [Variant(kernel, layout=layout) for layout in ("FLAT", "STRIDED")]
        found += [Variant(kernel, shared=True)]
    found += [Variant("redo", dtypes=("bf16",) * 3, rounding="stochastic")]
    found += [Variant("redo", dtypes=("bf16", "bf16", "fp32"), rounding="remainder", shared=True)]
    return found


def is_usual(variant: Variant) -> bool:
    """Whether the usual tests compile it: every kernel once, update for every target, layout, dtype and rounding."""
    if variant in (Variant(variant.kernel), Variant("share", shared=True), Variant("one_pass", layout="FLAT")):
        return True
    if variant.rounding == FIRST:
        return variant.layout == "FLAT"
    if variant.kernel != "update" or variant.shared or variant.layout == "FLAT":
        return False
    rounds = variant.rounding != "nearest"
    wide = ("bf16", "bf16", "fp32") if variant.rounding == "remainder" else ("bf16",) * 3
    return variant.rule == "AdamP" and variant.dtypes in ([wide] if rounds else [("fp32",) * 3, ("fp64",) * 3])


Accesses = dict[str, dict[int, int]]
"""For each accessed tensor of p, g, m, v and r (the remainder): bytes per instruction and thread -> instructions."""


class Row(NamedTuple):
    """Properties of a compiled variant.

    Attributes:
        threads: threads per program.
        registers: registers per thread; vector registers on AMD GPUs.
        spill_bytes: bytes per thread that are spilled to memory: stored or loaded, whichever is more.
        scalar_spills: on AMD GPUs, scalar registers spilled to lanes of vector registers, which uses no memory.
        shared_bytes: bytes of shared memory per program.
        assumptions: arguments for which the code relies on more than the type.
        fuses: whether the compiler may fuse a product and a sum into one operation with one rounding.
        arithmetic: floating-point operations, in the words of PTX; none on AMD GPUs.
        sums: of each sum over elements, their type, with the layout that says which ones a thread adds up.
    """

    kernel: str
    target: str
    layout: str
    dtypes: tuple[str, str, str]
    rule: str
    rounding: str
    shared: bool
    threads: int
    registers: int
    spill_bytes: int
    scalar_spills: int
    shared_bytes: int
    assumptions: list[str]
    fuses: bool
    arithmetic: dict[str, int]
    sums: list[str]
    loads: Accesses
    stores: Accesses
    seconds: float


class Driver:
    """Has Triton take it that there is a GPU. No kernel can be loaded on it."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target])

    def get_current_device(self) -> str:
        """Triton keeps what it has compiled by device."""
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0


def arguments(kernel: Any) -> list[Any]:
    """Arguments for a kernel, without the spec. The tensors start at multiples of 16 bytes."""
    names = [name for name in kernel.arg_names if name != "S"]
    return [_NUMBERS[name] if name in _NUMBERS else torch.empty(16, dtype=_TENSORS[name]) for name in names]


def make_spec(variant: Variant) -> Any:
    adaptive, buffer = RULES[variant.rule]
    p, g, state = (DTYPES[dtype] for dtype in variant.dtypes)
    if variant.rounding == FIRST:
        return backend.first_spec(p, g, variant.layout.lower(), "remainder", shared=variant.shared)
    spec = backend.make_spec(
        p,
        g,
        state,
        variant.layout.lower(),
        adaptive=adaptive,
        buffer=buffer,
        rounding=variant.rounding,
        shared=variant.shared,
    )
    return backend.in_float64(spec) if variant.kernel.startswith("redo") else spec


def compile_variant(variant: Variant) -> Row:
    """As a launch does, up to where the kernel would be loaded."""
    from fused_adamp.kernels import plans
    from triton.runtime import driver

    began = perf_counter()
    kernel = getattr(plans, f"{variant.kernel}_kernel")
    driver.set_active(Driver(variant.target))
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = backend.compile_kernel(kernel, arguments(kernel), make_spec(variant))
    kind, _, warp_size = TARGETS[variant.target]
    nvidia = kind == "cuda"
    assembly = compiled.asm["ptx" if nvidia else "amdgcn"]
    registers, spill_bytes, scalar_spills = _ptxas_usage(log.getvalue()) if nvidia else _amd_usage(assembly)
    loads, stores = _accesses(assembly)
    return Row(
        *variant,
        threads=backend._WARPS * warp_size,
        registers=registers,
        spill_bytes=spill_bytes,
        scalar_spills=scalar_spills,
        shared_bytes=compiled.metadata.shared,
        assumptions=assumptions(compiled),
        fuses=compiled.metadata.enable_fp_fusion,
        arithmetic=dict(Counter(_ARITHMETIC.findall(assembly))),
        sums=_sums(compiled.asm["ttgir"]),
        loads=loads,
        stores=stores,
        seconds=perf_counter() - began,
    )


def assumptions(compiled: Any) -> list[str]:
    """Arguments, besides the spec, whose values or divisors Triton has compiled in."""
    found = {*compiled.src.constants, *(place for place, attributes in compiled.src.attrs.items() if attributes)}
    names = [compiled.src.fn.arg_names[index] for index, *_ in sorted(found)]
    return [name for name in names if name != "S"]


_ARITHMETIC = re.compile(r"\b(?:add|sub|mul|fma|div|sqrt|rcp)(?:\.\w+)*\.f(?:16|32|64)(?:x2)?\b")
_LAYOUT = re.compile(r"^(#\w+) = (.*)$", re.MULTILINE)
_SUM = re.compile(r"^\s*\}\) : \((tensor<.*?)\) -> ", re.MULTILINE)


def _sums(intermediate: str) -> list[str]:
    """From Triton's GPU dialect, where layouts are names."""
    layouts = dict(_LAYOUT.findall(intermediate))
    return [re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), found) for found in _SUM.findall(intermediate)]


def _ptxas_usage(log: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and scalar spills from the log of the ptxas run that wrote the cubin."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas did not say how many registers it used: {log!r}")
    return max(map(int, registers)), max(map(int, spills)), 0


def _amd_usage(assembly: str) -> tuple[int, int, int]:
    counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    return int(counts["vgpr_count"]), 4 * int(counts["vgpr_spill_count"]), int(counts["sgpr_spill_count"])


_FILE = re.compile(r'^\s*\.file\s+(\d+) "([^"]*)"(?: "([^"]*)")?', re.MULTILINE)
_LINE = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_STREAM = re.compile(r"place\(memory, where, e, ([PGMVR]),")
_PTX = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d+))?\.[bfsu](\d+)\b")
_AMD = re.compile(r"\s*(?:global|buffer|flat)_(load|store)_(?:dwordx(\d)|(dword)|\w*?(short|byte))")
_AMD_BYTES = {"dword": 4, "short": 2, "byte": 1}


def _accesses(assembly: str) -> tuple[Accesses, Accesses]:
    """Loads and stores of the parameters' tensors.

    The line of source that an instruction stands for tells them from those of tables, which can be as wide.
    """
    files = {number: Path(folder, name) for number, folder, name in _FILE.findall(assembly)}
    counted: dict[str, dict[str, Counter[int]]] = {"l": {}, "s": {}}  # the first letters of both assembly languages
    stream = None
    lines_of_asm = -1  # none; within inline assembly LLVM may count on from its line, and only the first is right
    for line in assembly.splitlines():
        if "inline asm" in line:
            lines_of_asm = 0 if "begin" in line else -1
        elif place := _LINE.match(line):
            lines_of_asm += lines_of_asm >= 0
            if lines_of_asm > 1:
                continue
            found = _STREAM.search(linecache.getline(str(files[place[1]]), int(place[2])))
            stream = found[1].lower() if found else None
        elif stream is None:
            continue
        elif access := _PTX.search(line):
            counted[access[1][0]].setdefault(stream, Counter())[int(access[2] or 1) * int(access[3]) // 8] += 1
        elif access := _AMD.match(line):
            size = 4 * int(access[2]) if access[2] else _AMD_BYTES[access[3] or access[4]]
            counted[access[1][0]].setdefault(stream, Counter())[size] += 1
    loads, stores = ({name: dict(streams[name]) for name in "pgmvr" if name in streams} for streams in counted.values())
    return loads, stores


def _set_up_process(cache: str) -> None:
    os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}


def _kernels() -> Path:
    spec = find_spec("fused_adamp.kernels")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _place(variant: Variant) -> Path:
    """Where the variant's row is kept: by what it is made from."""
    key = hashlib.sha256(f"{variant} {version('triton')}".encode())
    package = Path(backend.__file__).parents[1]  # the kernels number their tables by the front end's
    sources = *_kernels().glob("*.py"), *package.glob("backends/*.py"), package / "batch.py", package / "reference.py"
    for path in (*sorted(sources), Path(__file__)):
        key.update(path.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_adamp" / "compiled"
    return Path(os.environ.get(CACHE, folder)) / f"{key.hexdigest()[:32]}.json"


def _with_numbers(fields: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are strings, also those that were sizes."""
    return {int(key) if key.isdecimal() else key: value for key, value in fields.items()}


def cached(variant: Variant) -> Row | None:
    """The cached row of a variant that was compiled from the same sources; None if there is none."""
    path = _place(variant)
    return Row(**json.loads(path.read_text(), object_hook=_with_numbers)) if path.exists() else None


def compile_all(chosen: list[Variant]) -> list[Row]:
    """With an empty cache of Triton's: ptxas reports what it compiles, not what is found compiled."""
    context = multiprocessing.get_context("spawn")  # Triton may have threads, which a fork would lose
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(_PROCESSES, context, _set_up_process, (cache,)) as pool,
    ):
        rows = list(pool.map(compile_variant, chosen))
    for variant, row in zip(chosen, rows, strict=True):
        path = _place(variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(row._asdict()))
        Path(file.name).replace(path)
    return rows


def count(accesses: Accesses, widths: dict[str, int], *, wide: bool) -> dict[str, int]:
    """For each tensor, the number of accesses of at least ``widths`` bytes, or of fewer bytes if not ``wide``."""
    return {
        stream: sum(n for size, n in sizes.items() if (size >= widths[stream]) == wide)
        for stream, sizes in accesses.items()
    }


def item_sizes(row: Row | Variant) -> dict[str, int]:
    """Bytes of an element of each tensor."""
    p, g, state = (DTYPES[dtype].itemsize for dtype in row.dtypes)
    return {"p": p, "g": g, "m": state, "v": state, "r": torch.int16.itemsize}


def whole_widths(row: Row | Variant) -> dict[str, int]:
    """Bytes of an access to each tensor where rows are aligned: four elements of a weight that is float32, a remainder
    included, whatever the storage; else as many as can be.
    """
    elements = 4 if row.dtypes[0] == "fp32" or row.rounding in ("remainder", FIRST) else WIDEST
    return {stream: min(WIDEST, elements * size) for stream, size in item_sizes(row).items()}


def _cell(accesses: Accesses) -> str:
    """``pg 12x16 1x4``: p and g are accessed by 12 instructions of 16 bytes and one of 4, each."""
    alike: dict[str, str] = {}
    for stream, sizes in accesses.items():
        widths = " ".join(f"{n}x{size}" for size, n in sorted(sizes.items(), reverse=True))
        alike[widths] = alike.get(widths, "") + stream
    return ", ".join(f"{streams} {widths}" for widths, streams in alike.items())


def print_table(rows: list[Row]) -> None:
    table = Table(
        title="Compiled kernels; loads and stores of p, g, m, v and r: instructions x bytes of one thread",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("kernel", "target", "layout", "p/g/state", "rule", "rounding", "shared"):
        table.add_column(heading, no_wrap=True)
    for heading in ("registers", "spill bytes", "scalar spills", "shared bytes", "whole loads", "whole stores"):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for heading in ("loads", "stores"):
        table.add_column(heading, no_wrap=True)
    table.add_column("s", justify="right")
    for row in rows:
        widths = whole_widths(row)
        wide = [str(sum(count(accesses, widths, wide=True).values())) for accesses in (row.loads, row.stores)]
        numbers = map(str, (row.registers, row.spill_bytes, row.scalar_spills, row.shared_bytes))
        names = row.kernel, row.target, row.layout, "/".join(row.dtypes), row.rule, row.rounding
        table.add_row(
            *names, "shared" * row.shared, *numbers, *wide, _cell(row.loads), _cell(row.stores), f"{row.seconds:.1f}"
        )
    Console(width=None if sys.stdout.isatty() else 215).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {str(variant): variant for variant in variants()}
    parser.add_argument("names", nargs="*", metavar="VARIANT", help="such as one_pass-sm_90-...; all by default")
    parser.add_argument("--cached", action="store_true", help="show rows that were made of the same sources before")
    arguments = parser.parse_args()
    if backend.interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if reason := backend.load():
        parser.error(reason)
    began = perf_counter()
    chosen = [names[name] for name in arguments.names or names]
    known = {variant: row for variant in chosen if arguments.cached and (row := cached(variant))}
    missing = [variant for variant in chosen if variant not in known]
    known |= zip(missing, compile_all(missing), strict=True)
    print_table([known[variant] for variant in chosen])
    print(f"{len(missing)} variants in {perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
