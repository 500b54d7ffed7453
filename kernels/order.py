"""The order between programs of a launch."""

import triton
import triton.language as tl


@triton.jit
def draw(counter, epoch):
    """Returns 0, 1, 2, ... to the callers of one epoch. It orders no other memory accesses.

    The counter holds the epoch in its upper 32 bits, so that counts of an aborted step are ignored.
    """
    tl.atomic_max(counter, epoch << 32, sem="relaxed")
    return tl.atomic_add(counter, 1, sem="relaxed") & 0xFFFFFFFF


@triton.jit
def count(counter, epoch, n):
    """Adds n to the epoch's count and returns the new count. Writes before earlier calls are visible after this one."""
    tl.debug_barrier()
    tl.atomic_max(counter, epoch << 32, sem="relaxed")
    return (tl.atomic_add(counter, n, sem="acq_rel") & 0xFFFFFFFF) + n


@triton.jit
def announce(flag, epoch):
    tl.debug_barrier()
    tl.atomic_xchg(flag, epoch, sem="release")


@triton.jit
def wait(flag, epoch):
    """Waits until :func:`announce` has set the flag. Jobs wait only for jobs drawn earlier, so there is no deadlock."""
    seen = tl.atomic_add(flag, 0, sem="acquire")
    while seen != epoch:
        seen = tl.atomic_add(flag, 0, sem="acquire")
