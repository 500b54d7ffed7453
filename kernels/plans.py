"""The kernels that are launched: the split plan, a launch for each stage, and the one-pass plan.

Arguments, of all of them, as pointers:
    table        (P, COLUMNS) int64: fused_adamp/bucket.py
    addresses    (P, ADDRESSES) int64: of p, g, m, v and the step count
    strides      (P, STRIDES) int64: tiles.py; read in the STRIDED layout only
    owners       (tiles,) int32: the parameter that a tile belongs to
    scalars      (groups, SCALARS) float64: hyperparameters
    coefficients (P, COEFFICIENTS) float64, sums (tiles, SUMS) float64, decisions (P,) uint8, projections (P,) float64
                 and counters (P, COUNTERS) int64: what the stages tell each other
    tickets      (TICKETS,) int64: what the programs of a launch tell each other
    active       (n,) int32: parameters of this launch
    jobs         (n, 3) int32: stage, first tile, tiles
epoch is another number, up from 1, in every step.
"""

import triton
import triton.language as tl

from .stages import announce, count, dot, measure, prepare, update, wait

PREPARE = tl.constexpr(0)
MEASURE = tl.constexpr(1)
DOT = tl.constexpr(2)
UPDATE = tl.constexpr(3)

# What a launch counts.
TICKET = tl.constexpr(0)
PREPARING = tl.constexpr(1)
PREPARED = tl.constexpr(2)
TICKETS = tl.constexpr(3)


@triton.jit(do_not_specialize=["epoch", "n_active"])
def measure_kernel(
    table, addresses, strides, owners, scalars, coefficients, sums, decisions, projections, counters, tickets,
    active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """One program a job: prepares a block of parameters, or measures a tile."""
    memory = (table, addresses, strides)
    work = (owners, scalars, coefficients, sums, decisions, projections, counters)
    job = jobs + tl.program_id(0) * 3
    if tl.load(job) == PREPARE:
        prepare(memory, work, active, n_active, tl.load(job + 1), S)
    else:
        measure(memory, work, epoch, tl.load(job + 1), S)


@triton.jit(do_not_specialize=["epoch", "n_active"])
def dot_kernel(
    table, addresses, strides, owners, scalars, coefficients, sums, decisions, projections, counters, tickets,
    active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """One program a job."""
    memory = (table, addresses, strides)
    work = (owners, scalars, coefficients, sums, decisions, projections, counters)
    job = jobs + tl.program_id(0) * 3
    for i in tl.range(0, tl.load(job + 2)):
        dot(memory, work, epoch, tl.load(job + 1) + i, S)


@triton.jit(do_not_specialize=["epoch", "n_active"])
def update_kernel(
    table, addresses, strides, owners, scalars, coefficients, sums, decisions, projections, counters, tickets,
    active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """One program a job, which is one tile."""
    memory = (table, addresses, strides)
    work = (owners, scalars, coefficients, sums, decisions, projections, counters)
    update(memory, work, epoch, tl.load(jobs + tl.program_id(0) * 3 + 1), S)


@triton.jit(do_not_specialize=["epoch", "n_active", "n_jobs", "n_blocks"])
def one_pass_kernel(
    table, addresses, strides, owners, scalars, coefficients, sums, decisions, projections, counters, tickets,
    active, jobs, epoch, n_active, n_jobs, n_blocks, S: tl.constexpr,
):  # fmt: skip
    """Any number of programs draw jobs in their order: the first n_blocks prepare, then tiles are measured a window
    before they are updated.

    A job only waits for jobs drawn before it, by programs that are running and wait for nothing later: no deadlock
    whatever the grid.
    """
    memory = (table, addresses, strides)
    work = (owners, scalars, coefficients, sums, decisions, projections, counters)
    ticket = count(tickets + TICKET, epoch)
    while ticket < n_jobs:
        job = jobs + ticket * 3
        stage = tl.load(job)
        first = tl.load(job + 1)
        # Hoisted out of the loop, the offsets of every class of rows would each keep registers: 255 and not 128.
        for i in tl.range(0, tl.load(job + 2), disable_licm=True):
            tile = first + i
            if stage == PREPARE:
                prepare(memory, work, active, n_active, tile, S)
                if count(tickets + PREPARING, epoch) + 1 == n_blocks:
                    announce(tickets + PREPARED, epoch)
            elif stage == MEASURE:
                measure(memory, work, epoch, tile, S)
            else:
                wait(tickets + PREPARED, epoch)
                if stage == DOT:
                    dot(memory, work, epoch, tile, S)
                else:
                    update(memory, work, epoch, tile, S)
        ticket = count(tickets + TICKET, epoch)
