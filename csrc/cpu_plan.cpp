// One AdamP or SGDP step over a bucket on the CPU.
//
// A parameter's tiles pass through stages, by one of five plans:
//
//   settled      update                                the decision needs no test: a vector, delta = 0, a forced projection
//   one_tile     measure, decide, update               at once, in cache
//   split        measure, decide, dot, update          any storage
//   speculative  predict, sweep, decide, finish        weight and state keep what was computed
//   columns      advance, decide, move                 rows lie side by side, as in a transposed matrix
//
// A parameter that lies on several ranks is decided by all of them together, between two operators: `measure` shares its
// sums, `step` is given the verdict, which settles the decision.
//
//   share        share                                 in measure: the sums, nothing moves
//   speculative  predict, sweep                        in measure: the sums and the step, by a guess
//   finish       finish                                in step, after that
//
//   measure  per row p.g, g.g and p.p; the largest cosine of a row                                 reads p g
//   decide   by the thread that ends the parameter's last tile: sums in tile order, decision
//   dot      p.u, where the chosen view is wider than a tile                                      reads p g m v
//   update   momentum, projection, weight decay, weight                                          reads p g m v, writes p m v
//   predict  measure of the first rows: if one fails, the channels cannot be projected           reads p g
//   sweep    measure and update in one, as if the prediction were the decision                    reads p g m v, writes p m v
//   finish   corrects weights if the prediction was wrong; most often it was right               reads p m v, writes p
//   advance  measure, dot and momentum, of some columns of many rows                              reads p g m v, writes m v
//   move     projection, weight decay, weight                                                    reads p m v, writes p
//   share    g.g, measure or dot, as the parameter's needs ask                                    reads g, p g or p g m v
//
// The prediction looks at this step's tensors only, so a step depends on nothing but its arguments. Every (stage, tile) is a
// job. Threads draw jobs in order from one counter, so a job only ever waits for jobs that were drawn before it by threads
// that are running: no deadlock for any number of threads. Tiles, the order of sums within them and the order in which tiles
// are summed depend on the table alone, so results are bitwise equal for any number of threads. docs/architecture.md says
// what each plan costs.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu_step.h"
#include "precision.h"

namespace fused_adamp {

// Whether other ranks hold parts of a view, so that its projection is given.
bool spans_ranks(const Parameter& x, Decision view) {
  const Sharing sharing = x.table->sharing;
  return view == Decision::layer ? sharing != Sharing::local : view == Decision::channel && sharing == Sharing::split;
}

// Whether a view is wider than a tile, or lies on several ranks.
bool spans_tiles(const Parameter& x, Decision view) {
  const TableRow& t = *x.table;
  return spans_ranks(x, view) || (view == Decision::layer ? t.tiles() > 1 : view == Decision::channel && t.segments() > 1);
}

// Whether speculation may keep the shrink of each row. If several ranks share the parameter, it is kept from measure to
// step, which takes too much memory for short rows (fused_adamp/backends/cpu.py).
bool keeps_shrink(const TableRow& t) { return t.local() || t.cols >= 64; }

// The number of tiles that predict measures, with at least 16 rows: 8% of random rows pass the test at delta = 0.1, but
// hardly ever all of 16. It is 0 if rows span tiles or ranks: their shrink is not known before the last part, so the guess is
// that nothing is projected.
int64_t predicted_tiles(const TableRow& t) {
  if (t.segments() > 1 || t.sharing == Sharing::split) return 0;
  return std::min((16 + t.tile_rows - 1) / t.tile_rows, t.tiles());
}

// Enough columns for 131072 elements, but no more than 32 jobs of the same rows: one thread adds up their sums. A gradient is
// gathered into the scratch of two tiles, 16 columns or more at once: a cache line of each row.
ColumnJobs column_jobs(const Parameter& x) {
  const TableRow& t = *x.table;
  const int64_t all = t.cols / x.width, tile = t.tile_rows * t.tile_cols;
  if (is_short<float>(t.rows, t.cols)) {
    const int64_t rows = t.tile_rows * std::max<int64_t>(1, x.turned ? 1 : most_rows / t.tile_rows);
    return {rows, all, 1, (t.rows + rows - 1) / rows, true, all};
  }
  const int64_t rows = std::min({t.rows, most_rows, x.turned ? 2 * tile / x.width : most_rows});
  const int64_t most = std::min<int64_t>(32, std::max<int64_t>(1, rows * t.cols / 131072));
  const int64_t columns = (all + most - 1) / most, per_row = (all + columns - 1) / columns;
  const int64_t at_once = std::max<int64_t>(1, 2 * tile / (rows * x.width));
  return {rows, columns, per_row, (t.rows + rows - 1) / rows * per_row, false, at_once};
}

namespace {

// Whether the old weight can be recovered from the new one and the state, as speculation requires: both must be stored as
// computed, and the shrink without projection must be small.
bool recovers(const Parameter& x) {
  const StorageType wanted = x.is_double ? storage_f64 : storage_f32;
  const auto exact = [&](Role role) { return !x.operand[role].data || x.operand[role].type == wanted; };
  const bool keeps = (exact(role_p) || x.operand[role_remainder].data) && exact(role_m) && exact(role_v);
  return keeps && x.rule != sgd_project_buffer && recoverable(x.scalars->lr * x.scalars->decay) &&
         keeps_shrink(*x.table);
}

Plan plan_for_step(const Parameter& x) {
  if (x.swept && *x.swept != Swept::no) return Plan::finish;
  if (x.width) return Plan::columns;
  if (!x.tested) return spans_tiles(x, x.settled) && !spans_ranks(x, x.settled) ? Plan::split : Plan::settled;
  if (x.table->tiles() <= 1) return Plan::one_tile;
  return recovers(x) ? Plan::speculative : Plan::split;
}

Plan plan_for_measure(const Parameter& x, bool final) {
  if (!x.needs) return Plan::none;
  const bool whole = (x.needs & need_test) && (x.needs & need_dot);
  return final && whole && recovers(x) ? Plan::speculative : Plan::share;
}

int64_t tiles_of(const Parameter* x) { return x && x->table->rows * x->table->cols > 0 ? x->table->tiles() : 0; }

}  // namespace

void Step::add(Parameter* x, Stage stage, int64_t count) {
  if (x && count > 0) segments_.push_back({x, stage, jobs(), jobs() + count});
}

// Makes the list of jobs. A speculative parameter's sweep follows the prediction of the next one, and its finish the sweep
// of the next one, so that threads do not wait for each other's last tiles. A parameter on several ranks is finished by
// another call.
void Step::schedule() {
  Parameter *swept = nullptr, *predicted = nullptr;
  const auto proceed = [&](Parameter* x) {
    if (x) add(x, Stage::predict, predicted_tiles(*x->table));
    add(predicted, Stage::sweep, tiles_of(predicted));
    if (swept && swept->table->local()) add(swept, Stage::finish, tiles_of(swept));
    swept = predicted;
    predicted = x;
  };
  for (int64_t i = 0; i < count_; ++i) {
    Parameter* x = &parameters_[i];
    switch (x->plan) {
      case Plan::none:
        break;
      case Plan::settled:
        add(x, Stage::update, tiles_of(x));
        break;
      case Plan::one_tile:
        add(x, Stage::measure_update, tiles_of(x));
        break;
      case Plan::split:
        if (x->tested) add(x, Stage::measure, tiles_of(x));
        add(x, Stage::dot, tiles_of(x));
        add(x, Stage::update_measured, tiles_of(x));
        break;
      case Plan::speculative:
        proceed(x);
        break;
      case Plan::columns:
        add(x, Stage::advance, column_jobs(*x).count);
        add(x, Stage::move, column_jobs(*x).count);
        break;
      case Plan::share:
        add(x, Stage::share, tiles_of(x));
        break;
      case Plan::finish:
        add(x, Stage::finish, tiles_of(x));
        break;
    }
  }
  proceed(nullptr);
  proceed(nullptr);
}

int64_t Step::threads() const {
  // Below so many elements a second thread costs more than it brings: the grain that torch uses too.
  constexpr int64_t elements_per_thread = 32768;
  return std::max<int64_t>(
      1, std::min<int64_t>({torch::stable::get_num_threads(), jobs(), elements_ / elements_per_thread}));
}

// Everything that can fail comes before the first write.
void Step::prepare() {
  schedule();
  const auto shrink_bytes = [](const Parameter& x) -> int64_t {
    const bool here = (x.plan == Plan::speculative && x.table->local()) || x.plan == Plan::columns;
    return here ? (x.table->rows * (x.is_double ? 8 : 4) + 63) / 64 * 64 : 0;
  };
  const auto row_sums_bytes = [](const Parameter& x) -> int64_t {
    if (x.plan != Plan::columns) return 0;
    const ColumnJobs jobs = column_jobs(x);
    return jobs.whole_rows ? 0 : x.table->rows * jobs.per_row * sizeof(ViewSums);
  };
  int64_t bytes = threads() * scratch_bytes();
  for (int64_t i = 0; i < count_; ++i) bytes += shrink_bytes(parameters_[i]) + row_sums_bytes(parameters_[i]);
  memory_.reset(new char[bytes + 64]);
  scratch_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  char* shrink = scratch_ + threads() * scratch_bytes();
  for (int64_t i = 0; i < count_; ++i) {
    Parameter& x = parameters_[i];
    if (shrink_bytes(x)) x.shrink = shrink;
    shrink += shrink_bytes(x);
    if (row_sums_bytes(x)) x.row_sums = reinterpret_cast<ViewSums*>(shrink);
    shrink += row_sums_bytes(x);
    x.predict_channel = predicted_tiles(*x.table) > 0;
    x.predicted = !x.predict_channel;
  }
}

void Step::run() {
  const InstructionSet& set = instructions();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads(), 1, [&](int64_t begin, int64_t) {
    const Scratch mine{scratch_ + begin * scratch_bytes(), tile_bytes_, stage_bytes_};
    auto segment = segments_.begin();
    for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs();) {
      while (job >= segment->end) ++segment;
      Parameter& x = *segment->parameter;
      run_job(set, x, segment->stage, job - segment->begin, mine);
    }
  });
}

// Computes the coefficients of every parameter from its t and the scale.
void Step::compute_coefficients() {
  for (int64_t i = 0; i < count_; ++i) {
    Parameter& x = parameters_[i];
    const Parameter* last = i > 0 ? &parameters_[i - 1] : nullptr;
    if (last && last->scalars == x.scalars && last->t == x.t) {  // saves two powers
      x.coefficients = last->coefficients;
      x.coefficients_f64 = last->coefficients_f64;
    } else {
      const Corrections by_step = corrections_of(*x.scalars, adaptive_, x.t);
      x.coefficients = Coefficients<float>(*x.scalars, by_step, scale_);
      x.coefficients_f64 = Coefficients<double>(*x.scalars, by_step, scale_);
    }
  }
}

void Step::measure(bool final) {
  for (int64_t i = 0; i < count_; ++i) parameters_[i].plan = plan_for_measure(parameters_[i], final);
  prepare();
  for (int64_t i = 0; i < count_; ++i) {
    Parameter& x = parameters_[i];
    if (!x.step) continue;
    x.t = *x.step + 1;
    if (x.plan == Plan::speculative) *x.step = float(x.t);
  }
  compute_coefficients();
  run();
  for (int64_t i = 0; i < count_; ++i) {
    const Parameter& x = parameters_[i];
    if (x.plan == Plan::none) continue;
    share_sums(x);
    if (!x.swept) continue;
    *x.swept = x.plan != Plan::speculative ? Swept::no : x.predict_channel ? Swept::channel : Swept::plain;
  }
}

void Step::step() {
  for (int64_t i = 0; i < count_; ++i) parameters_[i].plan = plan_for_step(parameters_[i]);
  prepare();
  for (int64_t i = 0; i < count_; ++i) {
    Parameter& x = parameters_[i];
    if (x.plan == Plan::finish) {
      x.predict_channel = *x.swept == Swept::channel;
      x.decided = true;
      *x.swept = Swept::no;
    } else {
      if (x.step) *x.step += 1;
      if (x.seed) {
        const uint64_t key = step_key((*x.seed)++);
        x.key[0] = uint32_t(key);
        x.key[1] = uint32_t(key >> 32);
      }
    }
    if (x.step) x.t = *x.step;
    *x.decision = uint8_t(tiles_of(&x) || !x.table->local() ? x.settled : Decision::none);
    if (x.table->local()) x.results[0] = x.results[1] = std::nan("");
    if (x.plan != Plan::split && x.plan != Plan::columns && spans_tiles(x, x.settled)) project_views(x);
  }
  compute_coefficients();
  run();
}

double Step::square_norm() {
  for (int64_t i = 0; i < count_; ++i) {
    parameters_[i].plan = Plan::share;
    parameters_[i].needs = need_square;
  }
  prepare();
  run();
  double sum = 0;
  for (int64_t i = 0; i < count_; ++i) sum += sum_tiles(parameters_[i]).total.sums.gg;
  return sum;
}

}  // namespace fused_adamp
