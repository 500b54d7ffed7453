// The stages of a step on one tile, and the order between the tiles of a parameter: cpu_plan.cpp says which come when.
#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>

#include "cpu_gather.h"

namespace fused_adamp {

namespace {

Decision decision_of(const Parameter& x) { return Decision(*x.decision); }

// The sums of a row over its tiles, of which there may be none, in their order.
ViewSums sum_row(const Parameter& x, int64_t row) {
  ViewSums sums;
  const int64_t segments = x.table->segments();
  for (int64_t i = row * segments; i < (row + 1) * segments; ++i) sums.add(x.tiles[i].total);
  return sums;
}

}  // namespace

// The sums of a parameter over all tiles, added in their order, with the largest ratio and the least limit of its rows. If
// rows have several tiles, each row is summed first.
TileSums sum_tiles(const Parameter& x) {
  const TableRow& t = *x.table;
  TileSums all;
  if (t.segments() > 1) {
    for (int64_t row = 0; row < t.rows; ++row) all.add(sum_row(x, row), x.test, double(t.cols));
  } else {
    for (int64_t i = 0; i < t.tiles(); ++i) {
      all.total.add(x.tiles[i].total);
      all.largest = std::max(all.largest, x.tiles[i].largest);
      all.least_limit = std::min(all.least_limit, x.tiles[i].least_limit);
    }
  }
  return all;
}

// Writes this rank's shares, as the parameter's needs ask: its sums, and those of each row that other ranks have parts of.
void share_sums(const Parameter& x) {
  const TileSums all = sum_tiles(x);
  const double scale = x.needs == need_square ? x.coefficients_f64.scale : 1;  // of gradients as they are
  Shares& to = *x.shares;
  if (x.needs & need_test) {
    to.limit = std::sqrt(all.least_limit);
    to.cosine = std::sqrt(all.largest);
  }
  if (x.needs & need_square) to.sums.sums.gg = scale * scale * all.total.sums.gg;
  put_needed(all.total, x.rows ? x.needs & ~need_dot : x.needs, &to.sums);
  if (x.rows && x.table->segments() != 1)
    for (int64_t row = 0; row < x.table->rows; ++row) put_needed(sum_row(x, row), x.needs, x.rows + row);
}

// Writes the projection c of every view of several tiles to the sums of each of its tiles. c of a row that other ranks hold
// parts of is in row_projections.
void project_views(const Parameter& x) {
  const int64_t tiles = x.table->tiles();
  const Decision decision = decision_of(x);
  const int64_t width = decision == Decision::layer ? tiles : x.table->segments();
  for (int64_t i = 0; i < tiles; i += width) {
    ViewSums view;
    for (int64_t j = i; j < i + width; ++j) view.add(x.tiles[j].total);
    const double c = spans_ranks(x, decision) ? x.verdict->projection : projection(view.pu, view.sums.pp, x.scalars->eps);
    for (int64_t j = i; j < i + width; ++j) x.tiles[j].projection = c;
  }
}

namespace {

// w, scaled down where the weight is projected.
double decay_of(const Parameter& x, Decision decision) {
  return x.scalars->lr * x.scalars->decay * (decision == Decision::none ? 1 : x.scalars->wd_ratio);
}

template <class T>
const Coefficients<T>& coefficients_of(const Parameter& x) {
  if constexpr (sizeof(T) == 8) {
    return x.coefficients_f64;
  } else {
    return x.coefficients;
  }
}

// The place for the sums of the tile's rows, if other ranks need them. share_sums adds up rows of several tiles.
RowShares row_shares(const Parameter& x, const Tile& tile) {
  return {x.rows && x.table->segments() == 1 ? x.rows + tile.row : nullptr, x.needs};
}

template <class F, class T = typename F::Number>
void measure(const Kernels<F>& k, const Parameter& x, const TileData<F>& data, const Tile& tile, TileSums* sums) {
  k.measure(data, tile.rows, tile.cols, coefficients_of<T>(x).scale, x.test, sums, row_shares(x, tile));
}

// Returns the decision on a parameter whose tiles are measured. If it was tested, writes its cosine and norm to results.
Decision decide(const Parameter& x) {
  if (!x.tested) return x.settled;
  const TableRow& t = *x.table;
  const TileSums all = sum_tiles(x);
  x.results[0] = std::sqrt(all.largest);
  x.results[1] = std::sqrt(all.total.sums.pp);
  if (all.largest < 1) return Decision::channel;
  return cosine_ratio(all.total.sums, x.test, double(t.rows) * double(t.cols)) < 1 ? Decision::layer : Decision::none;
}

template <class F, class T = typename F::Number>
void update(const Kernels<F>& k, const Parameter& x, const TileData<F>& data, const Tile& tile, const Scratch& scratch,
            const TileSums& sums) {
  const RuleKernels<F>& rule = k.rule[x.rule];
  const Decision decision = decision_of(x);
  const T decay = T(decay_of(x, decision));
  const Coefficients<T>& c = coefficients_of<T>(x);
  if (decision == Decision::none) {
    rule.update(data, 0, tile.size(), c, T(0), decay);
  } else if (x.row_projections) {
    for (int64_t row = 0; row < tile.rows; ++row)
      rule.update(data, row * tile.cols, tile.cols, c, T(x.row_projections[tile.row + row]), decay);
  } else if (spans_tiles(x, decision)) {
    rule.update(data, 0, tile.size(), c, T(sums.projection), decay);
  } else if (decision == Decision::layer) {
    rule.update_projected(data, scratch.u<T>(), 1, tile.size(), c, decay);
  } else {
    rule.update_projected(data, scratch.u<T>(), tile.rows, tile.cols, c, decay);
  }
}

// Sweeps a tile by the parameter's guess. The shrink of each row is kept for finish if the guess is channel, or if other
// ranks hold parts of the parameter but not of its rows.
template <class F, class T = typename F::Number>
void sweep(const Kernels<F>& k, const Parameter& x, const TileData<F>& data, const Tile& tile, const Scratch& scratch,
           TileSums* sums) {
  const bool channel = x.predict_channel;
  const bool keeps = channel || (!x.table->local() && !spans_tiles(x, Decision::channel));
  T* shrink = keeps ? reinterpret_cast<T*>(x.shrink) + tile.row : nullptr;
  const Guess<T> guess{x.test, T(decay_of(x, Decision::none)), T(decay_of(x, Decision::channel)), channel, shrink};
  k.rule[x.rule].sweep(data, scratch.u<T>(), tile.rows, tile.cols, coefficients_of<T>(x), guess, sums,
                       row_shares(x, tile));
}

// Whether some row of a swept tile has to be corrected, since the guess was wrong or the row has not moved.
bool needs_finish(const Parameter& x, const TileSums& sums) {
  const Decision decision = decision_of(x);
  const bool own = decision == Decision::channel && !spans_tiles(x, decision);
  return sums.unmoved != 0 || !(x.predict_channel ? own : decision == Decision::none);
}

// Corrects the weights of a swept tile: each row was moved with the shrink of the guess, and the decision asks for another.
template <class F, class T = typename F::Number>
void finish(const Kernels<F>& k, const Parameter& x, const TileData<F>& data, const Tile& tile, const Scratch& scratch,
            const TileSums& sums) {
  const Decision decision = decision_of(x);
  const Coefficients<T> c = coefficients_of<T>(x);
  const bool guess = x.predict_channel, spans = spans_tiles(x, decision), own = decision == Decision::channel && !spans;
  const T plain = T(decay_of(x, Decision::none)), projected = T(decay_of(x, decision));
  const bool by_row = guess || own || x.row_projections;
  if (by_row && is_short<T>(tile.rows, tile.cols)) {
    T* const was = scratch.u<T>();
    T* const is = was + tile.rows;
    for (int64_t row = 0; row < tile.rows; ++row) {
      const T shrink = guess || own ? reinterpret_cast<const T*>(x.shrink)[tile.row + row] : plain;
      const double given = x.row_projections ? x.row_projections[tile.row + row] : sums.projection;
      const bool moved = guess || (row + 1) * tile.cols <= tile.size() - int64_t(sums.unmoved);
      was[row] = !moved ? std::numeric_limits<T>::infinity() : guess ? shrink : plain;
      is[row] = own ? shrink : spans ? projected - c.step_size * T(given) : projected;
    }
    k.rule[x.rule].finish_rows(data, tile.rows, tile.cols, c, was, is);
    return;
  }
  const int64_t rows = by_row ? tile.rows : 1, cols = tile.size() / rows;
  for (int64_t row = 0; row < rows; ++row) {
    const T shrink = guess || own ? reinterpret_cast<const T*>(x.shrink)[tile.row + row] : plain;
    const T was = guess ? shrink : plain;
    const double given = x.row_projections ? x.row_projections[tile.row + row] : sums.projection;
    const T is = own ? shrink : spans ? projected - c.step_size * T(given) : projected;
    const int64_t first = row * cols, rest = tile.size() - int64_t(sums.unmoved) - first;  // of those that have moved
    const int64_t moved = guess ? (recoverable(shrink) ? cols : 0) : std::max<int64_t>(0, std::min(rest, cols));
    if (moved > 0 && was != is) k.rule[x.rule].finish(data, first, moved, c, was, is);
    if (moved < cols) k.rule[x.rule].move(data, first + moved, cols - moved, c, is);
  }
}

// The tile of a job of the plan for columns.
Tile columns_at(const Parameter& x, const ColumnJobs& jobs, int64_t job) {
  const TableRow& t = *x.table;
  const int64_t row = job / jobs.per_row * jobs.rows, cols = jobs.columns * x.width, col = job % jobs.per_row * cols;
  return {row, std::min(jobs.rows, t.rows - row), col, std::min(cols, t.cols - col)};
}

// Passes the columns of a tile to body(access, columns): at once, or if some tensor is gathered, as many at a time as fit.
template <class F, class Body>
void for_each_piece(const Parameter& x, const Tile& tile, const ColumnJobs& jobs, const Scratch& scratch, int roles,
                    const Body& body) {
  const bool gathers = x.turned && (roles & only_g);
  const int64_t step = gathers ? jobs.at_once * x.width : tile.cols;
  for (int64_t done = 0; done < tile.cols; done += step) {
    const Tile piece{tile.row, tile.rows, tile.col + done, std::min(step, tile.cols - done)};
    const TileAccess<F> access(x, piece, scratch, roles);
    body(access.data, columns_of(x, piece));
  }
}

// Advances some columns of some rows.
template <class F, class T = typename F::Number>
void advance(const Kernels<F>& k, const Parameter& x, const ColumnJobs& jobs, int64_t job, const Scratch& scratch) {
  const RuleKernels<F>& rule = k.rule[x.rule];
  const Tile part = columns_at(x, jobs, job);
  const Coefficients<T>& c = coefficients_of<T>(x);
  ViewSums* const sums = x.row_sums + part.row * jobs.per_row + job % jobs.per_row * part.rows;
  TileSums* const tiles = x.tiles + part.row / x.table->tile_rows;
  if (jobs.whole_rows) {
    std::fill_n(tiles, (part.rows + x.table->tile_rows - 1) / x.table->tile_rows, TileSums());
  } else {
    std::fill_n(sums, part.rows, ViewSums());
  }
  for_each_piece<F>(x, part, jobs, scratch, everything, [&](const TileData<F>& data, const Columns& columns) {
    if (jobs.whole_rows) {
      T* const shrink = reinterpret_cast<T*>(x.shrink) + part.row;
      rule.advance_short_columns(data, columns, c, x.test, T(decay_of(x, Decision::channel)), shrink, tiles);
    } else {
      rule.advance_columns(data, columns, c, least_square(x.test.eps2), sums);
    }
  });
}

// Adds up the sums of all jobs, row by row and tile by tile. Keeps the shrink that the projection of each row asks for.
template <class T>
void add_jobs(const Parameter& x, const ColumnJobs& jobs) {
  const TableRow& t = *x.table;
  const Coefficients<T>& c = coefficients_of<T>(x);
  const T decay = T(decay_of(x, Decision::channel));
  for (int64_t row = 0; row < t.rows; ++row) {
    ViewSums sums;
    const int64_t first = row / jobs.rows * jobs.rows, rows = std::min(jobs.rows, t.rows - first);
    for (int64_t job = 0; job < jobs.per_row; ++job) sums.add(x.row_sums[first * jobs.per_row + job * rows + row - first]);
    TileSums& to = x.tiles[row / t.tile_rows];
    if (row % t.tile_rows == 0) to = TileSums();
    to.add<T>(sums, x.test, double(t.cols));
    const T projected = T(projection(sums.pu, sums.sums.pp, double(c.eps)));
    reinterpret_cast<T*>(x.shrink)[row] = decay - c.step_size * projected;
  }
}

// Moves weights by the decision.
template <class F, class T = typename F::Number>
void move(const Kernels<F>& k, const Parameter& x, const ColumnJobs& jobs, int64_t job, const Scratch& scratch) {
  const RuleKernels<F>& rule = k.rule[x.rule];
  const Tile part = columns_at(x, jobs, job);
  const Decision decision = decision_of(x);
  const Coefficients<T>& c = coefficients_of<T>(x);
  const double projected = decision == Decision::layer ? x.tiles->projection : 0;
  const T shrink = T(decay_of(x, decision)) - c.step_size * T(projected);
  for_each_piece<F>(x, part, jobs, scratch, moved_roles(x), [&](TileData<F> data, const Columns& columns) {
    if (decision == Decision::channel) {
      rule.move_columns(data, columns, c, reinterpret_cast<const T*>(x.shrink) + part.row);
      return;
    }
    for (int64_t col = 0; col < columns.count; ++col) {
      const TileData<F> at = at_column(data, columns, col);
      rule.move(at, col * columns.stride, columns.rows * columns.width, c, shrink);
    }
  });
}

// Threads wait here only for jobs that other threads are running right now.
void wait_for(const std::atomic<bool>& flag) {
  for (int spins = 0; !flag.load(std::memory_order_acquire); ++spins) {
    if (spins < 4096) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }
}

// Counts one tile of a stage. Returns true for the last of `tiles`.
bool is_last(std::atomic<int64_t>& finished, int64_t tiles) {
  return finished.fetch_add(1, std::memory_order_acq_rel) + 1 == tiles;
}

template <class F, class T = typename F::Number>
void run_job(const Kernels<F>& k, Parameter& x, Stage stage, int64_t job, const Scratch& scratch) {
  const TableRow& t = *x.table;
  const int64_t tiles = t.tiles();
  // Update runs backwards: what measure read last is still in cache.
  const int64_t index = stage == Stage::update_measured ? tiles - 1 - job : job;
  const Tile tile = tile_at(t, index);
  TileSums& sums = x.tiles[index];
  switch (stage) {
    case Stage::update: {
      const TileAccess<F> access(x, tile, scratch, everything);
      update(k, x, access.data, tile, scratch, sums);
      access.store();
      break;
    }
    case Stage::measure_update: {
      const TileAccess<F> access(x, tile, scratch, everything);
      measure(k, x, access.data, tile, &sums);
      *x.decision = uint8_t(decide(x));
      update(k, x, access.data, tile, scratch, sums);
      access.store();
      break;
    }
    case Stage::measure: {
      measure(k, x, TileAccess<F>(x, tile, scratch, p_and_g).data, tile, &sums);
      if (!is_last(x.measured_tiles, tiles)) break;
      *x.decision = uint8_t(decide(x));
      x.decided.store(true, std::memory_order_release);
      break;
    }
    case Stage::dot: {
      if (x.tested) wait_for(x.decided);
      if (!spans_tiles(x, decision_of(x))) break;
      TileSums dotted;  // a tested tile's other sums stay those of its rows
      k.rule[x.rule].dot(TileAccess<F>(x, tile, scratch, everything).data, 1, tile.size(), coefficients_of<T>(x), x.test,
                         &dotted, {});
      if (x.tested) {
        sums.total.pu = dotted.total.pu;
      } else {
        sums = dotted;
      }
      if (!is_last(x.dotted_tiles, tiles)) break;
      project_views(x);
      x.dotted.store(true, std::memory_order_release);
      break;
    }
    case Stage::update_measured: {
      if (x.tested) wait_for(x.decided);
      if (spans_tiles(x, decision_of(x))) wait_for(x.dotted);
      const TileAccess<F> access(x, tile, scratch, everything);
      update(k, x, access.data, tile, scratch, sums);
      access.store();
      break;
    }
    case Stage::predict: {
      TileSums first;
      measure(k, x, TileAccess<F>(x, tile, scratch, p_and_g).data, tile, &first);
      if (!(first.largest < 1)) x.predict_channel.store(false, std::memory_order_relaxed);
      if (is_last(x.predicted_tiles, predicted_tiles(t))) x.predicted.store(true, std::memory_order_release);
      break;
    }
    case Stage::sweep: {
      wait_for(x.predicted);
      const TileAccess<F> access(x, tile, scratch, everything);
      sweep(k, x, access.data, tile, scratch, &sums);
      access.store();
      if (!t.local() || !is_last(x.measured_tiles, tiles)) break;
      *x.decision = uint8_t(decide(x));
      if (spans_tiles(x, decision_of(x))) project_views(x);
      x.decided.store(true, std::memory_order_release);
      break;
    }
    case Stage::finish: {
      wait_for(x.decided);
      if (!needs_finish(x, sums)) break;
      const TileAccess<F> access(x, tile, scratch, moved_roles(x));
      finish(k, x, access.data, tile, scratch, sums);
      access.store_weight();
      break;
    }
    case Stage::advance: {
      const ColumnJobs jobs = column_jobs(x);
      advance(k, x, jobs, job, scratch);
      if (!is_last(x.measured_tiles, jobs.count)) break;
      if (!jobs.whole_rows) add_jobs<T>(x, jobs);
      *x.decision = uint8_t(decide(x));
      if (decision_of(x) == Decision::layer) project_views(x);
      x.decided.store(true, std::memory_order_release);
      break;
    }
    case Stage::move: {
      wait_for(x.decided);
      const ColumnJobs jobs = column_jobs(x);
      move(k, x, jobs, jobs.count - 1 - job, scratch);  // backwards: the last columns are still in cache
      break;
    }
    case Stage::share: {
      if (x.needs & need_dot) {
        k.rule[x.rule].dot(TileAccess<F>(x, tile, scratch, everything).data, tile.rows, tile.cols, coefficients_of<T>(x),
                           x.test, &sums, row_shares(x, tile));
      } else if (x.needs & need_test) {
        measure(k, x, TileAccess<F>(x, tile, scratch, p_and_g).data, tile, &sums);
      } else {
        sums = TileSums();
        sums.total.sums.gg = k.square_norm(TileAccess<F>(x, tile, scratch, only_g).data, tile.size());
      }
      break;
    }
  }
}

}  // namespace

void run_job(const InstructionSet& set, Parameter& x, Stage stage, int64_t job, const Scratch& scratch) {
  const auto run = [&](const auto& kernels) { run_job(kernels, x, stage, job, scratch); };
  switch (x.format) {
    case format_f32: return run(set.f32);
    case format_f64: return run(set.f64);
    case format_f32_bf16_state: return run(set.f32_bf16_state);
    case format_bf16: return run(set.bf16_all);
    case format_bf16_f32_state: return run(set.bf16_f32_state);
    case format_remainder: return run(set.remainder);
    case format_remainder_bf16_state: return run(set.remainder_bf16_state);
    case format_f16: return run(set.f16);
  }
}

}  // namespace fused_adamp
