// Instructions that touch nothing but registers, for the lanes of a mask at once.
#pragma once

#include <cfenv>
#include <type_traits>

#include "numbers.h"

namespace ptx {

class Arithmetic {
 protected:
  // A register is an array of 32 lanes; a predicate is a mask. They belong to the warp that runs.
  u8* registers = nullptr;
  const u8* constants = nullptr;
  i32 jitter = 0;

  // Whether the instruction was known.
  bool calculate(const Instruction& i, u32 m) {
    switch (i.op) {
      case O_cvt: convert(i, m); return true;
      case O_cvt_pair: convert_pair(i, m); return true;
      case O_pack: pack(i, m); return true;
      case O_unpack: unpack(i, m); return true;
      case O_cvta: case O_cvta_to: case O_isspacep: return space(i, m);
      default: break;
    }
    switch (i.type) {
      case T_pred: return predicates(i, m);
      case T_f32: return real<float>(i, m);
      case T_f64: return real<double>(i, m);
      case T_u16: case T_s16: case T_b16: return integer<u32, i16, i32>(i, m);
      case T_u32: case T_s32: case T_b32: return integer<u32, i32, i64>(i, m);
      case T_u64: case T_s64: case T_b64: return integer<u64, i64, i128>(i, m);
      default: return false;
    }
  }

  // Operands.

  template <class T>
  const T* source(i32 operand) const {
    return reinterpret_cast<const T*>(operand >= 0 ? registers + operand : constants + ~operand);
  }
  template <class T>
  T* target(i32 operand) {
    return reinterpret_cast<T*>(registers + operand);
  }
  u64 lane(const Instruction& i, int operand, int l) const {
    if (i.r[operand] == NONE) return 0;
    return i.width[operand] == 8 ? source<u64>(i.r[operand])[l] : source<u32>(i.r[operand])[l];
  }
  void set_lane(const Instruction& i, int operand, int l, u64 value) {
    if (i.r[operand] == NONE) return;
    if (i.width[operand] == 8) target<u64>(i.r[operand])[l] = value;
    else target<u32>(i.r[operand])[l] = u32(value);
  }
  void set_predicate(i32 operand, u32 m, u32 value) {
    if (operand == NONE) return;
    u32* d = target<u32>(operand);
    *d = (*d & ~m) | (value & m);
  }
  u32 source_predicate(const Instruction& i, int operand) const {
    u32 p = *source<u32>(i.r[operand]);
    return i.flags & NEGATED_SOURCE ? ~p : p;
  }
  // All results come before the first is stored: a target may be a source.
  template <class D, class F>
  static inline __attribute__((always_inline)) void put(D* d, u32 m, F f) {
    D t[LANES];
    for (int l = 0; l < LANES; ++l) t[l] = f(l);
    if (m == ALL) {
      memcpy(d, t, sizeof t);
      return;
    }
    for (int l = 0; l < LANES; ++l)
      if (m >> l & 1) d[l] = t[l];
  }

 private:
  bool predicates(const Instruction& i, u32 m) {
    u32 a = *source<u32>(i.r[1]), b = i.r[2] == NONE ? 0 : *source<u32>(i.r[2]);
    switch (i.op) {
      case O_and_: set_predicate(i.r[0], m, a & b); return true;
      case O_or_: set_predicate(i.r[0], m, a | b); return true;
      case O_xor_: set_predicate(i.r[0], m, a ^ b); return true;
      case O_not_: set_predicate(i.r[0], m, ~a); return true;
      case O_mov: set_predicate(i.r[0], m, a); return true;
      default: return false;
    }
  }

  // Integers. R: a lane of a register, S: the signed type, W: one that holds every product of two.

  template <class R, class S, class W>
  bool integer(const Instruction& i, u32 m) {
    using U = std::make_unsigned_t<S>;
    constexpr u32 BITS = 8 * sizeof(S);
    const R *a = source<R>(i.r[1]), *b = source<R>(i.r[2]), *c = source<R>(i.r[3]);
    const u32 *b4 = source<u32>(i.r[2]), *c4 = source<u32>(i.r[3]), *d4 = source<u32>(i.r[4]);
    R* d = target<R>(i.r[0]);
    bool sg = is_signed(i.type);
    auto each = [&](auto f) { put(d, m, [&](int l) { return R(U(f(l))); }); };
    auto count = [&](auto f) { put(target<u32>(i.r[0]), m, [&](int l) { return u32(f(U(a[l]))); }); };
    // f of two numbers, signed or not as the instruction says.
    auto by_sign = [&](auto f) {
      if (sg) each([&](int l) { return f(S(a[l]), S(b[l])); });
      else each([&](int l) { return f(U(a[l]), U(b[l])); });
    };
    auto product = [&](int l) -> W { return sg ? W(S(a[l])) * W(S(b[l])) : W(std::make_unsigned_t<W>(U(a[l])) * U(b[l])); };
    auto saturated = [&](W x) { return S(std::clamp(x, W(std::numeric_limits<S>::min()), W(std::numeric_limits<S>::max()))); };
    switch (i.op) {
      case O_add:
        if (i.flags & SAT) each([&](int l) { return saturated(W(S(a[l])) + S(b[l])); });
        else each([&](int l) { return a[l] + b[l]; });
        return true;
      case O_sub:
        if (i.flags & SAT) each([&](int l) { return saturated(W(S(a[l])) - S(b[l])); });
        else each([&](int l) { return a[l] - b[l]; });
        return true;
      case O_mul: each([&](int l) { return u64(a[l]) * b[l]; }); return true;
      case O_mad: each([&](int l) { return u64(a[l]) * b[l] + c[l]; }); return true;
      case O_mul_hi: each([&](int l) { return product(l) >> BITS; }); return true;
      case O_mad_hi: each([&](int l) { return R(product(l) >> BITS) + c[l]; }); return true;
      case O_mul_wide: case O_mad_wide:
        if constexpr (sizeof(S) == 8) return false;
        else {
          using Wide = std::make_unsigned_t<W>;
          const Wide* addend = source<Wide>(i.r[3]);
          if (i.op == O_mul_wide) put(target<Wide>(i.r[0]), m, [&](int l) { return Wide(product(l)); });
          else put(target<Wide>(i.r[0]), m, [&](int l) { return Wide(Wide(product(l)) + addend[l]); });
          return true;
        }
      case O_div:  // what division by zero returns is not defined
        by_sign([](auto p, auto q) { return !q ? decltype(p)(-1) : q == decltype(q)(-1) && std::is_signed_v<decltype(q)> ? decltype(p)(U(0) - U(p)) : decltype(p)(p / q); });
        return true;
      case O_rem:
        by_sign([](auto p, auto q) { return !q ? p : q == decltype(q)(-1) && std::is_signed_v<decltype(q)> ? decltype(p)(0) : decltype(p)(p % q); });
        return true;
      case O_abs: each([&](int l) { return S(a[l]) < 0 ? 0 - a[l] : a[l]; }); return true;
      case O_neg: each([&](int l) { return 0 - a[l]; }); return true;
      case O_min: by_sign([](auto p, auto q) { return p < q ? p : q; }); return true;
      case O_max: by_sign([](auto p, auto q) { return p > q ? p : q; }); return true;
      case O_and_: each([&](int l) { return a[l] & b[l]; }); return true;
      case O_or_: each([&](int l) { return a[l] | b[l]; }); return true;
      case O_xor_: each([&](int l) { return a[l] ^ b[l]; }); return true;
      case O_not_: each([&](int l) { return ~a[l]; }); return true;
      case O_cnot: each([&](int l) { return U(a[l]) == 0; }); return true;
      case O_shl: each([&](int l) { return b4[l] >= BITS ? U(0) : U(a[l]) << b4[l]; }); return true;
      case O_shr:
        if (sg) each([&](int l) { return S(a[l]) >> std::min(b4[l], BITS - 1); });
        else each([&](int l) { return b4[l] >= BITS ? U(0) : U(a[l]) >> b4[l]; });
        return true;
      case O_mov: each([&](int l) { return a[l]; }); return true;
      case O_selp: {
        u32 p = *source<u32>(i.r[3]);
        each([&](int l) { return p >> l & 1 ? a[l] : b[l]; });
        return true;
      }
      case O_setp: case O_set:
        if (sg) compare(i, m, [&](int l) { return S(a[l]); }, [&](int l) { return S(b[l]); });
        else compare(i, m, [&](int l) { return U(a[l]); }, [&](int l) { return U(b[l]); });
        return true;
      case O_popc: count([](U v) { return __builtin_popcountll(v); }); return true;
      case O_clz: count([](U v) { return v ? __builtin_clzll(v) - (64 - int(BITS)) : int(BITS); }); return true;
      case O_bfind:
        count([&](U v) {
          if (sg && S(v) < 0) v = U(~v);
          if (!v) return ALL;
          u32 high = 63 - u32(__builtin_clzll(v));
          return i.flags & WRAP ? BITS - 1 - high : high;
        });
        return true;
      case O_brev:
        each([&](int l) {
          U out = 0;
          for (u32 n = 0; n < BITS; ++n) out |= U(U(a[l]) >> n & 1) << (BITS - 1 - n);
          return out;
        });
        return true;
      case O_bfe:  // past the end come zeros, or the sign
        each([&](int l) {
          u32 first = b4[l] & 255, length = c4[l] & 255;
          if (!length) return U(0);
          U sign = sg && U(a[l]) >> std::min(first + length - 1, BITS - 1) & 1 ? U(~U(0)) : U(0);
          U field = first >= BITS ? sign : sg ? U(S(a[l]) >> first) : U(U(a[l]) >> first), kept = low_bits<U>(length);
          return U((field & kept) | (sign & ~kept));
        });
        return true;
      case O_bfi:
        each([&](int l) {
          u32 first = c4[l] & 255, length = d4[l] & 255;
          if (first >= BITS || !length) return U(b[l]);
          U field = U(low_bits<U>(length) << first);
          return U((U(b[l]) & ~field) | (U(U(a[l]) << first) & field));
        });
        return true;
      default: break;
    }
    if constexpr (std::is_same_v<S, i32>) return integer32(i, m, d, a, b, c);
    return false;
  }

  template <class U>
  static U low_bits(u32 n) {
    return n >= 8 * sizeof(U) ? U(~U(0)) : U((U(1) << n) - 1);
  }

  bool integer32(const Instruction& i, u32 m, u32* d, const u32* a, const u32* b, const u32* c) {
    auto distance = [&](int l) { return i.flags & WRAP ? c[l] & 31 : std::min(c[l], 32u); };
    switch (i.op) {
      case O_shf_l: put(d, m, [&](int l) { return u32((u64(b[l]) << 32 | a[l]) << distance(l) >> 32); }); return true;
      case O_shf_r: put(d, m, [&](int l) { return u32((u64(b[l]) << 32 | a[l]) >> distance(l)); }); return true;
      case O_prmt:
        put(d, m, [&](int l) {
          u64 both = u64(b[l]) << 32 | a[l];
          u32 out = 0;
          for (int n = 0; n < 4; ++n) {
            u32 selector = c[l] >> 4 * n & 15, byte = both >> 8 * (selector & 7) & 255;
            if (selector & 8) byte = byte & 128 ? 255 : 0;  // its sign
            out |= byte << 8 * n;
          }
          return out;
        });
        return true;
      case O_lop3:
        put(d, m, [&](int l) {
          u32 out = 0;
          for (int n = 0; n < 8; ++n)
            if (i.immediate >> n & 1)
              out |= (n & 4 ? a[l] : ~a[l]) & (n & 2 ? b[l] : ~b[l]) & (n & 1 ? c[l] : ~c[l]);
          return out;
        });
        return true;
      default: return false;
    }
  }

  // setp and set. a and b return a lane's number.
  template <class A, class B>
  void compare(const Instruction& i, u32 m, A a, B b) {
    auto eval = [&](auto f) {
      u32 out = 0;
      for (int l = 0; l < LANES; ++l) out |= u32(f(a(l), b(l))) << l;
      return out;
    };
    u32 unordered = eval([](auto p, auto q) { return p != p || q != q; }), out = 0;
    switch (i.variant) {
      case EQ: case EQU: out = eval([](auto p, auto q) { return p == q; }); break;
      case NE: case NEU: out = eval([](auto p, auto q) { return p != q; }); break;
      case LT: case LTU: out = eval([](auto p, auto q) { return p < q; }); break;
      case LE: case LEU: out = eval([](auto p, auto q) { return p <= q; }); break;
      case GT: case GTU: out = eval([](auto p, auto q) { return p > q; }); break;
      case GE: case GEU: out = eval([](auto p, auto q) { return p >= q; }); break;
      case NUM: out = ~unordered; break;
      default: out = unordered;
    }
    if (i.variant <= GE) out &= ~unordered;
    else if (i.variant <= GEU) out |= unordered;
    u32 opposite = ~out;
    if (i.boolean) {
      u32 p = source_predicate(i, 3);
      auto joined = [&](u32 x) { return i.boolean == AND ? x & p : i.boolean == OR ? x | p : x ^ p; };
      out = joined(out);
      opposite = joined(opposite);
    }
    if (i.op == O_set) {
      u32 yes = i.type2 == T_f32 ? as<u32>(1.0f) : ALL;
      put(target<u32>(i.r[0]), m, [&](int l) { return out >> l & 1 ? yes : 0u; });
      return;
    }
    set_predicate(i.r[0], m, out);
    set_predicate(i.r[4], m, opposite);
  }

  // Floating point.

  // An instruction whose result PTX only bounds returns the nearest number; with jitter one up to `units` from it, by
  // chance, but always the same for the same operands, as on a GPU.
  template <class T>
  T approximate(T x, int units, T a, T b = 0) const {
    if (!jitter || !std::isfinite(x) || x == 0) return x;
    u64 hash = u64(jitter);
    for (T y : {a, b}) {
      u64 bits = 0;
      memcpy(&bits, &y, sizeof y);
      hash = (hash ^ bits) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 29;
    }
    int n = int(hash % u64(2 * units + 1)) - units;
    for (int step = 0; step < std::abs(n); ++step) x = std::nextafter(x, n < 0 ? T(-INFINITY) : T(INFINITY));
    return x;
  }

  template <class T>
  static T lesser(T p, T q, bool nan_wins) {
    if (p != p) return nan_wins ? p : q;
    if (q != q) return nan_wins ? q : p;
    if (p == 0 && q == 0) return std::signbit(p) ? p : q;
    return p < q ? p : q;
  }

  template <class T>
  bool real(const Instruction& i, u32 m) {
    const T *a = source<T>(i.r[1]), *b = source<T>(i.r[2]), *c = source<T>(i.r[3]);
    T *d = target<T>(i.r[0]), flushed[3][LANES];
    if (i.op == O_mov) {
      put(d, m, [&](int l) { return a[l]; });
      return true;
    }
    if (i.op == O_selp) {
      u32 p = *source<u32>(i.r[3]);
      put(d, m, [&](int l) { return p >> l & 1 ? a[l] : b[l]; });
      return true;
    }
    if (i.flags & FTZ) {
      auto flush_all = [&](const T* from, T* to) {
        for (int l = 0; l < LANES; ++l) to[l] = flush(from[l]);
        return static_cast<const T*>(to);
      };
      if (i.r[1] != NONE) a = flush_all(a, flushed[0]);
      if (i.r[2] != NONE) b = flush_all(b, flushed[1]);
      if (i.op == O_fma) c = flush_all(c, flushed[2]);
    }
    if (i.op == O_setp || i.op == O_set) {
      compare(i, m, [&](int l) { return a[l]; }, [&](int l) { return b[l]; });
      return true;
    }
    bool nan_wins = i.flags & NAN_WINS;
    auto each = [&](auto f) {
      put(d, m, [&](int l) {
        T x = f(l);
        if (i.flags & FTZ) x = flush(x);
        if (i.flags & SAT) x = !(x > 0) ? T(0) : x > 1 ? T(1) : x;
        return x;
      });
      return true;
    };
    constexpr int DIRECTIONS[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    auto exact = [&](auto f) {  // rounded as the instruction says
      if (i.round != RN) std::fesetround(DIRECTIONS[i.round]);
      each([&](int l) { return canonical(T(f(l))); });
      if (i.round != RN) std::fesetround(FE_TONEAREST);
      return true;
    };
    auto near = [&](int units, auto f) {
      return each([&](int l) { return approximate(canonical(T(f(double(a[l])))), units, a[l]); });
    };
    switch (i.op) {
      case O_add: return exact([&](int l) { return a[l] + b[l]; });
      case O_sub: return exact([&](int l) { return a[l] - b[l]; });
      case O_mul: return exact([&](int l) { return a[l] * b[l]; });
      case O_fma: return exact([&](int l) { return std::fma(a[l], b[l], c[l]); });
      case O_div: return exact([&](int l) { return a[l] / b[l]; });
      case O_rcp: return exact([&](int l) { return T(1) / a[l]; });
      case O_sqrt: return exact([&](int l) { return std::sqrt(a[l]); });
      case O_abs: return each([&](int l) { return std::fabs(a[l]); });
      case O_neg: return each([&](int l) { return -a[l]; });
      case O_copysign: return each([&](int l) { return std::copysign(b[l], a[l]); });
      case O_min: return each([&](int l) { return canonical(lesser(a[l], b[l], nan_wins)); });
      case O_max: return each([&](int l) { return canonical(T(-lesser(T(-a[l]), T(-b[l]), nan_wins))); });
      case O_div_approx: return each([&](int l) { return approximate(canonical(a[l] / b[l]), 2, a[l], b[l]); });
      case O_rcp_approx:
        if (sizeof(T) == 4) return near(1, [](double x) { return 1 / x; });
        return each([&](int l) { return T(upper(1 / upper(double(a[l])))); });
      case O_sqrt_approx: return near(1, [](double x) { return std::sqrt(x); });
      case O_rsqrt_approx:
        if (sizeof(T) == 4) return near(2, [](double x) { return 1 / std::sqrt(x); });
        return each([&](int l) { return T(upper(1 / std::sqrt(upper(double(a[l]))))); });
      case O_ex2_approx: return near(2, [](double x) { return std::exp2(x); });
      case O_lg2_approx: return near(2, [](double x) { return std::log2(x); });
      case O_sin_approx: return near(2, [](double x) { return std::sin(x); });
      case O_cos_approx: return near(2, [](double x) { return std::cos(x); });
      case O_tanh_approx: return near(2, [](double x) { return std::tanh(x); });
      default: return false;
    }
  }

  // rcp and rsqrt .approx.ftz.f64 read and write the upper word alone, and know no denormals.
  static double upper(double x) {
    if (x != x) return x;
    if (std::fabs(x) < 0x1p-1022) return std::copysign(0.0, x);
    return as<double>(as<u64>(x) >> 32 << 32);
  }

  // Conversions.

  void convert(const Instruction& i, u32 m) {
    u8 to = i.type, from = i.type2;
    if (to == T_f64 && from == T_f32 && !i.flags) {  // frequent
      auto a = source<float>(i.r[1]);
      put(target<double>(i.r[0]), m, [&](int l) { return a[l] == a[l] ? double(a[l]) : as<double>(nan_of(F64)); });
      return;
    }
    if (to == T_f32 && from == T_bf16 && !i.flags) {
      auto a = source<u32>(i.r[1]);
      put(target<float>(i.r[0]), m, [&](int l) { return from_bf16(u16(a[l])); });
      return;
    }
    for (u32 rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      set_lane(i, 0, l, converted(i, lane(i, 1, l)));
    }
  }

  static u64 converted(const Instruction& i, u64 raw) {
    u8 to = i.type, from = i.type2;
    if (!is_real(from)) {
      raw = extend(raw, from);
      if (!is_real(to)) return to_integer(raw, from, to, i.flags & SAT);
      if (i.flags & SAT) return rounded(double(is_signed(from) && i64(raw) < 0 ? 0 : raw != 0), format_of(to), RN);
      return rounded(exact(raw, is_signed(from)), format_of(to), i.round);
    }
    double x = from == T_f64    ? as<double>(raw)
               : from == T_bf16 ? double(from_bf16(u16(raw)))
               : from == T_f16  ? from_f16(u16(raw))
                                : double(i.flags & FTZ ? flush(as<float>(u32(raw))) : as<float>(u32(raw)));
    if (!is_real(to)) return to_integer(x, from, to, i.round);
    return rounded_real(i, i.flags & INTEGRAL ? to_integral(x, i.round) : x);
  }

  static u64 rounded_real(const Instruction& i, double x) {
    if (i.flags & SAT) x = !(x > 0) ? 0 : x > 1 ? 1 : x;
    if (i.flags & RELU && x <= 0) x = 0;
    u64 bits = rounded(x, format_of(i.type), i.round);
    if (i.flags & FTZ && i.type == T_f32) bits = as<u32>(flush(as<float>(u32(bits))));
    return bits;
  }

  void convert_pair(const Instruction& i, u32 m) {  // the first source goes into the upper half
    auto a = source<float>(i.r[1]), b = source<float>(i.r[2]);
    auto half = [&](float x) { return u32(rounded_real(i, i.flags & FTZ ? flush(x) : x)); };
    put(target<u32>(i.r[0]), m, [&](int l) { return half(a[l]) << 16 | half(b[l]); });
  }

  // Moves.

  void pack(const Instruction& i, u32 m) {  // r[1..n] into r[0]
    int bits = 8 * i.width[0] / i.n;
    for (u32 rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      u64 value = 0;
      for (int n = 0; n < i.n; ++n) value |= (lane(i, n + 1, l) & low_bits<u64>(u32(bits))) << bits * n;
      set_lane(i, 0, l, value);
    }
  }
  void unpack(const Instruction& i, u32 m) {  // r[8] into r[0..n-1]
    int bits = 8 * i.width[8] / i.n;
    for (u32 rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      u64 value = lane(i, 8, l);
      for (int n = 0; n < i.n; ++n) set_lane(i, n, l, value >> bits * n & low_bits<u64>(u32(bits)));
    }
  }

  bool space(const Instruction& i, u32 m) {
    auto a = source<u64>(i.r[1]);
    if (i.op == O_isspacep) {
      u32 out = 0;
      for (int l = 0; l < LANES; ++l) {
        u8 of = a[l] >= LOCAL_WINDOW ? LOCAL : a[l] >= SHARED_WINDOW ? SHARED : GLOBAL;
        out |= u32(of == i.space) << l;
      }
      set_predicate(i.r[0], m, out);
      return true;
    }
    u64 base = i.space == SHARED ? SHARED_WINDOW : i.space == LOCAL ? LOCAL_WINDOW : 0;
    put(target<u64>(i.r[0]), m, [&](int l) { return i.op == O_cvta ? a[l] + base : a[l] - base; });
    return true;
  }
};

}  // namespace ptx
