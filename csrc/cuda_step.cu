// One AdamP or SGDP step over a bucket on an NVIDIA GPU: kernels that NVRTC compiles where they run, one for each kind of
// parameter (fused_adamp/backends/cuda.py).
//
// A launch has a list of jobs (fused_adamp/backends/jobs.py). A job is a stage on a run of one parameter's tiles, and a block
// of 256 threads does it. The stages and the order between them are those of the Triton kernels: kernels/plans.py.
//
//   measure  per row p.g, g.g and p.p; the cosine test                                            reads p g
//   dot      p.u and p.p of views that are wider than a tile                                      reads p g m v
//   update   momentum, projection, weight decay, weight                                           reads p g m v, writes p m v
//   square   g.g of each tile, for the norm of the gradients                                      reads g
//   share    square, measure or dot, as other ranks need it                                       reads g, p g or p g m v
//
// A parameter of one tile is measured by its update, which finds p and g in the first-level cache then.
//
// A tile has at most 256 rows. A team works on a row at a time: some lanes of a warp, a warp, or the block. So rows of up to
// 1,024 elements need no barrier of the block. Sums are added up in double, whose range holds every square, in an order that
// depends on shapes alone.
#include "cuda_tile.h"

namespace fused_adamp {

// The job's parameter.

template <class T>
__device__ void copy(T& to, const T* from) {
  constexpr int words = sizeof(T) / 8;
  static_assert(sizeof(T) % 8 == 0 && words <= threads, "");
  if (thread() < words) reinterpret_cast<uint64_t*>(&to)[thread()] = reinterpret_cast<const uint64_t*>(from)[thread()];
}

// Reads what all stages need of parameter x. x is tested if the cosine test on this rank decides on it. No thread may still
// read the last job's parameter: whoever draws a job meets a barrier.
__device__ void enter(const Memory& a, int64_t x) {
  copy(b.row, a.table + x);
  copy(b.at, a.addresses + x);
  if (strided) copy(b.strides, a.strides + x);
  if (shares) copy(b.parts, a.parts + x);
  __syncthreads();
  copy(b.scalars, a.scalars + b.row.group);
  __syncthreads();
  if (thread() == 0) {
    const bool automatic = b.scalars.projection == double(Projection::automatic) && b.scalars.delta > 0;
    b.tested = b.row.projected && automatic && (!shares || b.row.local());
    if (shares) b.need = *b.parts.need;
  }
  __syncthreads();
}

// Reads what `prepare` has written for the parameter. The factor is that of the gradient.
__device__ void enter_step(const Memory& a, int64_t x, double factor) {
  if (thread() == 0) {
    Corrections by_step = a.coefficients[x];
    b.c = Coefficients<N>(b.scalars, by_step, factor);
    b.nesterov = b.scalars.nesterov != 0;
    b.project_buffer = b.scalars.project_buffer != 0;
    if (stochastic) {
      b.key[0] = uint32_t(a.counters[x].key);
      b.key[1] = uint32_t(a.counters[x].key >> 32);
    }
  }
  __syncthreads();
}

// Step counts and seeds, and what depends on them, for a block of parameters. Before ranks share, nothing is counted.
__device__ void prepare(const Memory& a, int block, bool counts) {
  const int i = block * prepare_block + thread();
  if (thread() >= prepare_block || i >= a.n_active) return;
  const int64_t x = a.active[i];
  const DeviceTableRow& row = a.table[x];
  const Addresses& at = a.addresses[x];
  float t = 1;
  if (R::adaptive) {
    t = *at.step + 1;
    if (counts) *at.step = t;
  }
  a.coefficients[x] = corrections_of(a.scalars[row.group], R::adaptive, t);
  if (!counts) return;
  if (stochastic) a.counters[x].key = step_key((*at.seed)++);
  if (row.rows * row.cols == 0) {  // no tile will report
    a.decisions[x] = uint8_t(shares && !row.local() ? a.parts[x].verdict->decision : double(Decision::none));
  }
}

// Sums.

// The sums of a row that are needed: of ROW_SHARES, p.u only for other ranks.
template <bool sharing>
constexpr int row_sums = sharing ? 4 : 3;

// Adds up one row of a tile.
template <bool sharing>
__device__ void add_row(const Tile& t, const Team& team, int row, double (&s)[row_sums<sharing>]) {
  for (int start = 0; start < t.cols; start += team.size * width * at_once) {
    Numbers<width> x[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int c = start + (k * team.size + team.lane) * width;
      if (c < t.cols) {
        x[k].load_weight(t, row * t.cols + c);
        x[k].template load_gradient<false>(t, row * t.cols + c);
      }
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int c = start + (k * team.size + team.lane) * width;
      if (c >= t.cols) continue;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (sharing) x[k].g[i] *= b.scale;
        const double p = x[k].p[i], g = x[k].g[i];
        s[0] = fma(p, g, s[0]);
        s[1] = fma(g, g, s[1]);
        s[2] = fma(p, p, s[2]);
      }
      if constexpr (sharing) {
        if (!(b.need & need_dot)) continue;
        x[k].load_state(t, row * t.cols + c);
        x[k].advance();
#pragma unroll
        for (int i = 0; i < width; ++i) s[3] = fma(double(x[k].p[i]), double(x[k].u[i]), s[3]);
      }
    }
  }
}

__device__ ViewSums sums_of(const double (&s)[4]) { return {{s[0], s[1], s[2]}, s[3]}; }

// Writes a tile's row of the sums: the square of the least limit and of the largest cosine of its rows, and their sums. With
// `sharing`, also the shares of rows that other ranks have parts of.
template <bool sharing>
__device__ void sum_tile(const Memory& a, int64_t index) {
  const Tile t(index);
  const Team team(t.cols);
  const Test test(b.scalars.delta, b.scalars.eps, true);
  for (int begin = 0; begin < t.rows; begin += team.rows) {
    const int row = begin + team.row;
    double s[row_sums<sharing>] = {};
    if (row < t.rows) add_row<sharing>(t, team, row, s);
    team.sum(s);
    if (team.lane == 0 && row < t.rows) {
      for (int i = 0; i < row_sums<sharing>; ++i) b.rows[row][i] = s[i];
      if (!sharing) b.rows[row][3] = 0;
    }
  }
  __syncthreads();
  const int row = thread();
  double peaks[2] = {-HUGE_VAL, 0}, total[4] = {0, 0, 0, 0};
  if (row < t.rows) {
    const ViewSums s = sums_of(b.rows[row]);
    peaks[0] = -squared_limit<N>(s.sums, test, t.cols);
    peaks[1] = cosine_ratio<N>(s.sums, test, t.cols);
    for (int i = 0; i < 4; ++i) total[i] = b.rows[row][i];
    if (sharing && b.row.sharing == Sharing::split && b.row.row_segments == 1)
      put_needed(s, b.need, b.parts.row_shares + t.row + row);
  }
  // The rows are those of the first threads. Warps without a row have nothing to combine.
  if (thread() / 32 * 32 < t.rows) {
    combine_lanes<Larger>(peaks, 32);
    combine_lanes<Plus>(total, 32);
  }
  if (t.rows > 32) {
    combine_warps<Larger>(peaks);
    combine_warps<Plus>(total);
  } else {
    __syncthreads();  // the next tile's rows take the place of these
  }
  if (thread() == 0) a.sums[index] = {-peaks[0], peaks[1], sums_of(total)};
}

// Adds up a parameter's tiles in their order; writes its findings, or with `sharing` its shares. If a row has several tiles,
// each row is added up first. All tiles' sums are visible.
template <bool sharing>
__device__ void conclude(const Memory& a, int64_t x) {
  const DeviceTableRow& row = b.row;
  const Test test(b.scalars.delta, b.scalars.eps, true);
  const bool by_rows = row.row_segments > 1 || row.all_tiles == 0;
  const int64_t views = by_rows ? row.rows : row.all_tiles, segments = by_rows ? row.row_segments : 1;
  double peaks[2] = {-HUGE_VAL, 0}, total[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int64_t view = thread(); view < views; view += threads) {
    ViewSums s;
    double limit = HUGE_VAL, ratio = 0;
#pragma unroll 1
    for (int64_t i = view * segments; i < (view + 1) * segments; ++i) {
      const Shares& tile = a.sums[row.first_tile + i];
      limit = tile.limit;
      ratio = tile.cosine;
      s.add(tile.sums);
    }
    if (by_rows) {
      limit = squared_limit<N>(s.sums, test, double(row.cols));
      ratio = cosine_ratio<N>(s.sums, test, double(row.cols));
      if (sharing && row.sharing == Sharing::split) put_needed(s, b.need, b.parts.row_shares + view);
    }
    peaks[0] = Larger()(peaks[0], -limit);
    peaks[1] = Larger()(peaks[1], ratio);
    total[0] += s.sums.pg;
    total[1] += s.sums.gg;
    total[2] += s.sums.pp;
    total[3] += s.pu;
  }
  combine<Larger>(peaks);
  combine<Plus>(total);
  if (thread() == 0) {
    const ViewSums s = sums_of(total);
    if (sharing) {
      if (b.need & need_test) {
        b.parts.shares->limit = sqrt(-peaks[0]);
        b.parts.shares->cosine = sqrt(peaks[1]);
      }
      if (b.need & need_square) b.parts.shares->sums.sums.gg = s.sums.gg;
      put_needed(s, b.need, &b.parts.shares->sums);
    } else {
      Findings& found = a.findings[x];
      found.channel_limit = sqrt(-peaks[0]);
      found.layer_limit = sqrt(squared_limit<N>(s.sums, test, double(row.rows) * double(row.cols)));
      found.found_cosine = sqrt(peaks[1]);
      found.found_norm = sqrt(s.sums.pp);
    }
  }
}

// g.g of elements [begin, end) of a tile that this thread adds up.
template <int n, bool sharing>
__device__ double square_elements(const Tile& t, int begin, int end) {
  double gg = 0;
#pragma unroll 1
  for (int e = begin + thread() * n; e < end; e += threads * n) {
    Numbers<n> x;
    x.template load_gradient<false>(t, e);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const double g = sharing ? b.scale * x.g[i] : x.g[i];
      gg = fma(g, g, gg);
    }
  }
  return gg;
}

// Elements of a tile in whole vectors. Only a parameter of one dimension may have more.
__device__ int whole_vectors(const Tile& t) { return t.size() / width * width; }

template <bool sharing>
__device__ void square(const Memory& a, int64_t index) {
  const Tile t(index);
  const int whole = whole_vectors(t);
  double gg[1] = {square_elements<width, sharing>(t, 0, whole)};
  if (width > 1) gg[0] += square_elements<1, sharing>(t, whole, t.size());
  combine<Plus>(gg);
  if (thread() == 0) a.sums[index] = {HUGE_VAL, 0, {{0, gg[0], 0}, 0}};
}

// Measures the tiles of a job that may be the parameter's only one. Whoever completes the parameter writes its findings.
__device__ void measure(const Memory& a, int64_t x, const Job& job) {
#pragma unroll 1
  for (int i = 0; i < job.n; ++i) sum_tile<false>(a, job.first + i);
  Counters& counters = a.counters[x];
  if (count(&counters.measured, a.epoch, job.n) == b.row.all_tiles) {
    conclude<false>(a, x);
    announce(&counters.concluded, a.epoch);
  }
}

__device__ void share(const Memory& a, const Job& job) {
  const int64_t x = a.owners[job.first];
  enter(a, x);
  if (!b.need) return;
  if (thread() == 0) b.scale = N(*a.scale);
  enter_step(a, x, 1);
  const bool by_rows = b.need & (need_test | need_dot);
#pragma unroll 1
  for (int i = 0; i < job.n; ++i) {
    if (by_rows) {
      sum_tile<true>(a, job.first + i);
    } else {
      square<true>(a, job.first + i);
    }
  }
  if (count(&a.counters[x].measured, a.epoch, job.n) == b.row.all_tiles) conclude<true>(a, x);
}

__device__ void share_nothing(const Memory& a, int64_t x) {
  enter(a, x);
  if (b.need) conclude<true>(a, x);
}

// Decisions.

// Whether the decided view is wider than a tile.
__device__ bool is_wide() {
  return (b.decision == Decision::layer && b.row.all_tiles > 1) ||
         (b.decision == Decision::channel && b.row.row_segments > 1);
}

// Whether all ranks have worked out the view's projection together.
__device__ bool is_given() {
  return shares && (b.row.sharing == Sharing::split ||
                    (b.row.sharing == Sharing::shared && b.decision == Decision::layer));
}

// Decides on the parameter: by the group's forced view, by the cosine test at this step's scale, or by all ranks' verdict.
// `waits`: it may have to wait until the parameter's tiles have been measured.
__device__ void decide(const Memory& a, int64_t x, bool waits) {
  if (waits && b.tested && b.row.all_tiles > 1) wait(&a.counters[x].concluded, a.epoch);
  if (thread() == 0) {
    const Scalars& s = b.scalars;
    Decision decision = Decision::none;
    if (shares && !b.row.local()) {
      decision = Decision(uint8_t(b.parts.verdict->decision));
    } else if (b.tested) {
      const Findings& found = a.findings[x];
      const double scale = *a.scale;
      if (passes(scale, found.channel_limit, s.eps)) {
        decision = Decision::channel;
      } else if (passes(scale, found.layer_limit, s.eps)) {
        decision = Decision::layer;
      }
    } else if (b.row.projected && s.projection != double(Projection::none)) {
      decision = Decision(uint8_t(s.projection));
    }
    b.decision = decision;
    b.decay = N(s.lr * s.decay * (decision == Decision::none ? 1.0 : s.wd_ratio));
  }
  __syncthreads();
}

__device__ void report(const Memory& a, int64_t x) {
  a.decisions[x] = uint8_t(b.decision);
  if (shares && !b.row.local()) return;  // all ranks together know the grounds
  const double nothing = __longlong_as_double(0x7ff8000000000000);
  const Findings& found = a.findings[x];
  a.results[x] = b.tested ? Results{found.found_cosine, found.found_norm} : Results{nothing, nothing};
}

// p.u and p.p of a tile.
__device__ void dot_tile(const Tile& t, double (&s)[2]) {
  s[0] = s[1] = 0;
  for (int e = thread() * width; e < t.size(); e += threads * width) {
    Numbers<width> x;
    x.load(t, e);
    x.advance();
    x.dot(s);
  }
  combine<Plus>(s);
}

// The projection of a view of n tiles, from the parameter's tile `begin` on.
__device__ double view_projection(const Memory& a, int64_t begin, int64_t n) {
  double s[2] = {0, 0};
#pragma unroll 1
  for (int64_t i = thread(); i < n; i += threads) {
    const ViewSums& tile = a.sums[b.row.first_tile + begin + i].sums;
    s[0] += tile.pu;
    s[1] += tile.sums.pp;
  }
  combine<Plus>(s);
  return projection(s[0], s[1], b.scalars.eps);
}

__device__ void dot(const Memory& a, const Job& job, bool waits) {
  const int64_t x = a.owners[job.first];
  enter(a, x);
  decide(a, x, waits);
  if (!is_wide() || is_given()) return;
  enter_step(a, x, *a.scale);
#pragma unroll 1
  for (int i = 0; i < job.n; ++i) {
    const Tile t(job.first + i);
    double s[2];
    dot_tile(t, s);
    if (thread() == 0) {
      ViewSums& sums = a.sums[job.first + i].sums;
      sums.pu = s[0];
      sums.sums.pp = s[1];
    }
  }
  Counters& counters = a.counters[x];
  if (count(&counters.dotted, a.epoch, job.n) == b.row.all_tiles) {
    if (b.decision == Decision::layer) {
      const double c = view_projection(a, 0, b.row.all_tiles);
      if (thread() == 0) a.findings[x].layer_projection = c;
    }
    announce(&counters.projection_known, a.epoch);
  }
}

// The update.

// Steps elements [begin, end) of a tile, n at a time, whose projection is known: c, or one for each row.
template <int n, int at_once>
__device__ void update_elements(const Tile& t, int begin, int end, N c, const double* by_row) {
#pragma unroll 1
  for (int e = begin + thread() * n; e < end; e += threads * n * at_once) {
    Numbers<n> x[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (e + k * threads * n < end) x[k].load(t, e + k * threads * n);
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int at = e + k * threads * n;
      if (at >= end) continue;
      if (shares && by_row) c = N(by_row[at / t.cols]);
      x[k].advance();
      x[k].store_second_moment(t, at);
      if (!R::adaptive && b.project_buffer && b.decision != Decision::none) {
        x[k].store_projected_buffer(t, at, c);
      } else {
        x[k].store_first_moment(t, at);
      }
      x[k].move(t, at, c);
    }
  }
}

// Steps a tile row by row, each a view whose projection is not known yet. u waits in shared memory for the row's sums; p is
// read again, from the first-level cache.
__device__ void update_rows(const Tile& t) {
  __shared__ N kept[threads * many];  // `many` of each thread
  const Team team(t.cols);
  const bool projects_buffer = !R::adaptive && b.project_buffer;
  for (int begin = 0; begin < t.rows; begin += team.rows) {
    const int row = begin + team.row, first = row * t.cols, cols = row < t.rows ? t.cols : 0;
    double s[2] = {0, 0};
    for (int start = 0, piece = 0; start < cols; start += team.size * width * rows_at_once, piece += rows_at_once) {
      Numbers<width> x[rows_at_once];
#pragma unroll
      for (int k = 0; k < rows_at_once; ++k) {
        const int c = start + (k * team.size + team.lane) * width;
        if (c < cols) x[k].load(t, first + c);
      }
#pragma unroll
      for (int k = 0; k < rows_at_once; ++k) {
        const int c = start + (k * team.size + team.lane) * width;
        if (c >= cols) continue;
        x[k].advance();
        x[k].dot(s);
        x[k].store_second_moment(t, first + c);
        if (!projects_buffer) x[k].store_first_moment(t, first + c);
#pragma unroll
        for (int i = 0; i < width; ++i) kept[((piece + k) * threads + thread()) * width + i] = x[k].u[i];
      }
    }
    team.sum(s);
    const N c = N(projection(s[0], s[1], b.scalars.eps));
    for (int at = team.lane * width, piece = 0; at < cols; at += team.size * width, ++piece) {
      Numbers<width> x;
      x.load_weight(t, first + at);
#pragma unroll
      for (int i = 0; i < width; ++i) x.u[i] = kept[(piece * threads + thread()) * width + i];
      x.move(t, first + at, c);
      if (projects_buffer) x.store_projected_buffer(t, first + at, c);
    }
  }
}

__device__ void update_tile(const Memory& a, int64_t x, int64_t index) {
  const Tile t(index);
  const bool given = is_given(), wide = is_wide();
  if (b.decision == Decision::channel && !given && !wide && t.cols <= threads * many) {
    update_rows(t);
    return;
  }
  double c = 0;
  const double* by_row = nullptr;
  if (given) {
    by_row = b.row.sharing == Sharing::split ? b.parts.given + t.row : nullptr;
    c = *b.parts.given;
  } else if (wide && b.decision == Decision::layer) {
    c = a.findings[x].layer_projection;
  } else if (wide) {
    c = view_projection(a, t.row * b.row.row_segments, b.row.row_segments);
  } else if (b.decision != Decision::none) {  // the tile is the view: a parameter of one tile, or one wide row
    double s[2];
    dot_tile(t, s);
    c = projection(s[0], s[1], b.scalars.eps);
  }
  const int whole = whole_vectors(t);
  update_elements<width, at_once>(t, 0, whole, N(c), by_row);
  if (width > 1) update_elements<1, 1>(t, whole, t.size(), N(c), by_row);
}

// Measures or updates, as the job says. In the kernel of one pass, it `waits` for the stages before. A parameter of one tile is
// measured by its update.
template <bool updates>
__device__ void step(const Memory& a, const Job& job, bool waits) {
  const int64_t x = a.owners[job.first];
  enter(a, x);
  const bool update = updates && job.stage == Stage::update;
  if (b.tested && (b.row.all_tiles == 1) == update) measure(a, x, job);
  if (!update) return;
  decide(a, x, waits);
  if (waits && is_wide() && !is_given()) wait(&a.counters[x].projection_known, a.epoch);
  enter_step(a, x, *a.scale);
#pragma unroll 1
  for (int i = 0; i < job.n; ++i) update_tile(a, x, job.first + i);
  if (job.first == b.row.first_tile && thread() == 0) report(a, x);
}

// The kernels: kernels/plans.py describes their arguments.

#define FUSED_ADAMP_ARGUMENTS                                                                                               \
  const DeviceTableRow *table, const Addresses *addresses, const Strides *strides, const int32_t *owners,                   \
      const Scalars *scalars, const double *scale, const double *found_inf, Corrections *coefficients, Shares *sums,        \
      Findings *findings, Counters *counters, uint8_t *decisions, Results *results, const Parts *parts, Tickets *tickets,   \
      const int64_t *replays, const int32_t *active, const Job *jobs, int32_t epoch, int32_t n_active
#define FUSED_ADAMP_MEMORY                                                                                                  \
  {table, addresses, strides, owners, scalars, scale, coefficients, sums, findings, counters, decisions, results, parts,   \
   tickets, active, jobs, uint64_t(epoch + *replays), n_active}
#define FUSED_ADAMP_KERNEL extern "C" __global__ void __launch_bounds__(threads, FUSED_ADAMP_BLOCKS)

#if defined(FUSED_ADAMP_measure_kernel)
// One block a job.
FUSED_ADAMP_KERNEL measure_kernel(FUSED_ADAMP_ARGUMENTS) {
  if (*found_inf != 0) return;
  const Memory a = FUSED_ADAMP_MEMORY;
  const Job job = jobs[blockIdx.x];
  if (job.stage == Stage::prepare) {
    prepare(a, job.first, true);
  } else if (job.stage == Stage::measure) {
    step<false>(a, job, false);
  } else {
    enter(a, owners[job.first]);
  #pragma unroll 1
  for (int i = 0; i < job.n; ++i) square<false>(a, job.first + i);
  }
}
#endif

#if defined(FUSED_ADAMP_share_kernel)
// One block a job. One launch prepares parameters, the next one shares tiles.
FUSED_ADAMP_KERNEL share_kernel(FUSED_ADAMP_ARGUMENTS) {
  const Memory a = FUSED_ADAMP_MEMORY;
  const Job job = jobs[blockIdx.x];
  if (job.stage == Stage::prepare) {
    prepare(a, job.first, false);
  } else if (job.stage == Stage::share) {
    share(a, job);
  } else {
    share_nothing(a, job.first);
  }
}
#endif

#if defined(FUSED_ADAMP_dot_kernel)
// One block a job.
FUSED_ADAMP_KERNEL dot_kernel(FUSED_ADAMP_ARGUMENTS) {
  if (*found_inf != 0) return;
  const Memory a = FUSED_ADAMP_MEMORY;
  dot(a, jobs[blockIdx.x], false);
}
#endif

#if defined(FUSED_ADAMP_update_kernel)
// One block a job.
FUSED_ADAMP_KERNEL update_kernel(FUSED_ADAMP_ARGUMENTS) {
  if (*found_inf != 0) return;
  const Memory a = FUSED_ADAMP_MEMORY;
  step<true>(a, jobs[blockIdx.x], false);
}
#endif

#if defined(FUSED_ADAMP_one_pass_kernel)
// Any number of blocks draw jobs in their order: the first n_blocks prepare, then tiles are measured a window before they are
// updated. A job only waits for jobs drawn before it, by blocks that are running and wait for nothing later: no deadlock
// whatever the grid.
FUSED_ADAMP_KERNEL one_pass_kernel(FUSED_ADAMP_ARGUMENTS, int32_t n_jobs, int32_t n_blocks) {
  if (*found_inf != 0) return;
  const Memory a = FUSED_ADAMP_MEMORY;
  for (;;) {
    const int32_t i = int32_t(broadcast(thread() == 0 ? draw(&a.tickets->ticket, a.epoch) : 0));
    if (i >= n_jobs) return;
    const Job job = jobs[i];
    if (job.stage == Stage::prepare) {
      prepare(a, job.first, true);
      if (int32_t(count(&a.tickets->preparing, a.epoch, 1)) == n_blocks) announce(&a.tickets->prepared, a.epoch);
    } else {
      if (job.stage != Stage::measure) wait(&a.tickets->prepared, a.epoch);
      if (job.stage == Stage::dot) {
        dot(a, job, true);
      } else {
        step<true>(a, job, true);
      }
    }
  }
}
#endif

}  // namespace fused_adamp
