// The input of the machine from emulator.py: numbered names, and decoded instructions.
#pragma once

#include <cstdint>
#include <cstring>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using i128 = __int128;
using u128 = unsigned __int128;

constexpr int LANES = 32;
constexpr u32 ALL = ~0u;
constexpr i32 NONE = INT32_MIN;  // no operand
// Generic addresses of shared and local memory start here. Global memory is the memory of this process, below both.
constexpr u64 SHARED_WINDOW = 1ull << 56, LOCAL_WINDOW = 1ull << 57;

// The Python side asks for these lists, so a name has its number in one place.
#define PTX_TYPES(X)                                                                                       \
  X(u8) X(s8) X(b8) X(u16) X(s16) X(b16) X(u32) X(s32) X(b32) X(u64) X(s64) X(b64) X(f16) X(bf16) X(f32)  \
  X(f64) X(pred) X(bf16x2) X(f16x2)
#define PTX_OPS(X)                                                                                         \
  X(add) X(sub) X(mul) X(mul_hi) X(mul_wide) X(mad) X(mad_hi) X(mad_wide) X(fma) X(div) X(div_approx)      \
  X(rem) X(abs) X(neg) X(min) X(max) X(and_) X(or_) X(xor_) X(not_) X(cnot) X(shl) X(shr) X(shf_l)         \
  X(shf_r) X(prmt) X(bfe) X(bfi) X(lop3) X(popc) X(clz) X(brev) X(bfind) X(sqrt) X(sqrt_approx) X(rcp)     \
  X(rcp_approx) X(rsqrt_approx) X(ex2_approx) X(lg2_approx) X(sin_approx) X(cos_approx) X(tanh_approx)     \
  X(copysign) X(setp) X(set) X(selp) X(mov) X(pack) X(unpack) X(special) X(cvt) X(cvt_pair) X(cvta)        \
  X(cvta_to) X(isspacep) X(ld) X(st) X(atom) X(ld_param) X(ldmatrix) X(shfl) X(vote) X(redux)              \
  X(activemask) X(elect) X(match_any) X(bar) X(bar_warp) X(fence) X(bra) X(ret) X(trap) X(nop)
#define PTX_SPECIALS(X)                                                                                    \
  X(tid_x) X(tid_y) X(tid_z) X(ntid_x) X(ntid_y) X(ntid_z) X(ctaid_x) X(ctaid_y) X(ctaid_z) X(nctaid_x)    \
  X(nctaid_y) X(nctaid_z) X(laneid) X(warpid) X(lanemask_eq) X(lanemask_lt) X(lanemask_le) X(lanemask_gt)  \
  X(lanemask_ge) X(clock) X(clock64) X(globaltimer)

enum Type : u8 {
#define X(t) T_##t,
  PTX_TYPES(X)
#undef X
};
enum Op : u16 {
#define X(o) O_##o,
  PTX_OPS(X)
#undef X
};
enum Special : u8 {
#define X(s) R_##s,
  PTX_SPECIALS(X)
#undef X
};

// In the order of the tables of decode.py.
enum Comparison : u8 { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
enum Boolean : u8 { NO_BOOLEAN, AND, OR, XOR };
enum Space : u8 { GENERIC, GLOBAL, SHARED, LOCAL };
enum Order : u8 { WEAK, RELAXED, ACQUIRE, RELEASE, ACQ_REL };
enum Scope : u8 { CTA_SCOPE, GPU_SCOPE };
enum Round : u8 { RN, RZ, RM, RP };
enum Flag : u8 {
  FTZ = 1,
  SAT = 2,
  WRAP = 4,  // of shf; of bfind: .shiftamt
  NAN_WINS = 8,
  INTEGRAL = 16,  // round to an integer
  NEGATED_GUARD = 32,
  NEGATED_SOURCE = 64,  // the predicate among the sources
  RELU = 128
};
enum Update : u8 { U_ADD, U_MIN, U_MAX, U_AND, U_OR, U_XOR, U_EXCH, U_CAS, U_INC, U_DEC };
enum Shuffle : u8 { IDX, UP, DOWN, BFLY };
enum Vote : u8 { VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT };

struct Instruction {  // emulator.py, _INSTRUCTION
  u16 op;
  u8 type, type2;  // type2: what a conversion starts from, what a comparison returns
  u8 space, order, scope, flags;
  u8 round, variant, boolean, n;  // variant: a Comparison, Update, Shuffle, Vote; of bar: aligned
  u8 bytes, pad[3];               // n elements of a vector, bytes of one in memory
  u8 width[12];                   // bytes of a lane of each operand: 4 or 8; 1 for a predicate
  i32 r[12];                      // operands: offsets in the registers, ~ offsets in the constants, or NONE
  i32 guard, target;              // target: an instruction; of bar: the number of threads
  i64 immediate;                  // an address, a table, a special register, a barrier
};

struct Options {  // emulator.py, _OPTIONS
  u32 grid[3], block[3];
  i32 resident, policy, dynamic_shared, races, jitter, traffic;
  u64 seed, limit;
};

template <class To, class From>
inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

inline bool is_signed(u8 type) { return type == T_s8 || type == T_s16 || type == T_s32 || type == T_s64; }
inline bool is_real(u8 type) { return type == T_f16 || type == T_bf16 || type == T_f32 || type == T_f64; }

// Bytes of a number.
inline int size_of(u8 type) {
  switch (type) {
    case T_u8: case T_s8: case T_b8: return 1;
    case T_u16: case T_s16: case T_b16: case T_f16: case T_bf16: return 2;
    case T_u64: case T_s64: case T_b64: case T_f64: return 8;
    default: return 4;
  }
}

// Sign-extends an integer of a type that is narrower than its register.
inline u64 extend(u64 value, u8 type) {
  switch (type) {
    case T_s8: return u64(i64(i8(value)));
    case T_s16: return u64(i64(i16(value)));
    case T_s32: return u64(i64(i32(value)));
    case T_u8: case T_b8: return u8(value);
    case T_u16: case T_b16: return u16(value);
    case T_u32: case T_b32: return u32(value);
    default: return value;
  }
}

}  // namespace ptx
