// One AdamP or SGDP step over a bucket on the CPU.
//
// A parameter's tiles pass through stages, by one of four plans:
//
//   untested     update                                a vector, or delta = 0: nothing is ever projected
//   one_tile     measure, decide, update               at once, in cache
//   split        measure, decide, dot, update          any storage
//   speculative  predict, sweep, decide, finish        float32 or float64 in place
//
//   measure  per row p.g, g.g and p.p; the rows that fail the cosine test                         reads p g
//   decide   by the thread that ends the parameter's last tile: sums in tile order, decision
//   dot      p.u, where the chosen view is wider than a tile                                      reads p g m v
//   update   momentum, projection, weight decay, weight                                          reads p g m v, writes p m v
//   predict  measure of the first rows: if one fails, the channels cannot be projected           reads p g
//   sweep    measure and update in one, as if the prediction were the decision                    reads p g m v, writes p m v
//   finish   puts weights right where it was not; most often there is nothing to do              reads p m v, writes p
//
// The prediction looks at this step's tensors only, so a step depends on nothing but its arguments. Every (stage, tile) is a
// job. Threads draw jobs in order from one counter, so a job only ever waits for jobs that were drawn before it by threads
// that are running: no deadlock for any number of threads. Tiles, the order of sums within them and the order in which tiles
// are summed depend on the table alone, so results are bitwise equal for any number of threads. docs/architecture.md says
// what each plan costs.
#include "cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "bucket.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_adamp {

// Tensors.

bool TensorRef::same_sizes(const TensorRef& other) const {
  const int64_t n = dim();
  return n == other.dim() && std::equal(sizes(), sizes() + n, other.sizes());
}

bool TensorRef::overlaps() const {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < dim(); ++d)
    if (sizes()[d] > 1) dims.emplace_back(strides()[d], sizes()[d]);
  std::sort(dims.begin(), dims.end());
  int64_t end = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= end) return numel() > 0;
    end += (size - 1) * stride;
  }
  return false;
}

TensorList::TensorList(StableIValue argument) {
  const auto list = torch::stable::detail::to<StableListHandle>(argument);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  handles_.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
}

TensorList::~TensorList() {
  for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
}

namespace {

StorageType storage_type(int32_t dtype) {
  static const int32_t known[storage_count] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                               aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return StorageType(std::find(known, known + storage_count, dtype) - known);
}

// The instruction set to run: the widest that the processor has, or the one that FUSED_ADAMP_CPU names.

const InstructionSet* find_instructions(const std::string& wish) {
#if defined(FUSED_ADAMP_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (wish.empty() || wish == instructions_avx512.name)) return &instructions_avx512;
  if (avx2 && (wish.empty() || wish == instructions_avx2.name)) return &instructions_avx2;
#endif
  if (wish.empty() || wish == instructions_baseline.name) return &instructions_baseline;
  return nullptr;
}

const InstructionSet& instructions() {
  const char* wish = std::getenv("FUSED_ADAMP_CPU");
  const InstructionSet* found = find_instructions(wish ? wish : "");
  if (!found)
    throw std::runtime_error(std::string("FUSED_ADAMP_CPU=") + wish +
                             " is not an instruction set that this processor runs: leave it unset, or choose baseline, "
                             "avx2 or avx512");
  return *found;
}

template <class T>
const Kernels<T>& kernels_of(const InstructionSet& set);
template <>
const Kernels<float>& kernels_of(const InstructionSet& set) { return set.f32; }
template <>
const Kernels<double>& kernels_of(const InstructionSet& set) { return set.f64; }

// From tensors to parameters.

RuleIndex rule_index(bool adaptive, const Scalars& s, bool stateful) {
  if (adaptive) return s.nesterov ? adam_nesterov : adam;
  if (!stateful) return sgd_no_buffer;
  if (s.nesterov) return sgd_nesterov;
  return s.project_buffer ? sgd_project_buffer : sgd;
}

// Sets strides, merging the dimensions beyond dim 0 wherever all of the parameter's tensors allow it. The order within a
// row means nothing to the algorithm as long as all tensors agree on it, so dimensions are sorted by p's stride first.
void collapse(Parameter& x, const TensorRef (&tensor)[role_count], int roles) {
  const int64_t dim = tensor[role_p].dim();
  const int64_t* sizes = tensor[role_p].sizes();
  const int64_t outer = dim >= 2 ? 1 : 0;  // a vector is one row
  std::vector<int64_t> order;
  for (int64_t d = outer; d < dim; ++d)
    if (sizes[d] != 1) order.push_back(d);
  const int64_t* p_strides = tensor[role_p].strides();
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p_strides[a] > p_strides[b]; });

  x.inner_sizes.clear();
  for (int r = 0; r < roles; ++r) {
    x.operand[r].row_stride = outer ? tensor[r].strides()[0] : 0;
    x.operand[r].inner.clear();
  }
  for (int64_t d : order) {
    bool merges = !x.inner_sizes.empty();
    for (int r = 0; merges && r < roles; ++r)
      merges = x.operand[r].inner.back() == sizes[d] * tensor[r].strides()[d];
    if (merges) {
      x.inner_sizes.back() *= sizes[d];
      for (int r = 0; r < roles; ++r) x.operand[r].inner.back() = tensor[r].strides()[d];
    } else {
      x.inner_sizes.push_back(sizes[d]);
      for (int r = 0; r < roles; ++r) x.operand[r].inner.push_back(tensor[r].strides()[d]);
    }
  }
  if (x.inner_sizes.empty()) {  // one column
    x.inner_sizes.push_back(1);
    for (int r = 0; r < roles; ++r) x.operand[r].inner.push_back(1);
  }

  const StorageType wanted = x.is_double ? storage_f64 : storage_f32;
  x.direct = x.inner_sizes.size() == 1;
  for (int r = 0; x.direct && r < roles; ++r) {
    const Operand& o = x.operand[r];
    x.direct = o.type == wanted && o.inner[0] == 1 && (x.table->rows == 1 || o.row_stride == x.table->cols);
  }
}

// Speculation rests on recovering the old weight from the new one and the state, so both must be stored as computed, and
// the shrink without projection be small. It keeps one number per row, too much for short rows.
Plan plan_for(const Parameter& x) {
  constexpr int64_t shortest_row = 64;
  const TableRow& t = *x.table;
  if (!t.projected || !(x.scalars->delta > 0)) return Plan::untested;  // with delta = 0 no cosine is below the threshold
  if (t.tiles() <= 1) return Plan::one_tile;
  const bool recovers = x.direct && x.rule != sgd_project_buffer && recoverable(x.scalars->decay);
  return recovers && t.cols >= shortest_row ? Plan::speculative : Plan::split;
}

// The tiles that predict measures: at least 16 rows. If rows pass the test by chance, as 8% of random ones do at
// delta = 0.1, all of 16 hardly ever do.
int64_t predicted_tiles(const TableRow& t) {
  if (t.segments() > 1) return 1;
  return std::min((16 + t.tile_rows - 1) / t.tile_rows, t.tiles());
}

// One tile, in memory or gathered.

struct Tile {
  int64_t row, rows, col, cols;  // rows [row, row + rows), columns [col, col + cols)
  int64_t size() const { return rows * cols; }
};

Tile tile_at(const TableRow& t, int64_t index) {
  const int64_t segments = t.segments();
  const int64_t row = index / segments * t.tile_rows, col = index % segments * t.tile_cols;
  return {row, std::min(t.tile_rows, t.rows - row), col, std::min(t.tile_cols, t.cols - col)};
}

// Calls run(offset in operand, its stride, offset in tile, its stride, count) for runs of elements that cover the tile.
template <class Run>
void for_each_run(const Parameter& x, const Operand& o, const Tile& tile, const Run& run) {
  const auto& sizes = x.inner_sizes;
  const int last = int(sizes.size()) - 1;
  if (last == 0 && o.row_stride < o.inner[0]) {  // columns lie further apart than rows: run along the rows
    for (int64_t c = 0; c < tile.cols; ++c)
      run(tile.row * o.row_stride + (tile.col + c) * o.inner[0], o.row_stride, c, tile.cols, tile.rows);
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t c = 0; c < tile.cols;) {
      int64_t rest = tile.col + c, offset = (tile.row + r) * o.row_stride;
      const int64_t count = std::min(sizes[last] - rest % sizes[last], tile.cols - c);
      for (int d = last; d >= 0; rest /= sizes[d], --d) offset += rest % sizes[d] * o.inner[d];
      run(offset, o.inner[last], r * tile.cols + c, 1, count);
      c += count;
    }
  }
}

template <class T>
void gather(const Kernels<T>& k, const Parameter& x, Role role, const Tile& tile, T* to) {
  const Operand& o = x.operand[role];
  for_each_run(x, o, tile, [&](int64_t at, int64_t stride, int64_t place, int64_t step, int64_t n) {
    k.gather[o.type](o.data + at * o.itemsize(), stride, to + place, step, n);
  });
}

template <class T>
void scatter(const Kernels<T>& k, const Parameter& x, Role role, const Tile& tile, const T* from) {
  const Operand& o = x.operand[role];
  for_each_run(x, o, tile, [&](int64_t at, int64_t stride, int64_t place, int64_t step, int64_t n) {
    k.scatter[o.type](from + place, step, o.data + at * o.itemsize(), stride, n);
  });
}

// A thread's scratch: u of the rows in flight, and for tiles that have to be gathered one tile of each role.
struct Scratch {
  char* base;
  int64_t tile_bytes;

  template <class T>
  T* u() const {
    return reinterpret_cast<T*>(base);
  }
  template <class T>
  T* gathered(Role role) const {
    return reinterpret_cast<T*>(base + (rows_in_flight + role) * tile_bytes);
  }
};

// The tile as the kernels want it. What a gathered tile writes reaches the parameter with store().
template <class T>
class TileAccess {
 public:
  TileAccess(const Kernels<T>& k, const Parameter& x, const Tile& tile, const Scratch& scratch, bool with_state)
      : kernels_(k), parameter_(x), tile_(tile) {
    data.p = get(role_p, scratch);
    data.g = get(role_g, scratch);
    data.m = with_state ? get(role_m, scratch) : nullptr;
    data.v = with_state ? get(role_v, scratch) : nullptr;
  }
  void store() const {
    if (parameter_.direct) return;
    scatter(kernels_, parameter_, role_p, tile_, data.p);
    if (data.m) scatter(kernels_, parameter_, role_m, tile_, data.m);
    if (data.v) scatter(kernels_, parameter_, role_v, tile_, data.v);
  }
  TileData<T> data;

 private:
  T* get(Role role, const Scratch& scratch) {
    const Operand& o = parameter_.operand[role];
    if (!o.data) return nullptr;
    if (parameter_.direct) return reinterpret_cast<T*>(o.data) + tile_.row * parameter_.table->cols + tile_.col;
    T* to = scratch.gathered<T>(role);
    gather(kernels_, parameter_, role, tile_, to);
    return to;
  }
  const Kernels<T>& kernels_;
  const Parameter& parameter_;
  const Tile tile_;
};

// The stages.

Decision decision_of(const Parameter& x) { return Decision(*x.decision); }

// w, scaled down where the weight is projected.
double decay_of(const Parameter& x, Decision decision) {
  return x.scalars->decay * (decision == Decision::none ? 1 : x.scalars->wd_ratio);
}

template <class T>
Coefficients<T> coefficients_of(const Parameter& x) {
  return Coefficients<T>(*x.scalars, x.operand[role_v].data != nullptr, x.t);
}

template <class T>
TileSums measure(const Kernels<T>& k, const Parameter& x, const TileData<T>& data, const Tile& tile) {
  TileSums s{};
  s.sums = k.measure(data.p, data.g, tile.rows, tile.cols, x.scalars->delta, x.scalars->eps, &s.failed);
  return s;
}

// For rows of several tiles the tiles of a row are added up here, in tile order, else whole tiles.
Decision decide(const Parameter& x) {
  const TableRow& t = *x.table;
  const int64_t segments = t.segments(), tiles = t.tiles();
  double failed = 0;
  Sums layer{0, 0, 0};
  for (int64_t i = 0; i < tiles; i += segments) {
    Sums row{0, 0, 0};
    for (int64_t j = i; j < i + segments; ++j) {
      row.pg += x.tiles[j].sums.pg;
      row.gg += x.tiles[j].sums.gg;
      row.pp += x.tiles[j].sums.pp;
    }
    failed += segments == 1 ? x.tiles[i].failed : !below_threshold(row, x.scalars->delta, x.scalars->eps, double(t.cols));
    layer.pg += row.pg;
    layer.gg += row.gg;
    layer.pp += row.pp;
  }
  if (failed == 0) return Decision::channel;
  const bool below = below_threshold(layer, x.scalars->delta, x.scalars->eps, double(t.rows) * double(t.cols));
  return below ? Decision::layer : Decision::none;
}

// Whether the chosen view is wider than a tile.
bool view_spans_tiles(const Parameter& x) {
  return (decision_of(x) == Decision::layer && x.table->tiles() > 1) ||
         (decision_of(x) == Decision::channel && x.table->segments() > 1);
}

// The projection c of every view of several tiles, written to each of its tiles.
void project_views(const Parameter& x) {
  const int64_t tiles = x.table->tiles();
  const int64_t width = decision_of(x) == Decision::layer ? tiles : x.table->segments();
  for (int64_t i = 0; i < tiles; i += width) {
    double pu = 0, pp = 0;
    for (int64_t j = i; j < i + width; ++j) {
      pu += x.tiles[j].pu;
      pp += x.tiles[j].sums.pp;
    }
    const double c = projection(pu, pp, x.scalars->eps);
    for (int64_t j = i; j < i + width; ++j) x.tiles[j].projection = c;
  }
}

template <class T>
void update(const Kernels<T>& k, const Parameter& x, const TileData<T>& data, const Tile& tile, const Scratch& scratch,
            double c) {
  const RuleKernels<T>& rule = k.rule[x.rule];
  const Decision decision = decision_of(x);
  const T decay = T(decay_of(x, decision));
  if (decision == Decision::none || view_spans_tiles(x)) {
    rule.update(data, tile.size(), coefficients_of<T>(x), T(c), decay);
  } else if (decision == Decision::layer) {
    rule.update_projected(data, scratch.u<T>(), 1, tile.size(), coefficients_of<T>(x), decay);
  } else {
    rule.update_projected(data, scratch.u<T>(), tile.rows, tile.cols, coefficients_of<T>(x), decay);
  }
}

template <class T>
void sweep(const Kernels<T>& k, const Parameter& x, const TileData<T>& data, const Tile& tile, const Scratch& scratch,
           TileSums* sums) {
  T* shrink = x.predict_channel ? reinterpret_cast<T*>(x.shrink) + tile.row : nullptr;
  const Guess<T> guess{x.scalars->delta, x.scalars->eps, T(decay_of(x, Decision::none)), T(decay_of(x, Decision::channel)),
                       shrink};
  k.rule[x.rule].sweep(data, scratch.u<T>(), tile.rows, tile.cols, coefficients_of<T>(x), guess, sums);
}

// Each row was moved with the shrink of the guess; now the decision is known, and so is the shrink it should have had.
template <class T>
void finish(const Kernels<T>& k, const Parameter& x, TileData<T> data, const Tile& tile, const TileSums& sums) {
  const Decision decision = decision_of(x);
  const Coefficients<T> c = coefficients_of<T>(x);
  const T plain = T(decay_of(x, Decision::none));
  T is = T(decay_of(x, decision));
  if (view_spans_tiles(x)) is -= c.step_size * T(sums.projection);
  if (!x.predict_channel) {
    if (decision != Decision::none) k.rule[x.rule].finish(data, tile.size(), c, plain, is);
    return;
  }
  if (decision == Decision::channel && sums.deferred == 0) return;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const T shrink = reinterpret_cast<const T*>(x.shrink)[tile.row + row];
    const T was = recoverable(shrink) ? shrink : plain;
    if (decision == Decision::channel) is = shrink;
    const int64_t offset = row * tile.cols;
    const TileData<T> t{data.p + offset, data.g + offset, data.m ? data.m + offset : nullptr,
                        data.v ? data.v + offset : nullptr};
    if (was != is) k.rule[x.rule].finish(t, tile.cols, c, was, is);
  }
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

// Counts one tile of a stage; true for the last.
bool is_last(std::atomic<int64_t>& finished, int64_t tiles) {
  return finished.fetch_add(1, std::memory_order_acq_rel) + 1 == tiles;
}

enum class Stage { update, measure_update, measure, dot, update_measured, predict, sweep, finish };

// One stage of one parameter: a run of jobs, one per tile.
struct Segment {
  Parameter* parameter;
  Stage stage;
  int64_t begin, end;
};

template <class T>
void run_job(const Kernels<T>& k, Parameter& x, Stage stage, int64_t job, const Scratch& scratch) {
  const TableRow& t = *x.table;
  const int64_t tiles = t.tiles();
  // Update runs backwards: what measure read last is still in cache.
  const int64_t index = stage == Stage::update_measured ? tiles - 1 - job : job;
  const Tile tile = tile_at(t, index);
  TileSums& sums = x.tiles[index];
  switch (stage) {
    case Stage::update: {
      const TileAccess<T> access(k, x, tile, scratch, true);
      update(k, x, access.data, tile, scratch, 0);
      access.store();
      break;
    }
    case Stage::measure_update: {
      const TileAccess<T> access(k, x, tile, scratch, true);
      sums = measure(k, x, access.data, tile);
      *x.decision = uint8_t(decide(x));
      update(k, x, access.data, tile, scratch, 0);
      access.store();
      break;
    }
    case Stage::measure: {
      sums = measure(k, x, TileAccess<T>(k, x, tile, scratch, false).data, tile);
      if (!is_last(x.measured_tiles, tiles)) break;
      *x.decision = uint8_t(decide(x));
      x.decided.store(true, std::memory_order_release);
      break;
    }
    case Stage::dot: {
      wait_for(x.decided);
      if (!view_spans_tiles(x)) break;
      sums.pu = k.rule[x.rule].dot(TileAccess<T>(k, x, tile, scratch, true).data, tile.size(), coefficients_of<T>(x));
      if (!is_last(x.dotted_tiles, tiles)) break;
      project_views(x);
      x.dotted.store(true, std::memory_order_release);
      break;
    }
    case Stage::update_measured: {
      wait_for(x.decided);
      const bool spans = view_spans_tiles(x);
      if (spans) wait_for(x.dotted);
      const TileAccess<T> access(k, x, tile, scratch, true);
      update(k, x, access.data, tile, scratch, spans ? sums.projection : 0);
      access.store();
      break;
    }
    case Stage::predict: {
      if (measure(k, x, TileAccess<T>(k, x, tile, scratch, false).data, tile).failed > 0)
        x.predict_channel.store(false, std::memory_order_relaxed);
      if (is_last(x.predicted_tiles, predicted_tiles(t))) x.predicted.store(true, std::memory_order_release);
      break;
    }
    case Stage::sweep: {
      wait_for(x.predicted);
      sweep(k, x, TileAccess<T>(k, x, tile, scratch, true).data, tile, scratch, &sums);
      if (!is_last(x.measured_tiles, tiles)) break;
      *x.decision = uint8_t(decide(x));
      if (view_spans_tiles(x)) project_views(x);
      x.decided.store(true, std::memory_order_release);
      break;
    }
    case Stage::finish: {
      wait_for(x.decided);
      finish(k, x, TileAccess<T>(k, x, tile, scratch, true).data, tile, sums);
      break;
    }
  }
}

// One step over a bucket.
class Step {
 public:
  // Returns the index of the first parameter that does not fit its row of the table, -1 if all do. Writes nothing.
  int64_t bind(const TensorList& params, const TensorList& grads, const TensorList (&moments)[2], const TensorList& steps,
               const TableRow* table, int64_t size, const Scalars* scalars, StorageType dtype, bool adaptive,
               uint8_t* decisions, TileSums* sums);
  void run();

 private:
  void schedule();
  void add(Parameter* x, Stage stage, int64_t jobs);
  int64_t jobs() const { return segments_.empty() ? 0 : segments_.back().end; }

  std::unique_ptr<Parameter[]> parameters_;
  std::vector<Segment> segments_;
  int64_t count_ = 0, elements_ = 0, tile_bytes_ = 0, shrink_bytes_ = 0;
  bool gathers_ = false;
};

int64_t Step::bind(const TensorList& params, const TensorList& grads, const TensorList (&moments)[2],
                   const TensorList& steps, const TableRow* table, int64_t size, const Scalars* scalars, StorageType dtype,
                   bool adaptive, uint8_t* decisions, TileSums* sums) {
  parameters_.reset(new Parameter[size]);
  const int roles = 2 + !moments[0].empty() + !moments[1].empty();
  const bool is_double = dtype == storage_f64;
  for (int64_t i = 0; i < size; ++i) {
    const TableRow& row = table[i];
    const TensorRef none(nullptr);
    const TensorRef tensor[role_count] = {params[i], grads[i], roles > 2 ? moments[0][i] : none,
                                          roles > 3 ? moments[1][i] : none};
    const int64_t numel = tensor[role_p].numel();
    if (tensor[role_g].dtype() == aoti_torch_dtype_bool() && tensor[role_g].numel() == 0) continue;  // no gradient

    const int64_t dim = tensor[role_p].dim();
    const int64_t rows = dim < 2 ? 1 : tensor[role_p].sizes()[0];
    bool fits = storage_type(tensor[role_p].dtype()) == dtype && row.projected == (dim >= 2) && row.rows == rows &&
                row.rows * row.cols == numel;
    for (int r = 0; fits && r < roles; ++r)
      fits = tensor[r].is_dense_on_cpu() && tensor[r].same_sizes(tensor[role_p]) &&
             storage_type(tensor[r].dtype()) < storage_count;
    if (fits && !steps.empty())
      fits = steps[i].is_dense_on_cpu() && steps[i].numel() == 1 && steps[i].dtype() == aoti_torch_dtype_float32();
    if (!fits) return i;

    Parameter& x = parameters_[count_++];
    x.table = &row;
    x.tiles = sums + row.first_tile;
    x.decision = decisions + i;
    x.scalars = scalars + row.group;
    x.rule = rule_index(adaptive, *x.scalars, roles > 2);
    x.step = steps.empty() ? nullptr : static_cast<float*>(steps[i].data());
    x.is_double = is_double;
    for (int r = 0; r < roles; ++r) {
      x.operand[r].data = static_cast<char*>(tensor[r].data());
      x.operand[r].type = storage_type(tensor[r].dtype());
    }
    collapse(x, tensor, roles);
    for (int r = 0; !x.direct && r < roles; ++r)  // rows in a row never share memory
      if (r != role_g && tensor[r].overlaps()) return i;
    x.plan = plan_for(x);
    if (x.plan == Plan::speculative) {
      x.shrink_offset = shrink_bytes_;
      shrink_bytes_ += (row.rows * (is_double ? 8 : 4) + 63) / 64 * 64;
    }
    elements_ += numel;
    gathers_ |= !x.direct;
    tile_bytes_ = std::max<int64_t>(tile_bytes_, (row.tile_rows * row.tile_cols * (is_double ? 8 : 4) + 63) / 64 * 64);
  }
  return -1;
}

void Step::add(Parameter* x, Stage stage, int64_t count) {
  if (x && count > 0) segments_.push_back({x, stage, jobs(), jobs() + count});
}

// Lines up the jobs. A speculative parameter's sweep follows the prediction of the next one, and its finish the sweep of
// the next one, so that no thread waits for the last tiles of another.
void Step::schedule() {
  Parameter *swept = nullptr, *predicted = nullptr;
  const auto tiles = [](const Parameter* x) { return x && x->table->rows * x->table->cols > 0 ? x->table->tiles() : 0; };
  const auto proceed = [&](Parameter* x) {
    if (x) add(x, Stage::predict, predicted_tiles(*x->table));
    add(predicted, Stage::sweep, tiles(predicted));
    add(swept, Stage::finish, tiles(swept));
    swept = predicted;
    predicted = x;
  };
  for (int64_t i = 0; i < count_; ++i) {
    Parameter* x = &parameters_[i];
    switch (x->plan) {
      case Plan::untested:
        add(x, Stage::update, tiles(x));
        break;
      case Plan::one_tile:
        add(x, Stage::measure_update, tiles(x));
        break;
      case Plan::split:
        add(x, Stage::measure, tiles(x));
        add(x, Stage::dot, tiles(x));
        add(x, Stage::update_measured, tiles(x));
        break;
      case Plan::speculative:
        proceed(x);
        break;
    }
  }
  proceed(nullptr);
  proceed(nullptr);
}

void Step::run() {
  // Below so many elements a second thread costs more than it brings: the grain that torch uses too.
  constexpr int64_t elements_per_thread = 32768;
  const InstructionSet& set = instructions();
  // Everything that can fail comes before the first write.
  schedule();
  const int64_t threads = std::max<int64_t>(
      1, std::min<int64_t>({torch::stable::get_num_threads(), jobs(), elements_ / elements_per_thread}));
  const int64_t scratch_bytes = tile_bytes_ * (rows_in_flight + (gathers_ ? role_count : 0));
  std::unique_ptr<char[]> memory(new char[threads * scratch_bytes + shrink_bytes_ + 64]);
  char* scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);

  for (int64_t i = 0; i < count_; ++i) {
    Parameter& x = parameters_[i];
    if (x.step) x.t = *x.step += 1;
    *x.decision = uint8_t(Decision::none);
    x.shrink = scratch + threads * scratch_bytes + x.shrink_offset;
    if (x.table->segments() > 1) x.predict_channel = false;  // a row's shrink is not known before its last tile
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    const Scratch mine{scratch + begin * scratch_bytes, tile_bytes_};
    auto segment = segments_.begin();
    for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs();) {
      while (job >= segment->end) ++segment;
      Parameter& x = *segment->parameter;
      if (x.is_double) {
        run_job(set.f64, x, segment->stage, job - segment->begin, mine);
      } else {
        run_job(set.f32, x, segment->stage, job - segment->begin, mine);
      }
    }
  });
}

}  // namespace

int64_t layout() { return layout_version; }

std::string instruction_set() { return instructions().name; }

void step(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::Tensor;
  using torch::stable::detail::to;
  const TensorList params(stack[0]), grads(stack[1]), moments[2] = {TensorList(stack[2]), TensorList(stack[3])},
                   steps(stack[4]);
  const Tensor decisions = to<Tensor>(stack[5]), sums = to<Tensor>(stack[6]), table = to<Tensor>(stack[7]),
               scalars = to<Tensor>(stack[8]);
  const auto dtype = StorageType(to<int64_t>(stack[9]));
  const bool adaptive = to<bool>(stack[10]), check_only = to<bool>(stack[11]);

  Step step;
  const int64_t stale = step.bind(
      params, grads, moments, steps, static_cast<const TableRow*>(table.const_data_ptr()), table.size(0),
      static_cast<const Scalars*>(scalars.const_data_ptr()), dtype, adaptive,
      static_cast<uint8_t*>(decisions.mutable_data_ptr()), static_cast<TileSums*>(sums.mutable_data_ptr()));
  if (stale < 0 && !check_only) step.run();
  stack[0] = torch::stable::detail::from(stale);
}

void advise_huge_pages(torch::stable::Tensor storage) {
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(storage.mutable_data_ptr());
  const uintptr_t end = (begin + storage.numel() * storage.element_size()) / page * page;
  const uintptr_t first = (begin + page - 1) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // only advice: may fail
#else
  (void)storage;
#endif
}

}  // namespace fused_adamp
