"""The kernels that are launched: the split plan, a launch for each stage, and the one-pass plan; share before either,
redo after each.

Arguments, of all of them, as pointers:
    table        (P, COLUMNS) int64: fused_adamp/batch.py
    addresses    (P, ADDRESSES) int64: of p, g, m, v, the remainder, the step count and the seed
    strides      (P, STRIDES) int64: tiles.py; read in the STRIDED layout only
    owners       (tiles,) int32: the parameter that a tile belongs to
    scalars      (groups, SCALARS) float64: hyperparameters
    scale        (1,) float64: what gradients are multiplied with
    found_inf    (1,) float64: where it is not 0, the launch does nothing
    coefficients (P, COEFFICIENTS) float64, sums (tiles, SUMS) float64, findings (P, FINDINGS) float64 and
                 counters (P, COUNTERS) int64: results that stages pass to each other
    decisions    (P,) uint8 and results (P, RESULTS) float64: results for the user
    parts        (P, PLACES_OF_PARTS) int64: addresses of the parameter's shares and verdicts, if several ranks
                 share the bucket
    tickets      (TICKETS,) int64: counters of the programs of a launch
    replays      (1,) int64: added to epoch
    active       (n,) int32: parameters of this launch
    jobs         (n, 3) int32: stage, first tile and number of tiles, all of one parameter
epoch + replays starts at 1 and grows by one in every step and every norm. The host counts epoch up, or, if a CUDA graph
may repeat a step, replays on the device.
"""

import triton
import triton.language as tl

from fused_adamp.backends.jobs import STAGES, TICKETS

from .decision import is_tested
from .dot import dot
from .measure import measure
from .order import announce, count, draw, wait
from .prepare import prepare
from .redo import redo, redo_ahead
from .share import share, share_nothing
from .sums import square
from .tables import numbered
from .update import update

_stage = numbered(STAGES)
PREPARE = _stage["prepare"]
MEASURE = _stage["measure"]
DOT = _stage["dot"]
SQUARE = _stage["square"]
SHARE = _stage["share"]

_ticket = numbered(TICKETS)
TICKET = _ticket["ticket"]
PREPARING = _ticket["preparing"]
PREPARED = _ticket["prepared"]


@triton.jit(do_not_specialize=["epoch", "n_active"])
def measure_kernel(
    table, addresses, strides, owners, scalars, scale, found_inf, coefficients, sums, findings, counters,
    decisions, results, parts, tickets, replays, active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """One program a job: prepares a block of parameters, or measures or squares tiles."""
    memory = (table, addresses, strides)
    work = (owners, scalars, scale, coefficients, sums, findings, counters, decisions, results, parts)
    if tl.load(found_inf) == 0:
        job = jobs + tl.program_id(0) * 3
        stage = tl.load(job)
        first = tl.load(job + 1)
        n = tl.load(job + 2)
        if stage == PREPARE:
            prepare(memory, work, active, n_active, first, S, False)
        elif stage == SQUARE:
            square(memory, work, epoch + tl.load(replays), first, n, S, False)
        elif is_tested(memory, work, tl.load(owners + first).to(tl.int64), S):
            measure(memory, work, epoch + tl.load(replays), first, n, S)


@triton.jit(do_not_specialize=["epoch", "n_active"])
def share_kernel(
    table, addresses, strides, owners, scalars, scale, found_inf, coefficients, sums, findings, counters,
    decisions, results, parts, tickets, replays, active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """One program a job. One launch prepares parameters, the next one shares tiles."""
    memory = (table, addresses, strides)
    work = (owners, scalars, scale, coefficients, sums, findings, counters, decisions, results, parts)
    job = jobs + tl.program_id(0) * 3
    stage = tl.load(job)
    first = tl.load(job + 1)
    if stage == PREPARE:
        prepare(memory, work, active, n_active, first, S, True)
    elif stage == SHARE:
        share(memory, work, epoch + tl.load(replays), first, tl.load(job + 2), S)
    else:
        share_nothing(memory, work, first.to(tl.int64))


@triton.jit(do_not_specialize=["epoch", "n_active"])
def dot_kernel(
    table, addresses, strides, owners, scalars, scale, found_inf, coefficients, sums, findings, counters,
    decisions, results, parts, tickets, replays, active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """One program a job."""
    memory = (table, addresses, strides)
    work = (owners, scalars, scale, coefficients, sums, findings, counters, decisions, results, parts)
    if tl.load(found_inf) == 0:
        job = jobs + tl.program_id(0) * 3
        dot(memory, work, epoch + tl.load(replays), tl.load(job + 1), tl.load(job + 2), S, False)


@triton.jit(do_not_specialize=["epoch", "n_active"])
def update_kernel(
    table, addresses, strides, owners, scalars, scale, found_inf, coefficients, sums, findings, counters,
    decisions, results, parts, tickets, replays, active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """One program a job."""
    memory = (table, addresses, strides)
    work = (owners, scalars, scale, coefficients, sums, findings, counters, decisions, results, parts)
    if tl.load(found_inf) == 0:
        job = jobs + tl.program_id(0) * 3
        update(memory, work, epoch + tl.load(replays), tl.load(job + 1), tl.load(job + 2), S, False)


@triton.jit(do_not_specialize=["epoch", "n_active", "n_jobs", "n_blocks"])
def one_pass_kernel(
    table, addresses, strides, owners, scalars, scale, found_inf, coefficients, sums, findings, counters,
    decisions, results, parts, tickets, replays, active, jobs, epoch, n_active, n_jobs, n_blocks, S: tl.constexpr,
):  # fmt: skip
    """Any number of programs draw jobs in their order: the first n_blocks prepare, then tiles are measured a window
    before they are updated.

    A job only waits for jobs drawn before it, by programs that are running and wait for nothing later: no deadlock
    whatever the grid.
    """
    memory = (table, addresses, strides)
    work = (owners, scalars, scale, coefficients, sums, findings, counters, decisions, results, parts)
    if tl.load(found_inf) == 0:
        now = epoch + tl.load(replays)
        ticket = draw(tickets + TICKET, now)
        while ticket < n_jobs:
            job = jobs + ticket * 3
            stage = tl.load(job)
            first = tl.load(job + 1)
            n = tl.load(job + 2)
            if stage == PREPARE:
                prepare(memory, work, active, n_active, first, S, False)
                if count(tickets + PREPARING, now, 1) == n_blocks:
                    announce(tickets + PREPARED, now)
            elif stage == MEASURE:
                if is_tested(memory, work, tl.load(owners + first).to(tl.int64), S):
                    measure(memory, work, now, first, n, S)
            else:
                wait(tickets + PREPARED, now)
                if stage == DOT:
                    dot(memory, work, now, first, n, S, True)
                else:
                    update(memory, work, now, first, n, S, True)
            ticket = draw(tickets + TICKET, now)


@triton.jit(do_not_specialize=["epoch", "n_active"])
def redo_kernel(
    table, addresses, strides, owners, scalars, scale, found_inf, coefficients, sums, findings, counters,
    decisions, results, parts, tickets, replays, active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """One program an active parameter, after the last kernel of a step: most often it has nothing to do."""
    memory = (table, addresses, strides)
    work = (owners, scalars, scale, coefficients, sums, findings, counters, decisions, results, parts)
    redo(memory, work, epoch + tl.load(replays), tl.load(active + tl.program_id(0)).to(tl.int64), S)


@triton.jit(do_not_specialize=["epoch", "n_active"])
def redo_ahead_kernel(
    table, addresses, strides, owners, scalars, scale, found_inf, coefficients, sums, findings, counters,
    decisions, results, parts, tickets, replays, active, jobs, epoch, n_active, S: tl.constexpr,
):  # fmt: skip
    """As redo_kernel, but after share, or after the norm of the gradients."""
    memory = (table, addresses, strides)
    work = (owners, scalars, scale, coefficients, sums, findings, counters, decisions, results, parts)
    redo_ahead(memory, work, epoch + tl.load(replays), tl.load(active + tl.program_id(0)).to(tl.int64), S)
