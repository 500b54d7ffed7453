"""Marks for sums of squares that leave float32's range.

A stage that finds such sums writes the epoch into a mark and leaves the parameter or the tile unchanged.
"""

import triton
import triton.language as tl

from .tables import COUNTERS, COUNTS, LEAST_SQUARE, TINY_EPS2


@triton.jit
def least_square(eps):
    """The value below which p.p or g.g of a row may lack squares that are too small for float32; -1 if eps is large.

    Then the clamp at eps, and |p| + eps, hide the loss.
    """
    return tl.where(eps * eps < TINY_EPS2, LEAST_SQUARE, -1.0)


@triton.jit
def left_float32(sizes, lowest, least, S: tl.constexpr):
    """Whether float32 sums have to be computed again in float64. False if S.number is float64.

    ``sizes`` is the sum of the sums' absolute values, ``lowest`` the smallest p.p or g.g. True unless ``sizes`` is
    finite and ``lowest`` is above ``least``, from :func:`least_square`.
    """
    left = (sizes != sizes) & (sizes == sizes)  # false, in the shape of sizes
    if S.number == tl.float32:
        left = ((sizes < float("inf")) & (lowest > least)) == 0
    return left


@triton.jit
def mark(work, epoch, x, left, WHICH: tl.constexpr, S: tl.constexpr):
    if S.number == tl.float32:
        tl.store(work[COUNTS] + x * COUNTERS + WHICH, epoch, left)


@triton.jit
def is_marked(work, epoch, x, WHICH: tl.constexpr, S: tl.constexpr):
    """Whether a stage has marked the parameter in this epoch. Call it only when all programs of the stage are done."""
    marked = x != x
    if S.number == tl.float32:
        marked = tl.load(work[COUNTS] + x * COUNTERS + WHICH, cache_modifier=".cg") == epoch
    return marked
