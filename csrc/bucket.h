// A bucket in one step: from the operator's tensor lists to parameters, tiles and jobs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu_kernels.h"

namespace fused_adamp {

// A borrowed tensor of an operator's tensor list. Reads the fields a step needs, through the stable C interface.
class TensorRef {
 public:
  explicit TensorRef(AtenTensorHandle handle) : handle_(handle) {}

  void* data() const { return get<void*>(aoti_torch_get_data_ptr); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  const int64_t* sizes() const { return get<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides); }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  bool is_dense_on_cpu() const {
    return get<int32_t>(aoti_torch_get_device_type) == aoti_torch_device_type_cpu() &&
           get<int32_t>(aoti_torch_get_layout) == aoti_torch_layout_strided();
  }
  bool same_sizes(const TensorRef& other) const;
  bool overlaps() const;  // elements may share memory: fused_adamp/bucket.py

 private:
  template <class T, class Getter>
  T get(Getter getter) const {
    T value;
    TORCH_ERROR_CODE_CHECK(getter(handle_, &value));
    return value;
  }
  AtenTensorHandle handle_;
};

// An operator's argument of type Tensor[], owned until the end of the call.
class TensorList {
 public:
  explicit TensorList(StableIValue argument);
  ~TensorList();
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  bool empty() const { return handles_.empty(); }
  TensorRef operator[](int64_t i) const { return TensorRef(handles_[i]); }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// Counted up whenever TableRow, TileSums, Scalars or the operators change: fused_adamp/backends/cpu.py compares it.
constexpr int64_t layout_version = 1;

// One row of the bucket's table: fused_adamp/bucket.py, COLUMNS.
struct TableRow {
  int64_t group, projected, rows, cols, tile_rows, tile_cols, first_tile;

  int64_t segments() const { return (cols + tile_cols - 1) / tile_cols; }  // of a row that is wider than a tile
  int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows * segments(); }
};

// One of a parameter's tensors (p, g, m or v). `inner` are the strides of the collapsed dimensions beyond dim 0.
struct Operand {
  char* data = nullptr;
  StorageType type = storage_f32;
  int64_t row_stride = 0;
  std::vector<int64_t> inner;

  int64_t itemsize() const { return type == storage_f64 ? 8 : type == storage_f32 ? 4 : 2; }
};

enum Role { role_p, role_g, role_m, role_v, role_count };

// How a parameter passes through the stages: cpu.cpp.
enum class Plan { untested, one_tile, split, speculative };

struct Parameter {
  const TableRow* table;
  TileSums* tiles;  // this parameter's
  uint8_t* decision;
  RuleIndex rule;
  const Scalars* scalars;
  float* step;       // t, kept in the state; null where the rule counts no steps
  double t = 0;      // the step being taken, 1-based
  bool is_double;    // computed in double, else in float
  bool direct;       // tiles lie in memory as the kernels want them, else they are gathered into scratch
  Plan plan;
  Operand operand[role_count];
  std::vector<int64_t> inner_sizes;  // of the collapsed dimensions beyond dim 0
  int64_t shrink_offset = 0;         // bytes into the step's scratch: speculative, one number per row
  char* shrink = nullptr;

  // Tiles that finished the stage, and what holds once all have.
  std::atomic<int64_t> predicted_tiles{0}, measured_tiles{0}, dotted_tiles{0};
  std::atomic<bool> predicted{false}, decided{false}, dotted{false};
  std::atomic<bool> predict_channel{true};
};

}  // namespace fused_adamp
