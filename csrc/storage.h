// Blocks of a tile on their way from its storage to the numbers it is computed in, and back, by the rules of
// fused_adamp/precision.py. Plain loops: the compiler makes vectors of them.
//
// Like vec.h, included once per instruction set.
#pragma once

#include "cpu_kernels.h"
#include "precision.h"
#include "vec.h"

#if defined(__GNUC__)
#define FUSED_ADAMP_OUTLINE __attribute__((noinline))
#else
#define FUSED_ADAMP_OUTLINE
#endif

namespace {

using namespace fused_adamp;

FUSED_ADAMP_INLINE float half_to_float(uint16_t half) {
  // Exponent and fraction move to float's places; multiplying by 2^112 sets the exponent's bias right, and gives
  // subnormal numbers their value; what had the largest exponent is infinite or NaN.
  const float x = same_bits<float>(uint32_t(half & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return same_bits<float>(same_bits<uint32_t>(x) | special | uint32_t(half & 0x8000) << 16);
}

FUSED_ADAMP_INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = same_bits<uint32_t>(x), size = magnitude(bits), sign = (bits >> 16) & 0x8000;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (size >= 0x47800000) return uint16_t(sign | 0x7c00);  // 2^16 and above
  // Below 2^-14: adding 0.5 aligns the fraction to multiples of 2^-24 and rounds to nearest even.
  if (size < 0x38800000) return uint16_t(sign | (same_bits<uint32_t>(same_bits<float>(size) + 0.5f) - 0x3f000000));
  return uint16_t(sign | (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13);
}

// Elements [begin, begin + n) of a role, to numbers.
template <class T>
FUSED_ADAMP_OUTLINE void read_block(const Storage& s, Role role, int64_t begin, int64_t n, T* to) {
  switch (s.type[role]) {
    case storage_f64: {
      const double* from = reinterpret_cast<const double*>(s.data[role]) + begin;
      for (int64_t i = 0; i < n; ++i) to[i] = T(from[i]);
      break;
    }
    case storage_f32: {
      const float* from = reinterpret_cast<const float*>(s.data[role]) + begin;
      for (int64_t i = 0; i < n; ++i) to[i] = T(from[i]);
      break;
    }
    case storage_bf16: {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(s.data[role]) + begin;
      if (role == role_p && s.data[role_remainder]) {
        const uint16_t* rest = reinterpret_cast<const uint16_t*>(s.data[role_remainder]) + begin;
        for (int64_t i = 0; i < n; ++i) to[i] = T(same_bits<float>(join(uint32_t(from[i]), uint32_t(rest[i]))));
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = T(same_bits<float>(uint32_t(from[i]) << 16));
      }
      break;
    }
    default: {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(s.data[role]) + begin;
      int64_t i = 0;
#if defined(__F16C__)
      if constexpr (sizeof(T) == 4) {
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
      }
#endif
      for (; i < n; ++i) to[i] = T(half_to_float(from[i]));
    }
  }
}

// Numbers to elements [begin, begin + n) of a role.
template <class T>
FUSED_ADAMP_OUTLINE void write_block(const Storage& s, Role role, int64_t begin, int64_t n, const T* from) {
  switch (s.type[role]) {
    case storage_f64: {
      double* to = reinterpret_cast<double*>(s.data[role]) + begin;
      for (int64_t i = 0; i < n; ++i) to[i] = from[i];
      break;
    }
    case storage_f32: {
      float* to = reinterpret_cast<float*>(s.data[role]) + begin;
      for (int64_t i = 0; i < n; ++i) to[i] = float(from[i]);
      break;
    }
    case storage_bf16: {
      uint16_t* to = reinterpret_cast<uint16_t*>(s.data[role]) + begin;
      if (role == role_p && s.data[role_remainder]) {
        // To nearest, ties away from zero; the remainder is what is left, with its sign.
        uint16_t* rest = reinterpret_cast<uint16_t*>(s.data[role_remainder]) + begin;
        for (int64_t i = 0; i < n; ++i) {
          const uint32_t bits = without_nan(same_bits<uint32_t>(float(from[i])));
          to[i] = uint16_t(upper_half(bits));
          rest[i] = uint16_t(bits);
        }
      } else if (s.stochastic) {
        const uint32_t low = s.key[role == role_v], high = s.key[role != role_v], first = s.first + uint32_t(begin);
        const int half = role == role_m ? 16 : 0;
        for (int64_t i = 0; i < n; ++i) {
          const uint32_t random = chance(low, high, first + uint32_t(i)) >> half & 0xffff;
          to[i] = uint16_t(round_by_chance(same_bits<uint32_t>(float(from[i])), random) >> 16);
        }
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = uint16_t(round_to_nearest(same_bits<uint32_t>(float(from[i]))) >> 16);
      }
      break;
    }
    default: {
      uint16_t* to = reinterpret_cast<uint16_t*>(s.data[role]) + begin;
      int64_t i = 0;
#if defined(__F16C__)
      if constexpr (sizeof(T) == 4) {
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                           _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
      }
#endif
      for (; i < n; ++i) to[i] = float_to_half(float(from[i]));
    }
  }
}

// Vectors of a tensor, from and to its storage.

template <class T, class Extent>
FUSED_ADAMP_INLINE Vec<T> load(AsComputed<T>, const T* from, int64_t i, Extent extent, T rest = T(0)) {
  return Vec<T>::load(from + i, extent, rest);
}
template <class T, class Extent>
FUSED_ADAMP_INLINE void store(AsComputed<T>, T* to, int64_t i, Extent extent, Vec<T> x) {
  x.store(to + i, extent);
}
template <class T>
FUSED_ADAMP_INLINE T* shift(AsComputed<T>, T* pointer, int64_t n) {
  return pointer ? pointer + n : nullptr;
}

FUSED_ADAMP_INLINE uint16_t* shift(Bfloat16, uint16_t* pointer, int64_t n) { return pointer ? pointer + n : nullptr; }
FUSED_ADAMP_INLINE uint16_t* shift(Float16, uint16_t* pointer, int64_t n) { return pointer ? pointer + n : nullptr; }
FUSED_ADAMP_INLINE WithRemainder::Pointer shift(WithRemainder, WithRemainder::Pointer pointer, int64_t n) {
  return {pointer.high + n, pointer.rest + n};
}

#if defined(__AVX2__) && defined(__GNUC__)
#define FUSED_ADAMP_HALVES 1

using Bits = Register<uint32_t>;
using Halves = typename RegisterOf<uint16_t, register_bytes / 2>::type;

FUSED_ADAMP_INLINE Halves load_raw(const uint16_t* from, Whole) {
  Halves x;
  memcpy(&x, from, sizeof x);
  return x;
}
FUSED_ADAMP_INLINE void store_raw(uint16_t* to, Whole, Halves x) { memcpy(to, &x, sizeof x); }
#if defined(__AVX512F__)
FUSED_ADAMP_INLINE Halves load_raw(const uint16_t* from, Part part) {
  return (Halves)_mm256_maskz_loadu_epi16(__mmask16((1u << part.n) - 1), from);
}
FUSED_ADAMP_INLINE void store_raw(uint16_t* to, Part part, Halves x) {
  _mm256_mask_storeu_epi16(to, __mmask16((1u << part.n) - 1), (__m256i)x);
}
#else
FUSED_ADAMP_INLINE Halves load_raw(const uint16_t* from, Part part) {
  Halves x{};
  copy_part<sizeof x>(reinterpret_cast<char*>(&x), reinterpret_cast<const char*>(from), part.n * sizeof(uint16_t));
  return x;
}
FUSED_ADAMP_INLINE void store_raw(uint16_t* to, Part part, Halves x) {
  copy_part<sizeof x>(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(&x), part.n * sizeof(uint16_t));
}
#endif
template <class Extent>
FUSED_ADAMP_INLINE Bits load_halves(const uint16_t* from, Extent extent) {
  return __builtin_convertvector(load_raw(from, extent), Bits);
}
template <class Extent>
FUSED_ADAMP_INLINE void store_halves(uint16_t* to, Extent extent, Bits low) {
  store_raw(to, extent, __builtin_convertvector(low, Halves));
}

FUSED_ADAMP_INLINE Vec<float> with_rest(Vec<float> x, Whole, float) { return x; }
FUSED_ADAMP_INLINE Vec<float> with_rest(Vec<float> x, Part part, float rest) {
  if (rest == 0) return x;  // as it is
  float lanes[Vec<float>::lanes];
  x.store(lanes, Whole{});
  return Vec<float>::load(lanes, part, rest);
}

FUSED_ADAMP_INLINE Vec<float> as_floats(Bits bits) { return {same_bits<Register<float>>(bits)}; }

template <class Extent>
FUSED_ADAMP_INLINE Vec<float> load(Bfloat16, const uint16_t* from, int64_t i, Extent extent, float rest = 0) {
  return with_rest(as_floats(load_halves(from + i, extent) << 16), extent, rest);
}
template <class Extent>
FUSED_ADAMP_INLINE void store(Bfloat16, uint16_t* to, int64_t i, Extent extent, Vec<float> x) {
  store_halves(to + i, extent, round_to_nearest(same_bits<Bits>(x.lane)) >> 16);
}

// The processor's own conversions, to nearest even.
#if defined(__AVX512F__)
FUSED_ADAMP_INLINE Vec<float> from_half(Halves x) { return {(Register<float>)_mm512_cvtph_ps((__m256i)x)}; }
FUSED_ADAMP_INLINE Halves to_half(Vec<float> x) {
  return (Halves)_mm512_cvtps_ph((__m512)x.lane, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
FUSED_ADAMP_INLINE Vec<float> from_half(Halves x) { return {(Register<float>)_mm256_cvtph_ps((__m128i)x)}; }
FUSED_ADAMP_INLINE Halves to_half(Vec<float> x) {
  return (Halves)_mm256_cvtps_ph((__m256)x.lane, _MM_FROUND_TO_NEAREST_INT);
}
#endif
template <class Extent>
FUSED_ADAMP_INLINE Vec<float> load(Float16, const uint16_t* from, int64_t i, Extent extent, float rest = 0) {
  return with_rest(from_half(load_raw(from + i, extent)), extent, rest);
}
template <class Extent>
FUSED_ADAMP_INLINE void store(Float16, uint16_t* to, int64_t i, Extent extent, Vec<float> x) {
  store_raw(to + i, extent, to_half(x));
}

template <class Extent>
FUSED_ADAMP_INLINE Vec<float> load(WithRemainder, WithRemainder::Pointer from, int64_t i, Extent extent) {
  return as_floats(join(load_halves(from.high + i, extent), load_halves(from.rest + i, extent)));
}
template <class Extent>
FUSED_ADAMP_INLINE void store(WithRemainder, WithRemainder::Pointer to, int64_t i, Extent extent, Vec<float> x) {
  const Bits bits = without_nan(same_bits<Bits>(x.lane));
  store_halves(to.high + i, extent, upper_half(bits));
  store_halves(to.rest + i, extent, bits & 0xffff);
}
#endif

// A block of a tile: where it lies, or staged.
template <class F>
struct Block {
  typename F::P::Pointer p;
  typename F::G::Pointer g;
  typename F::State::Pointer m, v;

  template <class Extent>
  FUSED_ADAMP_INLINE auto load_p(int64_t i, Extent extent) const {
    return load(typename F::P(), p, i, extent);
  }
  template <class Extent>
  FUSED_ADAMP_INLINE auto load_g(int64_t i, Extent extent) const {
    return load(typename F::G(), g, i, extent);
  }
  template <class Extent, class V>
  FUSED_ADAMP_INLINE void store_p(int64_t i, Extent extent, V x) const {
    store(typename F::P(), p, i, extent, x);
  }
  template <class Extent, class V>
  FUSED_ADAMP_INLINE void store_m(int64_t i, Extent extent, V x) const {
    store(typename F::State(), m, i, extent, x);
  }
};

enum Roles { none = 0, with_p = 1, with_g = 2, with_m = 4, with_v = 8 };

// A rule's state.
template <class R>
constexpr int with_state = (R::buffer ? with_m : none) | (R::adaptive ? with_v : none);

// The elements [begin, begin + n) of a role: in place, or in `stage`, read from the storage if `reads`.
template <class T>
FUSED_ADAMP_INLINE T* open(const Storage& s, Role role, bool reads, int64_t begin, int64_t n, T* stage) {
  if (!s.staged[role]) return reinterpret_cast<T*>(s.data[role]) + begin;
  if (reads) read_block(s, role, begin, n, stage);
  return stage;
}

// The block [begin, begin + n) of a tile, with the roles that will be read. `part` is where in the stage it goes.
template <int roles, class F>
FUSED_ADAMP_INLINE Block<F> open(const TileData<F>& t, int64_t begin, int64_t n, int part = 0) {
  using T = typename F::Number;
  if constexpr (std::is_same<F, Format<T>>::value) {
    if (t.storage) {
      T* const stage = t.stage + part * block_size<T>;
      return {open(*t.storage, role_p, roles & with_p, begin, n, stage),
              open(*t.storage, role_g, roles & with_g, begin + t.g_offset, n, stage + block_size<T>),
              open(*t.storage, role_m, roles & with_m, begin, n, stage + 2 * block_size<T>),
              open(*t.storage, role_v, roles & with_v, begin, n, stage + 3 * block_size<T>)};
    }
  }
  return {shift(typename F::P(), t.p, begin), shift(typename F::G(), t.g, begin + t.g_offset), shift(typename F::State(), t.m, begin),
          shift(typename F::State(), t.v, begin)};
}

// Writes the roles that have changed back to the storage.
template <int roles, class F>
FUSED_ADAMP_INLINE void close(const TileData<F>& t, const Block<F>& b, int64_t begin, int64_t n) {
  if constexpr (std::is_same<F, Format<typename F::Number>>::value) {
    if (!t.storage) return;
    const Storage& s = *t.storage;
    if (roles & with_p && s.staged[role_p]) write_block(s, role_p, begin, n, b.p);
    if (roles & with_m && s.staged[role_m]) write_block(s, role_m, begin, n, b.m);
    if (roles & with_v && s.staged[role_v]) write_block(s, role_v, begin, n, b.v);
  }
}

}  // namespace
