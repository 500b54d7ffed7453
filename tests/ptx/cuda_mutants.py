"""Small faults of the CUDA C++ kernels, planted one at a time; and which tests find them. See kernel_mutants.py."""

from __future__ import annotations

from mutation import Mutant, Tests

STEP = "csrc/cuda_step.cu"
BLOCK = "csrc/cuda_block.h"
ORDER = "csrc/cuda_order.h"
TILE = "csrc/cuda_tile.h"


def under(plan: str, file: str, which: str = "") -> Tests:
    environment = (
        ("FUSED_ADAMP_PLAN", plan),
        ("FUSED_ADAMP_EMULATED", "cuda"),
        ("PTX_SEEDS", "3"),
        ("FUSED_ADAMP_FULL_PRODUCTS", "1"),
    )
    return Tests(f"tests/ptx/{file}", which, environment)


USUAL = "(clipped_step and AdamP) or more_parameters or infinite_gradients or compiled_steps or one_row"
ONE_PASS = under("one_pass", "emulated_steps.py", USUAL)
SPLIT = under("split", "emulated_steps.py", USUAL)
BOTH = (ONE_PASS, SPLIT)
RANGE = under("one_pass", "emulated_range.py")
REPLAYS = under("one_pass", "emulated_graphs.py")
SHARES = under("split", "emulated_shares.py")
FLAT = under("one_pass", "emulated_table.py", "prime or 1111 or leave")
STRIDED = under("split", "emulated_table.py", "transposed")
CASES_OF_SGDP = under("split", "emulated_table.py", "SGDP")
CHANCE = under("split", "emulated_precision.py")
REMAINDER = under("one_pass", "emulated_precision.py")
REPORT = under("split", "emulated_steps.py", "results")

BARRIER = "  __syncthreads();\n"

MUTANTS = (
    # The order between blocks.
    Mutant("count: relaxed", ORDER, "atom.acq_rel.gpu.global.add", "atom.relaxed.gpu.global.add", BOTH),
    Mutant("count: release alone", ORDER, "atom.acq_rel.gpu.global.add", "atom.release.gpu.global.add", BOTH),
    Mutant("count: acquire alone", ORDER, "atom.acq_rel.gpu.global.add", "atom.acquire.gpu.global.add", BOTH),
    Mutant(
        "count: no barrier before",
        BLOCK,
        "uint32_t n) {\n" + BARRIER + "  return broadcast(",
        "uint32_t n) {\n  return broadcast(",
        (SHARES, *BOTH),
        equivalent="the thread that counts has stored a tile's sums itself; `sum_tile` has waited for the others",
    ),
    Mutant("publish: relaxed", ORDER, "st.release.gpu.global", "st.relaxed.gpu.global", (ONE_PASS,)),
    Mutant("wait: relaxed", ORDER, "ld.acquire.gpu.global", "ld.relaxed.gpu.global", (ONE_PASS,)),
    Mutant("wait: for nothing", BLOCK, "while (!is_published(flag, epoch))", "while (false)", (ONE_PASS,)),
    Mutant("wait: for any later epoch", ORDER, "return seen == epoch;", "return seen != 0;", (ONE_PASS,)),
    Mutant(
        "enter_step: nobody meets the thread that has waited",
        STEP,
        "      b.key[1] = uint32_t(a.counters[x].key >> 32);\n    }\n  }\n" + BARRIER,
        "      b.key[1] = uint32_t(a.counters[x].key >> 32);\n    }\n  }\n",
        BOTH,
    ),
    Mutant(
        "decide: nobody meets the thread that has waited",
        STEP,
        "? 1.0 : s.wd_ratio));\n  }\n" + BARRIER,
        "? 1.0 : s.wd_ratio));\n  }\n",
        BOTH,
    ),
    Mutant("an old count goes on", ORDER, '"l"(epoch << 32)', '"l"(epoch & 0)', (ONE_PASS,), times=2),
    Mutant(
        "decide: no wait", STEP, "if (waits && b.tested && b.row.all_tiles > 1) wait", "if (false) wait", (ONE_PASS,)
    ),
    Mutant(
        "update: no wait for dot", STEP, "if (waits && is_wide() && !is_given()) wait", "if (false) wait", (ONE_PASS,)
    ),
    Mutant("no wait for prepare", STEP, "if (job.stage != Stage::measure) wait", "if (false) wait", (ONE_PASS,)),
    Mutant("prepare: announced by the first", STEP, "a.epoch, 1)) == n_blocks", "a.epoch, 1)) == 1", (ONE_PASS,)),
    Mutant(
        "measure: concluded by the first",
        STEP,
        "counters.measured, a.epoch, job.n) == b.row.all_tiles",
        "counters.measured, a.epoch, job.n) == job.n",
        BOTH,
    ),
    Mutant(
        "dot: concluded by the first",
        STEP,
        "counters.dotted, a.epoch, job.n) == b.row.all_tiles",
        "counters.dotted, a.epoch, job.n) == job.n",
        BOTH,
    ),
    Mutant("measure: never announced", STEP, "    announce(&counters.concluded, a.epoch);\n", "", (ONE_PASS,)),
    Mutant("dot: never announced", STEP, "    announce(&counters.projection_known, a.epoch);\n", "", (ONE_PASS,)),
    # The order between the threads of a block.
    Mutant(
        "combine: partial sums are overwritten",
        BLOCK,
        "double (&x)[k]) {\n" + BARRIER + "  if (thread() % 32",
        "double (&x)[k]) {\n  if (thread() % 32",
        BOTH,
    ),
    Mutant(
        "combine: partial sums are read too early",
        BLOCK,
        "b.partial[thread() / 32][i] = x[i];\n  }\n" + BARRIER,
        "b.partial[thread() / 32][i] = x[i];\n  }\n",
        BOTH,
    ),
    Mutant(
        "sum_tile: rows are read too early",
        STEP,
        "    }\n  }\n" + BARRIER + "  const int row = thread();",
        "    }\n  }\n  const int row = thread();",
        BOTH,
    ),
    # What a thread works on.
    Mutant(
        "a team of one lane too few",
        BLOCK,
        "while (size < 32 && size * few < cols)",
        "while (size < 32 && size * few < cols - 1)",
        BOTH,
        equivalent="rows of an aligned tile are whole vectors; a team of fewer lanes takes more turns",
    ),
    Mutant("rows beyond the tile", STEP, "cols = row < t.rows ? t.cols : 0", "cols = t.cols", BOTH),
    Mutant(
        "a tile's rows are cut short",
        TILE,
        "x.tile_rows < x.rows - row ? x.tile_rows : x.rows - row",
        "x.tile_rows",
        BOTH,
    ),
    Mutant(
        "a tile's columns are cut short",
        TILE,
        "x.tile_cols < x.cols - col ? x.tile_cols : x.cols - col",
        "x.tile_cols",
        BOTH,
    ),
    Mutant(
        "the end of a vector is left out",
        STEP,
        "  if (width > 1) update_elements<1, 1>(t, whole, t.size(), N(c), by_row);\n",
        "",
        BOTH,
    ),
    Mutant(
        "the end of a vector is not in the norm",
        STEP,
        "  if (width > 1) gg[0] += square_elements<1, sharing>(t, whole, t.size());\n",
        "",
        BOTH,
    ),
    Mutant(
        "strides of the next dimension",
        TILE,
        "(row + in) * step[0] + outer * step[1]",
        "(row + in) * step[1] + outer * step[0]",
        (STRIDED,),
    ),
    Mutant(
        "a kept update of another thread",
        STEP,
        "x.u[i] = kept[(piece * threads + thread()) * width + i];",
        "x.u[i] = kept[(piece * threads + (thread() ^ 1)) * width + i];",
        BOTH,
    ),
    Mutant("p.u of half of a row", STEP, "        x[k].dot(s);\n", "        if (k == 0) x[k].dot(s);\n", BOTH),
    Mutant(
        "sums in float32",
        STEP,
        "const double p = x[k].p[i], g = x[k].g[i];",
        "const float p = x[k].p[i], g = x[k].g[i];",
        (RANGE,),
    ),
    Mutant(
        "the largest cosine of the first warp",
        STEP,
        "  if (t.rows > 32) {\n    combine_warps<Larger>(peaks);\n",
        "  if (t.rows > 32) {\n",
        BOTH,
    ),
    # The rule, storage, shares, the report.
    Mutant(
        "the scale is left out",
        STEP,
        "enter_step(a, x, *a.scale);\n#pragma unroll 1\n  for (int i = 0; i < job.n; ++i) update",
        "enter_step(a, x, 1);\n#pragma unroll 1\n  for (int i = 0; i < job.n; ++i) update",
        BOTH,
    ),
    Mutant(
        "the buffer is not projected",
        STEP,
        "if (projects_buffer) x.store_projected_buffer(t, first + at, c);",
        "if (false) x.store_projected_buffer(t, first + at, c);",
        (CASES_OF_SGDP,),
    ),
    Mutant("decay of an unprojected parameter", STEP, "decision == Decision::none ? 1.0 : s.wd_ratio", "1.0", BOTH),
    Mutant(
        "the first moment's chance is the weight's",
        TILE,
        "random(t, e, i, false) >> 16",
        "random(t, e, i, false) & 0xffff",
        (CHANCE,),
    ),
    Mutant(
        "keys are not swapped", TILE, "chance(b.key[second], b.key[!second]", "chance(b.key[0], b.key[1]", (CHANCE,)
    ),
    Mutant(
        "no remainder",
        TILE,
        "if constexpr (remainder) rest.template store<false>",
        "if constexpr (false) rest.template store<false>",
        (REMAINDER,),
    ),
    Mutant(
        "a remainder changes the order of sums",
        "fused_adamp/backends/cuda.py",
        'torch.float32 if self.rounding == "remainder" else self.p',
        "self.p",
        (REMAINDER,),
        equivalent="sums in double differ in their last bits then, and the projection is rounded to float32",
    ),
    Mutant("the replay's epoch", STEP, "uint64_t(epoch + *replays)", "uint64_t(epoch)", (REPLAYS,)),
    Mutant(
        "infinite gradients step",
        STEP,
        "if (*found_inf != 0) return;",
        "if (*found_inf == 0 && false) return;",
        BOTH,
        times=4,
    ),
    Mutant(
        "shares of gradients as they are",
        STEP,
        "if (sharing) x[k].g[i] *= b.scale;",
        "if (false) x[k].g[i] *= b.scale;",
        (SHARES,),
    ),
    Mutant(
        "rows of other ranks are projected by ours",
        STEP,
        "b.row.sharing == Sharing::split ||",
        "false ||",
        (SHARES,),
    ),
    Mutant(
        "a given projection for all rows",
        STEP,
        "by_row = b.row.sharing == Sharing::split ? b.parts.given + t.row : nullptr",
        "by_row = nullptr",
        (SHARES,),
    ),
    Mutant(
        "the report of another parameter",
        STEP,
        "const Findings& found = a.findings[x];\n  a.results",
        "const Findings& found = a.findings[0];\n  a.results",
        (REPORT,),
    ),
)
