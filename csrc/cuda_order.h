// The order between blocks: kernels/order.py, in one thread.
#pragma once

#include "algorithm.h"

namespace fused_adamp {

// Returns 0, 1, 2, ... to the callers of one epoch. The counter holds the epoch in its upper 32 bits, so that counts of an
// aborted step are ignored.
__device__ uint32_t draw(uint64_t* counter, uint64_t epoch) {
  uint64_t drawn;
  asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(counter), "l"(epoch << 32) : "memory");
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;" : "=l"(drawn) : "l"(counter) : "memory");
  return uint32_t(drawn);
}

// Adds n to the epoch's count and returns the new count. Writes before earlier calls are visible after this one.
__device__ uint32_t add(uint64_t* counter, uint64_t epoch, uint32_t n) {
  uint64_t before;
  asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(counter), "l"(epoch << 32) : "memory");
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before) : "l"(counter), "l"(uint64_t(n)) : "memory");
  return uint32_t(before) + n;
}

__device__ void publish(uint64_t* flag, uint64_t epoch) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(epoch) : "memory");
}

__device__ bool is_published(const uint64_t* flag, uint64_t epoch) {
  uint64_t seen;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  return seen == epoch;
}

}  // namespace fused_adamp
