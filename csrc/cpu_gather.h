// Access to tiles, in memory or gathered into scratch. Used by cpu_stages.cpp only.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu_step.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_adamp {

namespace {

struct Tile {
  int64_t row, rows, col, cols;  // rows [row, row + rows), columns [col, col + cols)
  int64_t size() const { return rows * cols; }
};

Tile tile_at(const TableRow& t, int64_t index) {
  const int64_t segments = t.segments();
  const int64_t row = index / segments * t.tile_rows, col = index % segments * t.tile_cols;
  return {row, std::min(t.tile_rows, t.rows - row), col, std::min(t.tile_cols, t.cols - col)};
}

// A dimension of a tile: how many elements, and how far apart they are in the parameter's tensor and in the tile.
struct Axis {
  int64_t size, tensor, tile;
};

// The axes of a tile, in the order that walks through the tensor's memory. The tile is to hold whole rows one after another; or,
// if width is not 0, columns, each with so many elements of every row.
std::vector<Axis> axes_of(const Layout& layout, int role, const Tile& tile, int64_t width) {
  std::vector<Axis> axes;
  const auto add = [&](const Axis& axis) {
    if (axis.size != 1) axes.push_back(axis);
  };
  if (width) {
    add({tile.cols / width, layout.inner[role][0], tile.rows * width});
    add({tile.rows, layout.row_stride[role], width});
    add({width, layout.inner[role].back(), 1});
  } else {
    int64_t step = 1;
    for (int d = int(layout.inner_sizes.size()) - 1; d >= 0; step *= layout.inner_sizes[d--])
      add({layout.inner_sizes[d], layout.inner[role][d], step});
    add({tile.rows, layout.row_stride[role], tile.cols});
  }
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.tensor > b.tensor; });
  size_t last = 0;  // of those that are merged
  for (size_t i = 1; i < axes.size(); ++i) {
    const Axis inner = axes[i];
    if (axes[last].tensor == inner.size * inner.tensor && axes[last].tile == inner.size * inner.tile) {
      axes[last] = {axes[last].size * inner.size, inner.tensor, inner.tile};
    } else {
      axes[++last] = inner;
    }
  }
  axes.resize(std::min(axes.size(), last + 1));
  return axes;
}

// block[c * line + r] = from[r * from_stride + c], for the rows and columns of a block of whole cache lines.
template <class Element>
void transpose_block(const Element* from, int64_t from_stride, Element* block, int64_t rows, int64_t cols) {
  constexpr int64_t line = 64 / sizeof(Element);
  int64_t r = 0;
#if defined(__SSE2__)
  if constexpr (sizeof(Element) == 4) {
    for (; r + 4 <= rows; r += 4) {
      int64_t c = 0;
      for (; c + 4 <= cols; c += 4) {
        __m128 x[4];
        for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_ps(reinterpret_cast<const float*>(from + (r + i) * from_stride + c));
        _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
        for (int i = 0; i < 4; ++i) _mm_store_ps(reinterpret_cast<float*>(block + (c + i) * line + r), x[i]);
      }
      for (; c < cols; ++c)
        for (int i = 0; i < 4; ++i) block[c * line + r + i] = from[(r + i) * from_stride + c];
    }
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) block[c * line + r] = from[r * from_stride + c];
}

// to[c * to_stride + r] = from[r * from_stride + c]. Passes through a block of its own, so that every cache line is read and
// written as a whole: lines whose distance is a power of two evict each other. Measured: a third of the time.
template <class Element>
void transpose(const Element* from, int64_t from_stride, Element* to, int64_t to_stride, int64_t rows, int64_t cols) {
  constexpr int64_t line = 64 / sizeof(Element);
  alignas(64) Element block[line * line];
  for (int64_t r = 0; r < rows; r += line) {
    const int64_t height = std::min(line, rows - r);
    for (int64_t c = 0; c < cols; c += line) {
      const int64_t width = std::min(line, cols - c);
      // Lines that lie a page apart are beyond the hardware's prefetchers.
      for (int64_t next = r + line; next < std::min(r + 2 * line, rows); ++next) __builtin_prefetch(from + next * from_stride + c);
      transpose_block(from + r * from_stride + c, from_stride, block, height, width);
      for (int64_t i = 0; i < width; ++i) {
        Element* const line_of_to = to + (c + i) * to_stride + r;
        if (height == line) {
          std::memcpy(line_of_to, block + i * line, 64);
        } else {
          for (int64_t k = 0; k < height; ++k) line_of_to[k] = block[i * line + k];
        }
      }
    }
  }
}

// Copies runs of elements that lie side by side. Short ones in pieces of 16 bytes, the last of which may overlap the one
// before: a memcpy of unknown size is a call, which costs more than nine elements.
template <class Element>
void copy_runs(const Element* from, int64_t from_stride, Element* to, int64_t to_stride, int64_t runs, int64_t length) {
  constexpr int64_t piece = 16 / sizeof(Element), longest = 16 * piece;
  for (int64_t run = 0; run < runs; ++run, from += from_stride, to += to_stride) {
    if (length > longest) {
      std::memcpy(to, from, length * sizeof(Element));
    } else if (length < piece) {
      for (int64_t i = 0; i < length; ++i) to[i] = from[i];
    } else {
      for (int64_t i = 0; i < length - piece; i += piece) std::memcpy(to + i, from + i, 16);
      std::memcpy(to + length - piece, from + length - piece, 16);
    }
  }
}

// Copies a tile out of a tensor, or back.
template <class Element, bool back>
void copy(const Axis* axes, size_t count, Element* tensor, Element* tile) {
  if (count > 1) {
    const Axis &a = axes[count - 2], &b = axes[count - 1];
    if (count == 2 && a.tile == 1 && b.tensor == 1) {
      return back ? transpose(tile, b.tile, tensor, a.tensor, b.size, a.size)
                  : transpose(tensor, a.tensor, tile, b.tile, a.size, b.size);
    }
    if (count == 2 && b.tile == 1 && b.tensor == 1) {
      return back ? copy_runs(tile, a.tile, tensor, a.tensor, a.size, b.size)
                  : copy_runs(tensor, a.tensor, tile, a.tile, a.size, b.size);
    }
    for (int64_t i = 0; i < axes->size; ++i)
      copy<Element, back>(axes + 1, count - 1, tensor + i * axes->tensor, tile + i * axes->tile);
    return;
  }
  const Axis axis = count ? *axes : Axis{1, 1, 1};
  if (axis.tensor == 1 && axis.tile == 1) {
    std::memcpy(back ? tensor : tile, back ? tile : tensor, axis.size * sizeof(Element));
  } else {
    for (int64_t i = 0; i < axis.size; ++i) {
      Element &outside = tensor[i * axis.tensor], &inside = tile[i * axis.tile];
      (back ? outside : inside) = back ? inside : outside;
    }
  }
}

// Copies a tile that is a part of a row, one run of the innermost dimension at a time.
template <class Element, bool back>
void copy_part(const Layout& layout, int role, const Tile& tile, Element* tensor, Element* to) {
  const auto& sizes = layout.inner_sizes;
  const auto& inner = layout.inner[role];
  const int last = int(sizes.size()) - 1;
  for (int64_t c = 0; c < tile.cols;) {
    int64_t rest = tile.col + c, offset = tile.row * layout.row_stride[role];
    const Axis run{std::min(sizes[last] - rest % sizes[last], tile.cols - c), inner[last], 1};
    for (int d = last; d >= 0; rest /= sizes[d], --d) offset += rest % sizes[d] * inner[d];
    copy<Element, back>(&run, 1, tensor + offset, to + c);
    c += run.size;
  }
}

// Copies a tile from a strided tensor to `scratch`, without gaps; or back.
template <bool back>
void copy(const Parameter& x, int role, const Tile& tile, char* scratch) {
  const Operand& o = x.operand[role];
  const Layout& layout = *x.layout;
  const bool columns = x.plan == Plan::columns;
  const int64_t first = tile.row * layout.row_stride[role] + (columns ? tile.col / x.width * layout.inner[role][0] : 0);
  const auto run = [&](auto element) {
    using Element = decltype(element);
    auto* const tensor = reinterpret_cast<Element*>(o.data);
    auto* const to = reinterpret_cast<Element*>(scratch);
    if (!columns && tile.cols < x.table->cols) return copy_part<Element, back>(layout, role, tile, tensor, to);
    std::vector<Axis> axes = axes_of(layout, role, tile, columns ? x.width : 0);
    const auto unit = std::find_if(axes.begin(), axes.end(), [](const Axis& axis) { return axis.tile == 1; });
    if (unit != axes.end() && unit + 1 != axes.end()) std::rotate(unit, unit + 1, axes.end() - 1);  // next to the last
    copy<Element, back>(axes.data(), axes.size(), tensor + first, to);
  };
  switch (itemsize(o.type)) {
    case 2: return run(uint16_t());
    case 4: return run(uint32_t());
    default: return run(uint64_t());
  }
}

// A tile whose rows lie side by side, and where its first element is in tensors that are not gathered.
Columns columns_of(const Parameter& x, const Tile& tile) {
  const int64_t stride = x.layout->inner[role_p][0];
  return {tile.rows, tile.cols / x.width, x.width, stride, x.turned ? tile.rows * x.width : stride};
}
int64_t first_of_columns(const Parameter& x, const Tile& tile) {
  return tile.row * x.width + tile.col / x.width * x.layout->inner[role_p][0];
}

// Whether kernels read a tensor from scratch, since it lies otherwise than they take it.
bool is_gathered(const Parameter& x, int role) {
  return x.plan == Plan::columns ? role == role_g && x.turned : x.gathered[role];
}

// Which of a tile's tensors a stage reads.
constexpr int only_g = 1 << role_g, p_and_g = only_g | 1 << role_p | 1 << role_remainder, everything = (1 << role_count) - 1;

// Those from which a stage moves weights whose state has advanced: RuleKernels, finish and move.
int moved_roles(const Parameter& x) {
  const bool by_g = x.rule == adam_nesterov || x.rule == sgd_nesterov || x.rule == sgd_no_buffer;
  return by_g ? everything : everything & ~only_g;
}

// A tile in the form that kernels take. store() copies the results of a gathered tile back to the parameter.
template <class F, class T = typename F::Number>
class TileAccess {
 public:
  TileAccess(const Parameter& x, const Tile& tile, const Scratch& scratch, int roles)
      : parameter_(x), tile_(tile), storage_{} {
    const int64_t first = x.plan == Plan::columns ? first_of_columns(x, tile) : tile.row * x.table->cols + tile.col;
    for (int role = 0; role < role_count; ++role) {
      const Operand& o = x.operand[role];
      if (!o.data || !(roles >> role & 1)) continue;
      storage_.type[role] = o.type;
      storage_.staged[role] = o.type != (sizeof(T) == 8 ? storage_f64 : storage_f32);
      if (!is_gathered(x, role)) {
        storage_.data[role] = o.data + first * itemsize(o.type);
      } else {
        storage_.data[role] = scratch.gathered(role);
        copy<false>(x, role, tile, storage_.data[role]);
      }
    }
    if (!x.staged) {
      data = {at<typename F::P>(role_p), at<typename F::G>(role_g), at<typename F::State>(role_m),
              at<typename F::State>(role_v), nullptr, nullptr, 0};
    } else {
      storage_.stochastic = x.seed != nullptr;
      storage_.key[0] = x.key[0];
      storage_.key[1] = x.key[1];
      storage_.first = uint32_t(x.table->first_number + tile.row * x.table->row_numbers + tile.col);
      data = {};
      data.storage = &storage_;
      data.stage = scratch.stage<T>();
    }
  }
  TileAccess(const TileAccess&) = delete;
  TileAccess& operator=(const TileAccess&) = delete;

  void store() const {
    store_weight();
    for (Role role : {role_m, role_v}) put_back(role);
  }
  void store_weight() const {
    for (Role role : {role_p, role_remainder}) put_back(role);
  }
  TileData<F> data;

 private:
  void put_back(Role role) const {
    if (storage_.data[role] && is_gathered(parameter_, role)) copy<true>(parameter_, role, tile_, storage_.data[role]);
  }
  template <class Stored>
  typename Stored::Pointer at(Role role) const {
    if constexpr (std::is_same<Stored, WithRemainder>::value) {
      return {reinterpret_cast<uint16_t*>(storage_.data[role]), reinterpret_cast<uint16_t*>(storage_.data[role_remainder])};
    } else {
      return reinterpret_cast<typename Stored::Pointer>(storage_.data[role]);
    }
  }
  const Parameter& parameter_;
  const Tile tile_;
  Storage storage_;
};

}  // namespace

}  // namespace fused_adamp
