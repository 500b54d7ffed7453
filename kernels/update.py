"""The kernel that moves weights: momentum, projection, weight decay, weight."""

import triton
import triton.language as tl

from .decision import decide, eps_of, given_projection, is_given, is_tested, is_wide, tiles_of
from .dot import dot_of_tile, view_projection
from .elements import elements, fits, momentum_update, rows_of_block, store, whole_vectors
from .marks import is_marked, least_square, left_float32, mark
from .order import wait
from .projection import projection
from .tables import (
    ALIGNED,
    CHANNEL,
    COLUMNS,
    COSINE,
    COUNTERS,
    COUNTS,
    DECISIONS,
    DOT_LEFT,
    FINDINGS,
    FIRST_TILE,
    FOUND,
    FOUND_COSINE,
    FOUND_NORM,
    LAYER,
    LAYER_PROJECTION,
    LIMIT,
    LOCAL,
    MEASURE_LEFT,
    NARROWEST,
    NONE,
    NORM,
    ONE,
    OUTCOMES,
    OWNERS,
    PROJECTION_KNOWN,
    RESULTS,
    SHARING,
    SUMS,
    TABLE,
    TILE_SUMS,
    TILES_LEFT,
    VECTOR,
    WIDTH_STEP,
)
from .tiles import locate


@triton.jit
def update(memory, work, epoch, first, n, S: tl.constexpr, WAIT: tl.constexpr):
    """Steps n tiles of one parameter. Reads p g m v, writes p m v: 28 bytes per float32 element."""
    x = tl.load(work[OWNERS] + first).to(tl.int64)
    decision = decide(memory, work, epoch, x, S, WAIT)
    left = is_marked(work, epoch, x, MEASURE_LEFT, S)
    if (decision != NONE) & (left == 0):
        tiles, segments = tiles_of(memory, x)
        if is_wide(decision, tiles, segments) & (is_given(memory, x, decision, S) == 0):
            if WAIT:
                wait(work[COUNTS] + x * COUNTERS + PROJECTION_KNOWN, epoch)
            left = is_marked(work, epoch, x, DOT_LEFT, S)
    if left == 0:
        for tile in tl.range(first, first + n, disable_licm=True):
            update_tile(memory, work, epoch, tile, decision, S)


@triton.jit
def update_tile(memory, work, epoch, tile, decision, S: tl.constexpr):
    """Steps a tile; or marks it, if the squares of a view within it have left float32's range."""
    where = locate(memory[TABLE], work[OWNERS], tile)
    x = where[0]
    given = is_given(memory, x, decision, S)
    rows_here = where[3]
    cols_here = where[4]
    entry = memory[TABLE] + x * COLUMNS
    eps = eps_of(memory, work, x)
    c = tl.full((), 0.0, tl.float64)
    by_rows = decision != decision
    left = by_rows
    if (decision != NONE) | given:
        tiles, segments = tiles_of(memory, x)
        by_rows = ((decision == CHANNEL) | given) & (cols_here <= S.tile) & (segments == 1)
        if given:
            c = given_projection(work, x, where[1], True)
        elif is_wide(decision, tiles, segments):
            if decision == LAYER:
                c = tl.load(work[FOUND] + x * FINDINGS + LAYER_PROJECTION, cache_modifier=".cg")
            else:
                begin = where[1] * segments
                c = view_projection(memory, work, x, begin, segments)
        elif by_rows == 0:  # the tile is the view: a parameter of one tile, or one wide row
            pu, pp = dot_of_tile(memory, work, where, S)
            left = left_float32(pp + tl.abs(pu), pp, least_square(eps), S)
            c = projection(pu, pp, eps)
    if by_rows:
        for log_cols in tl.static_range(NARROWEST, S.log_tile + WIDTH_STEP, WIDTH_STEP):
            if fits(cols_here, log_cols):
                e, mask = rows_of_block(where, min(ONE << log_cols, S.tile), S)
                p, m, v, u = momentum_update(memory, work, where, e, mask, S)
                pu = tl.sum(p * u, axis=1)
                pp = tl.sum(p * p, axis=1)
                row = tl.arange(0, S.tile // min(ONE << log_cols, S.tile))
                if S.number == tl.float32:
                    least = least_square(eps).to(S.number)
                    rows_left = left_float32(pp + tl.abs(pu), pp, least, S) & (row < rows_here) & (given == 0)
                    left = tl.max(rows_left.to(tl.int32)) != 0
                # A row outside the tile divides 0 by eps^2, or by 0: what it holds is masked.
                row_c = projection(pu, pp, eps.to(S.number))
                if given:
                    row_c = given_projection(work, x, where[1] + row, row < rows_here).to(S.number)
                if left == 0:
                    store(memory, work, where, e, mask, p, m, v, u, row_c[:, None], decision, S)
    else:
        n = tl.where(left, 0, rows_here * cols_here)
        for start in range(0, n, S.tile):
            e, mask = elements(where, start, S)
            p, m, v, u = momentum_update(memory, work, where, e, mask, S)
            store(memory, work, where, e, mask, p, m, v, u, c.to(S.number), decision, S)
        if S.layout == ALIGNED:
            # The end of a vector whose length is no multiple of a thread's widest load.
            whole = whole_vectors(n)
            if whole < n:
                e = whole + tl.arange(0, VECTOR)
                p, m, v, u = momentum_update(memory, work, where, e, e < n, S)
                store(memory, work, where, e, e < n, p, m, v, u, c.to(S.number), decision, S)
    if S.number == tl.float32:
        mark(work, epoch, x, left, TILES_LEFT, S)
        tl.store(work[TILE_SUMS] + tile * SUMS + LIMIT, -epoch.to(tl.float64), left)
    if tile == tl.load(entry + FIRST_TILE):
        report(memory, work, x, decision, S)


@triton.jit
def report(memory, work, x, decision, S: tl.constexpr):
    """Writes a parameter's decision and its results, the cosine and the norm, for the user."""
    cosine = tl.full((), float("nan"), tl.float64)
    norm = cosine
    here = True
    if S.shared:  # else all ranks know the grounds, and not this one alone
        here = tl.load(memory[TABLE] + x * COLUMNS + SHARING) == LOCAL
    if is_tested(memory, work, x, S):
        findings = work[FOUND] + x * FINDINGS
        cosine = tl.load(findings + FOUND_COSINE, cache_modifier=".cg")
        norm = tl.load(findings + FOUND_NORM, cache_modifier=".cg")
    tl.store(work[DECISIONS] + x, decision.to(tl.uint8))
    tl.store(work[OUTCOMES] + x * RESULTS + COSINE, cosine, here)
    tl.store(work[OUTCOMES] + x * RESULTS + NORM, norm, here)
