"""A rank's share of a parameter's sums, as far as the other ranks need it."""

import triton
import triton.language as tl

from .decision import part, tiles_of, views_of
from .order import count
from .sums import conclude, square, sum_rows
from .tables import COLUMNS, COUNTERS, COUNTS, DOT, MEASURED, NEED, OWNERS, ROWS, TABLE, TEST


@triton.jit
def share(memory, work, epoch, first, n, S: tl.constexpr):
    """Sums n tiles as the parameter's need asks. The run that completes the parameter writes its shares.

    Reads g for SQUARE, p and g for TEST, p, g, m and v for DOT: 4, 8 or 16 bytes per float32 element.
    """
    x = tl.load(work[OWNERS] + first).to(tl.int64)
    need = tl.load(part(work, x, NEED, tl.uint8)).to(tl.int32)
    if need != 0:
        share_tiles(memory, work, epoch, first, n, need, S)
        x = tl.load(work[OWNERS] + first).to(tl.int64)  # again: so that it keeps no register meanwhile
        tiles, _ = tiles_of(memory, x)
        if count(work[COUNTS] + x * COUNTERS + MEASURED, epoch, n) == tiles:
            conclude_shares(memory, work, x, need)


@triton.jit
def is_asked_by_rows(need):
    return (need & (TEST | DOT)) != 0


@triton.jit
def share_tiles(memory, work, epoch, first, n, need, S: tl.constexpr):
    if is_asked_by_rows(need):
        for tile in tl.range(first, first + n, disable_licm=True):
            sum_rows(memory, work, epoch, tile, need, S, True)
    else:
        square(memory, work, epoch, first, n, S, True)


@triton.jit
def conclude_shares(memory, work, x, need):
    tiles, segments = tiles_of(memory, x)
    segments = tl.where(is_asked_by_rows(need), segments, 1)
    conclude(memory, work, x, views_of(memory, x, tiles, segments), segments, need, True)


@triton.jit
def share_nothing(memory, work, x):
    """Writes the shares of a parameter without elements on this rank: sums of 0, also for its empty rows."""
    need = tl.load(part(work, x, NEED, tl.uint8)).to(tl.int32)
    if need != 0:
        _, segments = tiles_of(memory, x)
        conclude(memory, work, x, tl.load(memory[TABLE] + x * COLUMNS + ROWS), segments, need, True)
