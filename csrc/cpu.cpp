// One AdamP or SGDP step over a bucket on the CPU.
//
// A parameter's tiles pass through stages, by one of four plans:
//
//   settled      update                                the decision needs no test: a vector, delta = 0, a forced projection
//   one_tile     measure, decide, update               at once, in cache
//   split        measure, decide, dot, update          any storage
//   speculative  predict, sweep, decide, finish        weight and state keep what was computed
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
//   finish   puts weights right where it was not; most often there is nothing to do              reads p m v, writes p
//   share    what a parameter's needs ask for: g.g, measure or dot                                reads g, p g or p g m v
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
#include <deque>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>

#include "bucket.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_adamp {

// Tensors.

namespace {

int64_t element_size(int32_t dtype) {
  static const int32_t eight[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_int64()};
  static const int32_t two[] = {aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(), aoti_torch_dtype_int16()};
  if (std::find(std::begin(eight), std::end(eight), dtype) != std::end(eight)) return 8;
  if (std::find(std::begin(two), std::end(two), dtype) != std::end(two)) return 2;
  return dtype == aoti_torch_dtype_float32() ? 4 : 1;  // others are refused by their dtype
}

}  // namespace

TensorRef::TensorRef(AtenTensorHandle handle) : exists(true) {
  int32_t device, layout;
  int64_t *its_sizes, *its_strides;
  void* its_data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &its_sizes));
  sizes = its_sizes;
  numel = 1;
  for (int64_t d = 0; d < dim; ++d) numel *= sizes[d];
  static const int32_t cpu = aoti_torch_device_type_cpu(), strided = aoti_torch_layout_strided();
  on_cpu = device == cpu && layout == strided;
  if (!on_cpu) return;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &its_strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &its_data));
  strides = its_strides;
  data = static_cast<char*>(its_data);
  // Offloading tools free a tensor's storage under it.
  int64_t bytes, offset, last = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
  for (int64_t d = 0; d < dim; ++d) last += (sizes[d] - 1) * strides[d];
  if (numel > 0) on_cpu = (offset + last + 1) * element_size(dtype) <= bytes;
}

bool TensorRef::same_sizes(const TensorRef& other) const {
  return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
}

bool TensorRef::overlaps() const {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t end = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= end) return numel > 0;
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

Shared::Shared(const TensorList& list)
    : needs(reinterpret_cast<uint8_t*>(list[0].data)),
      shares(reinterpret_cast<Shares*>(list[1].data)),
      rows(reinterpret_cast<ViewSums*>(list[2].data)),
      verdicts(reinterpret_cast<Verdict*>(list[3].data)),
      row_projections(reinterpret_cast<double*>(list[4].data)),
      swept(reinterpret_cast<Swept*>(list[5].data)),
      shrink(list[6].data) {}

namespace {

StorageType storage_type(int32_t dtype) {
  static const int32_t known[storage_count] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                               aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return StorageType(std::find(known, known + storage_count, dtype) - known);
}

int64_t itemsize(StorageType type) { return type == storage_f64 ? 8 : type == storage_f32 ? 4 : 2; }

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

// From tensors to parameters.

RuleIndex rule_index(bool adaptive, const Scalars& s, bool stateful) {
  if (adaptive) return s.nesterov ? adam_nesterov : adam;
  if (!stateful) return sgd_no_buffer;
  if (s.nesterov) return sgd_nesterov;
  return s.project_buffer ? sgd_project_buffer : sgd;
}

bool is_contiguous(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int64_t expected = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Sets strides, merging the dimensions beyond dim 0 wherever all of the parameter's tensors allow it. The order within a
// row means nothing to the algorithm as long as all tensors agree on it, so dimensions are sorted by p's stride first.
void collapse(Parameter& x, const TensorRef (&tensor)[role_count]) {
  const int64_t dim = tensor[role_p].dim;
  const int64_t* sizes = tensor[role_p].sizes;
  x.dense = true;
  for (int r = 0; x.dense && r < role_count; ++r)
    x.dense = !tensor[r].exists || is_contiguous(dim, sizes, tensor[r].strides);
  if (x.dense) return;  // as most are
  const int64_t outer = dim >= 2 ? 1 : 0;  // a vector is one row
  std::vector<int64_t> order;
  for (int64_t d = outer; d < dim; ++d)
    if (sizes[d] != 1) order.push_back(d);
  const int64_t* strides[role_count] = {};
  for (int r = 0; r < role_count; ++r) strides[r] = tensor[r].strides;
  if (!x.seed) {  // of which every element of a row draws its own number
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[role_p][a] > strides[role_p][b]; });
  }

  x.layout.reset(new Layout);
  Layout& layout = *x.layout;
  const auto merges = [&](int64_t d) {
    if (layout.inner_sizes.empty()) return false;
    for (int r = 0; r < role_count; ++r)
      if (strides[r] && layout.inner[r].back() != sizes[d] * strides[r][d]) return false;
    return true;
  };
  for (int64_t d : order) {
    const bool merged = merges(d);
    if (merged) {
      layout.inner_sizes.back() *= sizes[d];
    } else {
      layout.inner_sizes.push_back(sizes[d]);
    }
    for (int r = 0; r < role_count; ++r) {
      if (!strides[r]) continue;
      if (merged) layout.inner[r].pop_back();
      layout.inner[r].push_back(strides[r][d]);
    }
  }
  if (order.empty()) {  // one column
    layout.inner_sizes.push_back(1);
    for (auto& inner : layout.inner) inner.push_back(1);
  }
  x.dense = true;
  for (int r = 0; r < role_count; ++r) {
    if (!strides[r]) continue;
    layout.row_stride[r] = outer ? strides[r][0] : 0;
    bool dense = x.table->rows == 1 || layout.row_stride[r] == x.table->cols;
    int64_t expected = 1;
    for (int d = int(layout.inner_sizes.size()) - 1; d >= 0; expected *= layout.inner_sizes[d--])
      dense &= layout.inner[r][d] == expected;
    x.gathered[r] = !dense;
    x.dense &= dense;
  }
}

// The format that kernels are compiled for, or staging.
void choose_format(Parameter& x, bool halves) {
  const auto is = [&](StorageType p, StorageType g, StorageType state) {
    const auto stored = [&](Role role) { return !x.operand[role].data || x.operand[role].type == state; };
    return x.operand[role_p].type == p && x.operand[role_g].type == g && stored(role_m) && stored(role_v);
  };
  const bool remainder = x.operand[role_remainder].data;
  x.format = x.is_double ? format_f64 : format_f32;
  x.staged = false;
  if (!remainder && !x.seed && is(storage_f32, storage_f32, storage_f32)) return;
  if (!remainder && is(storage_f64, storage_f64, storage_f64)) return;
  if (halves && !x.seed && (x.rule == adam || x.rule == sgd)) {
    if (!remainder && is(storage_f32, storage_f32, storage_bf16)) x.format = format_f32_bf16_state;
    if (is(storage_f16, storage_f16, storage_f16)) x.format = format_f16;
    if (is(storage_bf16, storage_bf16, storage_bf16)) x.format = remainder ? format_remainder_bf16_state : format_bf16;
    if (is(storage_bf16, storage_bf16, storage_f32)) x.format = remainder ? format_remainder : format_bf16_f32_state;
  }
  x.staged = x.format <= format_f64;
}

// Whether other ranks hold parts of a view, so that its projection is given.
bool spans_ranks(const Parameter& x, Decision view) {
  const Sharing sharing = x.table->sharing;
  return view == Decision::layer ? sharing != Sharing::local : view == Decision::channel && sharing == Sharing::split;
}

// Whether a view is wider than a tile, or than what is here.
bool spans_tiles(const Parameter& x, Decision view) {
  const TableRow& t = *x.table;
  return spans_ranks(x, view) || (view == Decision::layer ? t.tiles() > 1 : view == Decision::channel && t.segments() > 1);
}

// Speculation keeps one number per row: for the step, or from measure to step, which is too much memory for short rows
// (fused_adamp/backends/cpu.py).
bool keeps_shrink(const TableRow& t) { return t.local() || t.cols >= 64; }

// Speculation rests on recovering the old weight from the new one and the state, so both must be stored as computed, and
// the shrink without projection be small.
bool recovers(const Parameter& x) {
  const StorageType wanted = x.is_double ? storage_f64 : storage_f32;
  const auto exact = [&](Role role) { return !x.operand[role].data || x.operand[role].type == wanted; };
  const bool keeps = (exact(role_p) || x.operand[role_remainder].data) && exact(role_m) && exact(role_v);
  return keeps && x.rule != sgd_project_buffer && recoverable(x.scalars->lr * x.scalars->decay) &&
         keeps_shrink(*x.table);
}

Plan plan_for_step(const Parameter& x) {
  if (x.swept && *x.swept != Swept::no) return Plan::finish;
  if (!x.tested) return spans_tiles(x, x.settled) && !spans_ranks(x, x.settled) ? Plan::split : Plan::settled;
  if (x.table->tiles() <= 1) return Plan::one_tile;
  return recovers(x) ? Plan::speculative : Plan::split;
}

Plan plan_for_measure(const Parameter& x, bool final) {
  if (!x.needs) return Plan::none;
  const bool whole = (x.needs & need_test) && (x.needs & need_dot);
  return final && whole && recovers(x) ? Plan::speculative : Plan::share;
}

// The tiles that predict measures: at least 16 rows. If rows pass the test by chance, as 8% of random ones do at
// delta = 0.1, all of 16 hardly ever do. None where a row is not in one piece: its shrink is not known before its last
// part, so the guess is that nothing is projected.
int64_t predicted_tiles(const TableRow& t) {
  if (t.segments() > 1 || t.sharing == Sharing::split) return 0;
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

// A dimension of a tile: how many elements, and how far apart they are in the parameter's tensor and in the tile.
struct Axis {
  int64_t size, tensor, tile;
};

// The axes of a tile of whole rows, in the order that walks through the tensor's memory.
std::vector<Axis> axes_of(const Layout& layout, int role, const Tile& tile) {
  std::vector<Axis> axes;
  const auto add = [&](const Axis& axis) {
    if (axis.size != 1) axes.push_back(axis);
  };
  int64_t step = 1;
  for (int d = int(layout.inner_sizes.size()) - 1; d >= 0; step *= layout.inner_sizes[d--])
    add({layout.inner_sizes[d], layout.inner[role][d], step});
  add({tile.rows, layout.row_stride[role], tile.cols});
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.tensor > b.tensor; });
  size_t last = 0;  // of those that are merged
  for (size_t i = 1; i < axes.size(); ++i) {
    const Axis inner = axes[i];
    if (axes[last].tensor == inner.size * inner.tensor && axes[last].tile == inner.size * inner.tile) {
      axes[last] = {axes[last].size * inner.size, inner.tensor, inner.tile};
    } else {
      axes[++last] = inner;
    }
  }
  axes.resize(std::min(axes.size(), last + 1));
  return axes;
}

// to[c * to_stride + r] = from[r * from_stride + c]
template <class Element>
void transpose(const Element* from, int64_t from_stride, Element* to, int64_t to_stride, int64_t rows, int64_t cols) {
  constexpr int64_t line = 64 / sizeof(Element);  // elements of a cache line: a block of as many rows writes whole lines
  for (int64_t first = 0; first < rows; first += line) {
    const int64_t end = std::min(first + line, rows);
    // Lines that lie a page apart are beyond the hardware's prefetchers. Measured: a fifth of the step's time.
    for (int64_t r = end; r < std::min(end + line, rows); ++r) __builtin_prefetch(from + r * from_stride);
    int64_t c = 0;
#if defined(__SSE2__)
    if constexpr (sizeof(Element) == 4) {
      for (; c + 4 <= cols; c += 4) {
        for (int64_t next = c + 16; next < std::min(c + 20, cols); ++next) __builtin_prefetch(to + next * to_stride + first, 1);
        int64_t r = first;
        for (; r + 4 <= end; r += 4) {
          __m128 x[4];
          for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_ps(reinterpret_cast<const float*>(from + (r + i) * from_stride + c));
          _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
          for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float*>(to + (c + i) * to_stride + r), x[i]);
        }
        for (; r < end; ++r)
          for (int i = 0; i < 4; ++i) to[(c + i) * to_stride + r] = from[r * from_stride + c + i];
      }
    }
#endif
    for (; c < cols; ++c)
      for (int64_t r = first; r < end; ++r) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

// Copies a tile out of a tensor, or back.
template <class Element, bool back>
void copy(const Axis* axes, size_t count, Element* tensor, Element* tile) {
  if (count > 1) {
    const Axis &a = axes[count - 2], &b = axes[count - 1];
    if (count == 2 && a.tile == 1 && b.tensor == 1) {
      return back ? transpose(tile, b.tile, tensor, a.tensor, b.size, a.size)
                  : transpose(tensor, a.tensor, tile, b.tile, a.size, b.size);
    }
    for (int64_t i = 0; i < axes->size; ++i)
      copy<Element, back>(axes + 1, count - 1, tensor + i * axes->tensor, tile + i * axes->tile);
    return;
  }
  const Axis axis = count ? *axes : Axis{1, 1, 1};
  if (axis.tensor == 1 && axis.tile == 1) {
    std::memcpy(back ? tensor : tile, back ? tile : tensor, axis.size * sizeof(Element));
  } else {
    for (int64_t i = 0; i < axis.size; ++i) {
      Element &outside = tensor[i * axis.tensor], &inside = tile[i * axis.tile];
      (back ? outside : inside) = back ? inside : outside;
    }
  }
}

// The same of a part of a row, a run of the innermost dimension at a time.
template <class Element, bool back>
void copy_part(const Layout& layout, int role, const Tile& tile, Element* tensor, Element* to) {
  const auto& sizes = layout.inner_sizes;
  const auto& inner = layout.inner[role];
  const int last = int(sizes.size()) - 1;
  for (int64_t c = 0; c < tile.cols;) {
    int64_t rest = tile.col + c, offset = tile.row * layout.row_stride[role];
    const Axis run{std::min(sizes[last] - rest % sizes[last], tile.cols - c), inner[last], 1};
    for (int d = last; d >= 0; rest /= sizes[d], --d) offset += rest % sizes[d] * inner[d];
    copy<Element, back>(&run, 1, tensor + offset, to + c);
    c += run.size;
  }
}

// Between a tensor that lies otherwise and a tile's scratch.
template <bool back>
void copy(const Parameter& x, int role, const Tile& tile, char* scratch) {
  const Operand& o = x.operand[role];
  const auto run = [&](auto element) {
    using Element = decltype(element);
    auto* const tensor = reinterpret_cast<Element*>(o.data);
    auto* const to = reinterpret_cast<Element*>(scratch);
    if (tile.cols < x.table->cols) return copy_part<Element, back>(*x.layout, role, tile, tensor, to);
    std::vector<Axis> axes = axes_of(*x.layout, role, tile);
    const auto unit = std::find_if(axes.begin(), axes.end(), [](const Axis& axis) { return axis.tile == 1; });
    if (unit != axes.end() && unit + 1 != axes.end()) std::rotate(unit, unit + 1, axes.end() - 1);  // next to the last
    copy<Element, back>(axes.data(), axes.size(), tensor + tile.row * x.layout->row_stride[role], to);
  };
  switch (itemsize(o.type)) {
    case 2: return run(uint16_t());
    case 4: return run(uint32_t());
    default: return run(uint64_t());
  }
}

// A thread's scratch: u of the rows in flight, the stage, and for tiles that have to be gathered one tile of each role.
struct Scratch {
  char* base;
  int64_t tile_bytes, stage_bytes;

  template <class T>
  T* u() const {
    return reinterpret_cast<T*>(base);
  }
  template <class T>
  T* stage() const {
    return reinterpret_cast<T*>(base + rows_in_flight * tile_bytes);
  }
  char* gathered(int role) const { return base + (rows_in_flight + role) * tile_bytes + stage_bytes; }
};

// Which of a tile's tensors a stage reads.
constexpr int only_g = 1 << role_g, p_and_g = only_g | 1 << role_p | 1 << role_remainder, everything = (1 << role_count) - 1;

// The tile as the kernels want it. What a gathered tile writes reaches the parameter with store().
template <class F, class T = typename F::Number>
class TileAccess {
 public:
  TileAccess(const Parameter& x, const Tile& tile, const Scratch& scratch, int roles)
      : parameter_(x), tile_(tile), storage_{} {
    const int64_t first = tile.row * x.table->cols + tile.col;
    for (int role = 0; role < role_count; ++role) {
      const Operand& o = x.operand[role];
      if (!o.data || !(roles >> role & 1)) continue;
      storage_.type[role] = o.type;
      storage_.staged[role] = o.type != (sizeof(T) == 8 ? storage_f64 : storage_f32);
      if (!x.gathered[role]) {
        storage_.data[role] = o.data + first * itemsize(o.type);
      } else {
        storage_.data[role] = scratch.gathered(role);
        copy<false>(x, role, tile, storage_.data[role]);
      }
    }
    if (!x.staged) {
      data = {at<typename F::P>(role_p), at<typename F::G>(role_g), at<typename F::State>(role_m),
              at<typename F::State>(role_v), nullptr, nullptr};
    } else {
      storage_.stochastic = x.seed != nullptr;
      storage_.key[0] = x.key[0];
      storage_.key[1] = x.key[1];
      storage_.first = uint32_t(x.table->first_number + tile.row * x.table->row_numbers + tile.col);
      data = {};
      data.storage = &storage_;
      data.stage = scratch.stage<T>();
    }
  }
  TileAccess(const TileAccess&) = delete;
  TileAccess& operator=(const TileAccess&) = delete;

  void store() const {
    store_weight();
    for (Role role : {role_m, role_v}) put_back(role);
  }
  void store_weight() const {
    for (Role role : {role_p, role_remainder}) put_back(role);
  }
  TileData<F> data;

 private:
  void put_back(Role role) const {
    if (storage_.data[role] && parameter_.gathered[role]) copy<true>(parameter_, role, tile_, storage_.data[role]);
  }
  template <class Stored>
  typename Stored::Pointer at(Role role) const {
    if constexpr (std::is_same<Stored, WithRemainder>::value) {
      return {reinterpret_cast<uint16_t*>(storage_.data[role]), reinterpret_cast<uint16_t*>(storage_.data[role_remainder])};
    } else {
      return reinterpret_cast<typename Stored::Pointer>(storage_.data[role]);
    }
  }
  const Parameter& parameter_;
  const Tile tile_;
  Storage storage_;
};

// The stages.

Decision decision_of(const Parameter& x) { return Decision(*x.decision); }

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

// Where the sums of the tile's rows go. Rows of several tiles are added up by share_sums.
RowShares row_shares(const Parameter& x, const Tile& tile) {
  return {x.rows && x.table->segments() == 1 ? x.rows + tile.row : nullptr, x.needs};
}

template <class F, class T = typename F::Number>
void measure(const Kernels<F>& k, const Parameter& x, const TileData<F>& data, const Tile& tile, TileSums* sums) {
  k.measure(data, tile.rows, tile.cols, coefficients_of<T>(x).scale, x.test, sums, row_shares(x, tile));
}

// The sums of a row of several tiles, or of none, in tile order.
ViewSums sum_row(const Parameter& x, int64_t row) {
  ViewSums sums;
  const int64_t segments = x.table->segments();
  for (int64_t i = row * segments; i < (row + 1) * segments; ++i) sums.add(x.tiles[i].total);
  return sums;
}

// The sums of all tiles, in their order; those of a row first.
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

// The decision, and what the user may ask of the test.
Decision decide(const Parameter& x) {
  if (!x.tested) return x.settled;
  const TableRow& t = *x.table;
  const TileSums all = sum_tiles(x);
  x.results[0] = std::sqrt(all.largest);
  x.results[1] = std::sqrt(all.total.sums.pp);
  if (all.largest < 1) return Decision::channel;
  return cosine_ratio(all.total.sums, x.test, double(t.rows) * double(t.cols)) < 1 ? Decision::layer : Decision::none;
}

// The sums that the other ranks need: of rows whose parts they hold, else of the parameter.
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

// The projection c of every view of several tiles, written to each of its tiles. Rows that other ranks hold parts of have
// theirs in row_projections.
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

// A parameter that other ranks hold parts of keeps the shrink of rows that it has whole under either guess.
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

// Whether some row of a tile that was swept is not where the decision wants it.
bool needs_finish(const Parameter& x, const TileSums& sums) {
  const Decision decision = decision_of(x);
  const bool own = decision == Decision::channel && !spans_tiles(x, decision);
  return sums.unmoved != 0 || !(x.predict_channel ? own : decision == Decision::none);
}

// Each row was moved with the shrink of the guess; now the decision is known, and so is the shrink it should have had.
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

enum class Stage { update, measure_update, measure, dot, update_measured, predict, sweep, finish, share };

// One stage of one parameter: a run of jobs, one per tile.
struct Segment {
  Parameter* parameter;
  Stage stage;
  int64_t begin, end;
};

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
      const TileAccess<F> access(x, tile, scratch, everything);
      finish(k, x, access.data, tile, scratch, sums);
      access.store_weight();
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

// The arguments of an operator: registration.cpp.
struct Arguments {
  explicit Arguments(StableIValue* stack);

  const TensorList params, grads, moments[2], remainders, steps, seeds;
  const torch::stable::Tensor decisions, results, sums, table, scalars;
  const double scale;
  const StorageType dtype, state_dtype;
  const bool adaptive;
  const TensorList shared;
  const bool final;
};

// One pass over a bucket.
class Step {
 public:
  // Returns the index of the first parameter that does not fit its row of the table, -1 if all do. Writes nothing.
  int64_t bind(const Arguments& a);
  void measure(bool final);
  void step();
  double square_norm();

 private:
  void compute_coefficients();
  void schedule();
  void add(Parameter* x, Stage stage, int64_t jobs);
  void prepare();
  void run();
  int64_t jobs() const { return segments_.empty() ? 0 : segments_.back().end; }
  int64_t threads() const;
  int64_t scratch_bytes() const {
    return tile_bytes_ * (rows_in_flight + (gathers_ ? role_count : 0)) + stage_bytes_;
  }

  std::unique_ptr<Parameter[]> parameters_;
  std::unique_ptr<char[]> memory_;
  char* scratch_ = nullptr;
  std::vector<Segment> segments_;
  std::deque<std::vector<int64_t>> strides_;  // of contiguous state whose weight is not
  double scale_ = 1;
  bool adaptive_ = false;
  int64_t count_ = 0, elements_ = 0, tile_bytes_ = 0, stage_bytes_ = 0;
  bool gathers_ = false;
};

int64_t tiles_of(const Parameter* x) { return x && x->table->rows * x->table->cols > 0 ? x->table->tiles() : 0; }

int64_t Step::bind(const Arguments& a) {
  const int64_t size = a.table.size(0);
  const auto* table = static_cast<const TableRow*>(a.table.const_data_ptr());
  const auto* scalars = static_cast<const Scalars*>(a.scalars.const_data_ptr());
  auto* sums = static_cast<TileSums*>(a.sums.mutable_data_ptr());
  parameters_.reset(new Parameter[size]);
  scale_ = a.scale;
  adaptive_ = a.adaptive;
  const bool is_double = a.dtype == storage_f64;
  const Shared shared(a.shared);
  int64_t shrinks = 0;
  const InstructionSet& set = instructions();
  const int32_t no_gradient = aoti_torch_dtype_bool(), int16 = aoti_torch_dtype_int16();
  static const int32_t dtypes[storage_count] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                                aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  // The members' state, or the table of where it lies: contiguous, of one dtype. A step has checked it there.
  const auto listed = [&](const TensorList& list) { return list.size() == 1 && size != 1; };
  const auto address = [&](const TensorList& list, int64_t i) {
    return reinterpret_cast<char*>(reinterpret_cast<const int64_t*>(list[0].data)[i]);
  };
  const auto state = [&](const TensorList& list, int64_t i, const TensorRef& p, int32_t dtype) {
    if (!listed(list)) return list[i];
    TensorRef part = list[0];
    part.data = address(list, i);
    part.dtype = dtype;
    part.dim = p.dim;
    part.numel = p.numel;
    part.sizes = p.sizes;
    part.strides = p.strides;
    if (!is_contiguous(p.dim, p.sizes, p.strides)) {
      strides_.emplace_back(p.dim);
      int64_t stride = 1;
      for (int64_t d = p.dim - 1; d >= 0; stride *= std::max<int64_t>(p.sizes[d--], 1)) strides_.back()[d] = stride;
      part.strides = strides_.back().data();
    }
    return part;
  };
  for (int64_t i = 0; i < size; ++i) {
    const TableRow& row = table[i];
    const TensorRef p = a.params[i], g = a.grads[i];
    const int64_t first_shrink = shrinks;
    if (row.sharing == Sharing::shared && keeps_shrink(row)) shrinks += row.rows;
    if (g.dtype == no_gradient && g.numel == 0) continue;
    const int32_t moment = dtypes[a.state_dtype];
    const TensorRef tensor[role_count] = {p, g, state(a.moments[0], i, p, moment), state(a.moments[1], i, p, moment),
                                          state(a.remainders, i, p, int16)};
    const TensorRef step = listed(a.steps) ? TensorRef() : a.steps[i], seed = a.seeds[i];

    const int64_t rows = p.dim < 2 ? 1 : p.sizes[0];
    bool fits = storage_type(p.dtype) == a.dtype && row.projected == (p.dim >= 2) && row.rows == rows &&
                row.rows * row.cols == p.numel;
    for (int r = 0; fits && r < role_count; ++r) {
      if (!tensor[r].exists) continue;
      fits = tensor[r].on_cpu && tensor[r].same_sizes(p) &&
             (r == role_remainder ? tensor[r].dtype == int16 : storage_type(tensor[r].dtype) < storage_count);
    }
    fits = fits && (!step.exists || (step.on_cpu && step.numel == 1 && step.dtype == aoti_torch_dtype_float32()));
    fits = fits && (!seed.exists || (seed.on_cpu && seed.numel == 1 && seed.dtype == aoti_torch_dtype_int64()));
    if (!fits) return i;

    Parameter& x = parameters_[count_++];
    x.table = &row;
    x.tiles = sums + row.first_tile;
    x.decision = static_cast<uint8_t*>(a.decisions.mutable_data_ptr()) + i;
    x.results = static_cast<double*>(a.results.mutable_data_ptr()) + 2 * i;
    x.scalars = scalars + row.group;
    x.test = Test(x.scalars->delta, x.scalars->eps, !row.local());
    const auto wish = Projection(int(x.scalars->projection));
    if (!a.shared.empty()) {
      x.needs = shared.needs[i];
      x.shares = shared.shares + i;
      x.verdict = shared.verdicts + i;
      x.swept = row.local() ? nullptr : shared.swept + i;
      x.shrink = shared.shrink + first_shrink * (is_double ? 8 : 4);
      if (row.sharing == Sharing::split) {
        x.rows = shared.rows + row.first_row;
        x.row_projections = shared.row_projections + row.first_row;
      }
    }
    x.tested = row.local() && row.projected && wish == Projection::automatic &&
               x.scalars->delta > 0;  // at 0 no cosine is below
    x.settled = !row.local()                 ? Decision(int(x.verdict->decision))
                : !row.projected             ? Decision::none
                : wish == Projection::channel ? Decision::channel
                : wish == Projection::layer   ? Decision::layer
                                              : Decision::none;
    x.rule = rule_index(a.adaptive, *x.scalars, !a.moments[0].empty());
    char* count = listed(a.steps) ? address(a.steps, i) : step.exists ? step.data : nullptr;
    x.step = reinterpret_cast<float*>(count);
    x.seed = seed.exists ? reinterpret_cast<int64_t*>(seed.data) : nullptr;
    x.is_double = is_double;
    for (int r = 0; r < role_count; ++r) {
      if (!tensor[r].exists) continue;
      x.operand[r].data = tensor[r].data;
      x.operand[r].type = r == role_remainder ? storage_bf16 : storage_type(tensor[r].dtype);
    }
    choose_format(x, set.halves);
    collapse(x, tensor);
    for (int r = 0; !x.dense && r < role_count; ++r)  // rows in a row never share memory
      if (r != role_g && tensor[r].exists && tensor[r].overlaps()) return i;
    elements_ += p.numel;
    gathers_ |= !x.dense;
    if (x.staged) stage_bytes_ = staged_blocks * block_size<char>;
    tile_bytes_ = std::max<int64_t>(tile_bytes_, (row.tile_rows * row.tile_cols * (is_double ? 8 : 4) + 63) / 64 * 64);
  }
  return -1;
}

void Step::add(Parameter* x, Stage stage, int64_t count) {
  if (x && count > 0) segments_.push_back({x, stage, jobs(), jobs() + count});
}

// Lines up the jobs. A speculative parameter's sweep follows the prediction of the next one, and its finish the sweep of
// the next one, so that no thread waits for the last tiles of another. On several ranks it is finished in another pass.
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
    const bool here = x.plan == Plan::speculative && x.table->local();
    return here ? (x.table->rows * (x.is_double ? 8 : 4) + 63) / 64 * 64 : 0;
  };
  int64_t bytes = threads() * scratch_bytes();
  for (int64_t i = 0; i < count_; ++i) bytes += shrink_bytes(parameters_[i]);
  memory_.reset(new char[bytes + 64]);
  scratch_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  char* shrink = scratch_ + threads() * scratch_bytes();
  for (int64_t i = 0; i < count_; ++i) {
    Parameter& x = parameters_[i];
    if (shrink_bytes(x)) x.shrink = shrink;
    shrink += shrink_bytes(x);
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
      const auto run = [&](const auto& kernels) { run_job(kernels, x, segment->stage, job - segment->begin, mine); };
      switch (x.format) {
        case format_f32: run(set.f32); break;
        case format_f64: run(set.f64); break;
        case format_f32_bf16_state: run(set.f32_bf16_state); break;
        case format_bf16: run(set.bf16_all); break;
        case format_bf16_f32_state: run(set.bf16_f32_state); break;
        case format_remainder: run(set.remainder); break;
        case format_remainder_bf16_state: run(set.remainder_bf16_state); break;
        case format_f16: run(set.f16); break;
      }
    }
  });
}

// fused_adamp/precision.py, step_key: SplitMix64's finalizer.
void make_key(uint64_t seed, uint32_t (&key)[2]) {
  uint64_t z = (seed + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  key[0] = uint32_t(z);
  key[1] = uint32_t(z >> 32);
}

// For every parameter; its t and scale are known.
void Step::compute_coefficients() {
  for (int64_t i = 0; i < count_; ++i) {
    Parameter& x = parameters_[i];
    const Parameter* last = i > 0 ? &parameters_[i - 1] : nullptr;
    if (last && last->scalars == x.scalars && last->t == x.t) {  // saves two powers
      x.coefficients = last->coefficients;
      x.coefficients_f64 = last->coefficients_f64;
    } else {
      x.coefficients = Coefficients<float>(*x.scalars, adaptive_, x.t, scale_);
      x.coefficients_f64 = Coefficients<double>(*x.scalars, adaptive_, x.t, scale_);
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
      if (x.seed) make_key(uint64_t((*x.seed)++), x.key);
    }
    if (x.step) x.t = *x.step;
    *x.decision = uint8_t(tiles_of(&x) || !x.table->local() ? x.settled : Decision::none);
    if (x.table->local()) x.results[0] = x.results[1] = std::nan("");
    if (x.plan != Plan::split && spans_tiles(x, x.settled)) project_views(x);
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

}  // namespace

int64_t layout() { return layout_version; }

std::string instruction_set() { return instructions().name; }

namespace {

using torch::stable::detail::to;

Arguments::Arguments(StableIValue* stack)
    : params(stack[0]),
      grads(stack[1]),
      moments{TensorList(stack[2]), TensorList(stack[3])},
      remainders(stack[4]),
      steps(stack[5]),
      seeds(stack[6]),
      decisions(to<torch::stable::Tensor>(stack[7])),
      results(to<torch::stable::Tensor>(stack[8])),
      sums(to<torch::stable::Tensor>(stack[9])),
      table(to<torch::stable::Tensor>(stack[10])),
      scalars(to<torch::stable::Tensor>(stack[11])),
      scale(to<double>(stack[12])),
      dtype(StorageType(to<int64_t>(stack[13]))),
      state_dtype(StorageType(to<int64_t>(stack[14]))),
      adaptive(to<bool>(stack[15])),
      shared(stack[16]),
      final(to<bool>(stack[17])) {}

}  // namespace

void measure(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments arguments(stack);
  Step step;
  if (step.bind(arguments) >= 0) throw std::runtime_error("fused_adamp::measure: a parameter does not fit its bucket");
  step.measure(arguments.final);
}

void step(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments arguments(stack);
  Step step;
  const int64_t stale = step.bind(arguments);
  if (stale < 0) step.step();
  stack[0] = torch::stable::detail::from(stale);
}

void first_stale(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments arguments(stack);
  stack[0] = torch::stable::detail::from(Step().bind(arguments));
}

void square_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments arguments(stack);
  Step step;
  const bool fits = step.bind(arguments) < 0;
  stack[0] = torch::stable::detail::from(fits ? step.square_norm() : -1.0);
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
