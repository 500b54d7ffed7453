// bfloat16 storage without loss, by the rules of fused_adamp/precision.py, shared by every compiled backend.
//
// bfloat16 is the upper half of a float. The functions take and return a float's bits, of which the lower half is then
// dropped. N is uint32_t, or a vector of them.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cstring>
#endif

#include "algorithm.h"

namespace fused_adamp {

template <class To, class From>
FUSED_ADAMP_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class N>
FUSED_ADAMP_INLINE N magnitude(N bits) {
  return bits & 0x7fffffff;
}

template <class N>
FUSED_ADAMP_INLINE N without_nan(N bits) {
  return magnitude(bits) > 0x7f800000 ? N{} + 0x7fc00000 : bits;
}

template <class N>
FUSED_ADAMP_INLINE N round_to_nearest(N bits) {
  return magnitude(bits) > 0x7f800000 ? N{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
}

FUSED_ADAMP_INLINE uint32_t round_by_chance(uint32_t bits, uint32_t random) {
  return without_nan(bits) + (magnitude(bits) >= 0x7f800000 ? 0 : random);
}

// A float without NaN's other forms, split: the upper half is the nearest bfloat16, of two equally near the one further from
// zero. The lower half is the remainder, int16.
template <class N>
FUSED_ADAMP_INLINE N upper_half(N bits) {
  return (bits + 0x8000) >> 16;
}

// The float that was split, from both halves as stored. No zero has a negative remainder: fused_adamp/precision.py, join.
template <class N>
FUSED_ADAMP_INLINE N join(N high, N low) {
  const N bits = high << 16, rest = (low ^ 0x8000) - 0x8000;
  return ((magnitude(bits) == 0) & ((rest >> 31) != 0)) ? bits : bits + rest;
}

// The keys of a step's random bits: the low and the high half of SplitMix64's finalizer.
FUSED_ADAMP_INLINE uint64_t step_key(int64_t seed) {
  uint64_t z = (uint64_t(seed) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// 32 random bits for an element's number. The weight takes the low half, the first moment the high half, and the second
// moment the low half under swapped keys.
FUSED_ADAMP_INLINE uint32_t chance(uint32_t low, uint32_t high, uint32_t number) {
  uint32_t x = number + low;
  x = (x ^ (x >> 16)) * 0x21f0aaadu ^ high;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace fused_adamp
