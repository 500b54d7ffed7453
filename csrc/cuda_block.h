// The threads of a block: their shared memory, how they wait for each other, and how they add up numbers.
#pragma once

#include "cuda_order.h"
#include "cuda_spec.h"
#include "device_tables.h"

namespace fused_adamp {

// The memory of a launch: the arguments of all kernels. kernels/plans.py describes them.
struct Memory {
  const DeviceTableRow* table;
  const Addresses* addresses;
  const Strides* strides;
  const int32_t* owners;
  const Scalars* scalars;
  const double* scale;
  Corrections* coefficients;
  Shares* sums;
  Findings* findings;
  Counters* counters;
  uint8_t* decisions;
  Results* results;
  const Parts* parts;
  Tickets* tickets;
  const int32_t* active;
  const Job* jobs;
  uint64_t epoch;
  int32_t n_active;
};

// The shared memory of a block: the job's parameter, and numbers on their way between threads.
struct Block {
  DeviceTableRow row;
  Addresses at;
  Strides strides;
  Scalars scalars;
  Parts parts;
  Coefficients<N> c;
  N decay;
  N scale;  // of gradients whose sums are shared, which the sums are of
  uint32_t key[2];
  uint32_t message;
  int32_t need;
  Decision decision;
  bool nesterov, project_buffer, tested;
  double partial[warps][6];
  double rows[threads][4];  // the sums of each row of a tile, in the order of fused_adamp/batch.py, ROW_SHARES
};
__shared__ Block b;

__device__ int thread() { return int(threadIdx.x); }

// Gives a number of thread 0 to all threads.
__device__ uint32_t broadcast(uint32_t x) {
  if (thread() == 0) b.message = x;
  __syncthreads();
  x = b.message;
  __syncthreads();
  return x;
}

__device__ uint32_t count(uint64_t* counter, uint64_t epoch, uint32_t n) {
  __syncthreads();
  return broadcast(thread() == 0 ? add(counter, epoch, n) : 0);
}

__device__ void announce(uint64_t* flag, uint64_t epoch) {
  __syncthreads();
  if (thread() == 0) publish(flag, epoch);
}

// Thread 0 waits until `announce` has set the flag; the others must meet a barrier before they read what is announced. Jobs
// wait only for jobs drawn earlier, so there is no deadlock.
__device__ void wait(const uint64_t* flag, uint64_t epoch) {
  if (thread() != 0) return;
  while (!is_published(flag, epoch)) {
  }
}

struct Plus {
  template <class A>
  __device__ A operator()(A x, A y) const {
    return x + y;
  }
};
struct Larger {
  __device__ double operator()(double x, double y) const { return x > y ? x : y; }
};

// Combines each of k numbers of `size` lanes of a warp that follow each other.
template <class Operation, int k>
__device__ void combine_lanes(double (&x)[k], int size) {
#pragma unroll 1
  for (int offset = size / 2; offset; offset /= 2) {
#pragma unroll
    for (int i = 0; i < k; ++i) x[i] = Operation()(x[i], __shfl_xor_sync(all_lanes, x[i], offset));
  }
}

// Combines each of k numbers of all warps.
template <class Operation, int k>
__device__ void combine_warps(double (&x)[k]) {
  __syncthreads();
  if (thread() % 32 == 0) {
    for (int i = 0; i < k; ++i) b.partial[thread() / 32][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < k; ++i) x[i] = b.partial[0][i];
#pragma unroll 1  // all at once, they would take too many registers
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < k; ++i) x[i] = Operation()(x[i], b.partial[warp][i]);
  }
}

// Combines each of k numbers of all threads, in an order that is always the same. Every thread gets the results.
template <class Operation, int k>
__device__ void combine(double (&x)[k]) {
  combine_lanes<Operation>(x, 32);
  combine_warps<Operation>(x);
}

// The threads that work on one row, and which of the rows that are worked on at once it is.
struct Team {
  int size, lane, row, rows;

  // A thread has at most `few` elements if a warp is enough then, else at most `many`.
  __device__ explicit Team(int cols) {
    size = width > 1 ? 2 : 8;  // the lanes of a team read 32 bytes or more that follow each other
    while (size < 32 && size * few < cols) size *= 2;
    if (cols > 32 * many) size = threads;
    lane = thread() % size;
    row = thread() / size;
    rows = threads / size;
  }

  // Adds up each of k numbers of the team's threads. Every one of them gets the sums.
  template <int k>
  __device__ void sum(double (&x)[k]) const {
    combine_lanes<Plus>(x, size < 32 ? size : 32);
    if (size == threads) combine_warps<Plus>(x);
  }
};

}  // namespace fused_adamp
