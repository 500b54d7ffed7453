"""Lookups that are equal for all tiles of a parameter: its hyperparameters, the decision on it, its views."""

import triton
import triton.language as tl

from .cosine import below
from .order import wait
from .tables import (
    AUTO,
    CHANNEL,
    CHANNEL_LIMIT,
    COLUMNS,
    CONCLUDED,
    COUNTERS,
    COUNTS,
    DELTA,
    EPS,
    FINDINGS,
    FOUND,
    GIVEN,
    GIVEN_STEP,
    GROUP,
    LAYER,
    LAYER_LIMIT,
    LOCAL,
    NEVER,
    NONE,
    PARTS,
    PLACES_OF_PARTS,
    PROJECTED,
    PROJECTION,
    RATES,
    ROWS,
    SCALARS,
    SCALE,
    SEGMENTS,
    SHARED,
    SHARING,
    SPLIT,
    TABLE,
    TILES,
    VERDICT,
)


@triton.jit
def scalar(work, group, WHICH: tl.constexpr):
    return tl.load(work[RATES] + group * SCALARS + WHICH)


@triton.jit
def eps_of(memory, work, x):
    return scalar(work, tl.load(memory[TABLE] + x * COLUMNS + GROUP), EPS)


@triton.jit
def part(work, x, WHICH: tl.constexpr, TYPE: tl.constexpr):
    """A pointer to parameter x's entry in a table of :class:`~fused_adamp.batch.Shared`; WHICH: a column of PARTS."""
    return tl.load(work[PARTS] + x * PLACES_OF_PARTS + WHICH).to(tl.pointer_type(TYPE))


@triton.jit
def is_tested(memory, work, x, S: tl.constexpr):
    """Whether the cosine test on this rank decides on the parameter. It does not for delta = 0 or a forced view."""
    entry = memory[TABLE] + x * COLUMNS
    group = tl.load(entry + GROUP)
    automatic = (scalar(work, group, PROJECTION) == AUTO) & (scalar(work, group, DELTA) > 0)
    tested = (tl.load(entry + PROJECTED) != 0) & automatic
    if S.shared:
        tested &= tl.load(entry + SHARING) == LOCAL
    return tested


@triton.jit
def decide(memory, work, epoch, x, S: tl.constexpr, WAIT: tl.constexpr):
    """The decision on the parameter, int32: NONE, CHANNEL or LAYER.

    It is the group's forced view, the result of the cosine test at this step's scale, or the verdict of all ranks. With
    WAIT, it first waits until the parameter's tiles have been measured.
    """
    entry = memory[TABLE] + x * COLUMNS
    group = tl.load(entry + GROUP)
    fixed = scalar(work, group, PROJECTION).to(tl.int32)
    decision = tl.where((tl.load(entry + PROJECTED) != 0) & (fixed != NEVER), fixed, NONE)
    if is_tested(memory, work, x, S):
        if WAIT:
            wait(work[COUNTS] + x * COUNTERS + CONCLUDED, epoch)
        findings = work[FOUND] + x * FINDINGS
        scale = tl.load(work[SCALE])
        eps = scalar(work, group, EPS)
        channel = below(scale, tl.load(findings + CHANNEL_LIMIT, cache_modifier=".cg"), eps)
        layer = below(scale, tl.load(findings + LAYER_LIMIT, cache_modifier=".cg"), eps)
        decision = tl.where(channel, CHANNEL, tl.where(layer, LAYER, NONE))
    if S.shared:
        verdict = tl.load(part(work, x, VERDICT, tl.float64)).to(tl.int32)
        decision = tl.where(tl.load(entry + SHARING) == LOCAL, decision, verdict)
    return decision


@triton.jit
def is_given(memory, x, decision, S: tl.constexpr):
    """Whether the verdict has the projection c, since the view lies on several ranks."""
    given = decision != decision
    if S.shared:
        sharing = tl.load(memory[TABLE] + x * COLUMNS + SHARING)
        given = (sharing == SPLIT) | ((sharing == SHARED) & (decision == LAYER))
    return given


@triton.jit
def given_projection(work, x, row, mask):
    """The projection c from the verdict, float64, in the shape of ``row``: indices of rows, one or a block."""
    step = tl.load(work[PARTS] + x * PLACES_OF_PARTS + GIVEN_STEP)
    return tl.load(part(work, x, GIVEN, tl.float64) + row * step, mask, other=0.0)


@triton.jit
def tiles_of(memory, x):
    """The number of tiles of the parameter, and of each of its rows."""
    entry = memory[TABLE] + x * COLUMNS
    return tl.load(entry + TILES), tl.load(entry + SEGMENTS)


@triton.jit
def views_of(memory, x, tiles, segments):
    """The number of views to conclude: tiles, or the parameter's rows if a row has several tiles (segments)."""
    return tl.where(segments > 1, tl.load(memory[TABLE] + x * COLUMNS + ROWS), tiles)


@triton.jit
def is_wide(decision, tiles, segments):
    """Whether the decided view is wider than a tile."""
    return ((decision == LAYER) & (tiles > 1)) | ((decision == CHANNEL) & (segments > 1))
