"""The columns of every table that the kernels read or write, and the values of decisions, layouts and the like.

They are numbered as in :mod:`fused_adamp.batch` and :mod:`fused_adamp.backends.tables`, which say what they mean.
"""

import triton.language as tl

from fused_adamp import batch
from fused_adamp.backends import jobs, tables
from fused_adamp.reference import Decision


def numbered(names):
    """Maps each name to its index, as a constexpr."""
    return {name: tl.constexpr(place) for place, name in enumerate(names)}


# Choices.
NONE = tl.constexpr(int(Decision.NONE))
CHANNEL = tl.constexpr(int(Decision.CHANNEL))
LAYER = tl.constexpr(int(Decision.LAYER))

LOCAL = tl.constexpr(int(batch.Sharing.LOCAL))
SHARED = tl.constexpr(int(batch.Sharing.SHARED))
SPLIT = tl.constexpr(int(batch.Sharing.SPLIT))

# Bits of a parameter's need.
TEST = tl.constexpr(int(batch.Need.TEST))
DOT = tl.constexpr(int(batch.Need.DOT))
SQUARE = tl.constexpr(int(batch.Need.SQUARE))

# The values of ``projection``. Those between these two are decisions.
AUTO = tl.constexpr(batch.PROJECTIONS.index("auto"))
NEVER = tl.constexpr(batch.PROJECTIONS.index("none"))

# How a parameter's tensors lie in memory.
_layout = numbered(tables.LAYOUTS)
ALIGNED = _layout["aligned"]
FLAT = _layout["flat"]
STRIDED = _layout["strided"]

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

# A parameter's row of the table. The backend adds its tiles and those of one of its rows, so that no kernel divides
# numbers of 64 bits.
_column = numbered((*batch.COLUMNS, "tiles", "segments"))
GROUP = _column["group"]
PROJECTED = _column["projected"]
ROWS = _column["rows"]
COLS = _column["cols"]
TILE_ROWS = _column["tile_rows"]
TILE_COLS = _column["tile_cols"]
FIRST_TILE = _column["first_tile"]
SHARING = _column["sharing"]
FIRST_ROW = _column["first_row"]
FIRST_NUMBER = _column["first_number"]
ROW_NUMBERS = _column["row_numbers"]
TILES = _column["tiles"]
SEGMENTS = _column["segments"]
COLUMNS = tl.constexpr(len(_column))

# A parameter's row of the address table.
_address = numbered(tables.ADDRESSES)
P = _address["p"]
G = _address["g"]
M = _address["m"]
V = _address["v"]
R = _address["r"]
STEP = _address["step"]
SEED = _address["seed"]
ADDRESSES = tl.constexpr(len(_address))

# A parameter's row of the stride table: a size, then three strides for each of p, g, m, v and r.
STRIDES = tl.constexpr(tables.STRIDES)
assert tables.INNER == 2, "tiles.py reads two strides beyond that of dim 0"

# A parameter group's row of the hyperparameters.
_scalar = numbered(batch.Scalars._fields)
LR = _scalar["lr"]
MOMENTUM = _scalar["momentum"]
GAIN = _scalar["gain"]
NESTEROV_GAIN = _scalar["nesterov_gain"]
BETA2 = _scalar["beta2"]
GAIN2 = _scalar["gain2"]
EPS = _scalar["eps"]
DECAY = _scalar["decay"]
DELTA = _scalar["delta"]
WD_RATIO = _scalar["wd_ratio"]
SIGN = _scalar["sign"]
NESTEROV = _scalar["nesterov"]
PROJECT_BUFFER = _scalar["project_buffer"]
PROJECTION = _scalar["projection"]
SCALARS = tl.constexpr(len(_scalar))

# A parameter's row of the numbers that depend on the step count.
_coefficient = numbered(tables.COEFFICIENTS)
INVERSE_BIAS2 = _coefficient["inverse_bias2"]
STEP_SIZE = _coefficient["step_size"]
COEFFICIENTS = tl.constexpr(len(_coefficient))

# A tile's row of the sums, and a parameter's of the shares: the least limit and the largest cosine of its rows
# (cosine.py), and sums; those from PG on are also a row's shares. Update has no use for the limit: of a tile it leaves,
# it writes minus the epoch there, which no limit is.
_share = numbered(batch.SHARES)
LIMIT = _share["limit"]
LARGEST = _share["cosine"]
PG = _share["pg"]
GG = _share["gg"]
PP = _share["pp"]
PU = _share["pu"]
SUMS = tl.constexpr(len(_share))
assert batch.SHARES[PG.value :] == batch.ROW_SHARES, "a row's shares are a parameter's from pg on"

# A parameter's row of the findings.
_finding = numbered(tables.FINDINGS)
CHANNEL_LIMIT = _finding["channel_limit"]
LAYER_LIMIT = _finding["layer_limit"]
FOUND_COSINE = _finding["found_cosine"]
FOUND_NORM = _finding["found_norm"]
LAYER_PROJECTION = _finding["layer_projection"]
FINDINGS = tl.constexpr(len(_finding))

# A parameter's row of the results.
_result = numbered(batch.RESULTS)
COSINE = _result["cosine"]
NORM = _result["norm"]
RESULTS = tl.constexpr(len(_result))

# A parameter's row of the parts.
_part = numbered(tables.PARTS)
NEED = _part["need"]
SHARES = _part["shares"]
ROW_SHARES = _part["row_shares"]
VERDICT = _part["verdict"]
GIVEN = _part["given"]
GIVEN_STEP = _part["given_step"]
PLACES_OF_PARTS = tl.constexpr(len(_part))

# A parameter's row of the counters.
_counter = numbered(tables.COUNTERS)
MEASURED = _counter["measured"]
DOTTED = _counter["dotted"]
CONCLUDED = _counter["concluded"]
PROJECTION_KNOWN = _counter["projection_known"]
KEY = _counter["key"]
MEASURE_LEFT = _counter["measure_left"]
DOT_LEFT = _counter["dot_left"]
TILES_LEFT = _counter["tiles_left"]
COUNTERS = tl.constexpr(len(_counter))

# Sizes.
WIDEST_LOAD = tl.constexpr(tables.WIDEST_LOAD)
VECTOR = tl.constexpr(tables.VECTOR)
NARROWEST = tl.constexpr(6)  # log2 of the columns of the narrowest block of rows
WIDTH_STEP = tl.constexpr(2)  # and its step to the next
ONE = tl.constexpr(1)  # what is shifted is a constexpr too: so that it also works in the interpreter
CONCLUDE_BLOCK = tl.constexpr(256)
PREPARE_BLOCK = tl.constexpr(jobs.PREPARE_BLOCK)

# csrc/algorithm.h, least_square: below which eps^2 it matters, and the least sum that has lost nothing that matters.
TINY_EPS2 = tl.constexpr(2.0**-90)
LEAST_SQUARE = tl.constexpr(2.0**-100)
