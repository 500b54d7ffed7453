// The kernels of cpu_kernels.h for the instruction set that this file is compiled for, which the build names in
// FUSED_ADAMP_INSTRUCTIONS (setup.py compiles it once for each).
#include "cpu_kernels.h"

#include "storage.h"

namespace {

using namespace fused_adamp;

// A kernel, with the bodies of its loops inlined: by default, gcc calls them for each line.
#if defined(__GNUC__)
#define FUSED_ADAMP_KERNEL __attribute__((flatten))
#else
#define FUSED_ADAMP_KERNEL
#endif

// Covers n elements with blocks: body(begin, count). Lanes are summed in T within a block, in double from block to block:
// a sum's error stays below 64 roundings of T however long the row.
template <class T, class Body>
FUSED_ADAMP_INLINE void for_each_block(int64_t n, const Body& body) {
  static_assert(block_size<T> == 64 * Accumulator<T>::lanes, "");
  for (int64_t i = 0; i < n; i += block_size<T>) body(i, n - i < block_size<T> ? n - i : block_size<T>);
}

// p.g, g.g and p.p of a block.
template <class Sum, class F, class T>
FUSED_ADAMP_INLINE Sums measure_block(const Block<F>& b, int64_t n, T scale) {
  Sum pg, gg, pp;
  for_each_vec<T>(n, [&](int64_t i, auto k, auto extent) {
    const auto p = b.load_p(i, extent), g = scale * b.load_g(i, extent);
    pg.add(k, p, g);
    gg.add(k, g, g);
    pp.add(k, p, p);
  });
  return {pg.sum(), gg.sum(), pp.sum()};
}

// If the sums of a block in T are not right, `careful` computes its products in double. A separate function: inlined beside
// the other one, rows of 16 cost 2% more.
template <bool careful, class F, class T>
FUSED_ADAMP_OUTLINE FUSED_ADAMP_KERNEL void measure_rows(TileData<F> t, int64_t rows, int64_t cols, T scale, Test test,
                                                         TileSums* tile, RowShares shares) {
  TileSums total;
  for (int64_t row = 0; row < rows; ++row) {
    ViewSums view;
    for_each_block<T>(cols, [&](int64_t begin, int64_t n) {
      const Block<F> b = open<with_p | with_g>(t, row * cols + begin, n);
      Sums s = measure_block<Accumulator<T>>(b, n, scale);
      if constexpr (careful) {
        if (!representable({s}, least_square(test.eps2))) s = measure_block<DoubleAccumulator<T>>(b, n, scale);
      }
      view.sums.pg += s.pg;
      view.sums.gg += s.gg;
      view.sums.pp += s.pp;
    });
    total.template add<T>(view, test, double(cols));
    shares.put(row, view);
  }
  *tile = total;
}

template <class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL double square_norm(TileData<F> t, int64_t size) {
  double sum = 0;
  for_each_block<T>(size, [&](int64_t begin, int64_t n) {
    const Block<F> b = open<with_g>(t, begin, n);
    DoubleAccumulator<T> gg;
    for_each_vec<T>(n, [&](int64_t i, auto k, auto extent) { 
      const auto g = b.load_g(i, extent);
      gg.add(k, g, g);
    });
    sum += gg.sum();
  });
  return sum;
}

// One vector of the state. Lanes beyond the tile's end hold m = 0, v = 1: their u is 0 / (1 + eps), never NaN.
template <class R, class F>
struct State {
  using T = typename F::Number;
  Vec<T> m{}, v{};

  template <class Extent>
  FUSED_ADAMP_INLINE State(const Block<F>& b, int64_t i, Extent extent) {
    if constexpr (R::buffer) m = load(typename F::State(), b.m, i, extent);
    if constexpr (R::adaptive) v = load(typename F::State(), b.v, i, extent, T(1));
  }
  template <class Extent>
  FUSED_ADAMP_INLINE void store_to(const Block<F>& b, int64_t i, Extent extent) const {
    if constexpr (R::buffer) store(typename F::State(), b.m, i, extent, m);
    if constexpr (R::adaptive) store(typename F::State(), b.v, i, extent, v);
  }
};

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void update(TileData<F> t, int64_t first, int64_t size, Coefficients<T> c, T projected, T decay) {
  const T shrink = decay - c.step_size * projected;
  for_each_block<T>(size, [&](int64_t begin, int64_t n) {
    const Block<F> b = open<with_p | with_g | with_state<R>>(t, first + begin, n);
    for_each_vec<T>(n, [&](int64_t i, auto, auto extent) {
      const auto p = b.load_p(i, extent), g = b.load_g(i, extent);
      State<R, F> s(b, i, extent);
      advance<R>(g, s.m, s.v, c);
      const auto u = direction<R>(g, s.m, s.v, c);
      if constexpr (R::project_buffer) s.m = u - projected * p;
      s.store_to(b, i, extent);
      b.store_p(i, extent, weight_update(p, u, c.step_size, shrink));
    });
    close<with_p | with_state<R>>(t, b, first + begin, n);
  });
}

// Brings the cache line 1 KB ahead closer than the hardware's prefetcher does. Measured where every row is projected: Zen 5
// with AVX-512 gains 6% (81 to 86 GB/s), Zen 3 with AVX2 loses.
template <class R, class F>
FUSED_ADAMP_INLINE void prefetch(const Block<F>& b, int64_t i) {
#if defined(__AVX512F__)
  constexpr int64_t ahead = 1024 / sizeof(typename F::Number);
  if constexpr (std::is_same<typename F::P, WithRemainder>::value) {
    __builtin_prefetch(b.p.high + i + ahead);
    __builtin_prefetch(b.p.rest + i + ahead);
  } else {
    __builtin_prefetch(b.p + i + ahead);
  }
  __builtin_prefetch(b.g + i + ahead);
  if constexpr (R::buffer) __builtin_prefetch(b.m + i + ahead);
  if constexpr (R::adaptive) __builtin_prefetch(b.v + i + ahead);
#else
  (void)b, (void)i;
#endif
}

// The sums of a block of n elements, with products in double, after advance_row has stepped it. p is read from old_p, u from
// old_u, if they are not null. Else p is read from the block, and u is computed from its state. `stored`: the state in the
// block is the new one already.
template <class R, bool stored, class F, class T>
FUSED_ADAMP_OUTLINE FUSED_ADAMP_KERNEL ViewSums sum_again(Block<F> b, int64_t n, Coefficients<T> c, const T* old_p,
                                                          const T* old_u) {
  DoubleAccumulator<T> pg, gg, pp, pu;
  for_each_vec<T>(n, [&](int64_t i, auto k, auto extent) {
    const auto g = b.load_g(i, extent);
    State<R, F> s(b, i, extent);
    if constexpr (!stored || !R::buffer) advance<R>(g, s.m, s.v, c);
    const auto p = old_p ? Vec<T>::load(old_p + i, extent) : b.load_p(i, extent);
    const auto u = old_u ? Vec<T>::load(old_u + i, extent) : direction<R>(g, s.m, s.v, c);
    const auto scaled = c.scale * g;
    pg.add(k, p, scaled);
    gg.add(k, scaled, scaled);
    pp.add(k, p, p);
    pu.add(k, p, u);
  });
  return {{pg.sum(), gg.sum(), pp.sum()}, pu.sum()};
}

// Advances the state of the row of `size` elements that starts at element `row` of the tile. Returns the row's sums.
// `weights` moves the weights, through begin(start of the block within the row, elements), visit(i, extent, block, p, u)
// for each vector, and end(). It also says whether the state is stored. A block whose sums are not right in T is summed
// again, by the rule of measure, so that both find the same sums. Then stop(block, first element, elements) is called.
template <class R, class F, class T, class Weights>
FUSED_ADAMP_INLINE ViewSums advance_row(const TileData<F>& t, int64_t row, int64_t size, const Coefficients<T>& c,
                                        double least, Weights&& weights) {
  using W = std::remove_reference_t<Weights>;
  constexpr int written = W::roles | (W::stores_state ? with_state<R> : none);
  ViewSums total;
  for_each_block<T>(size, [&](int64_t begin, int64_t n) {
    const Block<F> b = open<with_p | with_g | with_state<R>>(t, row + begin, n);
    weights.begin(begin, n);
    Accumulator<T> pg, gg, pp, pu;
    for_each_vec<T>(n, [&](int64_t i, auto k, auto extent) {
      prefetch<R>(b, i);
      const auto p = b.load_p(i, extent), g = b.load_g(i, extent);
      State<R, F> s(b, i, extent);
      advance<R>(g, s.m, s.v, c);
      const auto u = direction<R>(g, s.m, s.v, c);
      if constexpr (W::stores_state) s.store_to(b, i, extent);
      weights.visit(i, extent, b, p, u);
      const auto scaled = c.scale * g;
      pg.add(k, p, scaled);
      gg.add(k, scaled, scaled);
      pp.add(k, p, p);
      pu.add(k, p, u);
    });
    ViewSums sums{{pg.sum(), gg.sum(), pp.sum()}, pu.sum()};
    if constexpr (std::is_same<T, float>::value) {
      if (!representable(sums, least)) {
        const ViewSums again = sum_again<R, W::stores_state>(b, n, c, weights.old_p(), weights.old_u());
        if (!representable({sums.sums}, least)) sums.sums = again.sums;
        sums.pu = again.pu;
        weights.stop(b, row + begin, n);
      }
    }
    weights.end();
    close<written>(t, b, row + begin, n);
    total.add(sums);
  });
  return total;
}

// Nothing moves.
template <class F, class T = typename F::Number>
struct Stay {
  static constexpr bool stores_state = false;
  static constexpr int roles = none;

  FUSED_ADAMP_INLINE void begin(int64_t, int64_t) {}
  template <class Extent>
  FUSED_ADAMP_INLINE void visit(int64_t, Extent, const Block<F>&, Vec<T>, Vec<T>) const {}
  FUSED_ADAMP_INLINE void stop(const Block<F>&, int64_t, int64_t) {}
  FUSED_ADAMP_INLINE const T* old_p() const { return nullptr; }
  FUSED_ADAMP_INLINE const T* old_u() const { return nullptr; }
  FUSED_ADAMP_INLINE void end() {}
};

// Moves the weights of a row that is not projected at once, and keeps the old ones until the block ends. If the block has to
// be summed again, it restores them, and moves nothing from there to the end of the tile: a step that is much larger than the
// weight could not be undone.
template <class F, class T = typename F::Number>
struct MoveNow {
  static constexpr bool stores_state = true;
  static constexpr int roles = with_p;
  T step_size, shrink;
  T* old;
  int64_t moved;  // the first element of the tile that has not moved

  FUSED_ADAMP_INLINE void begin(int64_t, int64_t) {}
  template <class Extent>
  FUSED_ADAMP_INLINE void visit(int64_t i, Extent extent, const Block<F>& b, Vec<T> p, Vec<T> u) const {
    if constexpr (std::is_same<T, float>::value) p.store(old + i, extent);
    b.store_p(i, extent, weight_update(p, u, step_size, shrink));
  }
  FUSED_ADAMP_INLINE void stop(const Block<F>& b, int64_t first, int64_t n) {
    for_each_vec<T>(n, [&](int64_t i, auto, auto extent) { b.store_p(i, extent, Vec<T>::load(old + i, extent)); });
    moved = first < moved ? first : moved;
    step_size = shrink = 0;
  }
  FUSED_ADAMP_INLINE const T* old_p() const { return old; }
  FUSED_ADAMP_INLINE const T* old_u() const { return nullptr; }
  FUSED_ADAMP_INLINE void end() {}
};

// Moves the weights of a row whose sums are known, from u in scratch: the second half of its update.
template <class R, class F, class T = typename F::Number>
struct Move {
  const TileData<F>* t;
  int64_t row;  // its first element
  const T* u;
  T step_size, projected, shrink;

  template <class Extent>
  FUSED_ADAMP_INLINE void vector(const Block<F>& b, const T* from, int64_t i, Extent extent) const {
    const auto p = b.load_p(i, extent), y = Vec<T>::load(from + i, extent);
    if constexpr (R::project_buffer) b.store_m(i, extent, y - projected * p);
    b.store_p(i, extent, weight_update(p, y, step_size, shrink));
  }
};

// Keeps u of a row in scratch until its sums are known. Meanwhile moves the weights of an earlier row.
template <class R, class F, bool moves, class T = typename F::Number>
struct MoveLater {
  static constexpr bool stores_state = true;
  static constexpr int roles = none, moved_roles = with_p | (R::project_buffer ? with_m : none);
  T* u;
  Move<R, F> old;
  int64_t start = 0, size = 0;
  Block<F> block{};

  FUSED_ADAMP_INLINE void begin(int64_t begin, int64_t n) {
    start = begin;
    size = n;
    if constexpr (moves) block = open<with_p>(*old.t, old.row + start, n, 4);
  }
  template <class Extent>
  FUSED_ADAMP_INLINE void visit(int64_t i, Extent extent, const Block<F>&, Vec<T>, Vec<T> y) const {
    y.store(u + start + i, extent);
    if constexpr (moves) old.vector(block, old.u + start, i, extent);
  }
  FUSED_ADAMP_INLINE void stop(const Block<F>&, int64_t, int64_t) {}
  FUSED_ADAMP_INLINE const T* old_p() const { return nullptr; }
  FUSED_ADAMP_INLINE const T* old_u() const { return u + start; }
  FUSED_ADAMP_INLINE void end() {
    if constexpr (moves) close<moved_roles>(*old.t, block, old.row + start, size);
  }
};

// Updates `rows` rows of `cols` elements, each of which is projected: p, m and v. move_of(row, sums) returns the step size,
// c and the shrink of a row. u has room for rows_in_flight rows. A row's weights move while the state of a later row advances:
// moving works in cache, advancing waits for memory. The later row is the next one but one if rows are short, so that no
// time is lost waiting for move_of, some hundred cycles; else it is the next one, so that the row is still in the
// first-level cache.
template <class R, class F, class T, class MoveOf>
FUSED_ADAMP_INLINE void update_rows(const TileData<F>& t, T* u, int64_t rows, int64_t cols, const Coefficients<T>& c,
                                    double least, const MoveOf& move_of) {
  constexpr int64_t line = Accumulator<T>::lanes;
  const int64_t stride = (cols + line - 1) / line * line;
  const int lag = cols <= 512 ? 2 : 1;
  Move<R, F> ring[rows_in_flight];
  for (int64_t row = 0; row < rows; ++row) {
    T* const u_now = u + row % rows_in_flight * stride;
    const ViewSums s =
        row < lag ? advance_row<R>(t, row * cols, cols, c, least, MoveLater<R, F, false>{u_now, {}})
                  : advance_row<R>(t, row * cols, cols, c, least,
                                   MoveLater<R, F, true>{u_now, ring[(row - lag) % rows_in_flight]});
    const auto by = move_of(row, s);
    ring[row % rows_in_flight] = {&t, row * cols, u_now, by.step_size, by.projected, by.shrink};
  }
  for (int64_t row = rows > lag ? rows - lag : 0; row < rows; ++row) {
    MoveLater<R, F, true> later{nullptr, ring[row % rows_in_flight]};
    for_each_block<T>(cols, [&](int64_t begin, int64_t n) {
      later.begin(begin, n);
      for_each_vec<T>(n, [&](int64_t i, auto, auto extent) { later.old.vector(later.block, later.old.u + begin, i, extent); });
      later.end();
    });
  }
}

// Rows that are shorter than a few vectors. Several make a block, which passes through in flat vectors; its sums are taken
// from what that leaves in the first-level cache, with a row in each lane.

// Rows in a block: a multiple of the lanes of Accumulator<T>, so that every instruction set sees the same groups of rows.
template <class T>
FUSED_ADAMP_INLINE int64_t rows_in_block(int64_t cols) {
  constexpr int64_t lanes = Accumulator<T>::lanes, fit = block_size<T> / 2;
  const int64_t rows = fit / cols / lanes * lanes;
  return rows > lanes ? rows : lanes;
}

// A block as it is computed: p, the scaled gradient and u. Beyond its last row zeros, up to a whole vector of rows.
template <class T>
struct RowBlock {
  static constexpr int64_t size = block_size<T> + Accumulator<T>::lanes;
  alignas(64) T p[size];
  alignas(64) T g[size];
  alignas(64) T u[size];

  template <bool with_u>
  FUSED_ADAMP_INLINE void pad(int64_t rows, int64_t cols) {
    constexpr int64_t lanes = Accumulator<T>::lanes;
    for (int64_t i = rows * cols; i < (rows + lanes - 1) / lanes * lanes * cols; ++i) {
      p[i] = g[i] = 0;
      if constexpr (with_u) u[i] = 0;
    }
  }
};

// Sums of rows, one in each lane, added up in T. With sizes, p_size and g_size are not 0 if any p or g is not.
template <class T>
struct LaneSums {
  Vec<T> pg{}, gg{}, pp{}, pu{}, p_size{}, g_size{};
};

// Sums of the rows whose first starts at x.p[at].
template <bool with_u, bool with_sizes, class T>
FUSED_ADAMP_INLINE LaneSums<T> sum_lanes(const RowBlock<T>& x, int64_t at, int64_t cols) {
  LaneSums<T> s;
  const auto add = [&](Vec<T> p, Vec<T> g, Vec<T> u) {
    s.pg = fma(p, g, s.pg);
    s.gg = fma(g, g, s.gg);
    s.pp = fma(p, p, s.pp);
    if constexpr (with_u) s.pu = fma(p, u, s.pu);
    if constexpr (with_sizes) {
      s.p_size = s.p_size + absolute(p);
      s.g_size = s.g_size + absolute(g);
    }
  };
  if (cols == 1) {
    add(Vec<T>::load(x.p + at, Whole{}), Vec<T>::load(x.g + at, Whole{}),
        with_u ? Vec<T>::load(x.u + at, Whole{}) : Vec<T>{});
    return s;
  }
  if (cols == 2) {
    const TwoColumns<T> p(x.p + at), g(x.g + at), u(with_u ? x.u + at : x.p + at);
    add(p.column[0], g.column[0], u.column[0]);
    add(p.column[1], g.column[1], u.column[1]);
    return s;
  }
  for (int64_t k = 0; k < cols; k += 4) {
    const FourColumns<T> p(x.p + at + k, cols), g(x.g + at + k, cols), u(with_u ? x.u + at + k : x.p + at + k, cols);
    add(p.column[0], g.column[0], u.column[0]);
    if (k + 1 < cols) add(p.column[1], g.column[1], u.column[1]);
    if (k + 2 < cols) add(p.column[2], g.column[2], u.column[2]);
    if (k + 3 < cols) add(p.column[3], g.column[3], u.column[3]);
  }
  return s;
}

// How sum_block uses the sums of each row, besides adding them up.
template <class T>
struct RowUse {
  const Test& test;
  const RowShares& shares;
  T eps;
  T* projected;  // gets c of weight_update, if it is wanted
};

// The range of squares, and of their products, in which a test in T is right.
template <class T>
struct Ordinary {
  static constexpr T least = sizeof(T) == 4 ? T(0x1p-100) : T(1e-120), most = sizeof(T) == 4 ? T(0x1p126) : T(1e120);
  static constexpr double least_eps2 = sizeof(T) == 4 ? 0x1p-54 : 1e-60;  // below it, a product of two may be too small
};

// Adds up the sums of the rows of a block in T; tests and projects them in T too. sums_at(i) returns the LaneSums of the rows
// from i on; beyond the last row it returns zeros, up to a whole Accumulator. False, and nothing is added to the tile, if some
// row's squares are out of the range that allows it. `tiny`: eps does not keep products of squares within it.
template <bool with_u, bool tiny, class T, class SumsAt>
FUSED_ADAMP_OUTLINE FUSED_ADAMP_KERNEL bool sum_ordinary_block(const SumsAt& sums_at, int64_t rows, int64_t cols,
                                                               const RowUse<T>& use, TileSums* tile) {
  const Vec<T> eps2 = broadcast(T(use.test.eps2)), eps = broadcast(use.eps), one = broadcast(T(1));
  const Vec<T> least = broadcast(Ordinary<T>::least), most = broadcast(Ordinary<T>::most);
  Accumulator<T> pg, gg, pp, pu;
  Vec<T> cosine2{};
  bool ordinary = true;
  for_each_vec<T>((rows + Accumulator<T>::lanes - 1) / Accumulator<T>::lanes * Accumulator<T>::lanes,
                  [&](int64_t i, auto k, auto) {
    const LaneSums<T> s = sums_at(i);
    ordinary &= all_less(s.pp + s.gg + absolute(s.pu), most);
    const auto size = larger(s.pp, eps2), slope = larger(s.gg, eps2);
    if constexpr (tiny) {
      ordinary &= all_less(least, smaller(s.pp.or_if_zero(s.p_size, one), s.gg.or_if_zero(s.g_size, one)));  // 0 is exact
      cosine2 = larger(cosine2, s.pg / size * (s.pg / slope));
    } else {
      const auto squares = size * slope;
      ordinary &= all_less(squares, most);
      cosine2 = larger(cosine2, s.pg * s.pg / squares);
    }
    pg.part[k.value] = pg.part[k.value] + s.pg;
    gg.part[k.value] = gg.part[k.value] + s.gg;
    pp.part[k.value] = pp.part[k.value] + s.pp;
    pu.part[k.value] = pu.part[k.value] + s.pu;
    if (with_u && use.projected) {
      const auto norm = sqrt(s.pp) + eps;
      (s.pu / (norm * norm)).store(use.projected + i, Whole{});
    }
  });
  const ViewSums total{{pg.sum(), gg.sum(), pp.sum()}, pu.sum()};
  if (!ordinary || !representable(total, -1)) return false;
  T lanes[Vec<T>::lanes];
  cosine2.store(lanes, Whole{});
  for (T lane : lanes) {
    const double ratio = double(lane) * double(cols) / use.test.delta2;
    tile->largest = ratio > tile->largest ? ratio : ratio == ratio ? tile->largest : HUGE_VAL;
  }
  tile->total.add(total);
  return true;
}

// As sum_block, but row by row, and in double from the sums on. Sums that are not right in T are added up again, by the rule
// of advance_row. Returns true if a weight's sum has left the range of T: then a step may be too large to be undone.
template <bool with_u, class T>
FUSED_ADAMP_OUTLINE FUSED_ADAMP_KERNEL bool sum_any_block(const RowBlock<T>& x, int64_t row, int64_t rows, int64_t cols,
                                                          const RowUse<T>& use, TileSums* tile) {
  constexpr int width = Vec<T>::lanes;
  const double least = least_square(use.test.eps2);
  bool lost = false;
  T pg[width], gg[width], pp[width], pu[width];
  for (int64_t i = 0; i < rows; ++i) {
    if (i % width == 0) {
      const LaneSums<T> s = sum_lanes<with_u, false>(x, i * cols, cols);
      s.pg.store(pg, Whole{});
      s.gg.store(gg, Whole{});
      s.pp.store(pp, Whole{});
      s.pu.store(pu, Whole{});
    }
    const int64_t lane = i % width;
    ViewSums s{{pg[lane], gg[lane], pp[lane]}, pu[lane]};
    if (std::is_same<T, float>::value && !representable(s, least)) {
      ViewSums again;
      for (int64_t j = i * cols; j < (i + 1) * cols; ++j) {
        const double p = x.p[j], g = x.g[j];
        again.sums.pg += p * g;
        again.sums.gg += g * g;
        again.sums.pp += p * p;
        if constexpr (with_u) again.pu += p * x.u[j];
      }
      lost |= !representable(s, -1) || (s.sums.pp <= least && again.sums.pp != 0);
      if (!representable({s.sums}, least)) s.sums = again.sums;
      s.pu = again.pu;
    }
    tile->template add<T>(s, use.test, double(cols));
    if (with_u && use.projected) use.projected[i] = T(projection(s.pu, s.sums.pp, double(use.eps)));
    use.shares.put(row + i, s);
  }
  return lost;
}

// Sums the rows of a block, the first of which is `row` of the tile. True if a step may have been lost: sum_any_block. Apart
// from the kernels, so that it is compiled once for all formats and rules.
template <bool with_u, class T>
FUSED_ADAMP_OUTLINE bool sum_block(RowBlock<T>& x, int64_t row, int64_t rows, int64_t cols, const RowUse<T>& use,
                                   TileSums* tile) {
  x.template pad<with_u>(rows, cols);
  const double eps2 = use.test.eps2;
  if (!use.shares.row && !use.test.limits && T(eps2) > 0) {
    const auto add = [&](auto tiny) {
      const auto sums_at = [&x, cols](int64_t i) { return sum_lanes<with_u, decltype(tiny)::value>(x, i * cols, cols); };
      return sum_ordinary_block<with_u, decltype(tiny)::value, T>(sums_at, rows, cols, use, tile);
    };
    if (eps2 > Ordinary<T>::least_eps2 ? add(std::false_type()) : add(std::true_type())) return false;
  }
  return sum_any_block<with_u>(x, row, rows, cols, use, tile);
}

template <class T, class Body>
FUSED_ADAMP_INLINE void for_each_block_of_rows(int64_t rows, int64_t cols, const Body& body) {
  const int64_t step = rows_in_block<T>(cols);
  for (int64_t row = 0; row < rows; row += step) body(row, rows - row < step ? rows - row : step);
}

template <class F, class T = typename F::Number>
FUSED_ADAMP_OUTLINE FUSED_ADAMP_KERNEL void measure_short(TileData<F> t, int64_t rows, int64_t cols, T scale, Test test,
                                                          TileSums* tile, RowShares shares) {
  TileSums sums;
  RowBlock<T> x;
  for_each_block_of_rows<T>(rows, cols, [&](int64_t row, int64_t count) {
    const int64_t n = count * cols;
    const Block<F> b = open<with_p | with_g>(t, row * cols, n);
    for_each_vec<T>(n, [&](int64_t i, auto, auto extent) {
      b.load_p(i, extent).store(x.p + i, Whole{});
      (scale * b.load_g(i, extent)).store(x.g + i, Whole{});
    });
    sum_block<false, T>(x, row, count, cols, {test, shares, 0, nullptr}, &sums);
  });
  *tile = sums;
}

// How advance_short treats the weights: leave them, move them at once, or move them when the block's sums are known.
enum Weights { stay, move_now, move_later };

// Advances the state of n elements.
template <class R, Weights weights, class F, class T>
FUSED_ADAMP_OUTLINE FUSED_ADAMP_KERNEL void advance_block(Block<F> b, int64_t n, Coefficients<T> c, T step_size, T shrink,
                                                          RowBlock<T>& x) {
  for_each_vec<T>(n, [&](int64_t i, auto, auto extent) {
    prefetch<R>(b, i);
    const auto p = b.load_p(i, extent), g = b.load_g(i, extent);
    State<R, F> s(b, i, extent);
    advance<R>(g, s.m, s.v, c);
    const auto u = direction<R>(g, s.m, s.v, c);
    if constexpr (weights != stay) s.store_to(b, i, extent);
    p.store(x.p + i, Whole{});
    (c.scale * g).store(x.g + i, Whole{});
    u.store(x.u + i, Whole{});
    if constexpr (weights == move_now) b.store_p(i, extent, weight_update(p, u, step_size, shrink));
  });
}

// The lanes for which recoverable() holds.
template <class T>
FUSED_ADAMP_INLINE auto recoverable_lanes(Vec<T> shrink) {
  return (shrink.lane <= T(0.5)) & (shrink.lane >= T(-0.5));
}

// Every row's number, in the place of each of its elements. Writes up to a vector beyond the last.
template <class T>
FUSED_ADAMP_INLINE void spread(const T* numbers, int64_t rows, int64_t cols, T* to) {
  if (cols == 1) {
    memcpy(to, numbers, rows * sizeof(T));
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Vec<T> x = broadcast(numbers[row]);
    for (int64_t k = 0; k < cols; k += Vec<T>::lanes) x.store(to + row * cols + k, Whole{});
  }
}

// Moves the weights of a block whose rows are each projected, and with project_buffer their momentum. If `kept` is not null,
// it gets the shrink of each row, and rows that finish could not correct do not move. Returns the number of these.
template <bool project_buffer, class F, class T = typename F::Number>
FUSED_ADAMP_OUTLINE FUSED_ADAMP_KERNEL int64_t move_block(Block<F> b, int64_t rows, int64_t cols, T step_size, T decay,
                                                          const T* projected, T* kept, RowBlock<T>& x) {
  alignas(64) T shrink[RowBlock<T>::size];
  for (int64_t i = 0; i < rows; i += Vec<T>::lanes)
    (broadcast(decay) - step_size * Vec<T>::load(projected + i, Whole{})).store(shrink + i, Whole{});
  int64_t unmoved = 0;
  if (kept) {
    for (int64_t i = 0; i < rows; ++i) unmoved += !recoverable(shrink[i]);
    memcpy(kept, shrink, rows * sizeof(T));
  }
  spread(shrink, rows, cols, x.g);
  const auto each = [&](const auto& moved_of) {
    for_each_vec<T>(rows * cols, [&](int64_t i, auto, auto extent) {
      const auto p = Vec<T>::load(x.p + i, Whole{}), by = Vec<T>::load(x.g + i, Whole{});
      b.store_p(i, extent, moved_of(p, weight_update(p, Vec<T>::load(x.u + i, Whole{}), step_size, by), by));
    });
  };
  if (unmoved == 0) {
    each([](Vec<T>, Vec<T> moved, Vec<T>) { return moved; });
  } else {
    each([](Vec<T> p, Vec<T> moved, Vec<T> by) { return Vec<T>{recoverable_lanes(by) ? moved.lane : p.lane}; });
  }
  if constexpr (project_buffer) {
    spread(projected, rows, cols, x.g);
    for_each_vec<T>(rows * cols, [&](int64_t i, auto, auto extent) {
      const auto p = Vec<T>::load(x.p + i, Whole{}), u = Vec<T>::load(x.u + i, Whole{});
      b.store_m(i, extent, u - Vec<T>::load(x.g + i, Whole{}) * p);
    });
  }
  return unmoved;
}

// Puts back the weights of n elements that have moved.
template <class F, class T = typename F::Number>
FUSED_ADAMP_OUTLINE void restore_block(Block<F> b, int64_t n, const RowBlock<T>& x) {
  for_each_vec<T>(n, [&](int64_t i, auto, auto extent) { b.store_p(i, extent, Vec<T>::load(x.p + i, Whole{})); });
}

// As advance_row, for a tile of short rows: update_projected, sweep and dot of them. Moves with `decay`, the shrink of a row
// that is not projected. As with MoveNow, nothing moves any more once a step may have been lost.
template <class R, Weights weights, class F, class T>
FUSED_ADAMP_INLINE TileSums advance_short(const TileData<F>& t, int64_t rows, int64_t cols, const Coefficients<T>& c,
                                          const Test& test, const RowShares& shares, T decay = 0, T* kept = nullptr) {
  constexpr int state = weights == stay ? none : with_state<R>, written = weights == stay ? none : with_p | state;
  TileSums tile;
  RowBlock<T> x;
  alignas(64) T projected[RowBlock<T>::size];
  int64_t moved = rows * cols, unmoved_rows = 0;
  for_each_block_of_rows<T>(rows, cols, [&](int64_t row, int64_t count) {
    const int64_t begin = row * cols, n = count * cols;
    const Block<F> b = open<with_p | with_g | with_state<R>>(t, begin, n);
    const bool moves = begin < moved;
    advance_block<R, weights>(b, n, c, moves ? c.step_size : T(0), moves ? decay : T(0), x);
    const bool lost =
        sum_block<true, T>(x, row, count, cols, {test, shares, c.eps, weights == move_later ? projected : nullptr}, &tile);
    if constexpr (weights == move_now) {
      if (lost) {
        restore_block(b, n, x);
        moved = begin < moved ? begin : moved;
      }
    }
    if constexpr (weights == move_later)
      unmoved_rows += move_block<R::project_buffer>(b, count, cols, c.step_size, decay, projected, kept ? kept + row : nullptr, x);
    close<written>(t, b, begin, n);
  });
  tile.unmoved = double(weights == move_later ? unmoved_rows : rows * cols - moved);
  return tile;
}

// An infinite sum of a block shows in the tile's, so nothing has to be looked at before the end, unless eps is tiny.
template <class F, class T = typename F::Number>
void measure(TileData<F> t, int64_t rows, int64_t cols, T scale, Test test, TileSums* tile, RowShares shares) {
  if (is_short<T>(rows, cols)) return measure_short(t, rows, cols, scale, test, tile, shares);
  const bool looks = std::is_same<T, float>::value && least_square(test.eps2) >= 0;
  if (!looks) measure_rows<false>(t, rows, cols, scale, test, tile, shares);
  if constexpr (std::is_same<T, float>::value) {
    if (looks || !representable(tile->total, -1)) measure_rows<true>(t, rows, cols, scale, test, tile, shares);
  }
}

// The numbers of weight_update: the step size, c and the shrink.
template <class T>
struct By {
  T step_size, projected, shrink;
};

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void update_projected(TileData<F> t, T* u, int64_t rows, int64_t cols, Coefficients<T> c, T decay) {
  const double eps = double(c.eps);
  if (is_short<T>(rows, cols)) {
    advance_short<R, move_later>(t, rows, cols, c, Test(1, eps, false), {nullptr, 0}, decay);
    return;
  }
  update_rows<R>(t, u, rows, cols, c, least_square(eps * eps), [&](int64_t, const ViewSums& s) {
    const T projected = T(projection(s.pu, s.sums.pp, eps));
    return By<T>{c.step_size, projected, decay - c.step_size * projected};
  });
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void dot(TileData<F> t, int64_t rows, int64_t cols, Coefficients<T> c, Test test, TileSums* tile,
                            RowShares shares) {
  if (is_short<T>(rows, cols)) {
    *tile = advance_short<R, stay>(t, rows, cols, c, test, shares);
    return;
  }
  TileSums total;
  for (int64_t row = 0; row < rows; ++row) {
    const ViewSums s = advance_row<R>(t, row * cols, cols, c, least_square(test.eps2), Stay<F>{});
    total.template add<T>(s, test, double(cols));
    shares.put(row, s);
  }
  *tile = total;
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void sweep(TileData<F> t, T* u, int64_t rows, int64_t cols, Coefficients<T> c, Guess<T> guess,
                              TileSums* tile, RowShares shares) {
  if (is_short<T>(rows, cols)) {
    *tile = guess.channel ? advance_short<R, move_later>(t, rows, cols, c, guess.test, shares, guess.projected_decay, guess.shrink)
                          : advance_short<R, move_now>(t, rows, cols, c, guess.test, shares, guess.decay);
    return;
  }
  TileSums total;
  // Counts a row; returns the shrink that its projection asks for.
  const auto count = [&](int64_t row, const ViewSums& s) {
    total.template add<T>(s, guess.test, double(cols));
    shares.put(row, s);
    if (!guess.shrink) return guess.decay;
    return guess.shrink[row] = guess.projected_decay - c.step_size * T(projection(s.pu, s.sums.pp, double(c.eps)));
  };
  const double least = least_square(guess.test.eps2);
  if (guess.channel) {
    update_rows<R>(t, u, rows, cols, c, least, [&](int64_t row, const ViewSums& s) {
      const T shrink = count(row, s);
      const bool safe = recoverable(shrink);
      total.unmoved += !safe;
      return safe ? By<T>{c.step_size, T(0), shrink} : By<T>{T(0), T(0), T(0)};
    });
  } else {
    MoveNow<F> now{c.step_size, guess.decay, u, rows * cols};
    for (int64_t row = 0; row < rows; ++row) count(row, advance_row<R>(t, row * cols, cols, c, least, now));
    total.unmoved = double(rows * cols - now.moved);
  }
  *tile = total;
}

// Whether u depends on the gradient once the state has advanced.
template <class R>
constexpr bool needs_g = R::nesterov || !R::buffer;

// Moves weights whose state has advanced already to moved(element, extent, p, u).
template <class R, class F, class T, class Moved>
FUSED_ADAMP_INLINE void move_weights(const TileData<F>& t, int64_t first, int64_t size, const Coefficients<T>& c,
                                     const Moved& moved) {
  for_each_block<T>(size, [&](int64_t begin, int64_t n) {
    const Block<F> b = open<with_p | (needs_g<R> ? with_g : none) | with_state<R>>(t, first + begin, n);
    for_each_vec<T>(n, [&](int64_t i, auto, auto extent) {
      Vec<T> g{};
      if constexpr (needs_g<R>) g = b.load_g(i, extent);
      State<R, F> s(b, i, extent);
      if constexpr (!R::buffer) advance<R>(g, s.m, s.v, c);
      b.store_p(i, extent, moved(begin + i, extent, b.load_p(i, extent), direction<R>(g, s.m, s.v, c)));
    });
    close<with_p>(t, b, first + begin, n);
  });
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void finish(TileData<F> t, int64_t first, int64_t size, Coefficients<T> c, T was, T is) {
  move_weights<R>(t, first, size, c, [&](int64_t, auto, Vec<T> p, Vec<T> u) {
    return weight_correction(p, u, c.step_size, was, is);
  });
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void move(TileData<F> t, int64_t first, int64_t size, Coefficients<T> c, T is) {
  move_weights<R>(t, first, size, c, [&](int64_t, auto, Vec<T> p, Vec<T> u) { return weight_update(p, u, c.step_size, is); });
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void finish_rows(TileData<F> t, int64_t rows, int64_t cols, Coefficients<T> c, const T* was, const T* is) {
  alignas(64) T old_shrink[RowBlock<T>::size], shrink[RowBlock<T>::size];
  for_each_block_of_rows<T>(rows, cols, [&](int64_t row, int64_t count) {
    spread(was + row, count, cols, old_shrink);
    spread(is + row, count, cols, shrink);
    move_weights<R>(t, row * cols, count * cols, c, [&](int64_t i, auto, Vec<T> p, Vec<T> u) {
      const auto from = Vec<T>::load(old_shrink + i, Whole{}), to = Vec<T>::load(shrink + i, Whole{});
      const auto right = weight_correction(p, u, c.step_size, from, to), moved = weight_update(p, u, c.step_size, to);
      return Vec<T>{recoverable_lanes(from) ? right.lane : moved.lane};
    });
  });
}

// Rows that lie side by side: a row in each lane, so that all accesses follow memory, column by column. Runs of memory have to
// be long: with 4096 columns of 4096 rows, 256 rows at a time took three times as long.

// The sums of columns [first, end) of a row, with products in double, after its state has advanced.
template <class R, class F, class T>
FUSED_ADAMP_OUTLINE ViewSums sum_row_again(const TileData<F>& t, const Columns& s, int64_t row, int64_t first, int64_t end,
                                           const Coefficients<T>& c) {
  ViewSums total;
  for (int64_t col = first; col < end; ++col) {
    const int64_t begin = col * s.stride + row * s.width;
    const Block<F> b = open<with_p | with_g | with_state<R>>(at_column(t, s, col), begin, s.width);
    total.add(sum_again<R, true>(b, s.width, c, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr)));
  }
  return total;
}

// Sums of many rows, added up in T.
template <class T>
struct SumsOfRows {
  static constexpr int64_t room = most_rows + Accumulator<T>::lanes;
  alignas(64) T pg[room], gg[room], pp[room], pu[room];

  FUSED_ADAMP_INLINE void clear(int64_t rows) {
    for (T* sum : {pg, gg, pp, pu}) memset(sum, 0, (rows + Accumulator<T>::lanes) * sizeof(T));
  }
  FUSED_ADAMP_INLINE ViewSums operator[](int64_t row) const { return {{pg[row], gg[row], pp[row]}, pu[row]}; }
  FUSED_ADAMP_INLINE LaneSums<T> lanes_at(int64_t row) const {
    const auto of = [&](const T* sum) { return Vec<T>::load(sum + row, Whole{}); };
    return {of(pg), of(gg), of(pp), of(pu)};
  }
  // Whether those of a vector of rows are all representable(). Where there are fewer rows, it may be false without need.
  FUSED_ADAMP_INLINE bool are_right(int64_t row, double least) const {
    if (!std::is_same<T, float>::value) return true;
    const LaneSums<T> s = lanes_at(row);
    const Vec<T> most = broadcast(T(HUGE_VAL)), low = broadcast(T(least));
    return all_less(s.pp, most) & all_less(s.gg, most) & all_less(absolute(s.pu), most) & all_less(low, smaller(s.pp, s.gg));
  }
};

// Advances a column of one element of each row: a row in each lane.
template <class R, class F, class T>
FUSED_ADAMP_INLINE void advance_narrow_column(const TileData<F>& t, int64_t begin, int64_t rows, const Coefficients<T>& c,
                                       SumsOfRows<T>& sums) {
  const auto add = [](T* sum, Vec<T> x, Vec<T> y) { fma(x, y, Vec<T>::load(sum, Whole{})).store(sum, Whole{}); };
  for_each_block<T>(rows, [&](int64_t row, int64_t n) {
    const Block<F> b = open<with_p | with_g | with_state<R>>(t, begin + row, n);
    for_each_vec<T>(n, [&](int64_t i, auto, auto extent) {
      prefetch<R>(b, i);
      const auto p = b.load_p(i, extent), g = b.load_g(i, extent);
      State<R, F> s(b, i, extent);
      advance<R>(g, s.m, s.v, c);
      s.store_to(b, i, extent);
      const auto scaled = c.scale * g;
      add(sums.pg + row + i, p, scaled);
      add(sums.gg + row + i, scaled, scaled);
      add(sums.pp + row + i, p, p);
      add(sums.pu + row + i, p, direction<R>(g, s.m, s.v, c));
    });
    close<with_state<R>>(t, b, begin + row, n);
  });
}

// As advance_narrow_column, for several elements of each row: blocks of these are short rows.
template <class R, class F, class T>
FUSED_ADAMP_INLINE void advance_wide_column(const TileData<F>& t, int64_t begin, int64_t rows, int64_t width,
                                            const Coefficients<T>& c, RowBlock<T>& x, SumsOfRows<T>& sums) {
  const auto add = [](T* sum, Vec<T> part) { (Vec<T>::load(sum, Whole{}) + part).store(sum, Whole{}); };
  for_each_block_of_rows<T>(rows, width, [&](int64_t row, int64_t count) {
    const Block<F> b = open<with_p | with_g | with_state<R>>(t, begin + row * width, count * width);
    advance_block<R, move_later>(b, count * width, c, T(0), T(0), x);
    close<with_state<R>>(t, b, begin + row * width, count * width);
    x.template pad<true>(count, width);
    for (int64_t i = 0; i < count; i += Vec<T>::lanes) {
      const LaneSums<T> s = sum_lanes<true, false>(x, i * width, width);
      add(sums.pg + row + i, s.pg);
      add(sums.gg + row + i, s.gg);
      add(sums.pp + row + i, s.pp);
      add(sums.pu + row + i, s.pu);
    }
  });
}

// Advances the rows from `first` on in some columns, and sets `sums` to their sums.
template <class R, class F, class T>
FUSED_ADAMP_INLINE void advance_rows(const TileData<F>& t, const Columns& s, int64_t first, int64_t rows, int64_t col, int64_t end,
                                     const Coefficients<T>& c, RowBlock<T>& x, SumsOfRows<T>& sums) {
  sums.clear(rows);
  for (; col < end; ++col) {
    const TileData<F> at = at_column(t, s, col);
    const int64_t begin = col * s.stride + first * s.width;
    if (s.width == 1) {
      advance_narrow_column<R>(at, begin, rows, c, sums);
    } else {
      advance_wide_column<R>(at, begin, rows, s.width, c, x, sums);
    }
  }
}

// The sums of a row in columns [col, end) that have just advanced: again, with products in double, if they are not right in T.
template <class R, class F, class T>
FUSED_ADAMP_INLINE ViewSums right_sums(const TileData<F>& t, const Columns& s, int64_t row, int64_t col, int64_t end,
                                       const Coefficients<T>& c, double least, ViewSums sums) {
  if (std::is_same<T, float>::value && !representable(sums, least)) {
    const ViewSums again = sum_row_again<R>(t, s, row, col, end, c);
    if (!representable({sums.sums}, least)) sums.sums = again.sums;
    sums.pu = again.pu;
  }
  return sums;
}

// As many elements of a row are added up in T as a lane of Accumulator adds up of a block, the rest in double.
template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void advance_columns(TileData<F> t, Columns s, Coefficients<T> c, double least, ViewSums* total) {
  const int64_t most = block_size<T> / Accumulator<T>::lanes / s.width, step = most > 1 ? most : 1;
  SumsOfRows<T> sums;
  RowBlock<T> x;
  for (int64_t first = 0; first < s.count; first += step) {
    const int64_t end = s.count - first < step ? s.count : first + step;
    advance_rows<R>(t, s, 0, s.rows, first, end, c, x, sums);
    for (int64_t row = 0; row < s.rows; row += Vec<T>::lanes) {
      const int64_t last = s.rows - row < Vec<T>::lanes ? s.rows : row + Vec<T>::lanes;
      if (sums.are_right(row, least)) {
        for (int64_t i = row; i < last; ++i) total[i].add(sums[i]);
      } else {
        for (int64_t i = row; i < last; ++i) total[i].add(right_sums<R>(t, s, i, first, end, c, least, sums[i]));
      }
    }
  }
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void advance_short_columns(TileData<F> t, Columns s, Coefficients<T> c, Test test, T decay, T* shrink,
                                              TileSums* tile) {
  const int64_t cols = s.count * s.width;
  const double least = least_square(test.eps2);
  TileSums total;
  SumsOfRows<T> sums;
  RowBlock<T> x;
  alignas(64) T projected[SumsOfRows<T>::room];
  for (int64_t first = 0; first < s.rows; first += most_rows) {
    const int64_t rows = s.rows - first < most_rows ? s.rows - first : most_rows;
    advance_rows<R>(t, s, first, rows, 0, s.count, c, x, sums);
    const RowUse<T> use{test, {nullptr, 0}, c.eps, projected};
    const auto sums_at = [&sums](int64_t row) { return sums.lanes_at(row); };
    const bool tests = test.eps2 > Ordinary<T>::least_eps2;
    if (!tests || !sum_ordinary_block<true, false, T>(sums_at, rows, cols, use, &total)) {
      for (int64_t row = 0; row < rows; ++row) {
        const ViewSums right = right_sums<R>(t, s, first + row, 0, s.count, c, least, sums[row]);
        total.template add<T>(right, test, double(cols));
        projected[row] = T(projection(right.pu, right.sums.pp, double(c.eps)));
      }
    }
    for (int64_t row = 0; row < rows; ++row) shrink[first + row] = decay - c.step_size * projected[row];
  }
  *tile = total;
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void move_columns(TileData<F> t, Columns s, Coefficients<T> c, const T* shrink) {
  alignas(64) T each[RowBlock<T>::size];
  for (int64_t col = 0; col < s.count; ++col) {
    const TileData<F> at = at_column(t, s, col);
    for_each_block_of_rows<T>(s.rows, s.width, [&](int64_t row, int64_t count) {
      if (s.width > 1) spread(shrink + row, count, s.width, each);
      const T* const by = s.width > 1 ? each : shrink + row;
      move_weights<R>(at, col * s.stride + row * s.width, count * s.width, c, [&](int64_t i, auto extent, Vec<T> p, Vec<T> u) {
        return weight_update(p, u, c.step_size, Vec<T>::load(by + i, extent));
      });
    });
  }
}

template <class R, class F>
constexpr RuleKernels<F> rule_kernels() {
  RuleKernels<F> all{dot<R, F>, update<R, F>, update_projected<R, F>, sweep<R, F>, finish<R, F>, move<R, F>,
                     finish_rows<R, F>, nullptr, nullptr, nullptr};
  if constexpr (std::is_same<typename F::State, AsComputed<typename F::Number>>::value && !R::project_buffer) {
    all.advance_columns = advance_columns<R, F>;
    all.advance_short_columns = advance_short_columns<R, F>;
    all.move_columns = move_columns<R, F>;
  }
  return all;
}

template <class F>
constexpr Kernels<F> kernels() {
  return {measure<F>,
          square_norm<F>,
          {rule_kernels<RuleAdam, F>(), rule_kernels<RuleAdamNesterov, F>(), rule_kernels<RuleSgd, F>(),
           rule_kernels<RuleSgdNesterov, F>(), rule_kernels<RuleSgdProjectBuffer, F>(),
           rule_kernels<RuleSgdNoBuffer, F>()}};
}

// For the usual rules only, to keep the build short.
template <class F>
constexpr Kernels<F> half_kernels() {
#if defined(FUSED_ADAMP_HALVES)
  return {measure<F>, square_norm<F>, {rule_kernels<RuleAdam, F>(), {}, rule_kernels<RuleSgd, F>(), {}, {}, {}}};
#else
  return {};
#endif
}

#if defined(FUSED_ADAMP_HALVES)
constexpr bool has_halves = true;
#else
constexpr bool has_halves = false;
#endif

}  // namespace

#define FUSED_ADAMP_JOIN(a, b) a##b
#define FUSED_ADAMP_NAME(set) FUSED_ADAMP_JOIN(instructions_, set)
#define FUSED_ADAMP_TEXT(x) #x
#define FUSED_ADAMP_QUOTE(x) FUSED_ADAMP_TEXT(x)

const fused_adamp::InstructionSet fused_adamp::FUSED_ADAMP_NAME(FUSED_ADAMP_INSTRUCTIONS) = {
    FUSED_ADAMP_QUOTE(FUSED_ADAMP_INSTRUCTIONS), has_halves, kernels<F32>(), kernels<F64>(), half_kernels<F32Bf16State>(),
    half_kernels<Bf16>(), half_kernels<Bf16F32State>(), half_kernels<Remainder>(), half_kernels<RemainderBf16State>(),
    half_kernels<F16>()};
