// From an operator's tensors to parameters. Everything is checked here, before anything is written.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "cpu_step.h"

namespace fused_adamp {

namespace {

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

}  // namespace

const InstructionSet& instructions() {
  const char* wish = std::getenv("FUSED_ADAMP_CPU");
  const InstructionSet* found = find_instructions(wish ? wish : "");
  if (!found)
    throw std::runtime_error(std::string("FUSED_ADAMP_CPU=") + wish +
                             " is not an instruction set that this processor runs: leave it unset, or choose baseline, "
                             "avx2 or avx512");
  return *found;
}

int64_t itemsize(StorageType type) { return type == storage_f64 ? 8 : type == storage_f32 ? 4 : 2; }

namespace {

StorageType storage_type(int32_t dtype) {
  static const int32_t known[storage_count] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                               aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return StorageType(std::find(known, known + storage_count, dtype) - known);
}

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

// Whether all of a parameter's tensors lie in the same order of its dimensions, without gaps.
bool is_permuted(const TensorRef (&tensor)[role_count]) {
  const TensorRef& p = tensor[role_p];
  int64_t last = 0;
  for (int64_t d = 0; d < p.dim; ++d) last += (p.sizes[d] - 1) * p.strides[d];
  bool same = last == p.numel - 1;
  for (const TensorRef& t : tensor) same &= !t.exists || std::equal(p.strides, p.strides + p.dim, t.strides);
  return same;
}

// Sets the parameter's layout. Dimensions after dim 0 are merged if all of its tensors allow it. The algorithm allows any
// order of a row's elements that is the same for all tensors, so dimensions are sorted by p's strides first.
void collapse(Parameter& x, const TensorRef (&tensor)[role_count]) {
  const int64_t dim = tensor[role_p].dim;
  const int64_t* sizes = tensor[role_p].sizes;
  x.dense = true;
  for (int r = 0; x.dense && r < role_count; ++r)
    x.dense = !tensor[r].exists || is_contiguous(dim, sizes, tensor[r].strides);
  if (x.dense) return;  // as most are
  // Without a test, a projection or random bits, elements in the order of memory are as good as any.
  const bool any_order = x.table->local() && !x.tested && x.settled == Decision::none && !x.seed;
  x.dense = any_order && !tensor[role_p].overlaps() && is_permuted(tensor);
  if (x.dense) return;
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

// Finds out whether the rows of a parameter with a layout lie side by side, at the same distances in the weight and its state,
// and u follows from the state as it is stored. If so, sets `width`, and `turned` for a gradient that lies otherwise.
void find_columns(Parameter& x) {
  const TableRow& t = *x.table;
  const Layout& layout = *x.layout;
  const bool follows = x.rule != sgd_project_buffer && !x.seed;
  const size_t dims = layout.inner_sizes.size();
  const int64_t width = dims == 2 ? layout.inner_sizes[1] : 1;
  if (!t.local() || !follows || t.rows < 16 || t.segments() > 1 || dims > 2 || width >= 64) return;
  for (int r = 0; r < role_count; ++r) {
    if (!x.operand[r].data) continue;
    bool fits = layout.row_stride[r] == width && layout.inner[r][0] == layout.inner[role_p][0];
    fits &= dims == 1 || layout.inner[r][1] == 1;
    if (r == role_m || r == role_v) fits &= x.operand[r].type == (x.is_double ? storage_f64 : storage_f32);
    if (!fits && r != role_g) return;
    if (r == role_g) x.turned = !fits;
  }
  x.width = width;
}

// Sets the format of the kernels, and whether blocks are staged since no kernel is compiled for the tensors' storage.
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

}  // namespace

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
    if (!x.dense) find_columns(x);
    for (int r = 0; !x.dense && r < role_count; ++r)  // rows in a row never share memory
      if (r != role_g && tensor[r].exists && tensor[r].overlaps()) return i;
    elements_ += p.numel;
    gathers_ |= !x.dense;
    if (x.staged) stage_bytes_ = staged_blocks * block_size<char>;
    tile_bytes_ = std::max<int64_t>(tile_bytes_, (row.tile_rows * row.tile_cols * (is_double ? 8 : 4) + 63) / 64 * 64);
  }
  return -1;
}

}  // namespace fused_adamp
