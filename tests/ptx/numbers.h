// Floating-point numbers: formats, and exact rounding between them.
#pragma once

#include <algorithm>
#include <cmath>

#include "isa.h"

namespace ptx {

struct Format {
  int width;      // bits in all
  int precision;  // significant bits, the hidden one among them
  int lowest;     // exponent of a denormal's last bit
};
constexpr Format F16{16, 11, -24}, BF16{16, 8, -133}, F32{32, 24, -149}, F64{64, 53, -1074};

inline const Format& format_of(u8 type) {
  return type == T_f16 || type == T_f16x2 ? F16 : type == T_bf16 || type == T_bf16x2 ? BF16 : type == T_f64 ? F64 : F32;
}

// (-1)^negative * digits * 2^exponent.
struct Exact {
  bool negative;
  u64 digits;
  int exponent;
};

inline Exact exact(double x) {  // finite
  u64 bits = as<u64>(x);
  int field = int(bits >> 52 & 2047);
  u64 fraction = bits & ((1ull << 52) - 1);
  return {bool(bits >> 63), field ? fraction | 1ull << 52 : fraction, std::max(field, 1) - 1075};
}
inline Exact exact(u64 value, bool is_signed) {
  bool negative = is_signed && i64(value) < 0;
  return {negative, negative ? 0 - value : value, 0};
}

inline u64 infinity_of(const Format& f) { return ((1ull << (f.width - f.precision)) - 1) << (f.precision - 1); }
inline u64 nan_of(const Format& f) {  // 0x7fff and 0x7fffffff, but the default NaN of float64
  return f.width == 64 ? 0x7ff8000000000000ull : (1ull << (f.width - 1)) - 1;
}

// The bits of x, rounded once.
inline u64 rounded(const Exact& x, const Format& f, u8 mode) {
  u64 sign = u64(x.negative) << (f.width - 1);
  if (!x.digits) return sign;
  int length = 64 - __builtin_clzll(x.digits);
  int last = std::max(x.exponent + length - f.precision, f.lowest);  // exponent of the last bit that stays
  int dropped = last - x.exponent;
  u64 kept = 0, rest = 0, half = 1;
  if (dropped <= 0) kept = x.digits << -dropped;
  else if (dropped > 64) rest = 1, half = 2;  // something, and less than half
  else {
    kept = dropped == 64 ? 0 : x.digits >> dropped;
    rest = dropped == 64 ? x.digits : x.digits & ((1ull << dropped) - 1);
    half = 1ull << (dropped - 1);
  }
  bool away = mode == RM ? x.negative : mode == RP ? !x.negative : false;
  if (mode == RN ? rest > half || (rest == half && kept & 1) : away && rest) ++kept;
  // The leading bit of a normal number adds one to the exponent's field, and so does a carry.
  u64 bits = (u64(last - f.lowest) << (f.precision - 1)) + kept, infinity = infinity_of(f);
  if (bits >= infinity) bits = mode == RN || away ? infinity : infinity - 1;
  return sign | bits;
}
inline u64 rounded(double x, const Format& f, u8 mode) {
  if (std::isnan(x)) return nan_of(f);
  if (std::isinf(x)) return u64(std::signbit(x)) << (f.width - 1) | infinity_of(f);
  return rounded(exact(x), f, mode);
}

inline float from_bf16(u16 x) { return as<float>(u32(x) << 16); }
inline double from_f16(u16 x) {
  int field = x >> 10 & 31;
  double value = field == 31   ? (x & 1023 ? NAN : INFINITY)
                 : field == 0  ? std::ldexp(double(x & 1023), -24)
                               : std::ldexp(double((x & 1023) | 1024), field - 25);
  return x >> 15 ? -value : value;
}

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline double flush(double x) { return x; }  // .ftz is for float32 alone

// float32 instructions return one NaN. The sign and payload of float64's are not modelled.
inline float canonical(float x) { return x == x ? x : as<float>(0x7fffffffu); }
inline double canonical(double x) { return x; }

inline double to_integral(double x, u8 mode) {
  return mode == RN ? std::nearbyint(x) : mode == RZ ? std::trunc(x) : mode == RM ? std::floor(x) : std::ceil(x);
}

// A number as an integer of a type, saturated. NaN is zero, but the top bit where either side has 64 bits.
inline u64 to_integer(double x, u8 from, u8 to, u8 mode) {
  int bits = 8 * size_of(to);
  bool sg = is_signed(to);
  if (std::isnan(x)) return from == T_f64 || bits == 64 ? extend(1ull << (bits - 1), to) : 0;
  i128 low = sg ? -(i128(1) << (bits - 1)) : 0, high = (i128(1) << (bits - sg)) - 1;
  x = to_integral(x, mode);
  i128 v = x <= double(low) ? low : x >= double(high) ? high : i128(x);
  return u64(v);
}

// The integer v (of 64 bits, signed or not) as one of a type, cut off or saturated.
inline u64 to_integer(u64 v, u8 from, u8 to, bool saturate) {
  if (saturate) {
    int bits = 8 * size_of(to);
    bool sg = is_signed(to);
    i128 value = is_signed(from) ? i128(i64(v)) : i128(v);
    i128 low = sg ? -(i128(1) << (bits - 1)) : 0, high = (i128(1) << (bits - sg)) - 1;
    v = u64(value < low ? low : value > high ? high : value);
  }
  return extend(v, to);
}

}  // namespace ptx
