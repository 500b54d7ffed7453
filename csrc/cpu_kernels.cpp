// The kernels of cpu_kernels.h for the instruction set that this file is compiled for, which the build names in
// FUSED_ADAMP_INSTRUCTIONS (setup.py compiles it once for each).
#include "cpu_kernels.h"

#include "storage.h"

namespace {

using namespace fused_adamp;

// A kernel, with the bodies of its loops inlined: left to itself, gcc calls them line by line.
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

// `careful` takes the products of a block in double where its sums in T are not right. A function of its own: inlined beside
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

// An infinite sum of a block shows in the tile's, so nothing has to be looked at before the end, unless eps is tiny.
template <class F, class T = typename F::Number>
void measure(TileData<F> t, int64_t rows, int64_t cols, T scale, Test test, TileSums* tile, RowShares shares) {
  const bool looks = std::is_same<T, float>::value && least_square(test.eps2) >= 0;
  if (!looks) measure_rows<false>(t, rows, cols, scale, test, tile, shares);
  if constexpr (std::is_same<T, float>::value) {
    if (looks || !representable(tile->total, -1)) measure_rows<true>(t, rows, cols, scale, test, tile, shares);
  }
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

// A block's sums, with products taken in double, after advance_row has been through it: p and u come from where `weights` has
// kept them, if it has, else from the block and from the state, which is advanced already if it is stored.
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

// Advances the state of the row of n elements that starts at `row` and adds up its sums. What becomes of its weights is up
// to `weights`: begin(start of the block within the row, elements), each vector's (i, extent, block, p, u), end(); and
// whether the state is stored. A block whose sums are not right in T is summed again (with the rule of measure, so that the
// same block has the same sums in both), and `weights` is told: stop(block, first element, elements).
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

// The weights of a row that is not projected move at once. Those of the block are kept until it ends. If it has to be summed
// again they go back, and from there to the end of the tile nothing moves: a step that dwarfs the weight could not be undone.
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

// How the weights of a row move once its sums are known: the second half of its update, from u in scratch.
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

// The weights of a row wait for its sums: u is kept in scratch. Meanwhile those of an earlier row move.
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

// Updates rows that are each projected: move_of(row, sums) gives (step size, projected, shrink). A row's weights move while the state
// of a later one advances: moving works in cache, advancing waits for memory. The next one but one where rows are short, so
// that how to move, a chain of some hundred cycles from the row's sums, is not waited for; else the next one, so that the
// row is still in the first-level cache.
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

// The numbers of weight_update: the step size, c and the shrink.
template <class T>
struct By {
  T step_size, projected, shrink;
};

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void update_projected(TileData<F> t, T* u, int64_t rows, int64_t cols, Coefficients<T> c, T decay) {
  const double eps = double(c.eps);
  update_rows<R>(t, u, rows, cols, c, least_square(eps * eps), [&](int64_t, const ViewSums& s) {
    const T projected = T(projection(s.pu, s.sums.pp, eps));
    return By<T>{c.step_size, projected, decay - c.step_size * projected};
  });
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void dot(TileData<F> t, int64_t rows, int64_t cols, Coefficients<T> c, Test test, TileSums* tile,
                            RowShares shares) {
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

// Moves weights whose state is advanced already: to what moved(p, u) gives.
template <class R, class F, class T, class Moved>
FUSED_ADAMP_INLINE void move_weights(const TileData<F>& t, int64_t first, int64_t size, const Coefficients<T>& c,
                                     const Moved& moved) {
  for_each_block<T>(size, [&](int64_t begin, int64_t n) {
    const Block<F> b = open<with_p | with_g | with_state<R>>(t, first + begin, n);
    for_each_vec<T>(n, [&](int64_t i, auto, auto extent) {
      const auto g = b.load_g(i, extent);
      State<R, F> s(b, i, extent);
      if constexpr (!R::buffer) advance<R>(g, s.m, s.v, c);
      b.store_p(i, extent, moved(b.load_p(i, extent), direction<R>(g, s.m, s.v, c)));
    });
    close<with_p>(t, b, first + begin, n);
  });
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void finish(TileData<F> t, int64_t first, int64_t size, Coefficients<T> c, T was, T is) {
  move_weights<R>(t, first, size, c, [&](Vec<T> p, Vec<T> u) { return weight_correction(p, u, c.step_size, was, is); });
}

template <class R, class F, class T = typename F::Number>
FUSED_ADAMP_KERNEL void move(TileData<F> t, int64_t first, int64_t size, Coefficients<T> c, T is) {
  move_weights<R>(t, first, size, c, [&](Vec<T> p, Vec<T> u) { return weight_update(p, u, c.step_size, is); });
}

template <class R, class F>
constexpr RuleKernels<F> rule_kernels() {
  return {dot<R, F>, update<R, F>, update_projected<R, F>, sweep<R, F>, finish<R, F>, move<R, F>};
}

template <class F>
constexpr Kernels<F> kernels() {
  return {measure<F>,
          square_norm<F>,
          {rule_kernels<RuleAdam, F>(), rule_kernels<RuleAdamNesterov, F>(), rule_kernels<RuleSgd, F>(),
           rule_kernels<RuleSgdNesterov, F>(), rule_kernels<RuleSgdProjectBuffer, F>(),
           rule_kernels<RuleSgdNoBuffer, F>()}};
}

// Of the usual rules only, to keep the build short.
template <class F>
constexpr Kernels<F> bf16_kernels() {
#if defined(FUSED_ADAMP_BF16)
  return {measure<F>, square_norm<F>, {rule_kernels<RuleAdam, F>(), {}, rule_kernels<RuleSgd, F>(), {}, {}, {}}};
#else
  return {};
#endif
}

#if defined(FUSED_ADAMP_BF16)
constexpr bool has_bf16 = true;
#else
constexpr bool has_bf16 = false;
#endif

}  // namespace

#define FUSED_ADAMP_JOIN(a, b) a##b
#define FUSED_ADAMP_NAME(set) FUSED_ADAMP_JOIN(instructions_, set)
#define FUSED_ADAMP_TEXT(x) #x
#define FUSED_ADAMP_QUOTE(x) FUSED_ADAMP_TEXT(x)

const fused_adamp::InstructionSet fused_adamp::FUSED_ADAMP_NAME(FUSED_ADAMP_INSTRUCTIONS) = {
    FUSED_ADAMP_QUOTE(FUSED_ADAMP_INSTRUCTIONS), has_bf16, kernels<F32>(), kernels<F64>(), bf16_kernels<F32Bf16State>(),
    bf16_kernels<Bf16>(), bf16_kernels<Bf16F32State>(), bf16_kernels<Remainder>(), bf16_kernels<RemainderBf16State>()};
