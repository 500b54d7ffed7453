"""The order between programs of a launch."""

import triton
import triton.language as tl


@triton.jit
def draw(counter, epoch):
    """Numbers the callers of one epoch 0, 1, 2, ... Nobody sees by it what others wrote.

    The epoch fills the upper half, so that whatever a broken-off step left behind counts as nothing.
    """
    tl.atomic_max(counter, epoch << 32, sem="relaxed")
    return tl.atomic_add(counter, 1, sem="relaxed") & 0xFFFFFFFF


@triton.jit
def count(counter, epoch, n):
    """Adds n to the epoch's count and returns it. Sees what earlier callers wrote, and shows later ones its own."""
    tl.debug_barrier()
    tl.atomic_max(counter, epoch << 32, sem="relaxed")
    return (tl.atomic_add(counter, n, sem="acq_rel") & 0xFFFFFFFF) + n


@triton.jit
def announce(flag, epoch):
    tl.debug_barrier()
    tl.atomic_xchg(flag, epoch, sem="release")


@triton.jit
def wait(flag, epoch):
    """Waits for :func:`announce`: only ever for programs that are running and wait for nobody that comes later."""
    seen = tl.atomic_add(flag, 0, sem="acquire")
    while seen != epoch:
        seen = tl.atomic_add(flag, 0, sem="acquire")
