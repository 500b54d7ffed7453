"""Small faults, planted one at a time in a copy of the kernels and of what lines them up; and which tests find them.

``tests/support/mutation.py`` runs them.
"""

from __future__ import annotations

import re

from mutation import Mutant, Tests, wrong

SEEDS = 8
"""Some faults show in a few interleavings alone."""


def under(plan: str, file: str, which: str = "") -> Tests:
    """Tests of the emulator, and the plan that they run under."""
    environment = ("FUSED_ADAMP_PLAN", plan), ("PTX_SEEDS", str(SEEDS)), ("FUSED_ADAMP_FULL_PRODUCTS", "1")
    return Tests(f"tests/ptx/{file}", which, environment)


ONE_PASS = under("one_pass", "emulated_steps.py", "(clipped_step and AdamP) or more_parameters or infinite_gradients")
SPLIT = under("split", "emulated_steps.py", "(clipped_step and AdamP) or more_parameters or infinite_gradients")
RANGE = under("split", "emulated_range.py")
RANGE_OF_ONE_PASS = under("one_pass", "emulated_range.py")
REPLAYS = under("split", "emulated_graphs.py")
REPLAYS_OF_ONE_PASS = under("one_pass", "emulated_graphs.py")
SHARES = under("split", "emulated_shares.py")
FLAT = under("one_pass", "emulated_table.py", "prime or 1111 or leave")
STRIDED = under("split", "emulated_table.py", "transposed")
CASES = under("split", "emulated_table.py", "AdamP and contiguous and not stochastic")
CASES_OF_SGDP = under("split", "emulated_table.py", "SGDP")
CHANCE = under("split", "emulated_precision.py")
REMAINDER = under("one_pass", "emulated_precision.py")
ZEROS = under("one_pass", "emulated_steps.py", "zeros or clamp or without_eps")
REPORT = under("split", "emulated_steps.py", "results")


NO_CACHES = "the emulator has no caches: what .cg promises, a GPU has to show"
BARRIER = "    tl.debug_barrier()\n"

ORDER = (
    Mutant(
        "count: no barrier",
        "kernels/order.py",
        BARRIER + "    tl.atomic_max",
        "    tl.atomic_max",
        (ONE_PASS, SPLIT),
        equivalent="Triton 3.6 puts a barrier of its own before an atomic operation whose result all threads get",
    ),
    Mutant("count: relaxed", "kernels/order.py", 'n, sem="acq_rel"', 'n, sem="relaxed"', (ONE_PASS, SPLIT)),
    Mutant("count: release alone", "kernels/order.py", 'n, sem="acq_rel"', 'n, sem="release"', (ONE_PASS, SPLIT)),
    Mutant("count: acquire alone", "kernels/order.py", 'n, sem="acq_rel"', 'n, sem="acquire"', (ONE_PASS, SPLIT)),
    Mutant(
        "announce: no barrier",
        "kernels/order.py",
        BARRIER + "    tl.atomic_xchg",
        "    tl.atomic_xchg",
        (ONE_PASS,),
        equivalent="all that is told are scalars, and the thread that announces has stored them itself",
    ),
    Mutant("announce: relaxed", "kernels/order.py", 'epoch, sem="release"', 'epoch, sem="relaxed"', (ONE_PASS,)),
    Mutant("wait: relaxed", "kernels/order.py", '0, sem="acquire"', '0, sem="relaxed"', (ONE_PASS,), times=2),
    Mutant("wait: for nothing", "kernels/order.py", "while seen != epoch:", "while seen < 0:", (ONE_PASS,)),
    Mutant("wait: for any later epoch", "kernels/order.py", "while seen != epoch:", "while seen == 0:", (ONE_PASS,)),
    Mutant(
        "decide: waits for no epoch",
        "kernels/decision.py",
        "CONCLUDED, epoch)\n        findings",
        "CONCLUDED, 0 * epoch)\n        findings",
        (ONE_PASS,),
    ),
    Mutant(
        "decide: no wait",
        "kernels/decision.py",
        "            wait(work[COUNTS] + x * COUNTERS + CONCLUDED, epoch)\n",
        "            pass\n",
        (ONE_PASS,),
    ),
    Mutant(
        "update: no wait for dot",
        "kernels/update.py",
        "                wait(work[COUNTS] + x * COUNTERS + PROJECTION_KNOWN, epoch)\n",
        "                pass\n",
        (ONE_PASS,),
    ),
    Mutant(
        "no wait for prepare", "kernels/plans.py", "                wait(tickets + PREPARED, now)\n", "", (ONE_PASS,)
    ),
    Mutant("prepare: announced by the first", "kernels/plans.py", "now, 1) == n_blocks", "now, 1) == 1", (ONE_PASS,)),
    Mutant(
        "measure: concluded by the first",
        "kernels/measure.py",
        "MEASURED, epoch, n) == tiles:\n        conclude(",
        "MEASURED, epoch, n) == n:\n        conclude(",
        (ONE_PASS, SPLIT),
    ),
    Mutant(
        "measure: never announced",
        "kernels/measure.py",
        "        announce(counters + CONCLUDED, epoch)\n",
        "",
        (ONE_PASS,),
    ),
    Mutant(
        "dot: concluded by the first",
        "kernels/dot.py",
        "DOTTED, epoch, n) == tiles",
        "DOTTED, epoch, n) == n",
        (ONE_PASS, SPLIT),
    ),
    Mutant(
        "dot: never announced",
        "kernels/dot.py",
        "                announce(counters + PROJECTION_KNOWN, epoch)\n",
        "",
        (ONE_PASS,),
    ),
    Mutant(
        "dot: announced as measured",
        "kernels/dot.py",
        "announce(counters + PROJECTION_KNOWN",
        "announce(counters + CONCLUDED",
        (ONE_PASS,),
    ),
    Mutant(
        "share: concluded by the first",
        "kernels/share.py",
        "MEASURED, epoch, n) == tiles:\n            conclude_shares",
        "MEASURED, epoch, n) == n:\n            conclude_shares",
        (SHARES,),
    ),
    Mutant(
        "jobs: dot after update",
        "fused_adamp/backends/jobs.py",
        "*map(order.dot, now), *map(order.update, reversed(now))",
        "*map(order.update, reversed(now)), *map(order.dot, now)",
        (ONE_PASS,),
    ),
    Mutant(
        "jobs: measured after dot",
        "fused_adamp/backends/jobs.py",
        "[*map(order.measure, ahead), *map(order.dot, now)",
        "[*map(order.dot, ahead), *map(order.measure, ahead)",
        (ONE_PASS,),
    ),
    Mutant(
        "jobs: prepared last",
        "fused_adamp/backends/jobs.py",
        "    return [torch.cat(pieces)]",
        "    return [torch.cat([*pieces[1:], pieces[0]])]",
        (ONE_PASS,),
    ),
    Mutant(
        "jobs: one is left out",
        "fused_adamp/backends/jobs.py",
        "tile = torch.arange(begin, end, width",
        "tile = torch.arange(begin, max(end - width, begin + 1), width",
        (SPLIT,),
    ),
    Mutant(
        "loads past the first-level cache: findings",
        "kernels/decision.py",
        'CHANNEL_LIMIT, cache_modifier=".cg"',
        "CHANNEL_LIMIT",
        (ONE_PASS,),
        equivalent=NO_CACHES,
    ),
    Mutant(
        "loads past the first-level cache: sums",
        "kernels/sums.py",
        '+ PG, live, other=0.0, cache_modifier=".cg"',
        "+ PG, live, other=0.0",
        (ONE_PASS,),
        equivalent=NO_CACHES,
    ),
)

EPOCHS = (
    Mutant(
        "draw: counts on",
        "kernels/order.py",
        '    tl.atomic_max(counter, epoch << 32, sem="relaxed")\n    return tl.atomic_add(counter, 1',
        "    return tl.atomic_add(counter, 1",
        (ONE_PASS,),
    ),
    Mutant(
        "count: counts on",
        "kernels/order.py",
        '    tl.atomic_max(counter, epoch << 32, sem="relaxed")\n    return (tl',
        "    return (tl",
        (ONE_PASS, SPLIT),
    ),
    Mutant(
        "draw: by no epoch",
        "kernels/order.py",
        'atomic_add(counter, 1, sem="relaxed") & 0xFFFFFFFF',
        'atomic_add(counter, 1, sem="relaxed")',
        (ONE_PASS,),
    ),
    Mutant(
        "measure: the host's epoch",
        "kernels/plans.py",
        "measure(memory, work, epoch + tl.load(replays)",
        "measure(memory, work, epoch + 0 * tl.load(replays)",
        (REPLAYS,),
    ),
    Mutant(
        "square: the host's epoch",
        "kernels/plans.py",
        "square(memory, work, epoch + tl.load(replays)",
        "square(memory, work, epoch + 0 * tl.load(replays)",
        (REPLAYS,),
    ),
    Mutant(
        "dot: the host's epoch",
        "kernels/plans.py",
        "dot(memory, work, epoch + tl.load(replays)",
        "dot(memory, work, epoch + 0 * tl.load(replays)",
        (REPLAYS,),
    ),
    Mutant(
        "update: the host's epoch",
        "kernels/plans.py",
        "update(memory, work, epoch + tl.load(replays)",
        "update(memory, work, epoch + 0 * tl.load(replays)",
        (REPLAYS,),
    ),
    Mutant(
        "one pass: the host's epoch",
        "kernels/plans.py",
        "now = epoch + tl.load(replays)",
        "now = epoch + 0 * tl.load(replays)",
        (REPLAYS_OF_ONE_PASS,),
    ),
    Mutant(
        "share: the host's epoch",
        "kernels/plans.py",
        "share(memory, work, epoch + tl.load(replays)",
        "share(memory, work, epoch + 0 * tl.load(replays)",
        (REPLAYS,),
    ),
    Mutant(
        "redo: the host's epoch",
        "kernels/plans.py",
        "redo(memory, work, epoch + tl.load(replays)",
        "redo(memory, work, epoch + 0 * tl.load(replays)",
        (REPLAYS,),
    ),
    Mutant(
        "redo ahead: the host's epoch",
        "kernels/plans.py",
        "redo_ahead(memory, work, epoch + tl.load(replays)",
        "redo_ahead(memory, work, epoch + 0 * tl.load(replays)",
        (REPLAYS,),
    ),
    Mutant(
        "redo: of any epoch",
        "kernels/redo.py",
        "measure_left = tl.load(counters + MEASURE_LEFT) == epoch",
        "measure_left = tl.load(counters + MEASURE_LEFT) != 0",
        (RANGE,),
    ),
    Mutant(
        "redo: tiles of any epoch",
        "kernels/redo.py",
        "whole | (tl.load(work[TILE_SUMS] + tile * SUMS + LIMIT) == -epoch.to(tl.float64))",
        "True",
        (RANGE,),
    ),
)

REDO = (
    Mutant(
        "redo: no barrier before conclude",
        "kernels/redo.py",
        BARRIER.replace("    ", " " * 12) + " " * 12 + "conclude(memory",
        " " * 12 + "conclude(memory",
        (RANGE,),
    ),
    Mutant(
        "redo: no barrier before decide",
        "kernels/redo.py",
        "segments, 0, False)\n            tl.debug_barrier()\n",
        "segments, 0, False)\n",
        (RANGE,),
        equivalent="conclude stores the limits before its last reduction, whose barriers order them",
    ),
    Mutant(
        "redo: no barrier before conclude_dot",
        "kernels/redo.py",
        " " * 12 + "tl.debug_barrier()\n" + " " * 12 + "conclude_dot",
        " " * 12 + "conclude_dot",
        (RANGE,),
    ),
    Mutant(
        "redo: no barrier before update",
        "kernels/redo.py",
        "conclude_dot(memory, work, x, tiles, decision)\n            tl.debug_barrier()\n",
        "conclude_dot(memory, work, x, tiles, decision)\n",
        (RANGE,),
    ),
    Mutant(
        "redo ahead: no barrier",
        "kernels/redo.py",
        " " * 12 + "tl.debug_barrier()\n" + " " * 12 + "conclude_shares",
        " " * 12 + "conclude_shares",
        (SHARES,),
    ),
    Mutant(
        "measure: no mark",
        "kernels/sums.py",
        "least_square(eps), S), MEASURE_LEFT, S)",
        "least_square(eps), S) & (tile < 0), MEASURE_LEFT, S)",
        (RANGE,),
    ),
    Mutant(
        "square: no mark",
        "kernels/sums.py",
        "left_float32(gg, gg, -1.0, S), MEASURE_LEFT",
        "left_float32(gg, gg, -1.0, S) & (tile < 0), MEASURE_LEFT",
        (RANGE,),
    ),
    Mutant(
        "dot: no mark",
        "kernels/dot.py",
        "mark(work, epoch, where[0], left, DOT_LEFT, S)",
        "mark(work, epoch, where[0], left & (tile < 0), DOT_LEFT, S)",
        (RANGE,),
    ),
    Mutant(
        "update: no mark",
        "kernels/update.py",
        "mark(work, epoch, x, left, TILES_LEFT, S)",
        "mark(work, epoch, x, left & (tile < 0), TILES_LEFT, S)",
        (RANGE,),
    ),
    Mutant(
        "update: no mark of the tile",
        "kernels/update.py",
        "LIMIT, -epoch.to(tl.float64), left)",
        "LIMIT, -epoch.to(tl.float64), left & (tile < 0))",
        (RANGE,),
    ),
    Mutant(
        "update: steps what measure has left",
        "kernels/update.py",
        "left = is_marked(work, epoch, x, MEASURE_LEFT, S)",
        "left = is_marked(work, epoch, x, MEASURE_LEFT, S) & (first < 0)",
        (RANGE,),
    ),
    Mutant(
        "update: steps what dot has left",
        "kernels/update.py",
        "left = is_marked(work, epoch, x, DOT_LEFT, S)",
        "left = is_marked(work, epoch, x, DOT_LEFT, S) & (first < 0)",
        (RANGE,),
    ),
    Mutant(
        "update: steps rows it leaves",
        "kernels/update.py",
        "                if left == 0:\n                    store(",
        "                if True:\n                    store(",
        (RANGE,),
    ),
    Mutant(
        "update: steps the tile it leaves",
        "kernels/update.py",
        "n = tl.where(left, 0, rows_here * cols_here)",
        "n = rows_here * cols_here",
        (RANGE,),
    ),
    Mutant(
        "dot: of what measure has left",
        "kernels/dot.py",
        "(decision != NONE) & (is_marked(work, epoch, x, MEASURE_LEFT, S) == 0)",
        "(decision != NONE)",
        (RANGE,),
        equivalent="dot's sums are not used then: redo makes them anew",
    ),
    Mutant("small sums are lost", "kernels/marks.py", "(lowest > least)", "(lowest > -1)", (RANGE, RANGE_OF_ONE_PASS)),
    Mutant("large sums are lost", "kernels/marks.py", '(sizes < float("inf"))', "(sizes > -1)", (RANGE,)),
)

BOUNDS = (
    Mutant(
        "a row too many",
        "kernels/tiles.py",
        "rows_here = tl.minimum(tile_rows, tl.load(entry + ROWS) - row)",
        "rows_here = tl.minimum(tile_rows, tl.load(entry + ROWS) - row + 1)",
        (SPLIT,),
    ),
    Mutant(
        "a row too few",
        "kernels/tiles.py",
        "rows_here = tl.minimum(tile_rows, tl.load(entry + ROWS) - row)",
        "rows_here = tl.minimum(tile_rows - 1, tl.load(entry + ROWS) - row)",
        (SPLIT,),
    ),
    Mutant(
        "columns of a whole tile",
        "kernels/tiles.py",
        "cols_here = tl.minimum(tile_cols, tl.load(entry + COLS) - col)",
        "cols_here = tl.maximum(tile_cols, tl.load(entry + COLS) - col)",
        (SPLIT,),
    ),
    Mutant(
        "tiles in the wrong row",
        "kernels/tiles.py",
        "col = (index - view * segments) * tile_cols",
        "col = (index - view * segments + 0 * view) * tile_rows",
        (SPLIT,),
    ),
    Mutant("mask: an element too many", "kernels/elements.py", "return e, e < whole", "return e, e <= whole", (SPLIT,)),
    Mutant("mask: of no row", "kernels/elements.py", "(r < rows_here) & (c < cols_here)", "(c < cols_here)", (SPLIT,)),
    Mutant(
        "mask: of no column", "kernels/elements.py", "(r < rows_here) & (c < cols_here)", "(r < rows_here)", (SPLIT,)
    ),
    Mutant(
        "mask: rows that are not there are tested",
        "kernels/sums.py",
        'least_and_largest(tl.where(live, limits, float("inf")),',
        "least_and_largest(limits,",
        (RANGE,),
    ),
    Mutant(
        "mask: rows that are not there have a cosine",
        "kernels/sums.py",
        'float("inf")), tl.where(live, cosines, 0.0))',
        'float("inf")), cosines)',
        (REPORT,),
    ),
    Mutant("mask: a view too many", "kernels/sums.py", "live = view < views", "live = view <= views", (SPLIT,)),
    Mutant(
        "mask: a tile of a view too many",
        "kernels/dot.py",
        "i < n, other=0.0, cache_modifier",
        "i <= n, other=0.0, cache_modifier",
        (SPLIT,),
        times=2,
    ),
    Mutant("mask: a parameter too many", "kernels/prepare.py", "    live = i < n\n", "    live = i <= n\n", (SPLIT,)),
    Mutant(
        "mask: v is 0 outside",
        "kernels/elements.py",
        "mask, other=1.0)",
        "mask, other=0.0)",
        (ZEROS,),
    ),
    Mutant(
        "the end of a vector is left",
        "kernels/update.py",
        "            if whole < n:\n                e = whole + tl.arange(0, VECTOR)\n                p, m",
        "            if whole < 0:\n                e = whole + tl.arange(0, VECTOR)\n                p, m",
        (SPLIT,),
    ),
    Mutant(
        "the end of a vector is not in the norm",
        "kernels/sums.py",
        "        if whole < n:\n            e = whole",
        "        if whole < 0:\n            e = whole",
        (SPLIT,),
    ),
    Mutant(
        "blocks too narrow",
        "kernels/elements.py",
        "return (cols <= (ONE << LOG_COLS)) &",
        "return (cols <= (ONE << LOG_COLS) + 8) &",
        (SPLIT,),
    ),
    Mutant(
        "blocks for no row of 64",
        "kernels/elements.py",
        "return (cols <= (ONE << LOG_COLS)) &",
        "return (cols < (ONE << LOG_COLS)) &",
        (CASES,),
    ),
    Mutant(
        "false alignment",
        "fused_adamp/backends/tables.py",
        "aligned = at_vectors and (p.ndim < 2 or cols % VECTOR == 0)",
        "aligned = at_vectors",
        (FLAT,),
    ),
    Mutant(
        "strides: outer for inner",
        "kernels/tiles.py",
        "inner * tl.load(stride + 2)",
        "inner * tl.load(stride + 1)",
        (STRIDED,),
    ),
    Mutant(
        "strides: rows of the tile alone",
        "kernels/tiles.py",
        "(row + r) * tl.load(stride)",
        "r * tl.load(stride)",
        (STRIDED,),
    ),
    Mutant(
        "found_inf: update moves",
        "kernels/plans.py",
        "    if tl.load(found_inf) == 0:\n        job = jobs + tl.program_id(0) * 3\n        update",
        "    if True:\n        job = jobs + tl.program_id(0) * 3\n        update",
        (SPLIT,),
    ),
    Mutant(
        "found_inf: one pass moves",
        "kernels/plans.py",
        "    if tl.load(found_inf) == 0:\n        now",
        "    if True:\n        now",
        (ONE_PASS,),
    ),
    Mutant(
        "found_inf: dot is not stopped",
        "kernels/plans.py",
        "    if tl.load(found_inf) == 0:\n        job = jobs + tl.program_id(0) * 3\n        dot",
        "    if True:\n        job = jobs + tl.program_id(0) * 3\n        dot",
        (SPLIT,),
        equivalent="it writes scratch alone",
    ),
    Mutant(
        "every tile reports",
        "kernels/update.py",
        "    if tile == tl.load(entry + FIRST_TILE):\n",
        "    if tile >= 0:\n",
        (SPLIT,),
        equivalent="all tiles report the same: a race of equal values",
    ),
)

NUMBERS = (
    Mutant(
        "the test: no clamp of |g|",
        "kernels/cosine.py",
        'limit = tl.where(pg < a * g, float("inf"), a * least / pg)',
        'limit = tl.where(pg < a * g, float("inf"), a * 0 / pg)',
        (ZEROS,),
    ),
    Mutant("the test: not below", "kernels/cosine.py", "pg < a * g", "pg > a * g", (CASES,)),
    Mutant("the test: nothing at eps 0", "kernels/cosine.py", "& ((scale > 0) | (eps > 0))", "", (ZEROS,)),
    Mutant("projection: once", "kernels/projection.py", "pu / norm / norm", "pu / norm", (CASES,)),
    Mutant(
        "projection: without eps",
        "kernels/projection.py",
        "tl.sqrt(pp) + eps",
        "tl.sqrt(pp)",
        (CASES,),
    ),
    Mutant(
        "decay: projected as not",
        "kernels/elements.py",
        "tl.where(decision == NONE, 1.0, scalar(work, group, WD_RATIO))",
        "1.0",
        (CASES,),
    ),
    Mutant(
        "nesterov: never", "kernels/momentum.py", "tl.where(nesterov,", "tl.where(nesterov & (momentum < 0),", (CASES,)
    ),
    Mutant(
        "SGDP: the buffer is always projected",
        "kernels/elements.py",
        "(decision != NONE) & (scalar(work, group, PROJECT_BUFFER) != 0)",
        "(decision != NONE)",
        (CASES_OF_SGDP,),
    ),
    Mutant(
        "chance: another number",
        "kernels/elements.py",
        "return tl.load(entry + FIRST_NUMBER) + row *",
        "return tl.load(entry + FIRST_NUMBER) + 1 + row *",
        (CHANCE,),
    ),
    Mutant(
        "chance: the same for both",
        "kernels/elements.py",
        "rounded(m, random >> 16, S.state, S)",
        "rounded(m, random & 0xFFFF, S.state, S)",
        (CHANCE,),
    ),
    Mutant(
        "chance: the seed stays",
        "kernels/prepare.py",
        "tl.store(seed, s + 1, live)",
        "tl.store(seed, s, live)",
        (CHANCE,),
    ),
    Mutant(
        "remainder: ties the other way",
        "kernels/precision.py",
        "(bits + 0x8000) >> 16",
        "(bits + 0x7FFF) >> 16",
        (REMAINDER,),
    ),
    Mutant("remainder: stale beside a zero", "kernels/precision.py", "tl.where(stale, 0, rest)", "rest", (REMAINDER,)),
    Mutant(
        "share: unscaled",
        "kernels/sums.py",
        "        g *= tl.load(work[SCALE]).to(S.number)\n",
        "        g *= 1.0\n",
        (SHARES,),
    ),
    Mutant(
        "share: rows of the first",
        "kernels/sums.py",
        "share_rows(memory, work, x, where[1] + row, live,",
        "share_rows(memory, work, x, row, live,",
        (SHARES,),
    ),
    Mutant(
        "share: no verdict",
        "kernels/decision.py",
        "tl.load(entry + SHARING) == LOCAL, decision, verdict)\n    return",
        "tl.load(entry + SHARING) >= LOCAL, decision, verdict)\n    return",
        (SHARES,),
    ),
)

MUTANTS = (*ORDER, *EPOCHS, *REDO, *BOUNDS, *NUMBERS)


def cause(output: str) -> str:
    """How a fault was found: the kind of the emulator's finding, or that a test failed. ``output`` is pytest's."""
    from emulator import HARMLESS, KINDS

    for kind in KINDS:
        if kind not in HARMLESS and re.search(rf"^E?\s+(AssertionError: )?{kind} at ", output, re.MULTILINE):
            return kind
    if "CompilationError" in output:
        return "does not compile"
    return wrong(output)
