"""The stages of a step, each for a run of one parameter's tiles, and the order between runs.

    prepare  step counts, seeds, and what depends on them, for a block of parameters
    measure  per row p.g, g.g and p.p; whose run is a parameter's last concludes            reads p g
    square   g.g, where only the norm of the gradients is asked for                         reads g
    share    what measure, square and dot find, as far as the ranks ask it of each other    reads p g m v at most
    dot      p.u and p.p, where the decided view is wider than a tile; most often nothing   reads p g m v
    update   momentum, projection, weight decay, weight                                     reads p g m v, writes p m v
    redo     most often nothing: what the others have left, since its squares leave float32

``memory`` and ``work`` are tuples of tables, to be passed on whole: where a parameter's tensors lie, and what the
stages tell each other. Sums run in the math's dtype within a tile and in float64 from tile to tile, always in the
order of the tiles, so that results repeat bit for bit.

Measure and square see gradients as they are, everything else times the step's scale: so a tensor that was measured for
the norm of the gradients need not be measured again once the scale that clips them is known. What ranks share is of the
gradients times the scale: there, SHARE is true.

Sums of squares may leave float32: those of gradients or weights of 1e20. A stage that meets such sums writes the epoch
into a mark, and what it cannot decide or step, it leaves as it is. A mark is read once all who may write it are done.
Measure and dot mark a parameter, each with a mark of its own: nothing of it has moved by then, and nothing will. Update
marks a tile that is a view, or whose rows are: it alone has not moved. At the end, redo does what is marked, with the
same functions: there, S.number is float64.
"""

import triton
import triton.language as tl

from .cosine import below, compare
from .momentum import advance, bias_correction, direction
from .precision import REMAINDER, STOCHASTIC, halves, join, noise, round_stochastically, split, step_key
from .projection import projection, weight_update
from .tiles import (
    ADDRESSES,
    ALIGNED,
    COLS,
    COLUMNS,
    FIRST_NUMBER,
    FIRST_TILE,
    GROUP,
    PROJECTED,
    ROW_NUMBERS,
    ROWS,
    SEED,
    SEGMENTS,
    SHARING,
    STEP,
    TILES,
    VECTOR,
    G,
    M,
    P,
    R,
    V,
    locate,
    place,
)

# The tables of plans.py, as the tuples memory and work.
TABLE = tl.constexpr(0)
PLACES = tl.constexpr(1)
OWNERS = tl.constexpr(0)
RATES = tl.constexpr(1)
SCALE = tl.constexpr(2)
BY_STEP = tl.constexpr(3)
TILE_SUMS = tl.constexpr(4)
FOUND = tl.constexpr(5)
COUNTS = tl.constexpr(6)
DECISIONS = tl.constexpr(7)
OUTCOMES = tl.constexpr(8)
PARTS = tl.constexpr(9)

# fused_adamp/reference.py, Decision.
NONE = tl.constexpr(0)
CHANNEL = tl.constexpr(1)
LAYER = tl.constexpr(2)

# fused_adamp/batch.py, Sharing.
LOCAL = tl.constexpr(0)
SHARED = tl.constexpr(1)
SPLIT = tl.constexpr(2)

# fused_adamp/batch.py, Need: bits.
TEST = tl.constexpr(1)
DOT = tl.constexpr(2)
SQUARE = tl.constexpr(4)

# A parameter's row of the parts: addresses in fused_adamp/batch.py, Shared. GIVEN are c of its rows if they are split,
# else the one c of its layer; c of the next row lies GIVEN_STEP numbers further, 1 or 0.
NEED = tl.constexpr(0)
SHARES = tl.constexpr(1)
ROW_SHARES = tl.constexpr(2)
VERDICT = tl.constexpr(3)
GIVEN = tl.constexpr(4)
GIVEN_STEP = tl.constexpr(5)
PLACES_OF_PARTS = tl.constexpr(6)

# fused_adamp/batch.py, PROJECTIONS: those between are decisions.
AUTO = tl.constexpr(0)
NEVER = tl.constexpr(3)

# fused_adamp/batch.py, Scalars: a parameter group's row.
LR = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
GAIN = tl.constexpr(2)
NESTEROV_GAIN = tl.constexpr(3)
BETA2 = tl.constexpr(4)
GAIN2 = tl.constexpr(5)
EPS = tl.constexpr(6)
DECAY = tl.constexpr(7)
DELTA = tl.constexpr(8)
WD_RATIO = tl.constexpr(9)
SIGN = tl.constexpr(10)
NESTEROV = tl.constexpr(11)
PROJECT_BUFFER = tl.constexpr(12)
PROJECTION = tl.constexpr(13)
SCALARS = tl.constexpr(14)

# A parameter's row of the numbers that depend on the step count.
INVERSE_BIAS2 = tl.constexpr(0)
STEP_SIZE = tl.constexpr(1)
COEFFICIENTS = tl.constexpr(2)

# A tile's row of the sums, and of fused_adamp/batch.py, SHARES: the least limit and the largest cosine of its rows
# (cosine.py), and sums; those from PG on are also ROW_SHARES. Update has no use for the limit: of a tile it leaves,
# it writes minus the epoch there, which no limit is.
LIMIT = tl.constexpr(0)
LARGEST = tl.constexpr(1)
PG = tl.constexpr(2)
GG = tl.constexpr(3)
PP = tl.constexpr(4)
PU = tl.constexpr(5)
SUMS = tl.constexpr(6)

# A parameter's row of the findings: the limits of both views and what the results say, from measure; c, from dot.
CHANNEL_LIMIT = tl.constexpr(0)
LAYER_LIMIT = tl.constexpr(1)
FOUND_COSINE = tl.constexpr(2)
FOUND_NORM = tl.constexpr(3)
LAYER_PROJECTION = tl.constexpr(4)
FINDINGS = tl.constexpr(5)

# fused_adamp/batch.py, RESULTS: a parameter's row.
COSINE = tl.constexpr(0)
NORM = tl.constexpr(1)
RESULTS = tl.constexpr(2)

# A parameter's row of the counters: tiles that have been measured and dotted, the epoch in which all had been, the keys
# of this step's noise; and marks, the last epoch in which sums of measure, dot or update left float32.
MEASURED = tl.constexpr(0)
DOTTED = tl.constexpr(1)
CONCLUDED = tl.constexpr(2)
PROJECTION_KNOWN = tl.constexpr(3)
KEY = tl.constexpr(4)
MEASURE_LEFT = tl.constexpr(5)
DOT_LEFT = tl.constexpr(6)
TILES_LEFT = tl.constexpr(7)
COUNTERS = tl.constexpr(8)

# log2 of the columns of the narrowest block of rows, and its step to the next.
NARROWEST = tl.constexpr(6)
WIDTH_STEP = tl.constexpr(2)
ONE = tl.constexpr(1)  # what is shifted is a constexpr too: so that it also works in the interpreter
CONCLUDE_BLOCK = tl.constexpr(256)
PREPARE_BLOCK = tl.constexpr(128)

# csrc/algorithm.h, least_square: below which eps^2 it matters, and the least sum that has lost nothing that matters.
TINY_EPS2 = tl.constexpr(2.0**-90)
LEAST_SQUARE = tl.constexpr(2.0**-100)


# Order between programs.


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


# Squares that leave float32.


@triton.jit
def least_square(eps):
    """The size below which p.p or g.g of a row may have lost squares that are too small for float32.

    -1 where nobody would notice: the clamp at eps hides what is lost, and so does |p| + eps.
    """
    return tl.where(eps * eps < TINY_EPS2, LEAST_SQUARE, -1.0)


@triton.jit
def eps_of(memory, work, x):
    return scalar(work, tl.load(memory[TABLE] + x * COLUMNS + GROUP), EPS)


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


# Properties that all tiles of a parameter have in common.


@triton.jit
def scalar(work, group, WHICH: tl.constexpr):
    return tl.load(work[RATES] + group * SCALARS + WHICH)


@triton.jit
def part(work, x, WHICH: tl.constexpr, TYPE: tl.constexpr):
    """A pointer to the parameter's part of what its ranks tell each other."""
    return tl.load(work[PARTS] + x * PLACES_OF_PARTS + WHICH).to(tl.pointer_type(TYPE))


@triton.jit
def is_tested(memory, work, x, S: tl.constexpr):
    """Whether the cosine test decides on the parameter here. With delta = 0 no cosine is below the threshold."""
    entry = memory[TABLE] + x * COLUMNS
    group = tl.load(entry + GROUP)
    automatic = (scalar(work, group, PROJECTION) == AUTO) & (scalar(work, group, DELTA) > 0)
    tested = (tl.load(entry + PROJECTED) != 0) & automatic
    if S.shared:
        tested &= tl.load(entry + SHARING) == LOCAL
    return tested


@triton.jit
def decide(memory, work, epoch, x, S: tl.constexpr, WAIT: tl.constexpr):
    """The decision: what the group fixes, what the limits say of this step's scale, or the verdict of all ranks.

    With WAIT, the parameter's tiles may still be measured by others.
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
    """Whether the projection comes with the verdict: of a view that lies on several ranks."""
    given = decision != decision
    if S.shared:
        sharing = tl.load(memory[TABLE] + x * COLUMNS + SHARING)
        given = (sharing == SPLIT) | ((sharing == SHARED) & (decision == LAYER))
    return given


@triton.jit
def given_projection(work, x, row, mask):
    """The projection c of rows, which may be a block, from the verdict."""
    step = tl.load(work[PARTS] + x * PLACES_OF_PARTS + GIVEN_STEP)
    return tl.load(part(work, x, GIVEN, tl.float64) + row * step, mask, other=0.0)


@triton.jit
def tiles_of(memory, x):
    """Tiles of the parameter, and tiles of one of its rows."""
    entry = memory[TABLE] + x * COLUMNS
    return tl.load(entry + TILES), tl.load(entry + SEGMENTS)


@triton.jit
def views_of(memory, x, tiles, segments):
    """Tiles of whole rows; or rows, if each is several tiles."""
    return tl.where(segments > 1, tl.load(memory[TABLE] + x * COLUMNS + ROWS), tiles)


@triton.jit
def is_wide(decision, tiles, segments):
    """Whether the decided view is wider than a tile."""
    return ((decision == LAYER) & (tiles > 1)) | ((decision == CHANNEL) & (segments > 1))


# Blocks of elements.


@triton.jit
def load_weight(memory, where, e, mask, S: tl.constexpr):
    p = tl.load(place(memory, where, e, P, S.p, S), mask, other=0.0)
    if S.rounding == REMAINDER:
        p = join(p, tl.load(place(memory, where, e, R, tl.int16, S), mask, other=0))
    return p.to(S.number)


@triton.jit
def load_gradient(memory, where, e, mask, S: tl.constexpr):
    return tl.load(place(memory, where, e, G, S.g, S), mask, other=0.0).to(S.number)


@triton.jit
def load_state(memory, where, e, mask, S: tl.constexpr):
    """Loads m and v. Outside the mask v is 1, so that u is 0 there, never 0 / 0."""
    m = tl.zeros(e.shape, S.number)
    v = tl.zeros(e.shape, S.number)
    if S.buffer:
        m = tl.load(place(memory, where, e, M, S.state, S), mask, other=0.0).to(S.number)
    if S.adaptive:
        v = tl.load(place(memory, where, e, V, S.state, S), mask, other=1.0).to(S.number)
    return m, v


@triton.jit
def momentum_update(memory, work, where, e, mask, S: tl.constexpr):
    """p, and m, v and u after this step."""
    group = tl.load(memory[TABLE] + where[0] * COLUMNS + GROUP)
    p = load_weight(memory, where, e, mask, S)
    factor = (scalar(work, group, SIGN) * tl.load(work[SCALE])).to(S.number)
    g = factor * load_gradient(memory, where, e, mask, S)
    m, v, u = momentum_of(memory, work, where, e, mask, g, S)
    return p, m, v, u


@triton.jit
def momentum_of(memory, work, where, e, mask, g, S: tl.constexpr):
    """m, v and u after a step with the gradient g."""
    x = where[0]
    group = tl.load(memory[TABLE] + x * COLUMNS + GROUP)
    m, v = load_state(memory, where, e, mask, S)
    momentum = scalar(work, group, MOMENTUM).to(S.number)
    gain = scalar(work, group, GAIN).to(S.number)
    beta2 = scalar(work, group, BETA2).to(S.number)
    gain2 = scalar(work, group, GAIN2).to(S.number)
    m, v = advance(g, m, v, momentum, gain, beta2, gain2, S.adaptive, S.buffer)
    nesterov_gain = scalar(work, group, NESTEROV_GAIN).to(S.number)
    nesterov = scalar(work, group, NESTEROV) != 0
    inverse_bias2 = tl.load(work[BY_STEP] + x * COEFFICIENTS + INVERSE_BIAS2).to(S.number)
    eps = scalar(work, group, EPS).to(S.number)
    u = direction(g, m, v, momentum, nesterov_gain, nesterov, inverse_bias2, eps, S.adaptive)
    return m, v, u


@triton.jit
def first_number(memory, where):
    """The number of a tile's first element in the whole parameter, of which this may be a part. The others follow."""
    x, row, col, _, _ = where
    entry = memory[TABLE] + x * COLUMNS
    return tl.load(entry + FIRST_NUMBER) + row * tl.load(entry + ROW_NUMBERS) + col


@triton.jit
def rounded(x, random, TYPE: tl.constexpr, S: tl.constexpr):
    """Rounds x to a value that a tensor of that dtype stores."""
    by_chance: tl.constexpr = (S.rounding == STOCHASTIC) & TYPE.is_bf16()
    if S.number == tl.float64 and TYPE.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return round_stochastically(x.to(tl.float32), random) if by_chance else x.to(TYPE)


@triton.jit
def store(memory, work, where, e, mask, p, m, v, u, c, decision, S: tl.constexpr):
    """Moves the weight and stores it with the state; c is the projection of each element's view."""
    x = where[0]
    group = tl.load(memory[TABLE] + x * COLUMNS + GROUP)
    decay = scalar(work, group, LR) * scalar(work, group, DECAY)
    decay *= tl.where(decision == NONE, 1.0, scalar(work, group, WD_RATIO))
    step_size = tl.load(work[BY_STEP] + x * COEFFICIENTS + STEP_SIZE)
    if not S.adaptive:
        m = tl.where((decision != NONE) & (scalar(work, group, PROJECT_BUFFER) != 0), u - c * p, m)
    p = weight_update(p, u, c, step_size.to(S.number), decay.to(S.number))
    random = 0
    if S.rounding == STOCHASTIC:
        low, high = halves(tl.load(work[COUNTS] + x * COUNTERS + KEY))
        number = first_number(memory, where).to(tl.uint32) + e.to(tl.uint32)
        random = noise(number, low, high)
    if S.rounding == REMAINDER:
        p, r = split(p.to(tl.float32))
        tl.store(place(memory, where, e, R, tl.int16, S), r, mask)
        tl.store(place(memory, where, e, P, S.p, S), p, mask)
    else:
        tl.store(place(memory, where, e, P, S.p, S), rounded(p, random & 0xFFFF, S.p, S), mask)
    if S.buffer:
        tl.store(place(memory, where, e, M, S.state, S), rounded(m, random >> 16, S.state, S), mask)
    if S.adaptive:
        if S.rounding == STOCHASTIC:
            random = noise(number, high, low)
        tl.store(place(memory, where, e, V, S.state, S), rounded(v, random & 0xFFFF, S.state, S), mask)


@triton.jit
def whole_vectors(n):
    """n, or the multiple of VECTOR below it. Written so that the compiler sees the factor."""
    return n // VECTOR * VECTOR


@triton.jit
def rows_of_block(where, WIDTH: tl.constexpr, S: tl.constexpr):
    """A block of S.tile elements, WIDTH a row, that holds a tile: its element numbers and which of them exist."""
    rows_here = where[3]
    cols_here = where[4]
    if S.layout == ALIGNED:
        cols_here = whole_vectors(cols_here)
    r = tl.arange(0, S.tile // WIDTH)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    return r * cols_here + c, (r < rows_here) & (c < cols_here)


@triton.jit
def fits(cols, LOG_COLS: tl.constexpr):
    """Whether 2 ** LOG_COLS is the least of the widths that blocks of rows come in that holds `cols`.

    64, 256, 1024, ... and the tile: each width is code of its own, and the bytes moved do not depend on it.
    """
    return (cols <= (ONE << LOG_COLS)) & ((cols > (ONE << (LOG_COLS - WIDTH_STEP))) | (LOG_COLS == NARROWEST))


@triton.jit
def elements(where, start, S: tl.constexpr):
    """Element numbers of a block from `start`, and which of them exist and belong to whole vectors."""
    n = where[3] * where[4]
    whole = n
    if S.layout == ALIGNED:
        whole = whole_vectors(n)
    e = start + tl.arange(0, S.tile)
    return e, e < whole


# The stages.


@triton.jit
def prepare(memory, work, active, n, block, S: tl.constexpr, SHARE: tl.constexpr):
    """Counts the step of a block of the n active parameters and writes what depends on it.

    With SHARE it writes what the next step will, and counts nothing.
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


@triton.jit
def measure(memory, work, epoch, first, n, S: tl.constexpr):
    """The sums of n tiles; after a parameter's last, its findings. Reads p g: 8 bytes per float32 element."""
    x = tl.load(work[OWNERS] + first).to(tl.int64)
    for tile in tl.range(first, first + n, disable_licm=True):
        sum_rows(memory, work, epoch, tile, 0, S, False)
    tiles, segments = tiles_of(memory, x)
    counters = work[COUNTS] + x * COUNTERS
    if count(counters + MEASURED, epoch, n) == tiles:
        conclude(memory, work, x, views_of(memory, x, tiles, segments), segments, 0, False)
        announce(counters + CONCLUDED, epoch)


@triton.jit
def share(memory, work, epoch, first, n, S: tl.constexpr):
    """The sums of n tiles that are asked for; after a parameter's last, what its ranks are told.

    Reads g; p and g for the test; p g m v with p.u: 4, 8 or 16 bytes per float32 element.
    """
    x = tl.load(work[OWNERS] + first).to(tl.int64)
    need = tl.load(part(work, x, NEED, tl.uint8)).to(tl.int32)
    if need != 0:
        share_tiles(memory, work, epoch, first, n, need, S)
        x = tl.load(work[OWNERS] + first).to(tl.int64)  # again: so that it keeps no register meanwhile
        tiles, _ = tiles_of(memory, x)
        if count(work[COUNTS] + x * COUNTERS + MEASURED, epoch, n) == tiles:
            conclude_shares(memory, work, x, need)


@triton.jit
def is_asked_by_rows(need):
    return (need & (TEST | DOT)) != 0


@triton.jit
def share_tiles(memory, work, epoch, first, n, need, S: tl.constexpr):
    if is_asked_by_rows(need):
        for tile in tl.range(first, first + n, disable_licm=True):
            sum_rows(memory, work, epoch, tile, need, S, True)
    else:
        square(memory, work, epoch, first, n, S, True)


@triton.jit
def conclude_shares(memory, work, x, need):
    tiles, segments = tiles_of(memory, x)
    segments = tl.where(is_asked_by_rows(need), segments, 1)
    conclude(memory, work, x, views_of(memory, x, tiles, segments), segments, need, True)


@triton.jit
def share_nothing(memory, work, x):
    """The shares of a parameter that has no elements here: rows, if it has any, of no tiles."""
    need = tl.load(part(work, x, NEED, tl.uint8)).to(tl.int32)
    if need != 0:
        _, segments = tiles_of(memory, x)
        conclude(memory, work, x, tl.load(memory[TABLE] + x * COLUMNS + ROWS), segments, need, True)


@triton.jit
def four_sums(a, b, c, d, AXIS: tl.constexpr):
    """Each one's sums along an axis, by one reduction: its barriers are most of what a reduction costs."""
    ab, cd = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=AXIS))
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def four_totals(a, b, c, d):
    """Each one's sum of all elements."""
    a, b, c, d = four_sums(a, b, c, d, 0)
    return a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)


@triton.jit
def least_and_largest(a, b):
    """The least of a and the largest of b, by one reduction."""
    a, b = tl.split(tl.max(tl.join(-a, b), axis=0))
    return -a.to(tl.float64), b.to(tl.float64)


@triton.jit
def sum_rows(memory, work, epoch, tile, need, S: tl.constexpr, SHARE: tl.constexpr):
    """Per row p.g, g.g, p.p and what the test makes of them; the sums of the tile. With SHARE p.u too, if needed."""
    where = locate(memory[TABLE], work[OWNERS], tile)
    x = where[0]
    rows_here = where[3]
    cols_here = where[4]
    entry = memory[TABLE] + x * COLUMNS
    group = tl.load(entry + GROUP)
    delta = scalar(work, group, DELTA)
    eps = scalar(work, group, EPS)
    lowest = tl.full((), float("inf"), tl.float64)
    limit = tl.full((), 0.0, tl.float64)
    largest = limit
    pg = limit
    gg = limit
    pp = limit
    pu = limit
    if cols_here > S.tile:  # one row, in several blocks
        pgs = tl.zeros((S.tile,), S.number)
        ggs = pgs
        pps = pgs
        pus = pgs
        for start in range(0, cols_here, S.tile):
            e, mask = elements(where, start, S)
            p = load_weight(memory, where, e, mask, S)
            g = measured_gradient(memory, work, where, e, mask, S, SHARE)
            if SHARE:
                pus += products(memory, work, where, e, mask, p, g, need, S)
            pgs = tl.fma(p, g, pgs)
            ggs = tl.fma(g, g, ggs)
            pps = tl.fma(p, p, pps)
        pg, gg, pp, pu = four_totals(pgs, ggs, pps, pus)
        lowest = tl.minimum(gg, pp)
        limit, largest = compare(pg, gg, pp, delta, eps, cols_here)
        if SHARE:
            share_rows(memory, work, x, where[1], cols_here == tl.load(entry + COLS), need, pg, gg, pp, pu)
    for log_cols in tl.static_range(NARROWEST, S.log_tile + WIDTH_STEP, WIDTH_STEP):
        if (cols_here <= S.tile) & fits(cols_here, log_cols):
            e, mask = rows_of_block(where, min(ONE << log_cols, S.tile), S)
            p = load_weight(memory, where, e, mask, S)
            g = measured_gradient(memory, work, where, e, mask, S, SHARE)
            row = tl.arange(0, S.tile // min(ONE << log_cols, S.tile))
            live = row < rows_here
            pus = tl.zeros_like(p)
            if SHARE:
                pus = products(memory, work, where, e, mask, p, g, need, S)
            pgs, ggs, pps, pus = four_sums(p * g, g * g, p * p, pus, 1)
            if least_square(eps) >= 0:
                lowest = tl.min(tl.where(live, tl.minimum(ggs, pps), float("inf"))).to(tl.float64)
            limits, cosines = compare(pgs, ggs, pps, delta, eps, cols_here)
            limit, largest = least_and_largest(tl.where(live, limits, float("inf")), tl.where(live, cosines, 0.0))
            pg, gg, pp, pu = four_totals(pgs, ggs, pps, pus)
            if SHARE:
                live &= cols_here == tl.load(entry + COLS)
                share_rows(memory, work, x, where[1] + row, live, need, pgs, ggs, pps, pus)
    sums = work[TILE_SUMS] + tile * SUMS
    tl.store(sums + LIMIT, limit)
    tl.store(sums + LARGEST, largest)
    tl.store(sums + PG, pg)
    tl.store(sums + GG, gg)
    tl.store(sums + PP, pp)
    if SHARE:
        tl.store(sums + PU, pu)
    mark(work, epoch, x, left_float32(pp + gg + tl.abs(pg) + tl.abs(pu), lowest, least_square(eps), S), MEASURE_LEFT, S)


@triton.jit
def measured_gradient(memory, work, where, e, mask, S: tl.constexpr, SHARE: tl.constexpr):
    g = load_gradient(memory, where, e, mask, S)
    if SHARE:
        g *= tl.load(work[SCALE]).to(S.number)
    return g


@triton.jit
def products(memory, work, where, e, mask, p, g, need, S: tl.constexpr):
    """The products p u of all elements, if p.u is needed; else 0."""
    pu = tl.zeros(e.shape, S.number)
    if (need & DOT) != 0:
        sign = scalar(work, tl.load(memory[TABLE] + where[0] * COLUMNS + GROUP), SIGN).to(S.number)
        _, _, u = momentum_of(memory, work, where, e, mask, sign * g, S)
        pu = p * u
    return pu


@triton.jit
def share_rows(memory, work, x, row, live, need, pg, gg, pp, pu):
    """Tells the ranks the sums of a row or of a block of rows, if others have the rest. The norm is of no row."""
    live &= tl.load(memory[TABLE] + x * COLUMNS + SHARING) == SPLIT
    sums = part(work, x, ROW_SHARES, tl.float64) + row * (SUMS - PG) - PG
    share_sums(sums, live, need & (TEST | DOT), pg, gg, pp, pu)


@triton.jit
def share_sums(sums, live, need, pg, gg, pp, pu):
    tl.store(sums + PG, pg.to(tl.float64), live & ((need & TEST) != 0))
    tl.store(sums + GG, gg.to(tl.float64), live & ((need & (TEST | SQUARE)) != 0))
    tl.store(sums + PP, pp.to(tl.float64), live & ((need & (TEST | DOT)) != 0))
    tl.store(sums + PU, pu.to(tl.float64), live & ((need & DOT) != 0))


@triton.jit
def conclude(memory, work, x, views, segments, need, SHARE: tl.constexpr):
    """The sums of all of a parameter's tiles, added in their order: its findings, or what its ranks are told.

    A view is a tile of whole rows, or a row of several tiles (segments).
    """
    entry = memory[TABLE] + x * COLUMNS
    rows = tl.load(entry + ROWS)
    cols = tl.load(entry + COLS)
    group = tl.load(entry + GROUP)
    delta = scalar(work, group, DELTA)
    eps = scalar(work, group, EPS)
    first = work[TILE_SUMS] + tl.load(entry + FIRST_TILE) * SUMS
    limit = tl.full((CONCLUDE_BLOCK,), float("inf"), tl.float64)
    largest = tl.zeros((CONCLUDE_BLOCK,), tl.float64)
    pg = largest
    gg = largest
    pp = largest
    pu = largest
    for start in range(0, views, CONCLUDE_BLOCK):
        view = start + tl.arange(0, CONCLUDE_BLOCK)
        live = view < views
        view_limit = limit
        view_largest = largest
        view_pg = tl.zeros((CONCLUDE_BLOCK,), tl.float64)
        view_gg = view_pg
        view_pp = view_pg
        view_pu = view_pg
        for segment in range(segments):
            sums = first + (view * segments + segment) * SUMS
            view_limit = tl.load(sums + LIMIT, live, other=float("inf"), cache_modifier=".cg")
            view_largest = tl.load(sums + LARGEST, live, other=0.0, cache_modifier=".cg")
            view_pg += tl.load(sums + PG, live, other=0.0, cache_modifier=".cg")
            view_gg += tl.load(sums + GG, live, other=0.0, cache_modifier=".cg")
            view_pp += tl.load(sums + PP, live, other=0.0, cache_modifier=".cg")
            if SHARE:
                view_pu += tl.load(sums + PU, live, other=0.0, cache_modifier=".cg")
        if segments > 1:
            row_limit, row_cosine = compare(view_pg, view_gg, view_pp, delta, eps, cols)
            view_limit = tl.where(live, row_limit, float("inf"))
            view_largest = tl.where(live, row_cosine, 0.0)
        if SHARE:
            share_rows(memory, work, x, view, live & (segments != 1), need, view_pg, view_gg, view_pp, view_pu)
        limit = tl.minimum(limit, view_limit)
        largest = tl.maximum(largest, view_largest)
        pg += view_pg
        gg += view_gg
        pp += view_pp
        pu += view_pu
    if SHARE:
        shares = part(work, x, SHARES, tl.float64)
        tl.store(shares + LIMIT, tl.min(limit), (need & TEST) != 0)
        tl.store(shares + LARGEST, tl.max(largest), (need & TEST) != 0)
        share_sums(shares, True, need, tl.sum(pg), tl.sum(gg), tl.sum(pp), tl.sum(pu))
    else:
        norm2 = tl.sum(pp)
        layer_limit, _ = compare(tl.sum(pg), tl.sum(gg), norm2, delta, eps, rows * cols)
        findings = work[FOUND] + x * FINDINGS
        tl.store(findings + CHANNEL_LIMIT, tl.min(limit))
        tl.store(findings + LAYER_LIMIT, layer_limit)
        tl.store(findings + FOUND_COSINE, tl.max(largest))
        tl.store(findings + FOUND_NORM, tl.sqrt(norm2))


@triton.jit
def square(memory, work, epoch, first, n, S: tl.constexpr, SHARE: tl.constexpr):
    """g.g of each of n tiles. Reads g: 4 bytes per float32 element."""
    for tile in tl.range(first, first + n, disable_licm=True):
        square_of_tile(memory, work, epoch, tile, S, SHARE)


@triton.jit
def square_of_tile(memory, work, epoch, tile, S: tl.constexpr, SHARE: tl.constexpr):
    where = locate(memory[TABLE], work[OWNERS], tile)
    n = where[3] * where[4]
    ggs = tl.zeros((S.tile,), S.number)
    for start in range(0, n, S.tile):
        e, mask = elements(where, start, S)
        g = measured_gradient(memory, work, where, e, mask, S, SHARE)
        ggs = tl.fma(g, g, ggs)
    gg = tl.sum(ggs).to(tl.float64)
    if S.layout == ALIGNED:
        # The end of a vector: see update.
        whole = whole_vectors(n)
        if whole < n:
            e = whole + tl.arange(0, VECTOR)
            g = measured_gradient(memory, work, where, e, e < n, S, SHARE)
            gg += tl.sum(g * g).to(tl.float64)
    tl.store(work[TILE_SUMS] + tile * SUMS + GG, gg)
    # A norm that is too small for float32's squares scales nothing: clipping adds 1e-6 to it.
    mark(work, epoch, where[0], left_float32(gg, gg, -1.0, S), MEASURE_LEFT, S)


@triton.jit
def dot_of_tile(memory, work, where, S: tl.constexpr):
    """p.u and p.p."""
    pu = tl.zeros((S.tile,), S.number)
    pp = pu
    for start in range(0, where[3] * where[4], S.tile):
        e, mask = elements(where, start, S)
        p, _, _, u = momentum_update(memory, work, where, e, mask, S)
        pu = tl.fma(p, u, pu)
        pp = tl.fma(p, p, pp)
    return tl.sum(pu).to(tl.float64), tl.sum(pp).to(tl.float64)


@triton.jit
def dot(memory, work, epoch, first, n, S: tl.constexpr, WAIT: tl.constexpr):
    """p.u and p.p of n tiles, if the decided view is wider. Reads p g m v: 16 bytes per float32 element."""
    x = tl.load(work[OWNERS] + first).to(tl.int64)
    counters = work[COUNTS] + x * COUNTERS
    decision = decide(memory, work, epoch, x, S, WAIT)
    if (decision != NONE) & (is_marked(work, epoch, x, MEASURE_LEFT, S) == 0):
        tiles, segments = tiles_of(memory, x)
        if is_wide(decision, tiles, segments) & (is_given(memory, x, decision, S) == 0):
            dot_tiles(memory, work, epoch, first, n, S)
            if count(counters + DOTTED, epoch, n) == tiles:
                conclude_dot(memory, work, x, tiles, decision)
                announce(counters + PROJECTION_KNOWN, epoch)


@triton.jit
def dot_tiles(memory, work, epoch, first, n, S: tl.constexpr):
    for tile in tl.range(first, first + n, disable_licm=True):
        where = locate(memory[TABLE], work[OWNERS], tile)
        pu, pp = dot_of_tile(memory, work, where, S)
        sums = work[TILE_SUMS] + tile * SUMS
        tl.store(sums + PU, pu)
        tl.store(sums + PP, pp)
        left = left_float32(pp + tl.abs(pu), pp, least_square(eps_of(memory, work, where[0])), S)
        mark(work, epoch, where[0], left, DOT_LEFT, S)


@triton.jit
def conclude_dot(memory, work, x, tiles, decision):
    if decision == LAYER:
        c = view_projection(memory, work, x, 0, tiles)
        tl.store(work[FOUND] + x * FINDINGS + LAYER_PROJECTION, c)


@triton.jit
def view_projection(memory, work, x, begin, n):
    """The projection c of a view that n tiles share, of which the first is the parameter's tile `begin`."""
    entry = memory[TABLE] + x * COLUMNS
    first = work[TILE_SUMS] + (tl.load(entry + FIRST_TILE) + begin) * SUMS
    pu = tl.zeros((CONCLUDE_BLOCK,), tl.float64)
    pp = pu
    for start in range(0, n, CONCLUDE_BLOCK):
        i = start + tl.arange(0, CONCLUDE_BLOCK)
        pu += tl.load(first + i * SUMS + PU, i < n, other=0.0, cache_modifier=".cg")
        pp += tl.load(first + i * SUMS + PP, i < n, other=0.0, cache_modifier=".cg")
    return projection(tl.sum(pu), tl.sum(pp), eps_of(memory, work, x))


@triton.jit
def report(memory, work, x, decision, S: tl.constexpr):
    """Shows the user what was decided on the parameter, and on what grounds."""
    cosine = tl.full((), float("nan"), tl.float64)
    norm = cosine
    here = True
    if S.shared:  # else all ranks know the grounds, and not this one alone
        here = tl.load(memory[TABLE] + x * COLUMNS + SHARING) == LOCAL
    if is_tested(memory, work, x, S):
        findings = work[FOUND] + x * FINDINGS
        cosine = tl.load(findings + FOUND_COSINE, cache_modifier=".cg")
        norm = tl.load(findings + FOUND_NORM, cache_modifier=".cg")
    tl.store(work[DECISIONS] + x, decision.to(tl.uint8))
    tl.store(work[OUTCOMES] + x * RESULTS + COSINE, cosine, here)
    tl.store(work[OUTCOMES] + x * RESULTS + NORM, norm, here)


@triton.jit
def update(memory, work, epoch, first, n, S: tl.constexpr, WAIT: tl.constexpr):
    """The step of n tiles. Reads p g m v, writes p m v: 28 bytes per float32 element."""
    x = tl.load(work[OWNERS] + first).to(tl.int64)
    decision = decide(memory, work, epoch, x, S, WAIT)
    left = is_marked(work, epoch, x, MEASURE_LEFT, S)
    if (decision != NONE) & (left == 0):
        tiles, segments = tiles_of(memory, x)
        if is_wide(decision, tiles, segments) & (is_given(memory, x, decision, S) == 0):
            if WAIT:
                wait(work[COUNTS] + x * COUNTERS + PROJECTION_KNOWN, epoch)
            left = is_marked(work, epoch, x, DOT_LEFT, S)
    if left == 0:
        for tile in tl.range(first, first + n, disable_licm=True):
            update_tile(memory, work, epoch, tile, decision, S)


@triton.jit
def update_tile(memory, work, epoch, tile, decision, S: tl.constexpr):
    """Moves the tile; or marks it, if the squares of a view within it have left float32."""
    where = locate(memory[TABLE], work[OWNERS], tile)
    x = where[0]
    given = is_given(memory, x, decision, S)
    rows_here = where[3]
    cols_here = where[4]
    entry = memory[TABLE] + x * COLUMNS
    eps = eps_of(memory, work, x)
    c = tl.full((), 0.0, tl.float64)
    by_rows = decision != decision
    left = by_rows
    if (decision != NONE) | given:
        tiles, segments = tiles_of(memory, x)
        by_rows = ((decision == CHANNEL) | given) & (cols_here <= S.tile) & (segments == 1)
        if given:
            c = given_projection(work, x, where[1], True)
        elif is_wide(decision, tiles, segments):
            if decision == LAYER:
                c = tl.load(work[FOUND] + x * FINDINGS + LAYER_PROJECTION, cache_modifier=".cg")
            else:
                begin = where[1] * segments
                c = view_projection(memory, work, x, begin, segments)
        elif by_rows == 0:  # the tile is the view: a parameter of one tile, or one wide row
            pu, pp = dot_of_tile(memory, work, where, S)
            left = left_float32(pp + tl.abs(pu), pp, least_square(eps), S)
            c = projection(pu, pp, eps)
    if by_rows:
        for log_cols in tl.static_range(NARROWEST, S.log_tile + WIDTH_STEP, WIDTH_STEP):
            if fits(cols_here, log_cols):
                e, mask = rows_of_block(where, min(ONE << log_cols, S.tile), S)
                p, m, v, u = momentum_update(memory, work, where, e, mask, S)
                pu = tl.sum(p * u, axis=1)
                pp = tl.sum(p * p, axis=1)
                row = tl.arange(0, S.tile // min(ONE << log_cols, S.tile))
                if S.number == tl.float32:
                    least = least_square(eps).to(S.number)
                    rows_left = left_float32(pp + tl.abs(pu), pp, least, S) & (row < rows_here) & (given == 0)
                    left = tl.max(rows_left.to(tl.int32)) != 0
                # A row outside the tile divides 0 by eps^2, or by 0: what it holds is masked.
                row_c = projection(pu, pp, eps.to(S.number))
                if given:
                    row_c = given_projection(work, x, where[1] + row, row < rows_here).to(S.number)
                if left == 0:
                    store(memory, work, where, e, mask, p, m, v, u, row_c[:, None], decision, S)
    else:
        n = tl.where(left, 0, rows_here * cols_here)
        for start in range(0, n, S.tile):
            e, mask = elements(where, start, S)
            p, m, v, u = momentum_update(memory, work, where, e, mask, S)
            store(memory, work, where, e, mask, p, m, v, u, c.to(S.number), decision, S)
        if S.layout == ALIGNED:
            # The end of a vector whose length is no multiple of a thread's widest load.
            whole = whole_vectors(n)
            if whole < n:
                e = whole + tl.arange(0, VECTOR)
                p, m, v, u = momentum_update(memory, work, where, e, e < n, S)
                store(memory, work, where, e, e < n, p, m, v, u, c.to(S.number), decision, S)
    if S.number == tl.float32:
        mark(work, epoch, x, left, TILES_LEFT, S)
        tl.store(work[TILE_SUMS] + tile * SUMS + LIMIT, -epoch.to(tl.float64), left)
    if tile == tl.load(entry + FIRST_TILE):
        report(memory, work, x, decision, S)


@triton.jit
def redo(memory, work, epoch, x, S: tl.constexpr):
    """The step of a parameter, or of its tiles, that this epoch's stages have left. S.number is float64.

    One program does it all, one stage after the other: this is slow, and rare.
    """
    counters = work[COUNTS] + x * COUNTERS
    measure_left = tl.load(counters + MEASURE_LEFT) == epoch
    whole = measure_left | (tl.load(counters + DOT_LEFT) == epoch)
    if whole | (tl.load(counters + TILES_LEFT) == epoch):
        first = tl.load(memory[TABLE] + x * COLUMNS + FIRST_TILE).to(tl.int32)
        tiles, segments = tiles_of(memory, x)
        n = tiles.to(tl.int32)
        if measure_left:
            for tile in tl.range(first, first + n, disable_licm=True):
                sum_rows(memory, work, epoch, tile, 0, S, False)
            tl.debug_barrier()
            conclude(memory, work, x, views_of(memory, x, tiles, segments), segments, 0, False)
            tl.debug_barrier()
        decision = decide(memory, work, epoch, x, S, False)
        if whole & is_wide(decision, tiles, segments) & (is_given(memory, x, decision, S) == 0):
            dot_tiles(memory, work, epoch, first, n, S)
            tl.debug_barrier()
            conclude_dot(memory, work, x, tiles, decision)
            tl.debug_barrier()
        for tile in tl.range(first, first + n, disable_licm=True):
            if whole | (tl.load(work[TILE_SUMS] + tile * SUMS + LIMIT) == -epoch.to(tl.float64)):
                update_tile(memory, work, epoch, tile, decision, S)


@triton.jit
def redo_ahead(memory, work, epoch, x, S: tl.constexpr):
    """The shares of a parameter, or the squares for the norm, again if sums have left float32. See :func:`redo`."""
    if tl.load(work[COUNTS] + x * COUNTERS + MEASURE_LEFT) == epoch:
        first = tl.load(memory[TABLE] + x * COLUMNS + FIRST_TILE).to(tl.int32)
        n = tl.load(memory[TABLE] + x * COLUMNS + TILES).to(tl.int32)
        if S.shared:
            need = tl.load(part(work, x, NEED, tl.uint8)).to(tl.int32)
            share_tiles(memory, work, epoch, first, n, need, S)
            tl.debug_barrier()
            conclude_shares(memory, work, x, need)
        else:
            square(memory, work, epoch, first, n, S, False)
