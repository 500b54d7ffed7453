// Vec: a vector register of lanes, the number type of the CPU kernels; and sums over them.
//
// Included once per instruction set, hence the anonymous namespace. Nothing of the standard library's inline code may be
// used here, or the linker could keep the copy that was compiled for a wider instruction set than the processor has.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "algorithm.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#if defined(__has_builtin)
#define FUSED_ADAMP_HAS_SHUFFLE __has_builtin(__builtin_shufflevector)
#else
#define FUSED_ADAMP_HAS_SHUFFLE 0
#endif

namespace {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

template <class T, int bytes>
struct RegisterOf {
#if defined(__GNUC__)  // gcc and clang
  typedef T type __attribute__((vector_size(bytes)));
#else
  typedef T type;  // other compilers: plain numbers
#endif
};
template <class T>
using Register = typename RegisterOf<T, register_bytes>::type;

FUSED_ADAMP_INLINE float root(float x) { return std::sqrt(x); }
FUSED_ADAMP_INLINE double root(double x) { return std::sqrt(x); }

#if defined(__AVX512F__)
FUSED_ADAMP_INLINE Register<float> root(Register<float> x) { return (Register<float>)_mm512_sqrt_ps((__m512)x); }
FUSED_ADAMP_INLINE Register<double> root(Register<double> x) { return (Register<double>)_mm512_sqrt_pd((__m512d)x); }
FUSED_ADAMP_INLINE Register<float> muladd(Register<float> a, Register<float> x, Register<float> y) {
  return (Register<float>)_mm512_fmadd_ps((__m512)a, (__m512)x, (__m512)y);
}
FUSED_ADAMP_INLINE Register<double> muladd(Register<double> a, Register<double> x, Register<double> y) {
  return (Register<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)x, (__m512d)y);
}
#elif defined(__AVX2__)
FUSED_ADAMP_INLINE Register<float> root(Register<float> x) { return (Register<float>)_mm256_sqrt_ps((__m256)x); }
FUSED_ADAMP_INLINE Register<double> root(Register<double> x) { return (Register<double>)_mm256_sqrt_pd((__m256d)x); }
FUSED_ADAMP_INLINE Register<float> muladd(Register<float> a, Register<float> x, Register<float> y) {
  return (Register<float>)_mm256_fmadd_ps((__m256)a, (__m256)x, (__m256)y);
}
FUSED_ADAMP_INLINE Register<double> muladd(Register<double> a, Register<double> x, Register<double> y) {
  return (Register<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)x, (__m256d)y);
}
#else
template <class R>
FUSED_ADAMP_INLINE R muladd(R a, R x, R y) {
  return a * x + y;
}
#if defined(__x86_64__) && defined(__GNUC__)
FUSED_ADAMP_INLINE Register<float> root(Register<float> x) { return (Register<float>)_mm_sqrt_ps((__m128)x); }
FUSED_ADAMP_INLINE Register<double> root(Register<double> x) { return (Register<double>)_mm_sqrt_pd((__m128d)x); }
#elif defined(__GNUC__)
template <class R>
FUSED_ADAMP_INLINE R root(R x) {
  for (int i = 0; i < int(sizeof x / sizeof x[0]); ++i) x[i] = root(x[i]);
  return x;
}
#endif
#endif

// The first n lanes.
#if defined(__AVX512F__)
FUSED_ADAMP_INLINE Register<float> load_part(const float* from, int64_t n, float rest) {
  return (Register<float>)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), __mmask16((1u << n) - 1), from);
}
FUSED_ADAMP_INLINE Register<double> load_part(const double* from, int64_t n, double rest) {
  return (Register<double>)_mm512_mask_loadu_pd(_mm512_set1_pd(rest), __mmask8((1u << n) - 1), from);
}
FUSED_ADAMP_INLINE void store_part(float* to, int64_t n, Register<float> x) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), (__m512)x);
}
FUSED_ADAMP_INLINE void store_part(double* to, int64_t n, Register<double> x) {
  _mm512_mask_storeu_pd(to, __mmask8((1u << n) - 1), (__m512d)x);
}
#else
// Fewer than `bytes` bytes, in pieces of 16, 8, 4 and 2: a memcpy of unknown size is a call, slower than the rest of the
// vector's work.
template <int bytes>
FUSED_ADAMP_INLINE void copy_part(char* to, const char* from, int64_t n) {
  if constexpr (bytes >= 4) {
    constexpr int piece = bytes / 2;
    if (n & piece) {
      memcpy(to, from, piece);
      to += piece;
      from += piece;
    }
    copy_part<piece>(to, from, n);
  }
}
#if defined(__AVX2__)
alignas(64) constexpr int32_t first_words[16] = {-1, -1, -1, -1, -1, -1, -1, -1};  // from 8 - n on: n of them, then zeros
FUSED_ADAMP_INLINE Register<float> load_part(const float* from, int64_t n, float rest) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first_words + 8 - n));
  return (Register<float>)_mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(from, lanes), _mm256_castsi256_ps(lanes));
}
FUSED_ADAMP_INLINE Register<double> load_part(const double* from, int64_t n, double rest) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first_words + 8 - 2 * n));
  return (Register<double>)_mm256_blendv_pd(_mm256_set1_pd(rest), _mm256_maskload_pd(from, lanes), _mm256_castsi256_pd(lanes));
}
#else
template <class T>
FUSED_ADAMP_INLINE Register<T> load_part(const T* from, int64_t n, T rest) {
  T buffer[sizeof(Register<T>) / sizeof(T)];
  for (T& x : buffer) x = rest;
  copy_part<sizeof buffer>(reinterpret_cast<char*>(buffer), reinterpret_cast<const char*>(from), n * sizeof(T));
  Register<T> x;
  memcpy(&x, buffer, sizeof x);
  return x;
}
#endif
template <class T>
FUSED_ADAMP_INLINE void store_part(T* to, int64_t n, Register<T> x) {
  T buffer[sizeof(Register<T>) / sizeof(T)];
  memcpy(buffer, &x, sizeof x);
  copy_part<sizeof buffer>(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(buffer), n * sizeof(T));
}
#endif

// How many lanes are in memory: all of them, or the first n.
struct Whole {};
struct Part {
  int64_t n;
};

template <class T>
struct Vec {
  static constexpr int lanes = sizeof(Register<T>) / sizeof(T);
  Register<T> lane;

  static FUSED_ADAMP_INLINE Vec load(const T* from, Whole, T = T(0)) {
    Vec x;
    memcpy(&x.lane, from, sizeof x.lane);
    return x;
  }
  // Lanes that are not in memory hold `rest`.
  static FUSED_ADAMP_INLINE Vec load(const T* from, Part part, T rest = T(0)) {
    return {load_part(from, part.n, rest)};
  }
  // `other` in lanes where `test` is 0.
  FUSED_ADAMP_INLINE Vec or_if_zero(Vec test, Vec other) const { return {test.lane == 0 ? other.lane : lane}; }
  FUSED_ADAMP_INLINE void store(T* to, Whole) const { memcpy(to, &lane, sizeof lane); }
  FUSED_ADAMP_INLINE void store(T* to, Part part) const { store_part(to, part.n, lane); }
};

template <class T>
FUSED_ADAMP_INLINE Vec<T> operator*(Vec<T> x, Vec<T> y) {
  return {x.lane * y.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> operator*(T a, Vec<T> x) {
  return {a * x.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> operator-(T a, Vec<T> x) {
  return {a - x.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> operator/(T a, Vec<T> x) {
  return {a / x.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> operator/(Vec<T> x, Vec<T> y) {
  return {x.lane / y.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> operator+(Vec<T> x, Vec<T> y) {
  return {x.lane + y.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> operator-(Vec<T> x, Vec<T> y) {
  return {x.lane - y.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> sqrt(Vec<T> x) {
  return {root(x.lane)};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> broadcast(T a) {
  return {a - Register<T>{}};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> fma(Vec<T> a, Vec<T> x, Vec<T> y) {
  return {muladd(a.lane, x.lane, y.lane)};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> fma(T a, Vec<T> x, Vec<T> y) {
  return fma(broadcast(a), x, y);
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> fma(T a, Vec<T> x, T y) {
  return fma(broadcast(a), x, broadcast(y));
}

// y where either is NaN.
template <class T>
FUSED_ADAMP_INLINE Vec<T> larger(Vec<T> x, Vec<T> y) {
  return {x.lane > y.lane ? x.lane : y.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> smaller(Vec<T> x, Vec<T> y) {
  return {x.lane < y.lane ? x.lane : y.lane};
}
template <class T>
FUSED_ADAMP_INLINE Vec<T> absolute(Vec<T> x) {
  return larger(x, Vec<T>{-x.lane});
}
// Whether x < y in every lane: not so for a NaN.
#if defined(__AVX512F__)
FUSED_ADAMP_INLINE bool all_less(Vec<float> x, Vec<float> y) {
  return _mm512_cmp_ps_mask((__m512)x.lane, (__m512)y.lane, _CMP_LT_OQ) == 0xffff;
}
FUSED_ADAMP_INLINE bool all_less(Vec<double> x, Vec<double> y) {
  return _mm512_cmp_pd_mask((__m512d)x.lane, (__m512d)y.lane, _CMP_LT_OQ) == 0xff;
}
#elif defined(__AVX2__)
FUSED_ADAMP_INLINE bool all_less(Vec<float> x, Vec<float> y) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x.lane, (__m256)y.lane, _CMP_LT_OQ)) == 0xff;
}
FUSED_ADAMP_INLINE bool all_less(Vec<double> x, Vec<double> y) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)x.lane, (__m256d)y.lane, _CMP_LT_OQ)) == 0xf;
}
#elif defined(__GNUC__)
template <class T>
FUSED_ADAMP_INLINE bool all_less(Vec<T> x, Vec<T> y) {
  const auto less = x.lane < y.lane;
  uint64_t words[sizeof less / sizeof(uint64_t)], all = ~uint64_t(0);
  memcpy(words, &less, sizeof less);
  for (uint64_t word : words) all &= word;
  return all == ~uint64_t(0);
}
#else
template <class T>
FUSED_ADAMP_INLINE bool all_less(Vec<T> x, Vec<T> y) {
  return x.lane < y.lane;
}
#endif

template <int k>
struct Index {
  static constexpr int value = k;
};

// Lanes first + i of x. Shuffled and not copied by memcpy: that would keep x in memory all through the loop that adds to it.
template <class R, int first, class X, int... i>
FUSED_ADAMP_INLINE R lanes_from(X x, std::integer_sequence<int, i...>) {
#if FUSED_ADAMP_HAS_SHUFFLE
  return __builtin_shufflevector(x, x, (first + i)...);
#else
  return R{x[first + i]...};
#endif
}

// Adds lane i to lane i + lanes/2, then the halves of that, and so on.
template <class T, int bytes, class R>
FUSED_ADAMP_INLINE T sum_of_halves(R x) {
  if constexpr (bytes == sizeof(T)) {
    T lane;
    memcpy(&lane, &x, sizeof lane);
    return lane;
  } else {
    using Half = typename RegisterOf<T, bytes / 2>::type;
    constexpr int lanes = bytes / 2 / sizeof(T);
    const std::make_integer_sequence<int, lanes> index{};
    return sum_of_halves<T, bytes / 2>(lanes_from<Half, 0>(x, index) + lanes_from<Half, lanes>(x, index));
  }
}

// A sum kept in 64 bytes of lanes: one AVX-512 register, two AVX2 registers or four of 16 bytes. So it adds the same
// numbers in the same order on every processor, whatever its vectors' width.
template <class T>
struct Accumulator {
  static constexpr int lanes = 64 / sizeof(T);
  static constexpr int registers = lanes / Vec<T>::lanes;
  Vec<T> part[registers] = {};

  template <int k>
  FUSED_ADAMP_INLINE void add(Index<k>, Vec<T> x, Vec<T> y) {
    part[k] = fma(x, y, part[k]);
  }
  FUSED_ADAMP_INLINE T sum() const {
    Vec<T> x[registers];
    for (int i = 0; i < registers; ++i) x[i] = part[i];  // memcpy would keep `part` in memory throughout its loop
    for (int half = registers / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) x[i] = x[i] + x[i + half];
    return sum_of_halves<T, sizeof(Register<T>)>(x[0].lane);
  }
};

// A sum of products of T, taken and kept in double in the same pattern: as many lanes as Accumulator<T> has.
template <class T>
struct DoubleAccumulator {
  Accumulator<double> part[sizeof(double) / sizeof(T)] = {};

  template <int k>
  FUSED_ADAMP_INLINE void add(Index<k>, Vec<T> x, Vec<T> y) {
    if constexpr (sizeof(T) == sizeof(double)) {
      part[0].add(Index<k>{}, x, y);
    } else {
      add_half<2 * k, 0>(x, y);
      add_half<2 * k + 1, Vec<double>::lanes>(x, y);
    }
  }
  FUSED_ADAMP_INLINE double sum() const {
    double total = 0;
    for (const auto& p : part) total += p.sum();
    return total;
  }

 private:
  template <int first>
  static FUSED_ADAMP_INLINE Vec<double> half(Vec<T> x) {
#if defined(__GNUC__)
    using Half = typename RegisterOf<T, register_bytes / 2>::type;
    const std::make_integer_sequence<int, Vec<double>::lanes> index{};
    return {__builtin_convertvector(lanes_from<Half, first>(x.lane, index), Register<double>)};
#else
    return {double(x.lane)};
#endif
  }
  template <int k, int first>
  FUSED_ADAMP_INLINE void add_half(Vec<T> x, Vec<T> y) {
#if defined(__GNUC__)
    part[k / Accumulator<double>::registers].add(Index<k % Accumulator<double>::registers>{}, half<first>(x), half<first>(y));
#else
    if constexpr (first == 0)  // one lane is all there is
      part[k / 2 / Accumulator<double>::registers].add(Index<k / 2 % Accumulator<double>::registers>{}, half<0>(x), half<0>(y));
#endif
  }
};

template <class T, int k = 0, class Body>
FUSED_ADAMP_INLINE void for_each_register(const Body& body) {
  if constexpr (k < Accumulator<T>::registers) {
    body(Index<k>{});
    for_each_register<T, k + 1>(body);
  }
}

// Covers n elements with vectors: body(i, index of the accumulator's register, Whole{} or Part{count}).
template <class T, class Body>
FUSED_ADAMP_INLINE void for_each_vec(int64_t n, const Body& body) {
  constexpr int step = Accumulator<T>::lanes, width = Vec<T>::lanes;
  int64_t i = 0;
  for (; i + step <= n; i += step) for_each_register<T>([&](auto k) { body(i + k.value * width, k, Whole{}); });
  for_each_register<T>([&](auto k) {
    const int64_t at = i + k.value * width;
    if (at + width <= n) {
      body(at, k, Whole{});
    } else if (at < n) {
      body(at, k, Part{n - at});
    }
  });
}

// Columns of a matrix of short rows, a row in each lane: x[0], x[stride], x[2 stride] and so on.
template <class T, int... i>
FUSED_ADAMP_INLINE Vec<T> every(const T* x, int64_t stride, std::integer_sequence<int, i...>) {
#if defined(__GNUC__)
  return {Register<T>{x[i * stride]...}};
#else
  return {x[0]};
#endif
}

// Both columns of rows of two.
template <class T>
struct TwoColumns {
  Vec<T> column[2];

  FUSED_ADAMP_INLINE TwoColumns(const T* x) {
    for (int k = 0; k < 2; ++k) column[k] = every(x + k, 2, std::make_integer_sequence<int, Vec<T>::lanes>{});
  }
};

// Four of them that lie side by side. May read three numbers beyond the last row.
template <class T>
struct FourColumns {
  Vec<T> column[4];

  FUSED_ADAMP_INLINE FourColumns(const T* x, int64_t stride) {
    for (int k = 0; k < 4; ++k) column[k] = every(x + k, stride, std::make_integer_sequence<int, Vec<T>::lanes>{});
  }
};

#if FUSED_ADAMP_HAS_SHUFFLE
// Four numbers of each row are 16 bytes: pieces of a register.
using Quad = typename RegisterOf<float, 16>::type;
template <class R, int pieces>
FUSED_ADAMP_INLINE R quads(const float* x, int64_t stride) {
  if constexpr (pieces == 1) {
    Quad quad;
    memcpy(&quad, x, sizeof quad);
    return quad;
  } else if constexpr (pieces == 2) {
    return __builtin_shufflevector(quads<Quad, 1>(x, stride), quads<Quad, 1>(x + stride, stride), 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    using Half = typename RegisterOf<float, 32>::type;
    return __builtin_shufflevector(quads<Half, 2>(x, stride), quads<Half, 2>(x + 2 * stride, stride), 0, 1, 2, 3, 4, 5, 6, 7,
                                   8, 9, 10, 11, 12, 13, 14, 15);
  }
}
// In each piece, numbers a, b of x and c, d of y.
template <int a, int b, int c, int d, class R, int... i>
FUSED_ADAMP_INLINE R pick(R x, R y, std::integer_sequence<int, i...>) {
  constexpr int lanes = sizeof...(i), from[4] = {a, b, lanes + c, lanes + d};
  return __builtin_shufflevector(x, y, (i / 4 * 4 + from[i % 4])...);
}

template <>
FUSED_ADAMP_INLINE TwoColumns<float>::TwoColumns(const float* x) {
  using R = Register<float>;
  const std::make_integer_sequence<int, Vec<float>::lanes> index{};
  constexpr int pieces = sizeof(R) / sizeof(Quad);
  const R even = quads<R, pieces>(x, 8), odd = quads<R, pieces>(x + 4, 8);  // of every four rows two
  column[0] = {pick<0, 2, 0, 2>(even, odd, index)};
  column[1] = {pick<1, 3, 1, 3>(even, odd, index)};
}

template <>
FUSED_ADAMP_INLINE FourColumns<float>::FourColumns(const float* x, int64_t stride) {
  using R = Register<float>;
  constexpr int pieces = sizeof(R) / sizeof(Quad);
  const std::make_integer_sequence<int, Vec<float>::lanes> index{};
  R row[4];  // of every four rows the first, the second and so on
  for (int i = 0; i < 4; ++i) row[i] = quads<R, pieces>(x + i * stride, 4 * stride);
  const R first = pick<0, 1, 0, 1>(row[0], row[1], index), second = pick<0, 1, 0, 1>(row[2], row[3], index);
  const R third = pick<2, 3, 2, 3>(row[0], row[1], index), fourth = pick<2, 3, 2, 3>(row[2], row[3], index);
  column[0] = {pick<0, 2, 0, 2>(first, second, index)};
  column[1] = {pick<1, 3, 1, 3>(first, second, index)};
  column[2] = {pick<0, 2, 0, 2>(third, fourth, index)};
  column[3] = {pick<1, 3, 1, 3>(third, fourth, index)};
}
#endif

}  // namespace
