// The kernels of cpu_kernels.h for the instruction set that this file is compiled for, which the build names in
// FUSED_ADAMP_INSTRUCTIONS (setup.py compiles it once for each).
#include "cpu_kernels.h"

#include "vec.h"

namespace {

using namespace fused_adamp;

// A kernel, with the bodies of its loops inlined: left to itself, gcc calls them line by line.
#if defined(__GNUC__)
#define FUSED_ADAMP_KERNEL __attribute__((flatten))
#else
#define FUSED_ADAMP_KERNEL
#endif

// Covers n elements with blocks: body(begin, end). Lanes are summed in T within a block, in double from block to block:
// a sum's error stays below 64 roundings of T however long the row.
template <class T, class Body>
FUSED_ADAMP_INLINE void for_each_block(int64_t n, const Body& body) {
  constexpr int64_t size = 64 * Accumulator<T>::lanes;
  for (int64_t i = 0; i < n; i += size) body(i, n - i < size ? n : i + size);
}

template <class T>
FUSED_ADAMP_INLINE Sums measure_row(const T* p, const T* g, int64_t n) {
  Sums sums{0, 0, 0};
  for_each_block<T>(n, [&](int64_t begin, int64_t end) {
    Accumulator<T> pg, gg, pp;
    for_each_vec<T>(begin, end, [&](int64_t i, auto k, auto extent) {
      const auto x = Vec<T>::load(p + i, extent), y = Vec<T>::load(g + i, extent);
      pg.add(k, x, y);
      gg.add(k, y, y);
      pp.add(k, x, x);
    });
    sums.pg += pg.sum();
    sums.gg += gg.sum();
    sums.pp += pp.sum();
  });
  return sums;
}

template <class T>
FUSED_ADAMP_KERNEL Sums measure(const T* p, const T* g, int64_t rows, int64_t cols, double delta, double eps, double* failed) {
  Sums sums{0, 0, 0};
  for (int64_t row = 0; row < rows; ++row) {
    const Sums s = measure_row(p + row * cols, g + row * cols, cols);
    *failed += !below_threshold(s, delta, eps, double(cols));
    sums.pg += s.pg;
    sums.gg += s.gg;
    sums.pp += s.pp;
  }
  return sums;
}

// One vector of the state. Lanes beyond the tile's end hold m = 0, v = 1: their u is 0 / (1 + eps), never NaN.
template <class R, class T>
struct State {
  Vec<T> m{}, v{};

  template <class Extent>
  FUSED_ADAMP_INLINE State(const TileData<T>& t, int64_t i, Extent extent) {
    if constexpr (R::buffer) m = Vec<T>::load(t.m + i, extent);
    if constexpr (R::adaptive) v = Vec<T>::load(t.v + i, extent, T(1));
  }
  template <class Extent>
  FUSED_ADAMP_INLINE void store(const TileData<T>& t, int64_t i, Extent extent) const {
    if constexpr (R::buffer) m.store(t.m + i, extent);
    if constexpr (R::adaptive) v.store(t.v + i, extent);
  }
};

template <class R, class T>
FUSED_ADAMP_KERNEL double dot(TileData<T> t, int64_t n, Coefficients<T> c) {
  double sum = 0;
  for_each_block<T>(n, [&](int64_t begin, int64_t end) {
    Accumulator<T> pu;
    for_each_vec<T>(begin, end, [&](int64_t i, auto k, auto extent) {
      const auto g = Vec<T>::load(t.g + i, extent);
      State<R, T> s(t, i, extent);
      advance<R>(g, s.m, s.v, c);
      pu.add(k, Vec<T>::load(t.p + i, extent), direction<R>(g, s.m, s.v, c));
    });
    sum += pu.sum();
  });
  return sum;
}

template <class R, class T>
FUSED_ADAMP_KERNEL void update(TileData<T> t, int64_t n, Coefficients<T> c, T projected, T decay) {
  const T shrink = decay - c.step_size * projected;
  for_each_vec<T>(0, n, [&](int64_t i, auto, auto extent) {
    const auto p = Vec<T>::load(t.p + i, extent), g = Vec<T>::load(t.g + i, extent);
    State<R, T> s(t, i, extent);
    advance<R>(g, s.m, s.v, c);
    const auto u = direction<R>(g, s.m, s.v, c);
    if constexpr (R::project_buffer) s.m = u - projected * p;
    s.store(t, i, extent);
    weight_update(p, u, c.step_size, shrink).store(t.p + i, extent);
  });
}

// Brings the cache line 1 KB ahead closer than the hardware's prefetcher does. Measured where every row is projected: Zen 5
// with AVX-512 gains 6% (81 to 86 GB/s), Zen 3 with AVX2 loses.
template <class R, class T>
FUSED_ADAMP_INLINE void prefetch(const TileData<T>& t, int64_t i) {
#if defined(__AVX512F__)
  constexpr int64_t ahead = 1024 / sizeof(T);
  __builtin_prefetch(t.p + i + ahead);
  __builtin_prefetch(t.g + i + ahead);
  if constexpr (R::buffer) __builtin_prefetch(t.m + i + ahead);
  if constexpr (R::adaptive) __builtin_prefetch(t.v + i + ahead);
#else
  (void)t, (void)i;
#endif
}

struct RowSums {
  Sums sums{0, 0, 0};
  double pu = 0;
};

// Advances the state of n elements of one row, adds up its sums and hands (i, extent, p, u) to `store`.
template <class R, class T, class Store>
FUSED_ADAMP_INLINE RowSums advance_row(const TileData<T>& t, int64_t n, const Coefficients<T>& c, const Store& store) {
  RowSums row;
  for_each_block<T>(n, [&](int64_t begin, int64_t end) {
    Accumulator<T> pg, gg, pp, pu;
    for_each_vec<T>(begin, end, [&](int64_t i, auto k, auto extent) {
      prefetch<R>(t, i);
      const auto p = Vec<T>::load(t.p + i, extent), g = Vec<T>::load(t.g + i, extent);
      State<R, T> s(t, i, extent);
      advance<R>(g, s.m, s.v, c);
      const auto u = direction<R>(g, s.m, s.v, c);
      s.store(t, i, extent);
      store(i, extent, p, u);
      pg.add(k, p, g);
      gg.add(k, g, g);
      pp.add(k, p, p);
      pu.add(k, p, u);
    });
    row.sums.pg += pg.sum();
    row.sums.gg += gg.sum();
    row.sums.pp += pp.sum();
    row.pu += pu.sum();
  });
  return row;
}

// How the weights of a row move once its sums are known.
template <class T>
struct Move {
  T projected, shrink;
};

// The second half of the update of n elements, from u in scratch.
template <class R, class T, class Extent>
FUSED_ADAMP_INLINE void move(const TileData<T>& t, const T* u, int64_t i, Extent extent, T step_size, const Move<T>& by) {
  const auto p = Vec<T>::load(t.p + i, extent), y = Vec<T>::load(u + i, extent);
  if constexpr (R::project_buffer) (y - by.projected * p).store(t.m + i, extent);
  weight_update(p, y, step_size, by.shrink).store(t.p + i, extent);
}

template <class R, class T>
FUSED_ADAMP_INLINE void next_row(TileData<T>& t, int64_t cols) {
  t.p += cols;
  t.g += cols;
  if constexpr (R::buffer) t.m += cols;
  if constexpr (R::adaptive) t.v += cols;
}

// Updates rows that are each projected: move_of(row, sums) says how. A row's weights move while
// the state of a later one advances: moving works in cache, advancing waits for memory. The next one but one where rows are
// short, so that how to move, a chain of some hundred cycles from the row's sums, is not waited for; else the next one, so
// that the row is still in the first-level cache.
template <class R, class T, class MoveOf>
FUSED_ADAMP_INLINE void update_rows(TileData<T> t, T* u, int64_t rows, int64_t cols, const Coefficients<T>& c,
                                    const MoveOf& move_of) {
  struct Row {
    TileData<T> t;
    T* u;
    Move<T> by;
  };
  constexpr int64_t line = Accumulator<T>::lanes;
  const int64_t stride = (cols + line - 1) / line * line;
  const int lag = cols <= 512 ? 2 : 1;
  Row ring[rows_in_flight];
  for (int64_t row = 0; row < rows; ++row, next_row<R>(t, cols)) {
    T* const u_now = u + row % rows_in_flight * stride;
    RowSums s;
    if (row < lag) {
      s = advance_row<R>(t, cols, c, [&](int64_t i, auto extent, auto, auto y) { y.store(u_now + i, extent); });
    } else {
      const Row old = ring[(row - lag) % rows_in_flight];
      s = advance_row<R>(t, cols, c, [&](int64_t i, auto extent, auto, auto y) {
        y.store(u_now + i, extent);
        move<R>(old.t, old.u, i, extent, c.step_size, old.by);
      });
    }
    ring[row % rows_in_flight] = {t, u_now, move_of(row, s)};
  }
  for (int64_t row = rows > lag ? rows - lag : 0; row < rows; ++row) {
    const Row old = ring[row % rows_in_flight];
    for_each_vec<T>(0, cols, [&](int64_t i, auto, auto extent) { move<R>(old.t, old.u, i, extent, c.step_size, old.by); });
  }
}

template <class R, class T>
FUSED_ADAMP_KERNEL void update_projected(TileData<T> t, T* u, int64_t rows, int64_t cols, Coefficients<T> c, T decay) {
  update_rows<R>(t, u, rows, cols, c, [&](int64_t, const RowSums& s) {
    const T projected = T(projection(s.pu, s.sums.pp, double(c.eps)));
    return Move<T>{projected, decay - c.step_size * projected};
  });
}

template <class R, class T>
FUSED_ADAMP_KERNEL void sweep(TileData<T> t, T* u, int64_t rows, int64_t cols, Coefficients<T> c, Guess<T> guess,
                              TileSums* tile) {
  TileSums total{};
  const auto count = [&](const RowSums& s) {
    total.failed += !below_threshold(s.sums, guess.delta, guess.eps, double(cols));
    total.sums.pg += s.sums.pg;
    total.sums.gg += s.sums.gg;
    total.sums.pp += s.sums.pp;
    total.pu += s.pu;
  };
  if (guess.shrink) {
    update_rows<R>(t, u, rows, cols, c, [&](int64_t row, const RowSums& s) {
      count(s);
      const T shrink = guess.projected_decay - c.step_size * T(projection(s.pu, s.sums.pp, double(c.eps)));
      const bool safe = recoverable(shrink);
      guess.shrink[row] = shrink;
      total.deferred += !safe;
      return Move<T>{T(0), safe ? shrink : guess.decay};
    });
  } else {
    for (int64_t row = 0; row < rows; ++row, next_row<R>(t, cols)) {
      count(advance_row<R>(t, cols, c, [&](int64_t i, auto extent, auto p, auto y) {
        weight_update(p, y, c.step_size, guess.decay).store(t.p + i, extent);
      }));
    }
  }
  *tile = total;
}

template <class R, class T>
FUSED_ADAMP_KERNEL void finish(TileData<T> t, int64_t n, Coefficients<T> c, T was, T is) {
  for_each_vec<T>(0, n, [&](int64_t i, auto, auto extent) {
    const auto g = Vec<T>::load(t.g + i, extent);
    State<R, T> s(t, i, extent);
    if constexpr (!R::buffer) advance<R>(g, s.m, s.v, c);
    const auto u = direction<R>(g, s.m, s.v, c);
    weight_correction(Vec<T>::load(t.p + i, extent), u, c.step_size, was, is).store(t.p + i, extent);
  });
}

// 16-bit storage.

struct BFloat16 {
  uint16_t bits;
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
  }
  static BFloat16 from(float x) {
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return {uint16_t(x == x ? rounded : 0x7fc0)};
  }
};

struct Float16 {
  uint16_t bits;
  explicit operator float() const {
    // Exponent and fraction move to float's places; multiplying by 2^112 sets the exponent's bias right, and gives
    // subnormal numbers their value; what had the largest exponent is infinite or NaN.
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
    float x;
    memcpy(&x, &magnitude, sizeof x);
    x *= 0x1p112f;
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    wide |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    wide |= uint32_t(bits & 0x8000) << 16;
    memcpy(&x, &wide, sizeof x);
    return x;
  }
  static Float16 from(float x) {
    uint32_t wide;
    memcpy(&wide, &x, sizeof wide);
    const uint16_t sign = uint16_t(wide >> 16) & 0x8000;
    wide &= 0x7fffffff;
    uint32_t half;
    if (wide > 0x7f800000) {
      half = 0x7e00;
    } else if (wide >= 0x47800000) {
      half = 0x7c00;  // 2^16 and above
    } else if (wide < 0x38800000) {
      // Below 2^-14: adding 0.5 aligns the fraction to multiples of 2^-24 and rounds to nearest even.
      float y;
      memcpy(&y, &wide, sizeof y);
      y += 0.5f;
      memcpy(&wide, &y, sizeof wide);
      half = wide - 0x3f000000;
    } else {
      half = (wide - 0x38000000 + 0xfff + ((wide >> 13) & 1)) >> 13;
    }
    return {uint16_t(sign | half)};
  }
};

template <class S, class T>
FUSED_ADAMP_INLINE T widen(S x) {
  if constexpr (sizeof(S) == 2) {
    return T(float(x));
  } else {
    return T(x);
  }
}

template <class S, class T>
FUSED_ADAMP_INLINE S narrow(T x) {
  if constexpr (sizeof(S) == 2) {
    return S::from(float(x));
  } else {
    return S(x);
  }
}

template <class S, class T>
void gather(const void* from, int64_t from_stride, T* to, int64_t to_stride, int64_t n) {
  const S* source = static_cast<const S*>(from);
  if (from_stride == 1 && to_stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen<S, T>(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = widen<S, T>(source[i * from_stride]);
  }
}

template <class S, class T>
void scatter(const T* from, int64_t from_stride, void* to, int64_t to_stride, int64_t n) {
  S* target = static_cast<S*>(to);
  if (from_stride == 1 && to_stride == 1) {
    for (int64_t i = 0; i < n; ++i) target[i] = narrow<S, T>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i * to_stride] = narrow<S, T>(from[i * from_stride]);
  }
}

#if defined(__F16C__)
template <>
void gather<Float16, float>(const void* from, int64_t from_stride, float* to, int64_t to_stride, int64_t n) {
  const Float16* source = static_cast<const Float16*>(from);
  int64_t i = 0;
  if (from_stride == 1 && to_stride == 1) {
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
  for (; i < n; ++i) to[i * to_stride] = float(source[i * from_stride]);
}

template <>
void scatter<Float16, float>(const float* from, int64_t from_stride, void* to, int64_t to_stride, int64_t n) {
  Float16* target = static_cast<Float16*>(to);
  int64_t i = 0;
  if (from_stride == 1 && to_stride == 1) {
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) target[i * to_stride] = Float16::from(from[i * from_stride]);
}
#endif

template <class R, class T>
constexpr RuleKernels<T> rule_kernels() {
  return {dot<R, T>, update<R, T>, update_projected<R, T>, sweep<R, T>, finish<R, T>};
}

template <class T>
constexpr Kernels<T> kernels() {
  return {measure<T>,
          {rule_kernels<RuleAdam, T>(), rule_kernels<RuleAdamNesterov, T>(), rule_kernels<RuleSgd, T>(),
           rule_kernels<RuleSgdNesterov, T>(), rule_kernels<RuleSgdProjectBuffer, T>(),
           rule_kernels<RuleSgdNoBuffer, T>()},
          {gather<float, T>, gather<double, T>, gather<BFloat16, T>, gather<Float16, T>},
          {scatter<float, T>, scatter<double, T>, scatter<BFloat16, T>, scatter<Float16, T>}};
}

}  // namespace

#define FUSED_ADAMP_JOIN(a, b) a##b
#define FUSED_ADAMP_NAME(set) FUSED_ADAMP_JOIN(instructions_, set)
#define FUSED_ADAMP_TEXT(x) #x
#define FUSED_ADAMP_QUOTE(x) FUSED_ADAMP_TEXT(x)

const fused_adamp::InstructionSet fused_adamp::FUSED_ADAMP_NAME(FUSED_ADAMP_INSTRUCTIONS) = {
    FUSED_ADAMP_QUOTE(FUSED_ADAMP_INSTRUCTIONS), kernels<float>(), kernels<double>()};
