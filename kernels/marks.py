"""Sums of squares that leave float32's range: which they are, and the marks that say so.

A stage that meets such sums writes the epoch into a mark, and what it cannot decide or step, it leaves as it is.
"""

import triton
import triton.language as tl

from .tables import COUNTERS, COUNTS, LEAST_SQUARE, TINY_EPS2


@triton.jit
def least_square(eps):
    """The size below which p.p or g.g of a row may have lost squares that are too small for float32.

    -1 where nobody would notice: the clamp at eps hides what is lost, and so does |p| + eps.
    """
    return tl.where(eps * eps < TINY_EPS2, LEAST_SQUARE, -1.0)


@triton.jit
def left_float32(sizes, lowest, least, S: tl.constexpr):
    """Whether sums are not right that were added up in float32, from their sizes added up; or what they are of is
    infinite or not a number.
    """
    left = sizes != sizes
    if S.number == tl.float32:
        left = ((sizes < float("inf")) & (lowest > least)) == 0
    return left


@triton.jit
def mark(work, epoch, x, left, WHICH: tl.constexpr, S: tl.constexpr):
    if S.number == tl.float32:
        tl.store(work[COUNTS] + x * COUNTERS + WHICH, epoch, left)


@triton.jit
def is_marked(work, epoch, x, WHICH: tl.constexpr, S: tl.constexpr):
    """Whether the stage has left the parameter in this epoch: once all of the stage is known to be over."""
    marked = x != x
    if S.number == tl.float32:
        marked = tl.load(work[COUNTS] + x * COUNTERS + WHICH, cache_modifier=".cg") == epoch
    return marked
