"""Steps parameters and tiles again in float64 if their sums have left float32's range; most often there are none."""

import triton
import triton.language as tl

from .decision import decide, is_given, is_wide, part, tiles_of, views_of
from .dot import conclude_dot, dot_tiles
from .share import conclude_shares, share_tiles
from .sums import conclude, square, sum_rows
from .tables import (
    COLUMNS,
    COUNTERS,
    COUNTS,
    DOT_LEFT,
    FIRST_TILE,
    LIMIT,
    MEASURE_LEFT,
    NEED,
    SUMS,
    TABLE,
    TILE_SUMS,
    TILES,
    TILES_LEFT,
)
from .update import update_tile


@triton.jit
def redo(memory, work, epoch, x, S: tl.constexpr):
    """Steps a parameter, or its tiles, if this epoch's stages have marked them. S.number is float64.

    One program runs all stages one after the other: this is slow, and rare.
    """
    counters = work[COUNTS] + x * COUNTERS
    measure_left = tl.load(counters + MEASURE_LEFT) == epoch
    whole = measure_left | (tl.load(counters + DOT_LEFT) == epoch)
    if whole | (tl.load(counters + TILES_LEFT) == epoch):
        first = tl.load(memory[TABLE] + x * COLUMNS + FIRST_TILE).to(tl.int32)
        tiles, segments = tiles_of(memory, x)
        n = tiles.to(tl.int32)
        if measure_left:
            for tile in tl.range(first, first + n, disable_licm=True):
                sum_rows(memory, work, epoch, tile, 0, S, False)
            tl.debug_barrier()
            conclude(memory, work, x, views_of(memory, x, tiles, segments), segments, 0, False)
            tl.debug_barrier()
        decision = decide(memory, work, epoch, x, S, False)
        if whole & is_wide(decision, tiles, segments) & (is_given(memory, x, decision, S) == 0):
            dot_tiles(memory, work, epoch, first, n, S)
            tl.debug_barrier()
            conclude_dot(memory, work, x, tiles, decision)
            tl.debug_barrier()
        for tile in tl.range(first, first + n, disable_licm=True):
            if whole | (tl.load(work[TILE_SUMS] + tile * SUMS + LIMIT) == -epoch.to(tl.float64)):
                update_tile(memory, work, epoch, tile, decision, S)


@triton.jit
def redo_ahead(memory, work, epoch, x, S: tl.constexpr):
    """Writes a parameter's shares, or its squares for the norm, again if it is marked. See :func:`redo`."""
    if tl.load(work[COUNTS] + x * COUNTERS + MEASURE_LEFT) == epoch:
        first = tl.load(memory[TABLE] + x * COLUMNS + FIRST_TILE).to(tl.int32)
        n = tl.load(memory[TABLE] + x * COLUMNS + TILES).to(tl.int32)
        if S.shared:
            need = tl.load(part(work, x, NEED, tl.uint8)).to(tl.int32)
            share_tiles(memory, work, epoch, first, n, need, S)
            tl.debug_barrier()
            conclude_shares(memory, work, x, need)
        else:
            square(memory, work, epoch, first, n, S, False)
