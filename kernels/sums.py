"""The sums p.g, g.g, p.p and p.u of a tile and of a parameter, and the limits and cosines of the cosine test."""

import triton
import triton.language as tl

from .cosine import compare
from .decision import part, scalar
from .elements import elements, fits, load_gradient, load_weight, momentum_of, rows_of_block, whole_vectors
from .marks import least_square, left_float32, mark
from .tables import (
    ALIGNED,
    CHANNEL_LIMIT,
    COLS,
    COLUMNS,
    CONCLUDE_BLOCK,
    DELTA,
    DOT,
    EPS,
    FINDINGS,
    FIRST_TILE,
    FOUND,
    FOUND_COSINE,
    FOUND_NORM,
    GG,
    GROUP,
    LARGEST,
    LAYER_LIMIT,
    LIMIT,
    MEASURE_LEFT,
    NARROWEST,
    ONE,
    OWNERS,
    PG,
    PP,
    PU,
    ROW_SHARES,
    ROWS,
    SCALE,
    SHARES,
    SHARING,
    SIGN,
    SPLIT,
    SQUARE,
    SUMS,
    TABLE,
    TEST,
    TILE_SUMS,
    VECTOR,
    WIDTH_STEP,
)
from .tiles import locate


@triton.jit
def four_sums(a, b, c, d, AXIS: tl.constexpr):
    """The sums of each of four blocks along an axis, by one reduction: most of a reduction's cost is its barriers."""
    ab, cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=AXIS))
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def four_totals(a, b, c, d):
    """The sum of each of four vectors, as float64 scalars."""
    a, b, c, d = four_sums(a, b, c, d, 0)
    return a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)


@triton.jit
def least_and_largest(a, b):
    """The least element of a and the largest of b, as float64 scalars, by one reduction."""
    a, b = tl.split(tl.max(tl.join(-a, b), axis=0))
    return -a.to(tl.float64), b.to(tl.float64)


@triton.jit
def sum_rows(memory, work, epoch, tile, need, S: tl.constexpr, SHARE: tl.constexpr):
    """Writes a tile's row of the sums: the least limit and the largest cosine of its rows, and p.g, g.g and p.p.

    With SHARE also p.u, if needed, and the sums of each row that other ranks have parts of.
    """
    where = locate(memory[TABLE], work[OWNERS], tile)
    x = where[0]
    rows_here = where[3]
    cols_here = where[4]
    entry = memory[TABLE] + x * COLUMNS
    group = tl.load(entry + GROUP)
    delta = scalar(work, group, DELTA)
    eps = scalar(work, group, EPS)
    lowest = tl.full((), float("inf"), tl.float64)
    limit = tl.full((), 0.0, tl.float64)
    largest = limit
    pg = limit
    gg = limit
    pp = limit
    pu = limit
    if cols_here > S.tile:  # one row, in several blocks
        pgs = tl.zeros((S.tile,), S.number)
        ggs = pgs
        pps = pgs
        pus = pgs
        for start in range(0, cols_here, S.tile):
            e, mask = elements(where, start, S)
            p = load_weight(memory, where, e, mask, S)
            g = measured_gradient(memory, work, where, e, mask, S, SHARE)
            if SHARE:
                pus += products(memory, work, where, e, mask, p, g, need, S)
            pgs = tl.fma(p, g, pgs)
            ggs = tl.fma(g, g, ggs)
            pps = tl.fma(p, p, pps)
        pg, gg, pp, pu = four_totals(pgs, ggs, pps, pus)
        lowest = tl.minimum(gg, pp)
        limit, largest = compare(pg, gg, pp, delta, eps, cols_here)
        if SHARE:
            share_rows(memory, work, x, where[1], cols_here == tl.load(entry + COLS), need, pg, gg, pp, pu)
    for log_cols in tl.static_range(NARROWEST, S.log_tile + WIDTH_STEP, WIDTH_STEP):
        if (cols_here <= S.tile) & fits(cols_here, log_cols):
            e, mask = rows_of_block(where, min(ONE << log_cols, S.tile), S)
            p = load_weight(memory, where, e, mask, S)
            g = measured_gradient(memory, work, where, e, mask, S, SHARE)
            row = tl.arange(0, S.tile // min(ONE << log_cols, S.tile))
            live = row < rows_here
            pus = tl.zeros_like(p)
            if SHARE:
                pus = products(memory, work, where, e, mask, p, g, need, S)
            pgs, ggs, pps, pus = four_sums(p * g, g * g, p * p, pus, 1)
            if least_square(eps) >= 0:
                lowest = tl.min(tl.where(live, tl.minimum(ggs, pps), float("inf"))).to(tl.float64)
            limits, cosines = compare(pgs, ggs, pps, delta, eps, cols_here)
            limit, largest = least_and_largest(tl.where(live, limits, float("inf")), tl.where(live, cosines, 0.0))
            pg, gg, pp, pu = four_totals(pgs, ggs, pps, pus)
            if SHARE:
                live &= cols_here == tl.load(entry + COLS)
                share_rows(memory, work, x, where[1] + row, live, need, pgs, ggs, pps, pus)
    sums = work[TILE_SUMS] + tile * SUMS
    tl.store(sums + LIMIT, limit)
    tl.store(sums + LARGEST, largest)
    tl.store(sums + PG, pg)
    tl.store(sums + GG, gg)
    tl.store(sums + PP, pp)
    if SHARE:
        tl.store(sums + PU, pu)
    mark(work, epoch, x, left_float32(pp + gg + tl.abs(pg) + tl.abs(pu), lowest, least_square(eps), S), MEASURE_LEFT, S)


@triton.jit
def measured_gradient(memory, work, where, e, mask, S: tl.constexpr, SHARE: tl.constexpr):
    g = load_gradient(memory, where, e, mask, S)
    if SHARE:
        g *= tl.load(work[SCALE]).to(S.number)
    return g


@triton.jit
def products(memory, work, where, e, mask, p, g, need, S: tl.constexpr):
    """The products p u of all elements, if p.u is needed; else 0."""
    pu = tl.zeros(e.shape, S.number)
    if (need & DOT) != 0:
        sign = scalar(work, tl.load(memory[TABLE] + where[0] * COLUMNS + GROUP), SIGN).to(S.number)
        _, _, u = momentum_of(memory, work, where, e, mask, sign * g, S)
        pu = p * u
    return pu


@triton.jit
def share_rows(memory, work, x, row, live, need, pg, gg, pp, pu):
    """Writes the shares of a row or of a block of rows, if other ranks have parts of them. SQUARE is not by row."""
    live &= tl.load(memory[TABLE] + x * COLUMNS + SHARING) == SPLIT
    sums = part(work, x, ROW_SHARES, tl.float64) + row * (SUMS - PG) - PG
    share_sums(sums, live, need & (TEST | DOT), pg, gg, pp, pu)


@triton.jit
def share_sums(sums, live, need, pg, gg, pp, pu):
    tl.store(sums + PG, pg.to(tl.float64), live & ((need & TEST) != 0))
    tl.store(sums + GG, gg.to(tl.float64), live & ((need & (TEST | SQUARE)) != 0))
    tl.store(sums + PP, pp.to(tl.float64), live & ((need & (TEST | DOT)) != 0))
    tl.store(sums + PU, pu.to(tl.float64), live & ((need & DOT) != 0))


@triton.jit
def conclude(memory, work, x, views, segments, need, SHARE: tl.constexpr):
    """Adds up a parameter's tiles in their order. Writes its findings; with SHARE, its shares.

    There are ``views`` of ``segments`` tiles each: a tile of whole rows, or a row of several tiles.
    """
    entry = memory[TABLE] + x * COLUMNS
    rows = tl.load(entry + ROWS)
    cols = tl.load(entry + COLS)
    group = tl.load(entry + GROUP)
    delta = scalar(work, group, DELTA)
    eps = scalar(work, group, EPS)
    first = work[TILE_SUMS] + tl.load(entry + FIRST_TILE) * SUMS
    limit = tl.full((CONCLUDE_BLOCK,), float("inf"), tl.float64)
    largest = tl.zeros((CONCLUDE_BLOCK,), tl.float64)
    pg = largest
    gg = largest
    pp = largest
    pu = largest
    for start in range(0, views, CONCLUDE_BLOCK):
        view = start + tl.arange(0, CONCLUDE_BLOCK)
        live = view < views
        view_limit = limit
        view_largest = largest
        view_pg = tl.zeros((CONCLUDE_BLOCK,), tl.float64)
        view_gg = view_pg
        view_pp = view_pg
        view_pu = view_pg
        for segment in range(segments):
            sums = first + (view * segments + segment) * SUMS
            view_limit = tl.load(sums + LIMIT, live, other=float("inf"), cache_modifier=".cg")
            view_largest = tl.load(sums + LARGEST, live, other=0.0, cache_modifier=".cg")
            view_pg += tl.load(sums + PG, live, other=0.0, cache_modifier=".cg")
            view_gg += tl.load(sums + GG, live, other=0.0, cache_modifier=".cg")
            view_pp += tl.load(sums + PP, live, other=0.0, cache_modifier=".cg")
            if SHARE:
                view_pu += tl.load(sums + PU, live, other=0.0, cache_modifier=".cg")
        if segments > 1:
            row_limit, row_cosine = compare(view_pg, view_gg, view_pp, delta, eps, cols)
            view_limit = tl.where(live, row_limit, float("inf"))
            view_largest = tl.where(live, row_cosine, 0.0)
        if SHARE:
            share_rows(memory, work, x, view, live & (segments != 1), need, view_pg, view_gg, view_pp, view_pu)
        limit = tl.minimum(limit, view_limit)
        largest = tl.maximum(largest, view_largest)
        pg += view_pg
        gg += view_gg
        pp += view_pp
        pu += view_pu
    if SHARE:
        shares = part(work, x, SHARES, tl.float64)
        tl.store(shares + LIMIT, tl.min(limit), (need & TEST) != 0)
        tl.store(shares + LARGEST, tl.max(largest), (need & TEST) != 0)
        share_sums(shares, True, need, tl.sum(pg), tl.sum(gg), tl.sum(pp), tl.sum(pu))
    else:
        norm2 = tl.sum(pp)
        layer_limit, _ = compare(tl.sum(pg), tl.sum(gg), norm2, delta, eps, rows * cols)
        findings = work[FOUND] + x * FINDINGS
        tl.store(findings + CHANNEL_LIMIT, tl.min(limit))
        tl.store(findings + LAYER_LIMIT, layer_limit)
        tl.store(findings + FOUND_COSINE, tl.max(largest))
        tl.store(findings + FOUND_NORM, tl.sqrt(norm2))


@triton.jit
def square(memory, work, epoch, first, n, S: tl.constexpr, SHARE: tl.constexpr):
    """Writes g.g of each of n tiles. Reads g: 4 bytes per float32 element."""
    for tile in tl.range(first, first + n, disable_licm=True):
        square_of_tile(memory, work, epoch, tile, S, SHARE)


@triton.jit
def square_of_tile(memory, work, epoch, tile, S: tl.constexpr, SHARE: tl.constexpr):
    where = locate(memory[TABLE], work[OWNERS], tile)
    n = where[3] * where[4]
    ggs = tl.zeros((S.tile,), S.number)
    for start in range(0, n, S.tile):
        e, mask = elements(where, start, S)
        g = measured_gradient(memory, work, where, e, mask, S, SHARE)
        ggs = tl.fma(g, g, ggs)
    gg = tl.sum(ggs).to(tl.float64)
    if S.layout == ALIGNED:
        # The end of a vector: see update.
        whole = whole_vectors(n)
        if whole < n:
            e = whole + tl.arange(0, VECTOR)
            g = measured_gradient(memory, work, where, e, e < n, S, SHARE)
            gg += tl.sum(g * g).to(tl.float64)
    tl.store(work[TILE_SUMS] + tile * SUMS + GG, gg)
    # A norm that is too small for float32's squares scales nothing: clipping adds 1e-6 to it.
    mark(work, epoch, where[0], left_float32(gg, gg, -1.0, S), MEASURE_LEFT, S)
