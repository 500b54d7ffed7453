"""From a bucket's tables to the elements of a tile.

A tile is whole rows of one parameter, or a piece of one row that is wider than a tile. Its elements are numbered
e = 0, 1, 2, ... row by row. ``Spec`` says how they lie in memory and is known when a kernel is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tables import (
    ADDRESSES,
    ALIGNED,
    COLS,
    COLUMNS,
    FIRST_TILE,
    ROWS,
    SEGMENTS,
    STRIDED,
    STRIDES,
    TILE_COLS,
    TILE_ROWS,
    VECTOR,
    WIDEST_LOAD,
)


class Spec(NamedTuple):
    """The properties of tensors and rule that a kernel is compiled for.

    Attributes:
        p, g, state: dtypes in memory.
        number: the dtype of the math: float32, or float64 for float64 weights.
        layout: ALIGNED: rows follow each other, the first starts at a multiple of 16 bytes, and their length is a
            multiple of VECTOR (that of a vector need not be); FLAT: rows follow each other; STRIDED: anything else.
        adaptive, buffer: the momentum rule.
        rounding: how bfloat16 is stored: precision.py.
        shared: whether parameters may lie on several ranks.
        access: elements of one load or store of a thread, where the layout is ALIGNED and they fit in 16 bytes. It
            says which elements a thread holds, and so in which order a block is summed: the same for weights in
            float32 as for those in bfloat16 with a remainder.
        tile, log_tile: elements of a block, in registers at once, and their log2.
    """

    p: tl.dtype
    g: tl.dtype
    state: tl.dtype
    number: tl.dtype
    layout: tl.constexpr
    adaptive: tl.constexpr
    buffer: tl.constexpr
    rounding: tl.constexpr
    shared: tl.constexpr
    access: tl.constexpr
    log_tile: tl.constexpr
    tile: tl.constexpr


@triton.jit
def locate(table, owners, tile):
    """The place of a tile, ``where``: parameter x, first row, first column, number of rows, number of columns."""
    x = tl.load(owners + tile).to(tl.int64)
    entry = table + x * COLUMNS
    tile_rows = tl.load(entry + TILE_ROWS)
    tile_cols = tl.load(entry + TILE_COLS)
    index = (tile - tl.load(entry + FIRST_TILE)).to(tl.int32)
    segments = tl.load(entry + SEGMENTS).to(tl.int32)
    view = index // segments
    row = view * tile_rows
    col = (index - view * segments) * tile_cols
    rows_here = tl.minimum(tile_rows, tl.load(entry + ROWS) - row).to(tl.int32)
    cols_here = tl.minimum(tile_cols, tl.load(entry + COLS) - col).to(tl.int32)
    return x, row, col, rows_here, cols_here


@triton.jit
def first_element(memory, where, LAYOUT: tl.constexpr):
    """The number of a tile's first element among its parameter's elements here, counted row by row."""
    x, row, col, _, _ = where
    first = row * tl.load(memory[0] + x * COLUMNS + COLS) + col
    if LAYOUT == ALIGNED:
        # The row of a vector is 0, and a tile's first column is a multiple of the tile's width. This hint has to stand
        # where the number is computed: the compiler drops hints on a function's result.
        first = tl.multiple_of(first, VECTOR)
    return first


@triton.jit
def place(memory, where, e, ROLE: tl.constexpr, TYPE: tl.constexpr, S: tl.constexpr):
    """Pointers to elements e of a tile, in one of its parameter's tensors. ``where`` comes from :func:`locate`."""
    _, addresses, strides = memory
    x, row, col, _, cols_here = where
    start = tl.load(addresses + x * ADDRESSES + ROLE).to(tl.pointer_type(TYPE))
    if S.layout == STRIDED:
        entry = strides + x * STRIDES
        stride = entry + 1 + 3 * ROLE
        last = tl.load(entry).to(tl.int32)
        # In 32 bits: a division of 64 bits is a subroutine. backends/triton.py refuses rows of 2^31 elements.
        r = e // cols_here
        c = e - r * cols_here + col.to(tl.int32)
        outer = c // last
        inner = c - outer * last
        return start + (row + r) * tl.load(stride) + outer * tl.load(stride + 1) + inner * tl.load(stride + 2)
    if S.layout == ALIGNED:
        start = tl.multiple_of(start, min(WIDEST_LOAD, S.access * TYPE.primitive_bitwidth // 8))
    return start + first_element(memory, where, S.layout) + e
