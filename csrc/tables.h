// Rows of the tables that the front end and the backends share. Python's names of their columns stand beside each struct.
#pragma once

#include "algorithm.h"

namespace fused_adamp {

// How a parameter's rows lie on the ranks: fused_adamp/batch.py, Sharing.
enum class Sharing : int64_t { local = 0, shared = 1, split = 2 };

// One row of the bucket's table: fused_adamp/batch.py, COLUMNS.
struct TableRow {
  int64_t group, projected, rows, cols, tile_rows, tile_cols, first_tile;
  Sharing sharing;
  int64_t first_row, first_number, row_numbers;

  FUSED_ADAMP_INLINE bool local() const { return sharing == Sharing::local; }

  // The tiles of a row, and of the parameter.
  FUSED_ADAMP_INLINE int64_t segments() const { return (cols + tile_cols - 1) / tile_cols; }
  FUSED_ADAMP_INLINE int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows * segments(); }
};

// fused_adamp/batch.py, Need.
enum Need { need_test = 1, need_dot = 2, need_square = 4 };

FUSED_ADAMP_INLINE void put_needed(const ViewSums& s, int needs, ViewSums* to) {
  if (needs & need_test) to->sums = s.sums;
  if (needs & need_dot) to->sums.pp = s.sums.pp, to->pu = s.pu;
}

// This rank's shares of a parameter, and the verdict of all ranks: fused_adamp/batch.py, SHARES and Shared.
struct Shares {
  double limit, cosine;
  ViewSums sums;
};
struct Verdict {
  double decision, projection;
};

// fused_adamp/batch.py, RESULTS.
struct Results {
  double cosine, norm;
};

}  // namespace fused_adamp
