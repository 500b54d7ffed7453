// AdamP and SGDP as formulas, shared by every compiled backend: docs/architecture.md, "The numbers".
//
// N is the number a formula works on: float or double in one CUDA thread, a vector of lanes on the CPU (vec.h). T is the
// scalar type beneath it. fma(a, x, y) is a x + y, sqrt(x) the square root, both found next to N.
#pragma once

#if defined(__CUDACC_RTC__)  // has no standard headers, but the functions of <cmath>
using int16_t = short;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#define HUGE_VAL __longlong_as_double(0x7ff0000000000000)
#define FUSED_ADAMP_INLINE __device__ __forceinline__
#else
#include <cmath>
#include <cstdint>
#endif

#if defined(FUSED_ADAMP_INLINE)
#elif defined(__GNUC__)
#define FUSED_ADAMP_INLINE inline __attribute__((always_inline))
#else
#define FUSED_ADAMP_INLINE inline
#endif

namespace fused_adamp {

#if defined(__CUDACC_RTC__)
__device__ inline double power(double base, double t) { return exp(t * log(base > 1e-300 ? base : 1e-300)); }  // without a call
#else
using std::fabs;
using std::sqrt;
inline double power(double base, double t) { return std::pow(base, t); }
#endif

// A row of the hyperparameter table, in the order of fused_adamp/batch.py, Scalars.
struct Scalars {
  double lr, momentum, gain, nesterov_gain, beta2, gain2, eps, decay, delta, wd_ratio, sign, nesterov, project_buffer,
      projection;
};

enum class Decision : uint8_t { none = 0, channel = 1, layer = 2 };

// fused_adamp/batch.py, PROJECTIONS.
enum class Projection { automatic = 0, channel = 1, layer = 2, none = 3 };

// Which momentum rule, at compile time. A GPU's kernels are compiled for both values of nesterov, which is an argument then.
template <bool adaptive_, bool nesterov_, bool buffer_, bool project_buffer_>
struct Rule {
  static constexpr bool adaptive = adaptive_;              // AdamP: second moment, denominator, bias corrections
  static constexpr bool nesterov = nesterov_;
  static constexpr bool buffer = buffer_;                  // false: SGDP without momentum keeps no state
  static constexpr bool project_buffer = project_buffer_;  // the stored momentum is projected with the update
};

// The numbers of one parameter that depend on t, the 1-based step. They come in double, and so does 1 - beta: in float32,
// 1 - 0.999f is off by 1e-5.
struct Corrections {
  double inverse_bias2, step_size;
};

FUSED_ADAMP_INLINE Corrections corrections_of(const Scalars& s, bool adaptive, double t) {
  if (!adaptive) return {1, s.lr};
  return {1 / sqrt(1 - power(s.beta2, t)), s.lr / (1 - power(s.momentum, t))};
}

// The numbers of one parameter in one step.
template <class T>
struct Coefficients {
  T momentum, gain, nesterov_gain, beta2, gain2, scale, inverse_bias2, eps, step_size;

  Coefficients() = default;

  // scale is what loss scaling and clipping multiply the gradient by.
  FUSED_ADAMP_INLINE Coefficients(const Scalars& s, const Corrections& by_step, double scale_)
      : momentum(T(s.momentum)),
        gain(T(s.gain)),
        nesterov_gain(T(s.nesterov_gain)),
        beta2(T(s.beta2)),
        gain2(T(s.gain2)),
        scale(T(s.sign * scale_)),
        inverse_bias2(T(by_step.inverse_bias2)),
        eps(T(s.eps)),
        step_size(T(by_step.step_size)) {}
};

// The momentum:
//
//   AdamP  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
//   SGDP   m = mu m + (1-dampening) g
template <class R, class T, class N>
FUSED_ADAMP_INLINE void advance(N g, N& m, N& v, const Coefficients<T>& c) {
  g = c.scale * g;
  if constexpr (R::buffer) {
    m = fma(c.momentum, m, c.gain * g);
  } else {
    m = c.gain * g;
  }
  if constexpr (R::adaptive) v = fma(c.beta2, v, (c.gain2 * g) * g);
}

// The update u, from the momentum just advanced:
//
//   AdamP  u = m / (sqrt(v) / sqrt(1-b2^t) + eps)
//   SGDP   u = m
//   nesterov takes b1 m + (1-b1) g, or mu m + g, in place of m
template <class R, class T, class N>
FUSED_ADAMP_INLINE N direction(N g, N m, N v, const Coefficients<T>& c, bool nesterov = R::nesterov) {
  N u = m;
  if (nesterov) u = fma(c.momentum, m, c.nesterov_gain * (c.scale * g));
  if constexpr (R::adaptive) u = u / fma(c.inverse_bias2, sqrt(v), c.eps);
  return u;
}

// Moves the weight. Textbook form, with the projection's n = p/(|p|+eps), c = p.u/(|p|+eps)^2, s the step size, w the decay:
//
//   u -= n (n.u) = c p;   p *= 1 - w;   p -= s u      =>      p - w p - s (u - c p) = p - (s u + (w - s c) p)
//
// shrink is w - s c, of type S: T, or N where the lanes of a vector belong to several rows. One rounding at the size of p
// instead of two: 1 - w is never rounded to T.
template <class T, class N, class S>
FUSED_ADAMP_INLINE N weight_update(N p, N u, T step_size, S shrink) {
  return p - fma(step_size, u, shrink * p);
}

// Corrects a weight that was moved with the shrink `was` and should have been with `is`: with p' the moved and p the old one,
//
//   p' = p - (s u + was p)   =>   p = (p' + s u) / (1 - was);    p - (s u + is p) = p' - (is - was) p
//
// Exact but for one more rounding at the size of p, as p is only recovered to rounding. Needs |was| <= 1/2.
template <class T, class N, class S>
FUSED_ADAMP_INLINE N weight_correction(N moved, N u, T step_size, S was, S is) {
  const N p = (T(1) / (T(1) - was)) * fma(step_size, u, moved);
  return moved - (is - was) * p;
}

// Sums over a view (a row or a whole parameter), or over a tile's part of one. g is what the step makes of the gradient:
// unscaled and clipped.
struct Sums {
  double pg, gg, pp;
};

// The sums of one reading of a view, or of a tile's part of one: fused_adamp/batch.py, ROW_SHARES.
struct ViewSums {
  Sums sums{0, 0, 0};
  double pu = 0;  // p.u

  FUSED_ADAMP_INLINE void add(const ViewSums& other) {
    sums.pg += other.sums.pg;
    sums.gg += other.sums.gg;
    sums.pp += other.sums.pp;
    pu += other.pu;
  }
};

// The value below which a block's p.p or g.g may lack squares that are too small for float32, in which a block is summed.
// -1 if eps is large: then the clamp at eps, and |p| + eps, hide the loss.
FUSED_ADAMP_INLINE double least_square(double eps2) { return eps2 < 0x1p-90 ? 0x1p-100 : -1; }

// Whether a block's sums, added up in float32, are right: no square, and no p.u, has left the range of float32.
FUSED_ADAMP_INLINE bool representable(const ViewSums& s, double least) {
  const double least_of_both = s.sums.pp < s.sums.gg ? s.sums.pp : s.sums.gg;
  return (s.sums.pp + s.sums.gg + fabs(s.pu) < HUGE_VAL) & (least_of_both > least);
}

// The numbers that the cosine test compares with.
struct Test {
  double delta2 = 0, eps2 = 0;
  bool limits = false;  // whether squared_limit is wanted: 5 ns for a row that fails, 20% of rows of 9

  Test() = default;
  FUSED_ADAMP_INLINE Test(double delta, double eps, bool limits_)
      : delta2(delta * delta), eps2(eps * eps), limits(limits_) {}
};

// Whether a product of squares, and with it the square of what they bound, is far from the ends of double.
FUSED_ADAMP_INLINE bool ordinary(double squares) { return squares > 1e-250 && squares < 1e250; }

// The square of cos(g, p) = |p.g| / (max(|p|, eps) max(|g|, eps)) over its threshold delta / sqrt(dim): the test is passed
// below 1. Neither side is ever negative, and max(|p|, eps)^2 = max(p.p, eps^2).
// A NaN, which every broken gradient leaves in p.g, becomes infinity, so that a maximum of these does not lose it.
// T is the type of the numbers that were summed: products of float's squares never leave double.
template <class T = double>
FUSED_ADAMP_INLINE double cosine_ratio(const Sums& s, const Test& test, double dim) {
  const double pp = s.pp > test.eps2 ? s.pp : test.eps2;
  const double gg = s.gg > test.eps2 ? s.gg : test.eps2;
  const double squares = test.delta2 * pp * gg;
  double ratio = s.pg * s.pg * dim / squares;
  if (sizeof(T) == sizeof(double) && !ordinary(squares)) {
    const double cosine = s.pg / sqrt(pp) / sqrt(gg);
    ratio = cosine * cosine * dim / test.delta2;
  }
  return ratio == ratio ? ratio : HUGE_VAL;
}

// The square of a view's limit: docs/architecture.md, "The limit of a view". A NaN passes at no scale.
template <class T = double>
FUSED_ADAMP_INLINE double squared_limit(const Sums& s, const Test& test, double dim) {
  const double pp = s.pp > test.eps2 ? s.pp : test.eps2, pg = s.pg * s.pg * dim, squares = test.delta2 * pp * s.gg;
  if (sizeof(T) == sizeof(double) && !ordinary(squares)) {
    const double a = sqrt(test.delta2 / dim) * sqrt(pp), size = fabs(s.pg);
    if (size < a * sqrt(s.gg)) return HUGE_VAL;
    const double root = a * sqrt(test.eps2) / size;
    return root >= 0 ? root * root : 0;
  }
  if (pg < squares) return HUGE_VAL;
  const double limit = test.delta2 * pp * test.eps2 / pg;
  return limit >= 0 ? limit : 0;
}

// Whether a view passes at a scale of the gradient, from its limit. With eps = 0 the cosine of nothing is 0/0, which is below
// nothing.
FUSED_ADAMP_INLINE bool passes(double scale, double limit, double eps) {
  return scale < limit && (scale > 0 || eps > 0);
}

// c of weight_update.
template <class T>
FUSED_ADAMP_INLINE T projection(T pu, T pp, T eps) {
  const T norm = sqrt(pp) + eps;
  return pu / (norm * norm);
}

}  // namespace fused_adamp
