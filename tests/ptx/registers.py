"""Gives every register a place, so that those in use at once do not overlap. Fewer places keep a warp in cache."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from decode import LANES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from decode import Module


def place(module: Module) -> tuple[dict[str, int], int]:
    """Byte offsets of the registers in a warp's block of registers, and the size of that block."""
    ranges = _ranges(module)
    free: dict[int, list[int]] = {}
    taken: list[tuple[int, int, int]] = []  # last instruction, offset, bytes of a lane
    places: dict[str, int] = {}
    size = 0
    for name in sorted(ranges, key=ranges.__getitem__):
        first, last = ranges[name]
        while taken and taken[0][0] < first:
            _, offset, width = heapq.heappop(taken)
            heapq.heappush(free.setdefault(width, []), offset)
        width = module.registers[name]
        if free.get(width):
            offset = heapq.heappop(free[width])
        else:
            offset = size
            size += width * LANES  # a predicate is a mask of 4 bytes; the others stay aligned
        places[name] = offset
        heapq.heappush(taken, (last, offset, width))
    return places, size


def _ranges(module: Module) -> dict[str, tuple[int, int]]:
    """By register, the first instruction and the last between which it holds a value."""
    code = module.code
    number = {name: n for n, name in enumerate(module.registers)}
    reads, writes = [0] * len(code), [0] * len(code)  # sets of registers as bits
    for n, i in enumerate(code):
        for slot, operand in i.operands.items():
            if not isinstance(operand, str):
                continue
            bit = 1 << number[operand]
            if slot in i.targets:
                writes[n] |= bit
            if slot not in i.targets or i.guard is not None:  # a guarded target may keep its value
                reads[n] |= bit
        if i.guard is not None:
            reads[n] |= 1 << number[i.guard]
    blocks = _blocks(module)
    live_in, live_out = _live(module, blocks, reads, writes)
    held = [reads[n] | writes[n] for n in range(len(code))]
    for inside, outside, (begin, end) in zip(live_in, live_out, blocks, strict=True):
        held[begin] |= inside
        held[end - 1] |= outside
    first = _firsts(enumerate(held))
    last = _firsts(reversed(list(enumerate(held))))
    names = list(module.registers)
    return {names[register]: (first[register], last[register]) for register in first}


def _blocks(module: Module) -> list[tuple[int, int]]:
    """First instructions and ends of the runs without a branch inside."""
    after = (n + 1 for n, i in enumerate(module.code) if i.op in ("bra", "ret"))
    heads = sorted({0, *module.labels.values(), *after} - {len(module.code)})
    return list(zip(heads, [*heads[1:], len(module.code)], strict=True))


def _live(
    module: Module, blocks: list[tuple[int, int]], reads: list[int], writes: list[int]
) -> tuple[list[int], list[int]]:
    """By block, the registers whose values are needed at its beginning and at its end."""
    block_at = {begin: n for n, (begin, _) in enumerate(blocks)}
    successors, needs, sets = [], [], []
    for begin, end in blocks:
        last = module.code[end - 1]
        leaves = last.op in ("bra", "ret") and last.guard is None
        following = [block_at[end]] if end < len(module.code) and not leaves else []
        successors.append(following + ([block_at[last.target]] if last.op == "bra" else []))
        need = done = 0
        for n in range(begin, end):
            need |= reads[n] & ~done
            done |= writes[n]
        needs.append(need)
        sets.append(done)
    live_in, live_out = list(needs), [0] * len(blocks)
    changed = True
    while changed:
        changed = False
        for n in reversed(range(len(blocks))):
            live_out[n] = 0
            for successor in successors[n]:
                live_out[n] |= live_in[successor]
            new = needs[n] | live_out[n] & ~sets[n]
            changed |= new != live_in[n]
            live_in[n] = new
    return live_in, live_out


def _firsts(sets: Iterable[tuple[int, int]]) -> dict[int, int]:
    """By register, the number that comes first with a set that has it."""
    found: dict[int, int] = {}
    seen = 0
    for n, registers in sets:
        left = registers & ~seen
        seen |= left
        while left:
            low = left & -left
            found[low.bit_length() - 1] = n
            left ^= low
    return found
