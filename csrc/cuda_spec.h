// The properties that a kernel is compiled for, and numbers from and to their storage.
//
// Macros: FUSED_ADAMP_P, _G and _STATE name types in memory; _LAYOUT is 0 (aligned), 1 (flat) or 2 (strided); _WIDTH is the
// number of elements of a thread's widest access; _ADAPTIVE, _BUFFER, _STOCHASTIC, _REMAINDER and _SHARED are 0 or 1.
#pragma once

#include "precision.h"

namespace fused_adamp {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using P = FUSED_ADAMP_P;
using G = FUSED_ADAMP_G;
using State = FUSED_ADAMP_STATE;

template <class T>
struct NumberOf {
  using Type = float;
};
template <>
struct NumberOf<double> {
  using Type = double;
};
using N = NumberOf<P>::Type;  // of the math

constexpr bool strided = FUSED_ADAMP_LAYOUT == 2;
constexpr int width = FUSED_ADAMP_WIDTH;
constexpr bool stochastic = FUSED_ADAMP_STOCHASTIC, remainder = FUSED_ADAMP_REMAINDER, shares = FUSED_ADAMP_SHARED;
using R = Rule<FUSED_ADAMP_ADAPTIVE, false, FUSED_ADAMP_BUFFER, false>;

constexpr int threads = 256, warps = threads / 32;
constexpr unsigned all_lanes = 0xffffffff;
constexpr int few = 8, many = 128 / sizeof(N);  // elements of a row that a thread works on

// Accesses to a tensor that a thread has in flight; and when it updates rows. Half of them where registers would spill:
// sm_120, which has less bandwidth to keep busy, and rows on sm_100.
constexpr int most_at_once = width > 1 ? few / width : 4, half_at_once = most_at_once > 1 ? most_at_once / 2 : 1;
constexpr int at_once = __CUDA_ARCH__ >= 1200 ? half_at_once : most_at_once;
constexpr int rows_at_once = __CUDA_ARCH__ >= 1000 ? half_at_once : most_at_once;

// Numbers from and to their storage.

__device__ N number(float x) { return x; }
__device__ N number(double x) { return N(x); }
__device__ N number(Bfloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }
__device__ N number(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// random has 16 bits.
__device__ void put(float& to, N x, uint32_t) { to = float(x); }
__device__ void put(double& to, N x, uint32_t) { to = x; }
__device__ void put(Bfloat16& to, N x, uint32_t random) {
  const uint32_t bits = same_bits<uint32_t>(float(x));
  to.bits = uint16_t((stochastic ? round_by_chance(bits, random) : round_to_nearest(bits)) >> 16);
}
__device__ void put(Float16& to, N x, uint32_t) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(float(x))); }

}  // namespace fused_adamp
