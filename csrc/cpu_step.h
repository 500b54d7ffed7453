// One pass over a bucket: cpu_bind.cpp makes Parameters from its tensors, cpu_plan.cpp makes the list of jobs, and
// cpu_stages.cpp runs them.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "bucket.h"

namespace fused_adamp {

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

// Updates, sums and the like of one tile: cpu_stages.cpp.
enum class Stage {
  update, measure_update, measure, dot, update_measured, predict, sweep, finish, advance, move, share
};

// How a parameter whose rows lie side by side is shared out: jobs of up to `rows` rows by `columns` columns, all columns of some
// rows before the next. If rows are short, a job has whole rows of one or more tiles, whose sums are in the first. A gradient is
// gathered `at_once` columns at a time.
struct ColumnJobs {
  int64_t rows, columns, per_row;
  int64_t count;
  bool whole_rows;
  int64_t at_once;
};

// One stage of one parameter: a run of jobs, one per tile; of advance and move, one per ColumnJobs.
struct Segment {
  Parameter* parameter;
  Stage stage;
  int64_t begin, end;
};

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

// cpu_bind.cpp. The instruction set to run: the widest that the processor has, or the one that FUSED_ADAMP_CPU names.
const InstructionSet& instructions();

// cpu_bind.cpp. Bytes of a stored element.
int64_t itemsize(StorageType type);

// cpu_plan.cpp.
bool spans_ranks(const Parameter& x, Decision view);
bool spans_tiles(const Parameter& x, Decision view);
bool keeps_shrink(const TableRow& t);
int64_t predicted_tiles(const TableRow& t);
ColumnJobs column_jobs(const Parameter& x);

// cpu_stages.cpp.
TileSums sum_tiles(const Parameter& x);
void share_sums(const Parameter& x);
void project_views(const Parameter& x);
void run_job(const InstructionSet& set, Parameter& x, Stage stage, int64_t job, const Scratch& scratch);

}  // namespace fused_adamp
