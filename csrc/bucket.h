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

// The properties of a tensor that a step reads through the stable C interface. `exists` is false for a missing tensor.
struct TensorRef {
  TensorRef() = default;
  explicit TensorRef(AtenTensorHandle handle);

  bool exists = false;
  bool on_cpu = false;  // and dense, with all of its elements inside its storage
  char* data = nullptr;
  int32_t dtype = 0;
  int64_t dim = 0, numel = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  bool same_sizes(const TensorRef& other) const;
  bool overlaps() const;  // elements may share memory: fused_adamp/tensors.py
};

// An operator's argument of type Tensor[], owned until the end of the call.
class TensorList {
 public:
  explicit TensorList(StableIValue argument);
  ~TensorList();
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  bool empty() const { return handles_.empty(); }
  size_t size() const { return handles_.size(); }
  TensorRef operator[](int64_t i) const { return empty() ? TensorRef() : TensorRef(handles_[i]); }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// Counted up whenever TableRow, TileSums, Scalars, Shared or the operators change: fused_adamp/backends/cpu.py compares it.
constexpr int64_t layout_version = 6;

// Whether measure has moved a parameter that lies on several ranks: no; yes, without projection; yes, with rows projected.
enum class Swept : uint8_t { no, plain, channel };

// The tensors of Shared, and those that measure leaves for step.
struct Shared {
  explicit Shared(const TensorList& list);

  const uint8_t* needs;
  Shares* shares;
  ViewSums* rows;
  const Verdict* verdicts;
  const double* row_projections;
  Swept* swept;
  char* shrink;  // speculative, one number per row
};

// One of a parameter's tensors.
struct Operand {
  char* data = nullptr;
  StorageType type = storage_f32;  // of a remainder: that of the weight, which is as large
};

// How a parameter's tensors lie in memory, when the dimensions beyond dim 0 have been merged where all of them allow it.
struct Layout {
  std::vector<int64_t> inner_sizes;
  int64_t row_stride[role_count] = {};
  std::vector<int64_t> inner[role_count];  // strides
};

// How a parameter passes through the stages: cpu_plan.cpp.
enum class Plan { none, settled, one_tile, split, speculative, columns, share, finish };

struct Parameter {
  const TableRow* table;
  TileSums* tiles;  // this parameter's
  uint8_t* decision;
  double* results;  // fused_adamp/batch.py, RESULTS
  RuleIndex rule;
  const Scalars* scalars;
  Test test;
  bool tested;             // by the cosine test; else the decision is settled:
  Decision settled;        // by the projection that the group names, by all ranks, or by there being none
  float* step;             // t, kept in the state; null where the rule counts no steps
  int64_t* seed;           // of stochastic rounding; null where there is none
  uint32_t key[2] = {0, 0};  // of this step's random bits
  double t = 0;            // the step being taken, 1-based
  Coefficients<float> coefficients;
  Coefficients<double> coefficients_f64;
  bool is_double;          // computed in double, else in float
  bool dense;              // tiles lie in memory row by row; else
  bool gathered[role_count] = {};  // those of these roles are gathered into scratch
  int64_t width = 0;       // and rows lie side by side, each with so many elements in a column; else 0
  bool turned = false;     // but not those of the gradient
  FormatIndex format;      // of the kernels
  bool staged;             // not stored in that format: blocks pass through the stage
  Plan plan;
  Operand operand[role_count];
  std::unique_ptr<Layout> layout;    // null: all tensors are contiguous
  char* shrink = nullptr;            // speculative and columns, one number per row
  ViewSums* row_sums = nullptr;      // columns, per job those of its rows

  // In a bucket of which some parameters lie on several ranks.
  int needs = 0;  // Need
  Shares* shares = nullptr;
  const Verdict* verdict = nullptr;
  Swept* swept = nullptr;                   // null where the parameter is local
  ViewSums* rows = nullptr;                 // of rows that are split, what this rank shares of each,
  const double* row_projections = nullptr;  // and the projection c of each; else null

  // Tiles that finished the stage, and what holds once all have.
  std::atomic<int64_t> predicted_tiles{0}, measured_tiles{0}, dotted_tiles{0};
  std::atomic<bool> predicted{false}, decided{false}, dotted{false};
  std::atomic<bool> predict_channel{true};
};

}  // namespace fused_adamp
