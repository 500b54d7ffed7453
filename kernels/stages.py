"""The stages of a step, each for one tile, and the order between tiles.

    prepare  step counts and what depends on them, for a block of parameters
    measure  per row p.g, g.g and p.p; whose tile is a parameter's last decides             reads p g
    dot      p.u, where the chosen view is wider than a tile; there is most often nothing   reads p g m v
    update   momentum, projection, weight decay, weight                                     reads p g m v, writes p m v

``memory`` and ``work`` are tuples of tables, to be passed on whole: where a parameter's tensors lie, and what the
stages tell each other. Sums run in the math's dtype within a tile and in float64 from tile to tile, always in the
order of the tiles, so that results repeat bit for bit.
"""

import triton
import triton.language as tl

from .cosine import below_threshold
from .momentum import advance, bias_correction, direction
from .projection import projection, weight_update
from .tiles import (
    ADDRESSES,
    ALIGNED,
    COLS,
    COLUMNS,
    FIRST_TILE,
    GROUP,
    PROJECTED,
    ROWS,
    STEP,
    TILE_COLS,
    TILE_ROWS,
    VECTOR,
    G,
    M,
    P,
    V,
    locate,
    place,
)

# The tables of plans.py, as the tuples memory and work.
TABLE = tl.constexpr(0)
PLACES = tl.constexpr(1)
OWNERS = tl.constexpr(0)
RATES = tl.constexpr(1)
BY_STEP = tl.constexpr(2)
TILE_SUMS = tl.constexpr(3)
DECISIONS = tl.constexpr(4)
PROJECTIONS = tl.constexpr(5)
COUNTS = tl.constexpr(6)

# fused_adamp/reference.py, Decision.
NONE = tl.constexpr(0)
CHANNEL = tl.constexpr(1)
LAYER = tl.constexpr(2)

# fused_adamp/bucket.py, Scalars: a parameter group's row.
LR = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
GAIN = tl.constexpr(2)
NESTEROV_GAIN = tl.constexpr(3)
BETA2 = tl.constexpr(4)
GAIN2 = tl.constexpr(5)
EPS = tl.constexpr(6)
DECAY = tl.constexpr(7)
DELTA = tl.constexpr(8)
WD_RATIO = tl.constexpr(9)
SIGN = tl.constexpr(10)
NESTEROV = tl.constexpr(11)
PROJECT_BUFFER = tl.constexpr(12)
SCALARS = tl.constexpr(13)

# What depends on the step count: a parameter's row.
INVERSE_BIAS2 = tl.constexpr(0)
STEP_SIZE = tl.constexpr(1)
COEFFICIENTS = tl.constexpr(2)

# A tile's row of the sums.
FAILED = tl.constexpr(0)
PG = tl.constexpr(1)
GG = tl.constexpr(2)
PP = tl.constexpr(3)
PU = tl.constexpr(4)
SUMS = tl.constexpr(5)

# A parameter's row of the counters: tiles that have been measured and dotted, and the epoch in which all had been.
MEASURED = tl.constexpr(0)
DOTTED = tl.constexpr(1)
DECIDED = tl.constexpr(2)
PROJECTION_KNOWN = tl.constexpr(3)
COUNTERS = tl.constexpr(4)

# log2 of the columns of the narrowest block of rows, and its step to the next.
NARROWEST = tl.constexpr(6)
WIDTH_STEP = tl.constexpr(2)
ONE = tl.constexpr(1)  # what is shifted is a constexpr too: so that it also works in the interpreter
DECIDE_BLOCK = tl.constexpr(512)
PREPARE_BLOCK = tl.constexpr(128)


# Order between programs.


@triton.jit
def count(counter, epoch):
    """Numbers the callers of one epoch 0, 1, 2, ... Sees what they wrote before, and shows them what this one wrote.

    The epoch fills the upper half, so that whatever a broken-off step left behind counts as nothing.
    """
    tl.debug_barrier()
    tl.atomic_max(counter, epoch.to(tl.int64) << 32)
    return tl.atomic_add(counter, 1, sem="acq_rel") & 0xFFFFFFFF


@triton.jit
def announce(flag, epoch):
    tl.debug_barrier()
    tl.atomic_xchg(flag, epoch.to(tl.int64), sem="release")


@triton.jit
def wait(flag, epoch):
    """Waits for :func:`announce`: only ever for programs that are running and wait for nobody that comes later."""
    seen = tl.atomic_add(flag, 0, sem="acquire")
    while seen != epoch:
        seen = tl.atomic_add(flag, 0, sem="acquire")


# What a parameter's tiles have in common.


@triton.jit
def is_tested(memory, work, x):
    """Whether the parameter is ever projected. With delta = 0 no cosine is below the threshold."""
    entry = memory[TABLE] + x * COLUMNS
    delta = tl.load(work[RATES] + tl.load(entry + GROUP) * SCALARS + DELTA)
    return (tl.load(entry + PROJECTED) != 0) & (delta > 0)


@triton.jit
def tiles_of(memory, x):
    """Tiles of the parameter, and tiles of one of its rows."""
    entry = memory[TABLE] + x * COLUMNS
    segments = tl.cdiv(tl.load(entry + COLS), tl.load(entry + TILE_COLS))
    return tl.cdiv(tl.load(entry + ROWS), tl.load(entry + TILE_ROWS)) * segments, segments


@triton.jit
def is_wide(decision, tiles, segments):
    """Whether the chosen view is wider than a tile."""
    return ((decision == LAYER) & (tiles > 1)) | ((decision == CHANNEL) & (segments > 1))


@triton.jit
def scalar(work, group, WHICH: tl.constexpr):
    return tl.load(work[RATES] + group * SCALARS + WHICH)


# Blocks of elements.


@triton.jit
def load_weight_and_gradient(memory, where, e, mask, sign, S: tl.constexpr):
    p = tl.load(place(memory, where, e, P, S.p, S.layout), mask, other=0.0).to(S.number)
    g = tl.load(place(memory, where, e, G, S.g, S.layout), mask, other=0.0).to(S.number)
    return p, sign * g


@triton.jit
def load_state(memory, where, e, mask, S: tl.constexpr):
    """Loads m and v. Outside the mask v is 1, so that u is 0 there, never 0 / 0."""
    m = tl.zeros(e.shape, S.number)
    v = tl.zeros(e.shape, S.number)
    if S.buffer:
        m = tl.load(place(memory, where, e, M, S.state, S.layout), mask, other=0.0).to(S.number)
    if S.adaptive:
        v = tl.load(place(memory, where, e, V, S.state, S.layout), mask, other=1.0).to(S.number)
    return m, v


@triton.jit
def momentum_update(memory, work, where, e, mask, S: tl.constexpr):
    """p, and m, v and u after this step."""
    x = where[0]
    group = tl.load(memory[TABLE] + x * COLUMNS + GROUP)
    p, g = load_weight_and_gradient(memory, where, e, mask, scalar(work, group, SIGN).to(S.number), S)
    m, v = load_state(memory, where, e, mask, S)
    momentum = scalar(work, group, MOMENTUM).to(S.number)
    gain = scalar(work, group, GAIN).to(S.number)
    beta2 = scalar(work, group, BETA2).to(S.number)
    gain2 = scalar(work, group, GAIN2).to(S.number)
    m, v = advance(g, m, v, momentum, gain, beta2, gain2, S.adaptive, S.buffer)
    nesterov_gain = scalar(work, group, NESTEROV_GAIN).to(S.number)
    nesterov = scalar(work, group, NESTEROV) != 0
    inverse_bias2 = tl.load(work[BY_STEP] + x * COEFFICIENTS + INVERSE_BIAS2).to(S.number)
    eps = scalar(work, group, EPS).to(S.number)
    u = direction(g, m, v, momentum, nesterov_gain, nesterov, inverse_bias2, eps, S.adaptive)
    return p, m, v, u


@triton.jit
def store(memory, work, where, e, mask, p, m, v, u, c, decision, S: tl.constexpr):
    """Moves the weight and stores it with the state; c is the projection of each element's view."""
    x = where[0]
    group = tl.load(memory[TABLE] + x * COLUMNS + GROUP)
    decay = scalar(work, group, DECAY) * tl.where(decision == NONE, 1.0, scalar(work, group, WD_RATIO))
    step_size = tl.load(work[BY_STEP] + x * COEFFICIENTS + STEP_SIZE)
    moved = weight_update(p, u, c, step_size.to(S.number), decay.to(S.number))
    tl.store(place(memory, where, e, P, S.p, S.layout), moved.to(S.p), mask)
    if S.buffer:
        if not S.adaptive:
            m = tl.where((decision != NONE) & (scalar(work, group, PROJECT_BUFFER) != 0), u - c * p, m)
        tl.store(place(memory, where, e, M, S.state, S.layout), m.to(S.state), mask)
    if S.adaptive:
        tl.store(place(memory, where, e, V, S.state, S.layout), v.to(S.state), mask)


@triton.jit
def whole_vectors(n):
    """n, or the multiple of VECTOR below it. Written so that the compiler sees the factor."""
    return n // VECTOR * VECTOR


@triton.jit
def rows_of_block(where, WIDTH: tl.constexpr, S: tl.constexpr):
    """A block of S.tile elements, WIDTH a row, that holds a tile: its element numbers and which of them exist."""
    rows_here = where[3]
    cols_here = where[4]
    if S.layout == ALIGNED:
        cols_here = whole_vectors(cols_here)
    r = tl.arange(0, S.tile // WIDTH)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    return r * cols_here + c, (r < rows_here) & (c < cols_here)


@triton.jit
def fits(cols, LOG_COLS: tl.constexpr):
    """Whether 2 ** LOG_COLS is the least of the widths that blocks of rows come in that holds `cols`.

    64, 256, 1024, ... and the tile: each width is code of its own, and the bytes moved do not depend on it.
    """
    return (cols <= (ONE << LOG_COLS)) & ((cols > (ONE << (LOG_COLS - WIDTH_STEP))) | (LOG_COLS == NARROWEST))


@triton.jit
def elements(where, start, S: tl.constexpr):
    """Element numbers of a block from `start`, and which of them exist and belong to whole vectors."""
    n = where[3] * where[4]
    whole = n
    if S.layout == ALIGNED:
        whole = whole_vectors(n)
    e = start + tl.arange(0, S.tile)
    return e, e < whole


# The stages.


@triton.jit
def prepare(memory, work, active, n, block, S: tl.constexpr):
    """Counts the step of a block of the n active parameters and writes what depends on it."""
    i = block * PREPARE_BLOCK + tl.arange(0, PREPARE_BLOCK)
    live = i < n
    x = tl.load(active + i, live, other=0).to(tl.int64)
    group = tl.load(memory[TABLE] + x * COLUMNS + GROUP, live, other=0)
    rates = work[RATES] + group * SCALARS
    lr = tl.load(rates + LR, live, other=0.0)
    coefficients = work[BY_STEP] + x * COEFFICIENTS
    if S.adaptive:
        step = tl.load(memory[PLACES] + x * ADDRESSES + STEP, live, other=0).to(tl.pointer_type(tl.float32))
        t = tl.load(step, live, other=0.0) + 1
        tl.store(step, t, live)
        t = t.to(tl.float64)
        bias1 = bias_correction(tl.load(rates + MOMENTUM, live, other=0.0), t)
        bias2 = bias_correction(tl.load(rates + BETA2, live, other=0.0), t)
        tl.store(coefficients + INVERSE_BIAS2, 1 / tl.sqrt(bias2), live)
        tl.store(coefficients + STEP_SIZE, lr / bias1, live)
    else:
        tl.store(coefficients + STEP_SIZE, lr, live)
    tested = (tl.load(memory[TABLE] + x * COLUMNS + PROJECTED, live, other=0) != 0) & (
        tl.load(rates + DELTA, live, other=0.0) > 0
    )
    tl.store(work[DECISIONS] + x, tl.zeros((PREPARE_BLOCK,), tl.uint8), live & (tested == 0))


@triton.jit
def measure(memory, work, epoch, tile, S: tl.constexpr):
    """Row sums of one tile. Reads p g: 8 bytes per float32 element."""
    where = locate(memory[TABLE], work[OWNERS], tile)
    x = where[0]
    if is_tested(memory, work, x):
        rows_here = where[3]
        cols_here = where[4]
        group = tl.load(memory[TABLE] + x * COLUMNS + GROUP)
        delta = scalar(work, group, DELTA)
        eps = scalar(work, group, EPS)
        one = tl.full((), 1.0, S.number)
        failed = tl.full((), 0.0, tl.float64)
        pg = failed
        gg = failed
        pp = failed
        if cols_here > S.tile:  # one row, in several blocks
            pgs = tl.zeros((S.tile,), S.number)
            ggs = pgs
            pps = pgs
            for start in range(0, cols_here, S.tile):
                e, mask = elements(where, start, S)
                p, g = load_weight_and_gradient(memory, where, e, mask, one, S)
                pgs += p * g
                ggs += g * g
                pps += p * p
            pg = tl.sum(pgs).to(tl.float64)
            gg = tl.sum(ggs).to(tl.float64)
            pp = tl.sum(pps).to(tl.float64)
            failed = 1 - below_threshold(pg, gg, pp, delta, eps, cols_here).to(tl.float64)
        for log_cols in tl.static_range(NARROWEST, S.log_tile + WIDTH_STEP, WIDTH_STEP):
            if (cols_here <= S.tile) & fits(cols_here, log_cols):
                e, mask = rows_of_block(where, min(ONE << log_cols, S.tile), S)
                p, g = load_weight_and_gradient(memory, where, e, mask, one, S)
                pgs = tl.sum(p * g, axis=1)
                ggs = tl.sum(g * g, axis=1)
                pps = tl.sum(p * p, axis=1)
                below = below_threshold(pgs, ggs, pps, delta, eps, cols_here)
                live = tl.arange(0, S.tile // min(ONE << log_cols, S.tile)) < rows_here
                failed = tl.sum((live & (below == 0)).to(tl.int32)).to(tl.float64)
                pg = tl.sum(pgs).to(tl.float64)
                gg = tl.sum(ggs).to(tl.float64)
                pp = tl.sum(pps).to(tl.float64)
        sums = work[TILE_SUMS] + tile.to(tl.int64) * SUMS
        tl.store(sums + FAILED, failed)
        tl.store(sums + PG, pg)
        tl.store(sums + GG, gg)
        tl.store(sums + PP, pp)
        tiles, segments = tiles_of(memory, x)
        counters = work[COUNTS] + x * COUNTERS
        if count(counters + MEASURED, epoch) + 1 == tiles:
            tl.store(work[DECISIONS] + x, decide(memory, work, x, tiles, segments, delta, eps).to(tl.uint8))
            announce(counters + DECIDED, epoch)


@triton.jit
def decide(memory, work, x, tiles, segments, delta, eps):
    """The decision, from the sums of all of a parameter's tiles, added in their order."""
    entry = memory[TABLE] + x * COLUMNS
    rows = tl.load(entry + ROWS)
    cols = tl.load(entry + COLS)
    first = work[TILE_SUMS] + tl.load(entry + FIRST_TILE) * SUMS
    views = tiles // segments  # tiles of whole rows, or rows of several tiles
    failed = tl.zeros((DECIDE_BLOCK,), tl.float64)
    pg = failed
    gg = failed
    pp = failed
    for start in range(0, views, DECIDE_BLOCK):
        view = start + tl.arange(0, DECIDE_BLOCK)
        live = view < views
        view_failed = tl.zeros((DECIDE_BLOCK,), tl.float64)
        view_pg = view_failed
        view_gg = view_failed
        view_pp = view_failed
        for segment in range(segments):
            sums = first + (view * segments + segment) * SUMS
            view_failed = tl.load(sums + FAILED, live, other=0.0, cache_modifier=".cg")
            view_pg += tl.load(sums + PG, live, other=0.0, cache_modifier=".cg")
            view_gg += tl.load(sums + GG, live, other=0.0, cache_modifier=".cg")
            view_pp += tl.load(sums + PP, live, other=0.0, cache_modifier=".cg")
        row_failed = 1 - below_threshold(view_pg, view_gg, view_pp, delta, eps, cols).to(tl.float64)
        failed += tl.where(live, tl.where(segments > 1, row_failed, view_failed), 0.0)
        pg += view_pg
        gg += view_gg
        pp += view_pp
    layer = below_threshold(tl.sum(pg), tl.sum(gg), tl.sum(pp), delta, eps, rows * cols)
    return tl.where(tl.sum(failed) == 0, CHANNEL, tl.where(layer, LAYER, NONE))


@triton.jit
def dot_of_tile(memory, work, where, S: tl.constexpr):
    pu = tl.zeros((S.tile,), S.number)
    for start in range(0, where[3] * where[4], S.tile):
        e, mask = elements(where, start, S)
        p, _, _, u = momentum_update(memory, work, where, e, mask, S)
        pu += p * u
    return tl.sum(pu).to(tl.float64)


@triton.jit
def dot(memory, work, epoch, tile, S: tl.constexpr):
    """p.u of one tile, if the chosen view is wider. Reads p g m v: 16 bytes per float32 element."""
    x = tl.load(work[OWNERS] + tile).to(tl.int64)
    counters = work[COUNTS] + x * COUNTERS
    if is_tested(memory, work, x):
        wait(counters + DECIDED, epoch)
        decision = tl.load(work[DECISIONS] + x, cache_modifier=".cg")
        tiles, segments = tiles_of(memory, x)
        if is_wide(decision, tiles, segments):
            where = locate(memory[TABLE], work[OWNERS], tile)
            tl.store(work[TILE_SUMS] + tile.to(tl.int64) * SUMS + PU, dot_of_tile(memory, work, where, S))
            if count(counters + DOTTED, epoch) + 1 == tiles:
                if decision == LAYER:
                    tl.store(work[PROJECTIONS] + x, view_projection(memory, work, x, 0, tiles))
                announce(counters + PROJECTION_KNOWN, epoch)


@triton.jit
def view_projection(memory, work, x, begin, n):
    """The projection c of a view that n tiles share, of which the first is the parameter's tile `begin`."""
    entry = memory[TABLE] + x * COLUMNS
    first = work[TILE_SUMS] + (tl.load(entry + FIRST_TILE) + begin) * SUMS
    pu = tl.zeros((DECIDE_BLOCK,), tl.float64)
    pp = pu
    for start in range(0, n, DECIDE_BLOCK):
        i = start + tl.arange(0, DECIDE_BLOCK)
        pu += tl.load(first + i * SUMS + PU, i < n, other=0.0, cache_modifier=".cg")
        pp += tl.load(first + i * SUMS + PP, i < n, other=0.0, cache_modifier=".cg")
    return projection(tl.sum(pu), tl.sum(pp), scalar(work, tl.load(entry + GROUP), EPS))


@triton.jit
def update(memory, work, epoch, tile, S: tl.constexpr):
    """The step of one tile. Reads p g m v, writes p m v: 28 bytes per float32 element."""
    where = locate(memory[TABLE], work[OWNERS], tile)
    x = where[0]
    rows_here = where[3]
    cols_here = where[4]
    entry = memory[TABLE] + x * COLUMNS
    counters = work[COUNTS] + x * COUNTERS
    eps = scalar(work, tl.load(entry + GROUP), EPS)
    decision = tl.full((), 0, tl.uint8)
    c = tl.full((), 0.0, tl.float64)
    by_rows = decision == CHANNEL
    if is_tested(memory, work, x):
        wait(counters + DECIDED, epoch)
        decision = tl.load(work[DECISIONS] + x, cache_modifier=".cg")
        tiles, segments = tiles_of(memory, x)
        by_rows = (decision == CHANNEL) & (cols_here <= S.tile) & (segments == 1)
        if is_wide(decision, tiles, segments):
            wait(counters + PROJECTION_KNOWN, epoch)
            if decision == LAYER:
                c = tl.load(work[PROJECTIONS] + x, cache_modifier=".cg")
            else:
                begin = (tile - tl.load(entry + FIRST_TILE)) // segments * segments
                c = view_projection(memory, work, x, begin, segments)
        elif (decision != NONE) & (by_rows == 0):  # the tile is the view: a parameter of one tile, or one wide row
            pp = tl.load(work[TILE_SUMS] + tile.to(tl.int64) * SUMS + PP, cache_modifier=".cg")
            c = projection(dot_of_tile(memory, work, where, S), pp, eps)
    if by_rows:
        for log_cols in tl.static_range(NARROWEST, S.log_tile + WIDTH_STEP, WIDTH_STEP):
            if fits(cols_here, log_cols):
                e, mask = rows_of_block(where, min(ONE << log_cols, S.tile), S)
                p, m, v, u = momentum_update(memory, work, where, e, mask, S)
                row_c = projection(tl.sum(p * u, axis=1), tl.sum(p * p, axis=1), eps.to(S.number))[:, None]
                # A row outside the tile divides 0 by eps^2, or by 0: what it holds is masked.
                store(memory, work, where, e, mask, p, m, v, u, row_c, decision, S)
    else:
        n = rows_here * cols_here
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
