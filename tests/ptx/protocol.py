"""A model of the one-pass kernel's order protocol, and a search through everything that it can do.

The model has the synchronisation of kernels/order.py (draw, count, announce and wait) and, between two of these
operations, which tables a job reads and writes. :func:`search` visits every state that two or three blocks can reach in
any interleaving. It reports two kinds of faults:

    deadlock   a block waits, and no operation of any block is possible
    race       two accesses of one place, at least one of them a write, that causality does not order

Rules of PTX that the model follows (PTX ISA 8.5, chapter "Memory Consistency Model"):

- "Single-Copy Atomicity" and "Atomicity": every access of a counter or flag here is an ``atom``, all of gpu scope. An
  ``atom`` reads the value before its own in the location's coherence order. So an interleaving decides all values.
- "Release and Acquire Patterns", "Synchronizes-With": an ``atom.acquire`` that observes an ``atom.release``
  synchronizes with it. "Observation order": it still does if further ``atom`` operations on the location lie between.
  So a location keeps what was released to it; a relaxed operation neither adds to that nor takes from it.
- "Barriers" and "Morally strong": ``bar.sync`` orders the accesses of all warps of a block before it and after it.
- "Causality order" is transitive, within a block and between blocks. So each warp here has the set of accesses that
  causality orders before its next one.
- A release orders what comes before it, not what comes after it. So an announcement here may be carried out at any
  time after it was made: later operations of its block may come first.
- An operation whose result a block branches on, as draw and count, is over before the block goes on.

A block has two warps here. Both access data. The first one alone synchronises, as Triton's code does for scalars, and a
barrier follows, by which Triton hands the result to the other warps.

Accesses of data are carried out together with the operation before them. That finds the same races as any other time
would: whether two accesses are ordered depends on the synchronisation alone, and the later of the two reports it.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAULTS", "Job", "Outcome", "Parameter", "Protocol", "jobs_of", "search"]

WARPS = 2
NO_JOB = -1


class Parameter(NamedTuple):
    """The properties of a parameter that the protocol depends on.

    Attributes:
        tiles: the number of its tiles.
        matrix: whether it has two or more dimensions, so that it may be projected.
        tested: whether the decision comes from the cosine test, so that tiles are measured.
        projected: whether the decision is other than NONE.
        wide: whether the projected view is wider than a tile, so that tiles are dotted.
    """

    tiles: int
    matrix: bool
    tested: bool
    projected: bool
    wide: bool


class Job(NamedTuple):
    """One job: what a ticket stands for. ``parameter`` and ``tile`` are -1 of a job that prepares."""

    stage: str
    parameter: int
    tile: int


class Protocol(NamedTuple):
    """The orders, waits and barriers of the kernels. The defaults are the kernels' own; others are planted faults."""

    count_orders: bool = True
    """The order of count is acq_rel, not relaxed."""
    announce_releases: bool = True
    """The order of announce is release, not relaxed."""
    wait_acquires: bool = True
    """The order of wait is acquire, not relaxed."""
    count_barrier: bool = True
    """count starts with a barrier."""
    announce_barrier: bool = True
    """announce starts with a barrier."""
    waits_prepared: bool = True
    """dot and update wait until all is prepared."""
    waits_concluded: bool = True
    """dot and update wait for the findings of measure."""
    waits_dotted: bool = True
    """update waits for the projection of a wide view."""
    counts_epoch: bool = True
    """count lets what an earlier epoch left behind count as nothing."""
    announces_last: bool = True
    """Only the block that counts the last tile concludes. Else the first one does."""


FAULTS = [Protocol(**{name: False}) for name in Protocol._fields]
"""Each of the kernels' orders, waits and barriers left out."""


class Outcome(NamedTuple):
    """The result of a search.

    Attributes:
        states: the number of states that were visited.
        faults: a description of each kind of fault that was found.
    """

    states: int
    faults: set[str]


def jobs_of(parameters: list[Parameter], *, prepare: int = 1, window: int = 1) -> list[Job]:
    """The job list of fused_adamp/backends/triton.py: ``window`` parameters are measured ahead of their update."""
    jobs = [Job("prepare", -1, block) for block in range(prepare)]
    windows = [[*range(i, min(i + window, len(parameters)))] for i in range(0, len(parameters), window)]
    for ahead, now in zip([*windows, []], [[], *windows], strict=True):
        for i in ahead:
            jobs += [Job("measure", i, tile) for tile in range(parameters[i].tiles if parameters[i].tested else 0)]
        for i in now:
            jobs += [Job("dot", i, tile) for tile in _dotted_tiles(parameters[i])]
        for i in reversed(now):
            jobs += [Job("update", i, tile) for tile in reversed(range(parameters[i].tiles))]
    return jobs


def _dotted_tiles(p: Parameter) -> range:
    return range(p.tiles if p.matrix and p.tiles > 1 else 0)


class Operation(NamedTuple):
    """One step of a job's program.

    Attributes:
        kind: "read", "write", "barrier", "count", "announce" or "wait".
        place: which table, counter or flag.
        last: of a count: how many make the last, after which the operations behind it are carried out, which others
            skip.
        skips: of a count: how many operations that is.
    """

    kind: str
    place: str
    last: int = 0
    skips: int = 0


def _counted(counter: str, last: int, flag: str, conclusion: list[Operation], protocol: Protocol) -> list[Operation]:
    """count; who counts the last one concludes and announces it."""
    announce = [Operation("barrier", "")] * protocol.announce_barrier + [Operation("announce", flag)]
    behind = [*conclusion, *announce]
    barrier = [Operation("barrier", "")] * protocol.count_barrier
    return [*barrier, Operation("count", counter, last if protocol.announces_last else 1, len(behind)), *behind]


def program(job: Job, parameters: list[Parameter], prepare: int, protocol: Protocol) -> list[Operation]:
    """The operations of a job, as kernels/plans.py and the stages carry them out."""
    if job.stage == "prepare":
        return [
            Operation("write", f"coefficients {job.tile}"),
            *_counted("preparing", prepare, "prepared", [], protocol),
        ]
    i, p = job.parameter, parameters[job.parameter]
    sums = [f"sums {i} {tile}" for tile in range(p.tiles)]
    findings, layer = f"findings {i}", f"layer projection {i}"
    if job.stage == "measure":
        conclusion = [*(Operation("read", place) for place in sums), Operation("write", findings)]
        return [
            Operation("write", sums[job.tile]),
            *_counted(f"measured {i}", p.tiles, f"concluded {i}", conclusion, protocol),
        ]
    coefficients = [Operation("read", f"coefficients {block}") for block in range(prepare)]
    begin = [Operation("wait", "prepared")] * protocol.waits_prepared
    if p.tested:
        begin += [Operation("wait", f"concluded {i}")] * protocol.waits_concluded
        begin.append(Operation("read", findings))
    dotted = p.projected and p.wide
    if job.stage == "dot":
        if not dotted:
            return begin
        conclusion = [*(Operation("read", place) for place in sums), Operation("write", layer)]
        return [
            *begin,
            *coefficients,
            Operation("read", f"weight {i} {job.tile}"),
            Operation("write", sums[job.tile]),
            *_counted(f"dotted {i}", p.tiles, f"projection known {i}", conclusion, protocol),
        ]
    if dotted:
        begin += [Operation("wait", f"projection known {i}")] * protocol.waits_dotted
        begin.append(Operation("read", layer))
    return [*begin, *coefficients, Operation("write", f"weight {i} {job.tile}")]


class Block(NamedTuple):
    """A block between two operations.

    Attributes:
        job: its ticket, or NO_JOB.
        at: the next operation of the job's program.
        known: per warp, the accesses that causality orders before its next one, as bits.
        done: whether it has drawn a ticket beyond the last job.
    """

    job: int
    at: int
    known: tuple[int, ...]
    done: bool


class State(NamedTuple):
    """Everything that decides what can happen next. Blocks are alike, so their order means nothing.

    Attributes:
        ticket: the next one.
        blocks: the running ones.
        pending: announcements that were made and not carried out: flag and what they release.
        counters: of each that was touched, the count, and what was released to it.
        flags: those that stand, and what was released to them.
        accesses: of each place, the reads and the writes so far, as bits.
    """

    ticket: int
    blocks: tuple[Block, ...]
    pending: tuple[tuple[str, int], ...]
    counters: tuple[tuple[str, int, int], ...]
    flags: tuple[tuple[str, int], ...]
    accesses: tuple[tuple[str, int, int], ...]


class _Model:
    def __init__(
        self, parameters: list[Parameter], jobs: list[Job], prepare: int, protocol: Protocol, leftover: int
    ) -> None:
        self.protocol, self.leftover = protocol, leftover
        self.programs = [program(job, parameters, prepare, protocol) for job in jobs]
        self.faults: set[str] = set()
        starts = [0]
        for operations in self.programs:
            starts.append(starts[-1] + WARPS * len(operations))
        self.starts = starts

    def successors(self, state: State) -> list[State]:
        found = []
        for i, block in enumerate(state.blocks):
            if not block.done and i == state.blocks.index(block):  # the next of two that are alike adds nothing
                after = self._draw(state, i) if block.job == NO_JOB else self._synchronise(state, i)
                found += [] if after is None else [after]
        for i, (flag, released) in enumerate(state.pending):
            flags = dict(state.flags)
            flags[flag] = flags.get(flag, 0) | released
            pending = state.pending[:i] + state.pending[i + 1 :]
            found.append(state._replace(pending=pending, flags=tuple(sorted(flags.items()))))
        return found

    def _with(self, state: State, i: int, block: Block) -> State:
        """Block ``i`` goes on up to its next operation on a counter or flag."""
        places = {place: (reads, writes) for place, reads, writes in state.accesses}
        pending = [*state.pending]
        while block.job != NO_JOB:
            operations = self.programs[block.job]
            if block.at == len(operations):
                block = block._replace(job=NO_JOB, at=0)
                break
            kind, place, *_ = operations[block.at]
            if kind in ("count", "wait"):
                break
            known = block.known
            if kind == "barrier":
                known = self._barrier(known)
            elif kind == "announce":
                pending.append((place, known[0] if self.protocol.announce_releases else 0))
            else:
                known = self._access(block.job, block.at, kind, place, known, places)
            block = block._replace(at=block.at + 1, known=known)
        blocks = sorted((*state.blocks[:i], block, *state.blocks[i + 1 :]))
        accesses = tuple(sorted((place, *bits) for place, bits in places.items()))
        return state._replace(blocks=tuple(blocks), pending=tuple(sorted(pending)), accesses=accesses)

    @staticmethod
    def _barrier(known: tuple[int, ...]) -> tuple[int, ...]:
        together = 0
        for of in known:
            together |= of
        return (together,) * WARPS

    def _access(
        self, job: int, at: int, kind: str, place: str, known: tuple[int, ...], places: dict[str, tuple[int, int]]
    ) -> tuple[int, ...]:
        """Each warp accesses its own part of a place that is written; a place that is read, it reads whole."""
        after = []
        reads, writes = places.get(place, (0, 0))
        own = [1 << (self.starts[job] + WARPS * at + warp) for warp in range(WARPS)]
        for of, bit in zip(known, own, strict=True):
            conflicting = writes if kind == "read" else reads | writes
            if conflicting & ~of:
                self.faults.add(f"race: {kind} of {place.rstrip(' 0123456789')}")
            after.append(of | bit)
        bits = sum(own)
        places[place] = (reads | bits, writes) if kind == "read" else (reads, writes | bits)
        return tuple(after)

    def _draw(self, state: State, i: int) -> State:
        block = state.blocks[i]
        if state.ticket == len(self.programs):
            return self._with(state, i, block._replace(done=True, known=(0,) * WARPS))
        return self._with(state._replace(ticket=state.ticket + 1), i, block._replace(job=state.ticket, at=0))

    def _synchronise(self, state: State, i: int) -> State | None:
        """Carries out a count or a wait; None if a wait goes on."""
        block = state.blocks[i]
        operation = self.programs[block.job][block.at]
        mine = block.known[0]
        if operation.kind == "wait":
            flags = dict(state.flags)
            if operation.place not in flags:
                return None
            mine |= flags[operation.place] if self.protocol.wait_acquires else 0
            return self._with(state, i, block._replace(at=block.at + 1, known=self._handed_on(mine, block)))
        counters = {place: (count, released) for place, count, released in state.counters}
        left = 0 if self.protocol.counts_epoch else self.leftover
        count, released = counters.get(operation.place, (left, 0))
        count += 1
        if self.protocol.count_orders:
            mine |= released
            released |= mine
        counters[operation.place] = count, released
        at = block.at + 1 + (operation.skips if count != operation.last else 0)
        block = block._replace(at=at, known=self._handed_on(mine, block))
        changed = tuple(sorted((place, *of) for place, of in counters.items()))
        return self._with(state._replace(counters=changed), i, block)

    def _handed_on(self, mine: int, block: Block) -> tuple[int, ...]:
        """The barrier by which all warps get the first one's result."""
        return self._barrier((mine, *block.known[1:]))


def search(
    parameters: list[Parameter],
    *,
    blocks: int,
    protocol: Protocol | None = None,
    jobs: list[Job] | None = None,
    prepare: int = 1,
    window: int = 1,
    leftover: int = 1,
) -> Outcome:
    """Visits all states that the blocks can reach.

    Args:
        parameters: those of one launch.
        blocks: how many run at once.
        protocol: the kernels' own by default.
        jobs: their order; that of the backend by default.
        prepare: jobs that prepare.
        window: parameters that are measured ahead.
        leftover: what a counter holds of an earlier epoch that was broken off.
    """
    jobs = jobs_of(parameters, prepare=prepare, window=window) if jobs is None else jobs
    model = _Model(parameters, jobs, prepare, protocol or Protocol(), leftover)
    start = State(0, (Block(NO_JOB, 0, (0,) * WARPS, False),) * blocks, (), (), (), ())
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        successors = model.successors(state)
        if not successors and not all(block.done for block in state.blocks):
            stuck = [model.programs[b.job][b.at].place for b in state.blocks if b.job != NO_JOB]
            model.faults.update(f"deadlock: waits for {place.rstrip(' 0123456789')}" for place in stuck)
        for after in successors:
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return Outcome(len(seen), model.faults)
