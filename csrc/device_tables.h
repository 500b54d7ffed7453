// Rows of the tables that only GPUs read: fused_adamp/backends/tables.py says what their columns are, jobs.py what a job is.
#pragma once

#include "tables.h"

namespace fused_adamp {

// A row of the bucket's table, with the numbers of tiles of the parameter and of each of its rows.
struct DeviceTableRow : TableRow {
  int64_t all_tiles, row_segments;
};

// ADDRESSES. The state has one type for all moments.
struct Addresses {
  void *p, *g, *m, *v;
  int16_t* r;
  float* step;
  int64_t* seed;
};

// STRIDES: the size of the last dimension, then three strides for each of p, g, m, v and r.
struct Strides {
  int64_t last;
  int64_t step[5][3];
};

// FINDINGS.
struct Findings {
  double channel_limit, layer_limit, found_cosine, found_norm, layer_projection;
};

// COUNTERS. Of those after key, these kernels use none.
struct Counters {
  uint64_t measured, dotted, concluded, projection_known, key, measure_left, dot_left, tiles_left;
};

// PARTS.
struct Parts {
  const uint8_t* need;
  Shares* shares;
  ViewSums* row_shares;
  const Verdict* verdict;
  const double* given;
  int64_t given_step;
};

// TICKETS.
struct Tickets {
  uint64_t ticket, preparing, prepared;
};

// STAGES.
enum class Stage : int32_t {
  prepare = 0, measure = 1, dot = 2, update = 3, square = 4, share = 5, share_nothing = 6
};
struct Job {
  Stage stage;
  int32_t first, n;
};
constexpr int prepare_block = 128;

}  // namespace fused_adamp
