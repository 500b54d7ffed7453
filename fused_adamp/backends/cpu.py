"""The CPU backend: csrc/ over a bucket, in one call of one registered operator."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_adamp.batch import COLUMNS, FLOATING, Sharing
from fused_adamp.host import Marks, marks

if TYPE_CHECKING:
    from fused_adamp.batch import Batch, Members

__all__ = ["CpuBackend", "empty_like", "load"]

_LAYOUT = 6  # csrc/bucket.h
_SUMS = 8  # doubles per tile: csrc/cpu_kernels.h, TileSums
_SHORTEST_ROW = 64  # csrc/cpu_plan.cpp, keeps_shrink
_HUGE_PAGE = 1 << 21


@lru_cache(maxsize=1)
def load() -> str | None:
    """Loads the extension; returns None, or why there is none and how to get it."""
    try:
        importlib.import_module("fused_adamp._C")
    except ImportError as error:
        return (
            f"the compiled extension is missing ({error}); install a C++17 compiler (g++ or clang++) and run "
            "`pip install --no-build-isolation --force-reinstall --no-deps fused_adamp` beside an installed torch"
        )
    built = torch.ops.fused_adamp.layout()
    if built != _LAYOUT:
        return (
            f"the extension was built from other sources (layout {built}, wanted {_LAYOUT}); install the package again"
        )
    return None


class _Listed(NamedTuple):
    """The addresses of the members' state under one key: one tensor to pass to the operator in place of P.

    A step may use it if the members' tensors lie as they did: :meth:`still_holds`.
    """

    marks: Marks
    """Of the state tensors. All have the key's dtype and are contiguous."""
    table: Tensor
    """The addresses: ``(P,)`` int64."""

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Listed:
        found = marks(None, tensors, settled=True)
        return cls(found, torch.frombuffer(found.addresses, dtype=torch.int64))

    def still_holds(self, tensors: list[Tensor]) -> bool:
        return marks(self.marks, tensors, settled=True) is self.marks


@dataclass
class Scratch:
    """Memory that all steps of one bucket use."""

    sums: Tensor
    rows: list[Any] = field(default_factory=list)
    scalars: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    """The rows as a tensor."""
    kept: list[Tensor] = field(default_factory=list)
    """Tensors that `measure` fills for the step after it, if members lie on several ranks: :func:`_kept`."""
    listed: dict[str, _Listed] = field(default_factory=dict)
    """Per key, the state that was stepped last."""


def empty_like(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, backed by huge pages where it is large and the system grants them."""
    empty = torch.empty_like(t, dtype=dtype, device="cpu")
    if empty.nbytes > _HUGE_PAGE and load() is None:
        torch.ops.fused_adamp.advise_huge_pages(empty)
    return empty


class CpuBackend:
    name = "cpu"
    fused = True
    mixes_moments = True

    def unavailable(self, device: torch.device) -> str | None:
        return load() if device.type == "cpu" else "it steps parameters on the CPU only"

    def zeros_like(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        return empty_like(p, dtype).zero_()

    def geometry(self, rows: int, cols: int) -> tuple[int, int]:
        """Tiles of up to 32768 elements: large enough to stream from memory, small enough to stay in cache."""
        tile_cols = min(cols, 32768)
        return min(rows, 32768 // tile_cols) if cols <= 32768 else 1, tile_cols

    def counters_device(self, device: torch.device) -> torch.device:
        return device

    def scratch(self, bucket: Members) -> Scratch:
        sums = torch.empty(bucket.tiles, _SUMS, dtype=torch.float64, device="cpu")
        return Scratch(sums, kept=_kept(bucket) if bucket.shared else [])

    def first_stale(self, batch: Batch) -> int:
        return int(torch.ops.fused_adamp.first_stale.default(*_arguments(batch, _state(batch))))

    def square_norm(self, batch: Batch) -> Tensor | None:
        square = torch.ops.fused_adamp.square_norm.default(*_arguments(batch, {}))
        return None if square < 0 else torch.tensor(square, dtype=torch.float64, device="cpu")

    def measure(self, batch: Batch) -> None:
        torch.ops.fused_adamp.measure.default(*_arguments(batch, _state(batch)))

    def step(self, batch: Batch) -> int:
        operator = torch.ops.fused_adamp.step
        if batch.found_inf is not None and batch.found_inf.item():
            operator = torch.ops.fused_adamp.first_stale
        state = _state(batch)
        stale = int(operator.default(*_arguments(batch, state)))
        if stale < 0:
            _list_state(batch.bucket, state)
        return stale


def _kept(bucket: Members) -> list[Tensor]:
    """Two empty tables that `measure` fills for the step after it.

    Whether it has moved each member, and by which guess: ``(P,)`` uint8, csrc/bucket.h, Swept. And the shrink of each
    whole row of shared members, in float32, or float64 for float64 weights.
    """
    sharing, rows, cols = (bucket.table[:, COLUMNS.index(name)] for name in ("sharing", "rows", "cols"))
    whole = int(rows[(sharing == Sharing.SHARED) & (cols >= _SHORTEST_ROW)].sum())
    computed = torch.promote_types(bucket.key.dtype, torch.float32)
    return [
        torch.zeros(len(bucket.params), dtype=torch.uint8, device="cpu"),
        torch.empty(whole, dtype=computed, device="cpu"),
    ]


def _arguments(batch: Batch, state: dict[str, list[Tensor]]) -> tuple[Any, ...]:
    bucket = batch.bucket
    first, second = (*(state.get(name, []) for name in bucket.key.moments), [], [])[:2]
    return (
        batch.params,
        batch.grads,
        first,
        second,
        state.get("remainder", []),
        state.get("step", []),
        batch.seeds,
        bucket.decisions,
        bucket.results,
        bucket.scratch.sums,
        bucket.table,
        _scalars(batch),
        1.0 if batch.scale is None else batch.scale.item(),
        FLOATING.index(bucket.key.dtype),  # csrc/cpu_kernels.h: StorageType
        FLOATING.index(bucket.key.state_dtype),
        batch.rule.adaptive,
        [*(bucket.shared or ()), *bucket.scratch.kept],
        batch.final,
    )


def _scalars(batch: Batch) -> Tensor:
    """The hyperparameters as a table, ``(groups, len(Scalars))`` float64; a new one if a value has changed."""
    scratch, rows = batch.bucket.scratch, [batch.rule.scalars(group) for group in batch.groups]
    if rows != scratch.rows:
        scratch.rows, scratch.scalars = rows, torch.tensor(rows, dtype=torch.float64, device="cpu")
    table: Tensor = scratch.scalars
    return table


def _state(batch: Batch) -> dict[str, list[Tensor]]:
    """The members' state by key, without seeds: their tensors, or a list with only the table of their addresses."""
    listed = batch.bucket.scratch.listed
    moments = dict(zip(batch.bucket.key.moments, batch.moments, strict=False))
    state = moments | {n: of for n, of in (("remainder", batch.remainders), ("step", batch.steps)) if of}
    return {n: [listed[n].table] if n in listed and listed[n].still_holds(of) else of for n, of in state.items()}


def _list_state(bucket: Members, state: dict[str, list[Tensor]]) -> None:
    """Keeps the addresses of state that has just passed all checks, for the next step."""
    if not bucket.has_own_tensors:
        return
    dtypes = bucket.key.storage | bucket.key.counters
    for name, tensors in state.items():
        plain = all(t.dtype == dtypes[name] for t in tensors) and all(map(Tensor.is_contiguous, tensors))
        if len(tensors) > 1 and plain:  # ABSENT is of no such dtype
            bucket.scratch.listed[name] = _Listed.of(tensors)
