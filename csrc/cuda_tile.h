// The elements of a tile: where they lie, what they are in memory and in registers, and one step of them.
#pragma once

#include "cuda_block.h"

namespace fused_adamp {

// Integers that one instruction moves.
template <int bytes>
struct Word;
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// n elements that follow each other, as they are stored. `once`: they are not needed again in this step. The functions name the
// kind of access also so that the compiler knows that these pointers, which come from a table, are to global memory.
template <class T, int n>
struct Elements {
  static constexpr int bytes = sizeof(T) * n < 16 ? sizeof(T) * n : 16, words = sizeof(T) * n / bytes;
  using Type = typename Word<bytes>::Type;
  union {
    Type word[words];
    T at[n];
  };

  template <bool once>
  __device__ void load(const T* from) {
    const Type* const source = reinterpret_cast<const Type*>(from);
#pragma unroll
    for (int i = 0; i < words; ++i) word[i] = once ? __ldcs(source + i) : __ldca(source + i);
  }
  template <bool once>
  __device__ void store(T* to) const {
    Type* const target = reinterpret_cast<Type*>(to);
#pragma unroll
    for (int i = 0; i < words; ++i) {
      if (once) {
        __stcs(target + i, word[i]);
      } else {
        __stwb(target + i, word[i]);
      }
    }
  }
};

// A tile: whole rows of a parameter, or a piece of a row that is wider than a tile. Its elements are numbered 0, 1, 2, ... row
// by row.
struct Tile {
  int64_t row, col;
  int rows, cols;
  P* p;
  const G* g;
  State *m, *v;
  int16_t* r;
  uint32_t number;  // of the first element in the whole tensor

  __device__ explicit Tile(int64_t index) {
    const DeviceTableRow& x = b.row;
    const uint32_t i = uint32_t(index - x.first_tile), segments = uint32_t(x.row_segments), view = i / segments;
    row = int64_t(view) * x.tile_rows;
    col = int64_t(i - view * segments) * x.tile_cols;
    rows = int(x.tile_rows < x.rows - row ? x.tile_rows : x.rows - row);
    cols = int(x.tile_cols < x.cols - col ? x.tile_cols : x.cols - col);
    const int64_t first = strided ? 0 : row * x.cols + col;
    p = static_cast<P*>(b.at.p) + first;
    g = static_cast<const G*>(b.at.g) + first;
    m = static_cast<State*>(b.at.m) + first;
    v = static_cast<State*>(b.at.v) + first;
    r = b.at.r + first;
    number = uint32_t(x.first_number + row * x.row_numbers + col);
  }

  __device__ int size() const { return rows * cols; }

  // How far element e of a tensor lies from its pointer. `role` is the tensor's index in Strides.
  __device__ int64_t offset(int role, int e) const {
    if (!strided) return e;
    const uint32_t last = uint32_t(b.strides.last), in = uint32_t(e) / uint32_t(cols);
    const uint32_t c = uint32_t(e) - in * uint32_t(cols) + uint32_t(col), outer = c / last;
    const int64_t* const step = b.strides.step[role];
    return (row + in) * step[0] + outer * step[1] + int64_t(c - outer * last) * step[2];
  }
};

// n elements of a tile that follow each other, in registers.
template <int n>
struct Numbers {
  N p[n], g[n], m[n], v[n], u[n];

  __device__ void load_weight(const Tile& t, int e) {
    Elements<P, n> x;
    x.template load<false>(t.p + t.offset(0, e));
    if constexpr (remainder) {
      Elements<int16_t, n> rest;
      rest.template load<false>(t.r + t.offset(4, e));
#pragma unroll
      for (int i = 0; i < n; ++i) p[i] = same_bits<float>(join(uint32_t(x.at[i].bits), uint32_t(uint16_t(rest.at[i]))));
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) p[i] = number(x.at[i]);
    }
  }

  template <bool once>
  __device__ void load_gradient(const Tile& t, int e) {
    Elements<G, n> x;
    x.template load<once>(t.g + t.offset(1, e));
#pragma unroll
    for (int i = 0; i < n; ++i) g[i] = number(x.at[i]);
  }

  __device__ void load_state(const Tile& t, int e) {
    Elements<State, n> x, y;
    if constexpr (R::buffer) x.template load<true>(t.m + t.offset(2, e));
    if constexpr (R::adaptive) y.template load<true>(t.v + t.offset(3, e));
#pragma unroll
    for (int i = 0; i < n; ++i) {
      m[i] = R::buffer ? number(x.at[i]) : N(0);
      v[i] = R::adaptive ? number(y.at[i]) : N(0);
    }
  }

  __device__ void load(const Tile& t, int e) {
    load_weight(t, e);
    load_gradient<true>(t, e);
    load_state(t, e);
  }

  // m, v and the update u of this step.
  __device__ void advance() {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      fused_adamp::advance<R>(g[i], m[i], v[i], b.c);
      u[i] = direction<R>(g[i], m[i], v[i], b.c, b.nesterov);
    }
  }

  // Adds p.u and p.p.
  __device__ void dot(double (&s)[2]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      s[0] = fma(double(p[i]), double(u[i]), s[0]);
      s[1] = fma(double(p[i]), double(p[i]), s[1]);
    }
  }

  __device__ uint32_t random(const Tile& t, int e, int i, bool second) const {
    return stochastic ? chance(b.key[second], b.key[!second], t.number + uint32_t(e + i)) : 0;
  }

  __device__ void store_first_moment(const Tile& t, int e) const {
    if constexpr (R::buffer) {
      Elements<State, n> x;
#pragma unroll
      for (int i = 0; i < n; ++i) put(x.at[i], m[i], random(t, e, i, false) >> 16);
      x.template store<true>(t.m + t.offset(2, e));
    }
  }

  __device__ void store_second_moment(const Tile& t, int e) const {
    if constexpr (R::adaptive) {
      Elements<State, n> x;
#pragma unroll
      for (int i = 0; i < n; ++i) put(x.at[i], v[i], random(t, e, i, true) & 0xffff);
      x.template store<true>(t.v + t.offset(3, e));
    }
  }

  // Moves the weight, whose view has the projection c, and stores it.
  __device__ void move(const Tile& t, int e, N c) {
    const N shrink = b.decay - b.c.step_size * c;
    Elements<P, n> x;
    Elements<int16_t, n> rest;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const N moved = weight_update(p[i], u[i], b.c.step_size, shrink);
      if constexpr (remainder) {
        const uint32_t bits = without_nan(same_bits<uint32_t>(moved));
        x.at[i].bits = uint16_t(upper_half(bits));
        rest.at[i] = int16_t(bits);
      } else {
        put(x.at[i], moved, random(t, e, i, false) & 0xffff);
      }
    }
    x.template store<false>(t.p + t.offset(0, e));
    if constexpr (remainder) rest.template store<false>(t.r + t.offset(4, e));
  }

  // Stores the buffer of a rule that projects it too.
  __device__ void store_projected_buffer(const Tile& t, int e, N c) {
#pragma unroll
    for (int i = 0; i < n; ++i) m[i] = u[i] - c * p[i];
    store_first_moment(t, e);
  }
};

}  // namespace fused_adamp
