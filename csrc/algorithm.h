// AdamP and SGDP as formulas, shared by every compiled backend: docs/architecture.md, "The numbers".
//
// N is the number a formula works on: float or double in one CUDA thread, a vector of lanes on the CPU (vec.h). T is the
// scalar type beneath it. fma(a, x, y) is a x + y, sqrt(x) the square root, both found next to N.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_ADAMP_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FUSED_ADAMP_INLINE inline __attribute__((always_inline))
#else
#define FUSED_ADAMP_INLINE inline
#endif

namespace fused_adamp {

// A row of the hyperparameter table, in the order of fused_adamp/batch.py, Scalars.
struct Scalars {
  double lr, momentum, gain, nesterov_gain, beta2, gain2, eps, decay, delta, wd_ratio, sign, nesterov, project_buffer,
      projection;
};

enum class Decision : uint8_t { none = 0, channel = 1, layer = 2 };

// fused_adamp/batch.py, PROJECTIONS.
enum class Projection { automatic = 0, channel = 1, layer = 2, none = 3 };

// Which momentum rule, at compile time.
template <bool adaptive_, bool nesterov_, bool buffer_, bool project_buffer_>
struct Rule {
  static constexpr bool adaptive = adaptive_;              // AdamP: second moment, denominator, bias corrections
  static constexpr bool nesterov = nesterov_;
  static constexpr bool buffer = buffer_;                  // false: SGDP without momentum keeps no state
  static constexpr bool project_buffer = project_buffer_;  // the stored momentum is projected with the update
};

// The numbers of one parameter in one step.
template <class T>
struct Coefficients {
  T momentum, gain, nesterov_gain, beta2, gain2, scale, inverse_bias2, eps, step_size;

  Coefficients() = default;

  // t is the 1-based step; scale is what loss scaling and clipping multiply the gradient by. Bias corrections and 1 - beta
  // come in double: in float32, 1 - 0.999f is off by 1e-5.
  Coefficients(const Scalars& s, bool adaptive, double t, double scale_)
      : momentum(T(s.momentum)),
        gain(T(s.gain)),
        nesterov_gain(T(s.nesterov_gain)),
        beta2(T(s.beta2)),
        gain2(T(s.gain2)),
        scale(T(s.sign * scale_)),
        inverse_bias2(adaptive ? T(1 / std::sqrt(1 - std::pow(s.beta2, t))) : T(1)),
        eps(T(s.eps)),
        step_size(T(adaptive ? s.lr / (1 - std::pow(s.momentum, t)) : s.lr)) {}
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
FUSED_ADAMP_INLINE N direction(N g, N m, N v, const Coefficients<T>& c) {
  N u = m;
  if constexpr (R::nesterov) u = fma(c.momentum, m, c.nesterov_gain * (c.scale * g));
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

// The value below which a block's p.p or g.g may lack squares that are too small for float32, in which a block is summed.
// -1 if eps is large: then the clamp at eps, and |p| + eps, hide the loss.
FUSED_ADAMP_INLINE double least_square(double eps2) { return eps2 < 0x1p-90 ? 0x1p-100 : -1; }

// The numbers that the cosine test compares with.
struct Test {
  double delta2 = 0, eps2 = 0;
  bool limits = false;  // whether squared_limit is wanted: 5 ns for a row that fails, 20% of rows of 9

  Test() = default;
  Test(double delta, double eps, bool limits_) : delta2(delta * delta), eps2(eps * eps), limits(limits_) {}
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
    const double cosine = s.pg / std::sqrt(pp) / std::sqrt(gg);
    ratio = cosine * cosine * dim / test.delta2;
  }
  return ratio == ratio ? ratio : HUGE_VAL;
}

// The square of a view's limit: docs/architecture.md, "The limit of a view". A NaN passes at no scale.
template <class T = double>
FUSED_ADAMP_INLINE double squared_limit(const Sums& s, const Test& test, double dim) {
  const double pp = s.pp > test.eps2 ? s.pp : test.eps2, pg = s.pg * s.pg * dim, squares = test.delta2 * pp * s.gg;
  if (sizeof(T) == sizeof(double) && !ordinary(squares)) {
    const double a = std::sqrt(test.delta2 / dim) * std::sqrt(pp), size = std::fabs(s.pg);
    if (size < a * std::sqrt(s.gg)) return HUGE_VAL;
    const double root = a * std::sqrt(test.eps2) / size;
    return root >= 0 ? root * root : 0;
  }
  if (pg < squares) return HUGE_VAL;
  const double limit = test.delta2 * pp * test.eps2 / pg;
  return limit >= 0 ? limit : 0;
}

// c of weight_update.
FUSED_ADAMP_INLINE double projection(double pu, double pp, double eps) {
  const double norm = std::sqrt(pp) + eps;
  return pu / (norm * norm);
}

}  // namespace fused_adamp
