"""The machine of runtime.h: what threads tell each other, and that planted faults are found, in CUDA C++ by NVRTC."""

from __future__ import annotations

import math
from itertools import product

import compiler
import emulator
import pytest
import torch
from emulator import POLICIES, Kernel, Memory, Outcome

pytestmark = [
    pytest.mark.usefixtures("machine"),
    pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable())),
]

SCHEDULES = list(product((1, 2, 3), POLICIES))
"""Resident CTAs and policies."""


def launch(
    kernel: Kernel,
    grid: int,
    block: int,
    tensors: dict[str, torch.Tensor],
    *numbers: int,
    fixed: tuple[str, ...] = (),
    resident: int = 2,
    policy: str = "by chance",
    seed: int = 0,
) -> Outcome:
    """Launches with the tensors' addresses and the numbers as arguments. ``fixed``: the tensors not to be written."""
    memory = Memory()
    for name, tensor in tensors.items():
        memory.add(name, tensor, writable=name not in fixed)
    arguments = [*(tensor.data_ptr() for tensor in tensors.values()), *numbers]
    return kernel.launch((grid,), arguments, memory, block=(block,), resident=resident, policy=policy, seed=seed)


# Sums.


def summed(kernel: Kernel, **schedule: object) -> tuple[Outcome, float, float]:
    """The outcome, what was found, and the sum."""
    x = torch.randn(5000)
    tensors = {"x": x, "partial": torch.zeros(6), "out": torch.zeros(1), "arrived": torch.zeros(1, dtype=torch.int32)}
    outcome = launch(kernel, 6, 256, tensors, len(x), fixed=("x",), **schedule)  # type: ignore[arg-type]
    return outcome, float(tensors["out"]), float(x.double().sum())


@pytest.mark.parametrize(("resident", "policy"), SCHEDULES)
def test_sum_of_a_grid(resident: int, policy: str) -> None:
    kernel = Kernel(compiler.ptx("sums.cu"))
    for seed in range(3):
        outcome, found, wanted = summed(kernel, resident=resident, policy=policy, seed=seed)
        assert not outcome.findings, outcome
        assert not outcome.harmless
        assert abs(found - wanted) < 1e-3


@pytest.mark.parametrize("fault", ["NO_FENCE", "NO_BARRIER"])
def test_sum_without_order(fault: str) -> None:
    outcome, _, _ = summed(Kernel(compiler.ptx("sums.cu", fault)), resident=3, seed=1)
    assert "race" in outcome.kinds, outcome


def test_launches_repeat() -> None:
    kernel = Kernel(compiler.ptx("sums.cu"))

    def turns(seed: int) -> tuple[int, int]:
        outcome, _, _ = summed(kernel, resident=3, seed=seed)
        return outcome.switches, outcome.instructions

    assert turns(5) == turns(5)
    assert len({turns(seed) for seed in range(5)}) > 1


# Warps.


def collatz(v: int) -> int:
    n = 0
    while v > 1:
        v, n = 3 * v + 1 if v % 2 else v // 2, n + 1
    return n


def i32(x: int) -> int:
    x &= (1 << 32) - 1
    return x - (1 << 32) if x >> 31 else x


def test_lanes_of_a_warp() -> None:
    threads, block = 256, 64
    chance = torch.Generator().manual_seed(0)
    values = torch.randint(-9, 2000, (threads,), generator=chance, dtype=torch.int32)
    values[:32] |= 1
    out = torch.zeros(threads, 16, dtype=torch.int32)
    tensors = {"in": values, "out": out}
    outcome = launch(Kernel(compiler.ptx("warps.cu")), threads // block, block, tensors, 77, fixed=("in",))
    assert not outcome.findings, outcome
    every_third = sum(1 << lane for lane in range(0, 32, 3))
    for first in range(0, threads, 32):
        v = values[first : first + 32].tolist()
        unsigned = [x & (1 << 32) - 1 for x in v]
        xor = 0
        for x in unsigned:
            xor ^= x
        for lane, x in enumerate(v):
            ballot = sum((y & 2) >> 1 << n for n, y in enumerate(v)) & ~every_third
            wanted = [
                v[lane - 3] if lane >= 3 else x,
                v[lane + 5] if lane < 27 else x,
                v[lane ^ 6],
                v[(lane & 16) + (lane // 2 + 3) % 16],
                i32(sum((y & 1) << n for n, y in enumerate(v))),
                int(any(y == 7 for y in v)) + 2 * all(y > -10 for y in v) + 4 * all(y & 1 for y in v),
                i32(sum(v)),
                min(v),
                i32(max(unsigned)),
                i32(xor),
                i32(sum(1 << n for n, y in enumerate(v) if math.fmod(y, 4) == math.fmod(x, 4))),
                collatz(x & 63),
                i32(every_third if lane % 3 == 0 else ballot),
                i32(x * ((x & (1 << 32) - 1) % 6)),
                block * 1000 + 32,
                77,
            ]
            assert out[first + lane].tolist() == wanted, lane


# Atomic operations.


def updated(threads: int) -> list[int]:
    """The contents of a block of cells after update() in atomics.cu; then the two that wrap, and four times the sum."""
    values = range(threads)
    xor = 0
    for t in values:
        xor ^= t
    cells = [sum(values), min(0, 101 - threads), max(0, threads - 101), 0, i32((1 << min(threads, 32)) - 1), xor]
    return [*cells, 2 * threads, 5, threads % 10, -threads % 10, sum(values)]


@pytest.mark.parametrize(("resident", "policy"), SCHEDULES)
def test_atomic_operations(resident: int, policy: str) -> None:
    blocks, block = 3, 64
    tensors = {
        "ints": torch.zeros(8, dtype=torch.int32),
        "floats": torch.zeros(1),
        "doubles": torch.zeros(1, dtype=torch.float64),
        "wrapping": torch.zeros(2, dtype=torch.int32),
        "of_block": torch.zeros(blocks, 11, dtype=torch.int32),
    }
    kernel = Kernel(compiler.ptx("atomics.cu"))
    outcome = launch(kernel, blocks, block, tensors, resident=resident, policy=policy)
    assert not outcome.findings, outcome
    *cells, up, down, total = updated(blocks * block)
    assert tensors["ints"].tolist() == cells
    assert tensors["wrapping"].tolist() == [up, down]
    assert 4 * float(tensors["floats"]) == 8 * float(tensors["doubles"]) == total
    assert tensors["of_block"].tolist() == [updated(block)] * blocks


# Messages.


def sent(*macros: str, resident: int = 2, policy: str = "by chance", seed: int = 0) -> tuple[Outcome, bool]:
    """The outcome, and whether what arrived is right."""
    tensors = {name: torch.zeros(64, dtype=torch.int32) for name in ("data", "flag", "out")}
    kernel = Kernel(compiler.ptx("message.cu", *macros))
    outcome = launch(kernel, 2, 64, tensors, resident=resident, policy=policy, seed=seed)
    return outcome, tensors["out"].tolist() == [5 * (t ^ 1) for t in range(64)]


@pytest.mark.parametrize("macros", [(), ("FENCES",)], ids=["release and acquire", "fences"])
@pytest.mark.parametrize("policy", POLICIES)
def test_message_between_blocks(policy: str, macros: tuple[str, ...]) -> None:
    for seed in range(5):
        outcome, right = sent(*macros, policy=policy, seed=seed)
        assert not outcome.findings, outcome
        assert right


@pytest.mark.parametrize("fault", ["RELAXED_SEND", "RELAXED_WAIT", "CTA_SCOPE", "NO_BARRIER"])
def test_message_without_order(fault: str) -> None:
    """A race even where the schedule happens to bring the message."""
    for seed in range(5):
        outcome, _ = sent(fault, seed=seed)
        assert "race" in outcome.kinds, outcome


def test_message_to_a_block_that_is_not_resident() -> None:
    """One block at a time: fine if the sender comes first, else a deadlock."""
    outcomes = [sent(resident=1, seed=seed) for seed in range(20)]
    assert {frozenset(outcome.kinds) for outcome, _ in outcomes} == {frozenset(), frozenset({"deadlock"})}
    assert all(right != bool(outcome.findings) for outcome, right in outcomes)


# Planted faults.


def faulty(*macros: str, blocks: int = 1) -> tuple[Outcome, torch.Tensor]:
    """The outcome, and what was 64 numbers of a row of 96 before."""
    storage = torch.arange(96.0)
    tensors = {"x": storage[16:80], "fixed": torch.zeros(64)}
    kernel = Kernel(compiler.ptx("faults.cu", *macros))
    return launch(kernel, blocks, 64, tensors, 64, fixed=("fixed",)), storage


def test_no_fault() -> None:
    outcome, storage = faulty(blocks=1)
    assert not outcome.findings, outcome
    assert not outcome.harmless
    assert storage.tolist() == [float(i + (16 <= i < 80)) for i in range(96)]


@pytest.mark.parametrize(
    ("macro", "kind", "where"),
    [
        ("UNINITIALISED", "read of uninitialised shared memory", "shared memory+0"),
        ("RACE_IN_SHARED", "race", "shared memory"),
        ("RACE_BETWEEN_BLOCKS", "race", "x+"),
        ("PAST_THE_END", "out of bounds", "x+256 (past its end)"),
        ("BEFORE_THE_BEGINNING", "out of bounds", ""),
        ("PAST_SHARED", "out of bounds", "shared memory+256"),
        ("MISALIGNED", "misaligned", "fixed+4"),
        ("READ_ONLY", "write to read-only memory", "fixed+20"),
        ("BARRIER_FOR_SOME", "diverged", "lanes of a warp at different barriers"),
        ("BARRIER_LEFT_OUT", "deadlock", "spinning"),
        ("LANES_LEFT_OUT", "diverged", "lanes that it waits for do not come"),
        ("TRAPS", "trap", "the kernel's own"),
    ],
)
def test_planted_faults(macro: str, kind: str, where: str) -> None:
    outcome, _ = faulty(macro, blocks=2 if macro == "RACE_BETWEEN_BLOCKS" else 1)
    assert kind in outcome.kinds, outcome
    named = [finding for finding in outcome.findings if finding.kind == kind]
    assert any(finding.where.startswith(where) for finding in named), outcome
    assert all("faults.cu:" in finding.instruction for finding in named), "where in the source"


def test_bytes_between_elements_are_out_of_bounds() -> None:
    """A kernel may touch only the elements of a tensor with gaps, not the bytes between them."""
    tensors = {"x": torch.zeros(128)[::2], "fixed": torch.zeros(64)}
    outcome = launch(Kernel(compiler.ptx("faults.cu")), 1, 64, tensors, 64, fixed=("fixed",))
    assert outcome.kinds == {"out of bounds"}


def test_a_kernel_that_does_not_end() -> None:
    text = ".visible .entry loop()\n{\nforever:\nbra forever;\n}"
    assert Kernel(text).launch((1,), [], Memory(), limit=1000).kinds == {"too long"}


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "g++ is missing" in str(emulator.unavailable())


def test_bad_launches() -> None:
    kernel = Kernel(compiler.ptx("faults.cu"))
    with pytest.raises(ValueError, match="takes 3 arguments, got 1"):
        kernel.launch((1,), [0], Memory())
    with pytest.raises(ValueError, match="70000 CTAs"):
        kernel.launch((70000,), [0, 0, 0], Memory())
    with pytest.raises(ValueError, match="2048 threads"):
        kernel.launch((1,), [0, 0, 0], Memory(), block=(2048,))
    with pytest.raises(ValueError, match="no entry function absent"):
        Kernel(compiler.ptx("faults.cu"), "absent")


def test_the_compiler_writes_to_no_object_that_python_shares() -> None:
    """A log of one byte, say, in a bytes object of length 1, of which Python has one for each value."""
    compiler.made('extern "C" __global__ void nothing() {}', "nothing.cu")
    assert [bytes([value])[0] for value in range(256)] == list(range(256))
