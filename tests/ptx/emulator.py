"""Runs compiled GPU kernels on the CPU and reports what a GPU would not forgive.

    kernel = Kernel(ptx)                            # as Triton, NVRTC or nvcc wrote it
    memory = Memory().add("x", tensor)              # what the kernel may touch
    outcome = kernel.launch((8,), [tensor.data_ptr(), 5], memory, block=(256,), resident=3, seed=1)
    assert not outcome.findings, outcome

Among what is found are accesses outside of tensors, misaligned vectors, data races, deadlocks and warps that diverge at
a barrier. decode.py reads the PTX; the machine itself is runtime.h, which g++ compiles at the first use into a cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import struct
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from decode import LANES, Constant, Module
from registers import place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from decode import Instruction

__all__ = ["CACHE", "Finding", "Kernel", "Memory", "Outcome", "Traffic", "cache_folder", "unavailable"]

CACHE = "PTX_EMULATOR_CACHE"
"""Environment variable that names the folder of compiled machines; else one in the user's cache folder."""

KINDS = (
    "out of bounds",
    "misaligned",
    "write to read-only memory",
    "race",
    "race of equal values",
    "race of an unused read",
    "read of uninitialised shared memory",
    "deadlock",
    "diverged",
    "trap",
    "too long",
)
HARMLESS = {"race of equal values", "race of an unused read"}
"""A load that races with a store of its own CTA gets garbage. So if results are right, nobody used it."""
POLICIES = {"in order": 0, "by chance": 1, "priorities": 2}
"""How resident CTAs take turns."""

_NONE = -(1 << 31)
_SLOTS = 12
_INSTRUCTION = struct.Struct("<HBB4B4BB3x12B12iii4xq")  # isa.h, Instruction
_OPTIONS = struct.Struct("<3I3Iiiiiii2Q")  # isa.h, Options
_MOST_CTAS, _MOST_THREADS = (1 << 16) - 2, 1024


def unavailable() -> str | None:
    """Why kernels cannot be run here, None if they can."""
    return None if shutil.which("g++") else "g++ is missing, which compiles the emulator: apt install g++"


def cache_folder() -> Path:
    """Where compiled machines are kept, and what is compiled for them."""
    if CACHE in os.environ:
        return Path(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_adamp" / "ptx"


def _processor() -> str:
    """Architecture and CPU flags, on which the result of -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith("flags")), platform.processor())


@cache
def _library() -> ctypes.CDLL:
    """The machine. It is compiled unless that has been done for these sources, this compiler and this processor."""
    headers = sorted(Path(__file__).parent.glob("*.h"))
    # -frounding-math and no contraction: an instruction's result is the instruction's, in every rounding mode.
    options = [
        "-std=gnu++17",
        "-O1",
        "-ftree-vectorize",
        "-march=native",
        "-ffp-contract=off",
        "-frounding-math",
        "-fno-math-errno",
    ]
    command = ["g++", *options, "-shared", "-fPIC", "-include", str(Path(__file__).with_name("runtime.h")), "-x", "c++"]
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([version, _processor(), *options]).encode())
    for header in headers:
        key.update(header.read_bytes())
    path = cache_folder() / f"machine-{key.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, os.devnull, "-o", str(unfinished)], check=True)
        unfinished.rename(path)
    library = ctypes.CDLL(str(path))
    for name, kind in (
        ("ptx_names", ctypes.c_char_p),
        ("ptx_finding", ctypes.c_char_p),
        ("ptx_kernel", ctypes.c_void_p),
        ("ptx_machine", ctypes.c_void_p),
    ):
        getattr(library, name).restype = kind
    sizes = library.ptx_size(0), library.ptx_size(1)
    assert sizes == (_INSTRUCTION.size, _OPTIONS.size), f"isa.h and emulator.py differ: {sizes}"
    return library


@cache
def _numbers(which: int) -> dict[str, int]:
    """The machine's numbers of instructions (0), types (1) and special registers (2)."""
    return {name: n for n, name in enumerate(_library().ptx_names(which).decode().split())}


class Memory:
    """The memory that a kernel may touch, by regions. Whatever lies outside is out of bounds."""

    def __init__(self) -> None:
        self.regions: dict[tuple[int, int], tuple[str, int, bool, bytes | None]] = {}

    def add(self, name: str, tensor: torch.Tensor, *, writable: bool = True) -> Memory:
        """Adds a CPU tensor's elements, of any shape and strides, and no byte between them. Returns itself.

        If a tensor is added twice, the last ``writable`` counts.
        """
        if tensor.numel() == 0:
            return self
        size = tensor.itemsize
        elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        holes = None
        if elements != tensor.numel():
            free = torch.ones(elements, dtype=torch.uint8, device="cpu")
            free.as_strided(tensor.shape, tensor.stride()).fill_(0)
            holes = bytes(free.tolist())
        begin = tensor.data_ptr()
        self.regions[begin, begin + elements * size] = name, size.bit_length() - 1, writable, holes
        return self


@dataclass(frozen=True)
class Finding:
    """A fault of a launch that would be an error on a GPU, and how often it occurred at these instructions."""

    kind: str
    """One of ``KINDS``."""
    instruction: str
    thread: tuple[int, int]
    """CTA and thread."""
    where: str
    """A tensor's name and a byte offset, or a reason."""
    other: str = ""
    """The instruction with which it races."""
    other_thread: tuple[int, int] = (0, 0)
    count: int = 1

    def __str__(self) -> str:
        cta, thread = self.thread
        text = f"{self.kind} at {self.where} ({self.count}x): CTA {cta} thread {thread}: {self.instruction}"
        if self.other:
            cta, thread = self.other_thread
            text += f"\n    with CTA {cta} thread {thread}: {self.other}"
        return text


class Traffic(NamedTuple):
    """Bytes and sectors that loads and stores move of a tensor.

    A byte that several lanes of a warp access at once counts once. Caches and atomic operations do not count.
    """

    loaded: int = 0
    """Bytes."""
    stored: int = 0
    load_sectors: int = 0
    """Pieces of 32 bytes, which move as a whole."""
    store_sectors: int = 0

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(*map(sum, zip(self, other, strict=True)))


@dataclass
class Outcome:
    """The result of a launch. Instructions are counted per warp."""

    findings: list[Finding]
    harmless: list[Finding]
    """Findings of a kind in ``HARMLESS``."""
    instructions: int
    switches: int
    """Turns of warps."""
    accesses: int
    """Loads, stores and atomic operations of warps."""
    executed: list[int]
    """By instruction, how many warps executed it."""
    lanes: list[int]
    """By instruction, how many threads executed it."""
    traffic: dict[str, Traffic]
    """By the name of a region of memory."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "nothing found"

    @property
    def kinds(self) -> set[str]:
        """The kinds of the findings."""
        return {finding.kind for finding in self.findings}


class Kernel:
    """A kernel of a PTX module.

    Args:
        ptx: the module's text.
        entry: the kernel's name; None for the first.

    Raises:
        ValueError: there is no such kernel.
        UnknownInstructionError: it holds an instruction that the machine does not have.
    """

    def __init__(self, ptx: str, entry: str | None = None) -> None:
        self.module = Module(ptx, entry)
        self.name, self.code = self.module.name, self.module.code
        places, registers = place(self.module)
        constants: dict[Constant, int] = {}
        size = 0
        for i in self.code:
            for operand in i.operands.values():
                if isinstance(operand, Constant) and operand not in constants:
                    constants[operand] = size
                    size += operand.size * LANES
        code = b"".join(self._packed(i, places, constants) for i in self.code)
        filled = b"".join(c.bits.to_bytes(c.size, "little") * LANES for c in constants)
        single_bytes = any(i.op in ("ld", "st") and i.bytes == 1 and i.space != 1 for i in self.code)
        numbers = len(filled), registers, self.module.shared, self.module.local, 0 if single_bytes else 1
        self._handle = ctypes.c_void_p(_library().ptx_kernel(code, len(self.code), filled, *numbers))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            _library().ptx_free_kernel(self._handle)

    def _packed(self, i: Instruction, places: dict[str, int], constants: dict[Constant, int]) -> bytes:
        slots, widths = [_NONE] * _SLOTS, [4] * _SLOTS
        for slot, operand in i.operands.items():
            if isinstance(operand, str):
                slots[slot], widths[slot] = places[operand], self.module.registers[operand]
            elif operand is not None:
                slots[slot], widths[slot] = ~constants[operand], operand.size
        numbers = _numbers(0)[i.op], _numbers(1)[i.type], _numbers(1)[i.type2]
        manner = i.space, i.order, i.scope, i.flags, i.round, i.variant, i.boolean, i.n, i.bytes
        guard = _NONE if i.guard is None else places[i.guard]
        immediate = i.immediate - (1 << 64) if i.immediate >> 63 == 1 else i.immediate
        return _INSTRUCTION.pack(*numbers, *manner, *widths, *slots, guard, i.target, immediate)

    def _arguments(self, arguments: Sequence[int | float | bytes]) -> bytes:
        parameters = self.module.parameters
        if len(arguments) != len(parameters):
            raise ValueError(f"{self.name} takes {len(parameters)} arguments, got {len(arguments)}")
        blob = bytearray()
        for argument, (type_, offset, size) in zip(arguments, parameters, strict=True):
            blob += b"\0" * (offset - len(blob))
            if isinstance(argument, bytes):
                blob += argument
            elif type_ in ("f32", "f64"):
                blob += struct.pack("<f" if size == 4 else "<d", argument)
            else:
                blob += (int(argument) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        return bytes(blob)

    def launch(
        self,
        grid: Sequence[int],
        arguments: Sequence[int | float | bytes],
        memory: Memory,
        *,
        block: Sequence[int] | None = None,
        shared: int = 0,
        resident: int = 2,
        policy: str = "by chance",
        seed: int = 0,
        races: bool = True,
        jitter: int = 0,
        traffic: bool = False,
        limit: int = 20_000_000_000,
    ) -> Outcome:
        """Runs the kernel to its end, or to what it cannot go on after.

        Args:
            grid: CTAs, up to three numbers.
            arguments: numbers, addresses, and bytes for structures.
            block: threads of a CTA, up to three numbers; None: what the module says.
            shared: bytes of dynamic shared memory.
            resident: CTAs that run at once.
            policy: how they take turns, one of ``POLICIES``.
            seed: of the turns.
            races: whether to look for races and for uninitialised shared memory.
            jitter: if not 0, the seed of errors of approximate instructions, as large as PTX allows.
            traffic: whether to count what is moved.
            limit: instructions of warps after which it is too long.

        Raises:
            ValueError: the grid, the block or the number of arguments is not possible.
        """
        library = _library()
        ctas, threads = ((*size, 1, 1)[:3] for size in (grid, block or self.module.block or (1,)))
        for what, size, most in (("CTAs", ctas, _MOST_CTAS), ("threads", threads, _MOST_THREADS)):
            count = size[0] * size[1] * size[2]
            if not 1 <= count <= most or min(size) < 1:
                raise ValueError(f"{self.name}: {size} is {count} {what}, and the machine takes 1 to {most}")
        options = _OPTIONS.pack(
            *ctas, *threads, resident, POLICIES[policy], shared, races, jitter, traffic, seed, limit
        )
        regions = dict(memory.regions)
        for v in self.module.variables:
            regions[v.address, v.address + v.size] = v.name, 2 if v.size % 4 == 0 else 0, v.writable, None
        machine = ctypes.c_void_p(library.ptx_machine())
        try:
            for (begin, end), (name, shift, writable, holes) in regions.items():
                bounds = ctypes.c_uint64(begin), ctypes.c_uint64(end)
                library.ptx_region(machine, *bounds, shift, int(writable), name.encode(), holes)
            count = library.ptx_launch(machine, self._handle, options, self._arguments(arguments))
            found = [self._finding(machine, n) for n in range(count)]
            n = len(self.code)
            executed, lanes, totals = (ctypes.c_uint64 * n)(), (ctypes.c_uint64 * n)(), (ctypes.c_uint64 * 3)()
            library.ptx_counts(machine, executed, lanes, totals)
            moved: dict[str, Traffic] = {}
            for (begin, _), (name, *_) in regions.items():
                numbers = (ctypes.c_uint64 * 4)()
                library.ptx_traffic(machine, ctypes.c_uint64(begin), numbers)
                moved[name] = moved.get(name, Traffic()).plus(Traffic(*numbers))
        finally:
            library.ptx_free_machine(machine)
        findings, harmless = ([f for f in found if (f.kind in HARMLESS) == mild] for mild in (False, True))
        instructions, switches, accesses = totals
        return Outcome(findings, harmless, instructions, switches, accesses, list(executed), list(lanes), moved)

    def _finding(self, machine: ctypes.c_void_p, n: int) -> Finding:
        numbers = (ctypes.c_int64 * 8)()
        where = _library().ptx_finding(machine, n, numbers).decode()
        kind, instruction, other, cta, thread, other_cta, other_thread, count = numbers
        second = self.describe(other) if other >= 0 else ""
        first = self.describe(instruction)
        return Finding(KINDS[kind], first, (cta, thread), where, second, (other_cta, other_thread), count)

    def describe(self, n: int) -> str:
        """An instruction's number, text and place in the source."""
        return f"#{n} {self.code[n].text}   // {self.code[n].source}"
