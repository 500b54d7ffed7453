"""p.u and p.p of views that are wider than a tile."""

import triton
import triton.language as tl

from .decision import decide, eps_of, is_given, is_wide, tiles_of
from .elements import elements, momentum_update
from .marks import is_marked, least_square, left_float32, mark
from .order import announce, count
from .projection import projection
from .tables import (
    COLUMNS,
    CONCLUDE_BLOCK,
    COUNTERS,
    COUNTS,
    DOT_LEFT,
    DOTTED,
    FINDINGS,
    FIRST_TILE,
    FOUND,
    LAYER,
    LAYER_PROJECTION,
    MEASURE_LEFT,
    NONE,
    OWNERS,
    PP,
    PROJECTION_KNOWN,
    PU,
    SUMS,
    TABLE,
    TILE_SUMS,
)
from .tiles import locate


@triton.jit
def dot_of_tile(memory, work, where, S: tl.constexpr):
    """p.u and p.p of a tile, as float64 scalars."""
    pu = tl.zeros((S.tile,), S.number)
    pp = pu
    for start in range(0, where[3] * where[4], S.tile):
        e, mask = elements(where, start, S)
        p, _, _, u = momentum_update(memory, work, where, e, mask, S)
        pu = tl.fma(p, u, pu)
        pp = tl.fma(p, p, pp)
    return tl.sum(pu).to(tl.float64), tl.sum(pp).to(tl.float64)


@triton.jit
def dot(memory, work, epoch, first, n, S: tl.constexpr, WAIT: tl.constexpr):
    """Writes p.u and p.p of n tiles, if the decided view is wider than a tile; else does nothing.

    Reads p g m v: 16 bytes per float32 element.
    """
    x = tl.load(work[OWNERS] + first).to(tl.int64)
    counters = work[COUNTS] + x * COUNTERS
    decision = decide(memory, work, epoch, x, S, WAIT)
    if (decision != NONE) & (is_marked(work, epoch, x, MEASURE_LEFT, S) == 0):
        tiles, segments = tiles_of(memory, x)
        if is_wide(decision, tiles, segments) & (is_given(memory, x, decision, S) == 0):
            dot_tiles(memory, work, epoch, first, n, S)
            if count(counters + DOTTED, epoch, n) == tiles:
                conclude_dot(memory, work, x, tiles, decision)
                announce(counters + PROJECTION_KNOWN, epoch)


@triton.jit
def dot_tiles(memory, work, epoch, first, n, S: tl.constexpr):
    for tile in tl.range(first, first + n, disable_licm=True):
        where = locate(memory[TABLE], work[OWNERS], tile)
        pu, pp = dot_of_tile(memory, work, where, S)
        sums = work[TILE_SUMS] + tile * SUMS
        tl.store(sums + PU, pu)
        tl.store(sums + PP, pp)
        left = left_float32(pp + tl.abs(pu), pp, least_square(eps_of(memory, work, where[0])), S)
        mark(work, epoch, where[0], left, DOT_LEFT, S)


@triton.jit
def conclude_dot(memory, work, x, tiles, decision):
    if decision == LAYER:
        c = view_projection(memory, work, x, 0, tiles)
        tl.store(work[FOUND] + x * FINDINGS + LAYER_PROJECTION, c)


@triton.jit
def view_projection(memory, work, x, begin, n):
    """The projection c, a float64 scalar, of a view of n tiles, from the parameter's tile `begin` on."""
    entry = memory[TABLE] + x * COLUMNS
    first = work[TILE_SUMS] + (tl.load(entry + FIRST_TILE) + begin) * SUMS
    pu = tl.zeros((CONCLUDE_BLOCK,), tl.float64)
    pp = pu
    for start in range(0, n, CONCLUDE_BLOCK):
        i = start + tl.arange(0, CONCLUDE_BLOCK)
        pu += tl.load(first + i * SUMS + PU, i < n, other=0.0, cache_modifier=".cg")
        pp += tl.load(first + i * SUMS + PP, i < n, other=0.0, cache_modifier=".cg")
    return projection(tl.sum(pu), tl.sum(pp), eps_of(memory, work, x))
