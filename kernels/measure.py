"""The cosine test before a step."""

import triton
import triton.language as tl

from .decision import tiles_of, views_of
from .order import announce, count
from .sums import conclude, sum_rows
from .tables import CONCLUDED, COUNTERS, COUNTS, MEASURED, OWNERS


@triton.jit
def measure(memory, work, epoch, first, n, S: tl.constexpr):
    """Sums n tiles. The run that completes the parameter writes its findings.

    Reads p g: 8 bytes per float32 element.
    """
    x = tl.load(work[OWNERS] + first).to(tl.int64)
    for tile in tl.range(first, first + n, disable_licm=True):
        sum_rows(memory, work, epoch, tile, 0, S, False)
    tiles, segments = tiles_of(memory, x)
    counters = work[COUNTS] + x * COUNTERS
    if count(counters + MEASURED, epoch, n) == tiles:
        conclude(memory, work, x, views_of(memory, x, tiles, segments), segments, 0, False)
        announce(counters + CONCLUDED, epoch)
