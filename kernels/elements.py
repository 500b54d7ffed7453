"""Blocks of elements: loaded, advanced by momentum, rounded and stored."""

import triton
import triton.language as tl

from .decision import scalar
from .momentum import advance, direction
from .precision import REMAINDER, STOCHASTIC, halves, join, noise, round_stochastically, split
from .projection import weight_update
from .tables import (
    ALIGNED,
    BETA2,
    BY_STEP,
    COEFFICIENTS,
    COLUMNS,
    COUNTERS,
    COUNTS,
    DECAY,
    EPS,
    FIRST_NUMBER,
    GAIN,
    GAIN2,
    GROUP,
    INVERSE_BIAS2,
    KEY,
    LR,
    MOMENTUM,
    NARROWEST,
    NESTEROV,
    NESTEROV_GAIN,
    NONE,
    ONE,
    PROJECT_BUFFER,
    ROW_NUMBERS,
    SCALE,
    SIGN,
    STEP_SIZE,
    TABLE,
    VECTOR,
    WD_RATIO,
    WIDTH_STEP,
    G,
    M,
    P,
    R,
    V,
)
from .tiles import place


@triton.jit
def load_weight(memory, where, e, mask, S: tl.constexpr):
    p = tl.load(place(memory, where, e, P, S.p, S), mask, other=0.0)
    if S.rounding == REMAINDER:
        p = join(p, tl.load(place(memory, where, e, R, tl.int16, S), mask, other=0))
    return p.to(S.number)


@triton.jit
def load_gradient(memory, where, e, mask, S: tl.constexpr):
    return tl.load(place(memory, where, e, G, S.g, S), mask, other=0.0).to(S.number)


@triton.jit
def load_state(memory, where, e, mask, S: tl.constexpr):
    """Loads m and v. Outside the mask v is 1, so that u is 0 there, never 0 / 0."""
    m = tl.zeros(e.shape, S.number)
    v = tl.zeros(e.shape, S.number)
    if S.buffer:
        m = tl.load(place(memory, where, e, M, S.state, S), mask, other=0.0).to(S.number)
    if S.adaptive:
        v = tl.load(place(memory, where, e, V, S.state, S), mask, other=1.0).to(S.number)
    return m, v


@triton.jit
def momentum_update(memory, work, where, e, mask, S: tl.constexpr):
    """Loads a block. Returns p, and m, v and the update u after this step, in S.number and not yet stored."""
    group = tl.load(memory[TABLE] + where[0] * COLUMNS + GROUP)
    p = load_weight(memory, where, e, mask, S)
    factor = (scalar(work, group, SIGN) * tl.load(work[SCALE])).to(S.number)
    g = factor * load_gradient(memory, where, e, mask, S)
    m, v, u = momentum_of(memory, work, where, e, mask, g, S)
    return p, m, v, u


@triton.jit
def momentum_of(memory, work, where, e, mask, g, S: tl.constexpr):
    """Loads m and v of a block. Returns m, v and the update u after a step with g, the scaled gradient."""
    x = where[0]
    group = tl.load(memory[TABLE] + x * COLUMNS + GROUP)
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
    return m, v, u


@triton.jit
def first_number(memory, where):
    """The number of a tile's first element in the whole parameter, counted row by row, also if this is a shard."""
    x, row, col, _, _ = where
    entry = memory[TABLE] + x * COLUMNS
    return tl.load(entry + FIRST_NUMBER) + row * tl.load(entry + ROW_NUMBERS) + col


@triton.jit
def rounded(x, random, TYPE: tl.constexpr, S: tl.constexpr):
    """Rounds x, a block in S.number, to TYPE. ``random`` has 16 bits for each element, for stochastic rounding."""
    by_chance: tl.constexpr = (S.rounding == STOCHASTIC) & TYPE.is_bf16()
    if S.number == tl.float64 and TYPE.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return round_stochastically(x.to(tl.float32), random) if by_chance else x.to(TYPE)


@triton.jit
def store(memory, work, where, e, mask, p, m, v, u, c, decision, S: tl.constexpr):
    """Moves the weight of a block and stores p, m and v. c is the projection of each element's view, in S.number."""
    x = where[0]
    group = tl.load(memory[TABLE] + x * COLUMNS + GROUP)
    decay = scalar(work, group, LR) * scalar(work, group, DECAY)
    decay *= tl.where(decision == NONE, 1.0, scalar(work, group, WD_RATIO))
    step_size = tl.load(work[BY_STEP] + x * COEFFICIENTS + STEP_SIZE)
    if not S.adaptive:
        m = tl.where((decision != NONE) & (scalar(work, group, PROJECT_BUFFER) != 0), u - c * p, m)
    p = weight_update(p, u, c, step_size.to(S.number), decay.to(S.number))
    random = 0
    if S.rounding == STOCHASTIC:
        low, high = halves(tl.load(work[COUNTS] + x * COUNTERS + KEY))
        number = first_number(memory, where).to(tl.uint32) + e.to(tl.uint32)
        random = noise(number, low, high)
    if S.rounding == REMAINDER:
        p, r = split(p.to(tl.float32))
        tl.store(place(memory, where, e, R, tl.int16, S), r, mask)
        tl.store(place(memory, where, e, P, S.p, S), p, mask)
    else:
        tl.store(place(memory, where, e, P, S.p, S), rounded(p, random & 0xFFFF, S.p, S), mask)
    if S.buffer:
        tl.store(place(memory, where, e, M, S.state, S), rounded(m, random >> 16, S.state, S), mask)
    if S.adaptive:
        if S.rounding == STOCHASTIC:
            random = noise(number, high, low)
        tl.store(place(memory, where, e, V, S.state, S), rounded(v, random & 0xFFFF, S.state, S), mask)


@triton.jit
def whole_vectors(n):
    """n, or the multiple of VECTOR below it. Written so that the compiler sees the factor."""
    return n // VECTOR * VECTOR


@triton.jit
def rows_of_block(where, WIDTH: tl.constexpr, S: tl.constexpr):
    """Element numbers ``(S.tile / WIDTH, WIDTH)`` of a tile whose rows have at most WIDTH columns, and their mask."""
    rows_here = where[3]
    cols_here = where[4]
    if S.layout == ALIGNED:
        cols_here = whole_vectors(cols_here)
    r = tl.arange(0, S.tile // WIDTH)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    return r * cols_here + c, (r < rows_here) & (c < cols_here)


@triton.jit
def fits(cols, LOG_COLS: tl.constexpr):
    """Whether 2 ** LOG_COLS is the smallest width of a block of rows that holds `cols` columns.

    Widths are 64, 256, 1024, ... and the tile. Each width has its own code; the bytes moved do not depend on it.
    """
    return (cols <= (ONE << LOG_COLS)) & ((cols > (ONE << (LOG_COLS - WIDTH_STEP))) | (LOG_COLS == NARROWEST))


@triton.jit
def elements(where, start, S: tl.constexpr):
    """Element numbers ``(S.tile,)`` from `start` on, and the mask of those that exist, in whole vectors if ALIGNED."""
    n = where[3] * where[4]
    whole = n
    if S.layout == ALIGNED:
        whole = whole_vectors(n)
    e = start + tl.arange(0, S.tile)
    return e, e < whole
