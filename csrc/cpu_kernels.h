// The CPU kernels: what cpu_stages.cpp calls on one tile, once per instruction set.
#pragma once

#include <cstdint>

#include "tables.h"

namespace fused_adamp {

// The momentum rules that kernels are compiled for.
using RuleAdam = Rule<true, false, true, false>;
using RuleAdamNesterov = Rule<true, true, true, false>;
using RuleSgd = Rule<false, false, true, false>;
using RuleSgdNesterov = Rule<false, true, true, false>;
using RuleSgdProjectBuffer = Rule<false, false, true, true>;
using RuleSgdNoBuffer = Rule<false, false, false, false>;
enum RuleIndex { adam, adam_nesterov, sgd, sgd_nesterov, sgd_project_buffer, sgd_no_buffer, rule_count };

enum StorageType { storage_f32, storage_f64, storage_bf16, storage_f16, storage_count };

enum Role { role_p, role_g, role_m, role_v, role_remainder, role_count };

// The storage of a tile whose numbers are not stored as they are computed: csrc/storage.h.
struct Storage {
  char* data[role_count];
  StorageType type[role_count];  // of the remainder: none
  bool staged[role_count];       // not stored as computed
  bool stochastic;               // bfloat16 is rounded stochastically
  uint32_t key[2];               // the keys of the random bits
  uint32_t first;                // the number of the tile's first element
};

// How a tensor of a tile is stored, as far as a kernel reads and writes it by itself: csrc/storage.h.
template <class T>
struct AsComputed {
  using Pointer = T*;
};
struct Bfloat16 {
  using Pointer = uint16_t*;
};
struct Float16 {
  using Pointer = uint16_t*;
};
struct WithRemainder {
  struct Pointer {
    uint16_t* high;
    uint16_t* rest;  // int16
  };
};

// How the tensors of a tile are stored, and the type they are computed in.
template <class T, class P_ = AsComputed<T>, class G_ = AsComputed<T>, class State_ = AsComputed<T>>
struct Format {
  using Number = T;
  using P = P_;
  using G = G_;
  using State = State_;
};

// One tile. Rows follow each other without a gap.
template <class F>
struct TileData {
  typename F::P::Pointer p;
  typename F::G::Pointer g;
  typename F::State::Pointer m;
  typename F::State::Pointer v;
  const Storage* storage;       // of tensors that are not stored as F says; else null, and the rest counts for nothing
  typename F::Number* stage;    // room for blocks of numbers on their way from and to the storage
  int64_t g_offset = 0;         // of the gradient's elements from where those of the others are
};

// Rows that lie side by side: `count` columns, each of which holds `width` elements of every row. Element i of a row in a column
// is at [column * stride + row * width + i]; of the gradient, at [column * g_stride + row * width + i].
struct Columns {
  int64_t rows, count, width, stride, g_stride;
};

// The tile from which a column is read at col * stride: that is where the weight and the state have it.
template <class F>
FUSED_ADAMP_INLINE TileData<F> at_column(TileData<F> t, const Columns& s, int64_t col) {
  t.g_offset = col * (s.g_stride - s.stride);
  return t;
}

// The most rows that advance_columns works on at once: their sums stay in the second-level cache.
constexpr int64_t most_rows = 4096;

// Elements of a block, which is added up in T and passes through the stage as a whole; and blocks that the stage holds.
template <class T>
constexpr int64_t block_size = 4096 / sizeof(T);
constexpr int64_t staged_blocks = 8;

// Whether a tile's rows are short: they pass through in blocks of many rows, and not row by row.
template <class T>
constexpr bool is_short(int64_t rows, int64_t cols) {
  return rows >= 4 && cols < 64;
}

// The stages' results for a tile: a row of the bucket's scratch.
struct TileSums {
  double largest = 0;             // cosine_ratio of a row
  double least_limit = HUGE_VAL;  // squared_limit of a row, if it is wanted
  ViewSums total;
  double projection = 0;  // c of weight_update, where a view is wider than a tile
  double unmoved = 0;     // number of elements at the tile's end that sweep has not moved, or of rows if it projected rows

  template <class T = double>
  FUSED_ADAMP_INLINE void add(const ViewSums& row, const Test& test, double cols) {
    const double ratio = cosine_ratio<T>(row.sums, test, cols);
    largest = ratio > largest ? ratio : largest;
    if (test.limits) {
      const double limit = squared_limit<T>(row.sums, test, cols);
      least_limit = limit < least_limit ? limit : least_limit;
    }
    total.add(row);
  }
};

// Where the sums of a tile's rows go if other ranks hold parts of these rows, and which are needed; else null.
struct RowShares {
  ViewSums* row;
  int needs;

  FUSED_ADAMP_INLINE void put(int64_t i, const ViewSums& s) const {
    if (row) put_needed(s, needs, &row[i]);
  }
};

// The numbers by which sweep takes and tests a guess.
template <class T>
struct Guess {
  Test test;
  T decay, projected_decay;  // w of a parameter that is not projected, and of one that is
  bool channel;              // the guess: rows are projected, or nothing is
  T* shrink;                 // out, per row: the shrink that the row's projection asks for; null if it is not needed
};

// Whether weight_correction can recover the old weight from one that was moved with this shrink; false for NaN.
template <class T>
FUSED_ADAMP_INLINE bool recoverable(T shrink) {
  return shrink <= T(0.5) && shrink >= T(-0.5);
}

// Rows that update_projected and sweep work on at once: their scratch u has room for so many.
constexpr int rows_in_flight = 3;

// Kernels that depend on the momentum rule. Arguments that they read once per tile are passed by value: through a pointer,
// the compiler would have to read them again after every store.
template <class F, class T = typename F::Number>
struct RuleKernels {
  // Measures, p.u included. Reads p g m v (16 bytes per fp32 element), writes nothing.
  void (*dot)(TileData<F>, int64_t rows, int64_t cols, Coefficients<T>, Test, TileSums*, RowShares);
  // Updates n elements from `first` on; their projection c is known, 0 without one. Reads p g m v, writes p m v (28).
  void (*update)(TileData<F>, int64_t first, int64_t n, Coefficients<T>, T c, T decay);
  // Updates rows whose projection is not known yet, each row a view: first the sums p.u and p.p, with u kept in scratch,
  // then the weights, from the first-level cache. Reads p g m v, writes p m v (28).
  void (*update_projected)(TileData<F>, T* u, int64_t rows, int64_t cols, Coefficients<T>, T decay);
  // Measures and updates at once, as if the decision were the guess. Reads p g m v, writes p m v (28).
  void (*sweep)(TileData<F>, T* u, int64_t rows, int64_t cols, Coefficients<T>, Guess<T>, TileSums*, RowShares);
  // Corrects n elements from `first` on that were updated with the shrink `was` and should have been with `is`. Reads
  // p g m v, writes p (20; g only for nesterov and for SGDP without momentum, else 16).
  void (*finish)(TileData<F>, int64_t first, int64_t n, Coefficients<T>, T was, T is);
  // Moves n elements from `first` on that sweep has not moved, though their state is advanced. Bytes as for finish.
  void (*move)(TileData<F>, int64_t first, int64_t n, Coefficients<T>, T is);
  // Short rows that were updated with the shrink `was` of each and should have been with `is`. If `was` is not recoverable,
  // sweep has not moved the row. Bytes as for finish.
  void (*finish_rows)(TileData<F>, int64_t rows, int64_t cols, Coefficients<T>, const T* was, const T* is);
  // Rows that lie side by side: Columns. Null where u does not follow from the state: where that is rounded, or projected with
  // the update.
  //
  // Advances the state and adds the sums of each row to those that are there; weights stay. Reads p g m v, writes m v (24).
  void (*advance_columns)(TileData<F>, Columns, Coefficients<T>, double least, ViewSums*);
  // The same of short rows with all their columns. Tests the rows, adds up their sums, and writes for each the shrink that its
  // projection asks for; w is `decay`.
  void (*advance_short_columns)(TileData<F>, Columns, Coefficients<T>, Test, T decay, T* shrink, TileSums*);
  // Moves weights whose state has advanced, by the shrink of each row. Bytes as for finish.
  void (*move_columns)(TileData<F>, Columns, Coefficients<T>, const T* shrink);
};

template <class F, class T = typename F::Number>
struct Kernels {
  // Per row p.g, g.g and p.p of the scaled gradient; tests the rows and adds up their sums. Reads p g (8).
  void (*measure)(TileData<F>, int64_t rows, int64_t cols, T scale, Test, TileSums*, RowShares);
  // g.g of n elements, in double. Reads g (4).
  double (*square_norm)(TileData<F>, int64_t n);
  RuleKernels<F> rule[rule_count];
};

// The formats that kernels are compiled for. Any other storage is staged for f32 or f64.
using F32 = Format<float>;
using F64 = Format<double>;
using F32Bf16State = Format<float, AsComputed<float>, AsComputed<float>, Bfloat16>;
using Bf16 = Format<float, Bfloat16, Bfloat16, Bfloat16>;
using Bf16F32State = Format<float, Bfloat16, Bfloat16, AsComputed<float>>;
using Remainder = Format<float, WithRemainder, Bfloat16, AsComputed<float>>;
using RemainderBf16State = Format<float, WithRemainder, Bfloat16, Bfloat16>;
using F16 = Format<float, Float16, Float16, Float16>;
enum FormatIndex { format_f32, format_f64, format_f32_bf16_state, format_bf16, format_bf16_f32_state, format_remainder,
                   format_remainder_bf16_state, format_f16 };

struct InstructionSet {
  const char* name;
  bool halves;  // whether there are kernels for the formats after f64; of their rules, adam and sgd
  Kernels<F32> f32;
  Kernels<F64> f64;
  Kernels<F32Bf16State> f32_bf16_state;
  Kernels<Bf16> bf16_all;
  Kernels<Bf16F32State> bf16_f32_state;
  Kernels<Remainder> remainder;
  Kernels<RemainderBf16State> remainder_bf16_state;
  Kernels<F16> f16;
};

// Made by cpu_kernels.cpp, compiled once for each; the last two only where the compiler knows them.
extern const InstructionSet instructions_baseline;
extern const InstructionSet instructions_avx2;
extern const InstructionSet instructions_avx512;

}  // namespace fused_adamp
