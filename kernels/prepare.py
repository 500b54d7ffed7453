"""Step counts and seeds, and what depends on them, for a block of parameters."""

import triton
import triton.language as tl

from .decision import part
from .momentum import bias_correction
from .precision import STOCHASTIC, step_key
from .tables import (
    ADDRESSES,
    BETA2,
    BY_STEP,
    COEFFICIENTS,
    COLS,
    COLUMNS,
    COUNTERS,
    COUNTS,
    DECISIONS,
    GROUP,
    INVERSE_BIAS2,
    KEY,
    LOCAL,
    LR,
    MOMENTUM,
    NONE,
    PLACES,
    PREPARE_BLOCK,
    RATES,
    ROWS,
    SCALARS,
    SEED,
    SHARING,
    STEP,
    STEP_SIZE,
    TABLE,
    VERDICT,
)


@triton.jit
def prepare(memory, work, active, n, block, S: tl.constexpr, SHARE: tl.constexpr):
    """Counts the step of a block of the n active parameters. Writes their coefficients and the keys of their noise.

    With SHARE it writes the coefficients of the next step and counts nothing.
    """
    i = block * PREPARE_BLOCK + tl.arange(0, PREPARE_BLOCK)
    live = i < n
    x = tl.load(active + i, live, other=0).to(tl.int64)
    group = tl.load(memory[TABLE] + x * COLUMNS + GROUP, live, other=0)
    rates = work[RATES] + group * SCALARS
    lr = tl.load(rates + LR, live, other=0.0)
    coefficients = work[BY_STEP] + x * COEFFICIENTS
    places = memory[PLACES] + x * ADDRESSES
    if S.adaptive:
        step = tl.load(places + STEP, live, other=0).to(tl.pointer_type(tl.float32))
        t = tl.load(step, live, other=0.0) + 1
        if not SHARE:
            tl.store(step, t, live)
        t = t.to(tl.float64)
        bias1 = bias_correction(tl.load(rates + MOMENTUM, live, other=0.0), t)
        bias2 = bias_correction(tl.load(rates + BETA2, live, other=0.0), t)
        tl.store(coefficients + INVERSE_BIAS2, 1 / tl.sqrt(bias2), live)
        tl.store(coefficients + STEP_SIZE, lr / bias1, live)
    else:
        tl.store(coefficients + STEP_SIZE, lr, live)
    if not SHARE:
        if S.rounding == STOCHASTIC:
            seed = tl.load(places + SEED, live, other=0).to(tl.pointer_type(tl.int64))
            s = tl.load(seed, live, other=0)
            tl.store(seed, s + 1, live)
            tl.store(work[COUNTS] + x * COUNTERS + KEY, step_key(s), live)
        # A parameter without elements here has no tile that would report.
        entry = memory[TABLE] + x * COLUMNS
        size = tl.load(entry + ROWS, live, other=1) * tl.load(entry + COLS, live, other=1)
        decision = tl.full((PREPARE_BLOCK,), NONE, tl.uint8)
        if S.shared:
            verdict = tl.load(part(work, x, VERDICT, tl.float64)).to(tl.int32)
            decision = tl.where(tl.load(entry + SHARING) == LOCAL, decision, verdict.to(tl.uint8))
        tl.store(work[DECISIONS] + x, decision, size == 0)
