"""Rows of a few elements, which the CPU takes many at a time: every width, height and storage against float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from doubles import (
    Double,
    bits_are_those_of_one_thread,
    build,
    row_of_another_size_is_that_of_double,
    steps_are_those_of_double,
)
from tolerances import assert_close
from torch import Tensor, nn
from trajectory import KINDS, RULES, gradient

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
WIDTHS = [*range(1, 41), 48, 63, 64]
HEIGHTS = (1, 3, 4, 17, 530)
"""One row, below and at what takes the path, a part of a vector, several blocks."""


def matrices() -> list[Tensor]:
    return [torch.randn(rows, cols) for cols in WIDTHS for rows in {17, HEIGHTS[cols % len(HEIGHTS)]}]


STORAGES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "remainder": (torch.bfloat16, {"rounding": "remainder"}),
    "remainder, bfloat16 state": (torch.bfloat16, {"rounding": "remainder", "state_dtype": torch.bfloat16}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}),
}


@EVERY_RULE
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_and_height(rule: str, kind: str, backend: str) -> None:
    steps_are_those_of_double(rule, matrices(), lambda w, _: gradient(w, kind), backend)


@EVERY_RULE
def test_nesterov(rule: str, backend: str) -> None:
    weights = [torch.randn(530, cols) for cols in (1, 2, 3, 9, 31)]
    seen = steps_are_those_of_double(rule, weights, lambda w, t: gradient(w, KINDS[t]), backend, nesterov=True)
    assert len(seen) == 3


LARGE = [(40_001, 1), (20_003, 2), (12_001, 3), (9_001, 4), (4_001, 9), (1_201, 48)]
"""More than a tile."""


@EVERY_RULE
@pytest.mark.parametrize("projection", ["auto", "channel", "layer"])
def test_many_tiles(rule: str, projection: str, backend: str) -> None:
    weights = [torch.randn(shape) for shape in LARGE]
    seen = steps_are_those_of_double(rule, weights, lambda w, t: gradient(w, KINDS[t]), backend, projection=projection)
    assert len(seen) == (3 if projection == "auto" else 1)


@EVERY_RULE
@pytest.mark.parametrize("kind", ["layer", "free"])
@pytest.mark.parametrize("place", [0, 0.3, 0.97])
def test_one_row_among_many(rule: str, place: float, kind: str, backend: str) -> None:
    """All rows pass the test but a few: the guess that all do is wrong for the tensor, and every row is put right."""

    def mixed(w: Tensor, _: int) -> Tensor:
        g = gradient(w, "channel")
        first = int(place * len(w))
        g[first : first + 2] = gradient(w[first : first + 2], kind)
        return g

    steps_are_those_of_double(rule, [torch.randn(shape) for shape in LARGE], mixed, backend)


@EVERY_RULE
@pytest.mark.parametrize("eps", [1e-8, 1e-15])
@pytest.mark.parametrize("zeros", ["gradient", "weight", "both"])
def test_rows_of_zeros(rule: str, zeros: str, eps: float, backend: str) -> None:
    """As of points that no pixel shows: zeros are exact, whatever eps is."""
    hidden = {rows: torch.rand(rows) < 0.7 for rows, _ in LARGE}
    weights = [torch.randn(shape) for shape in LARGE]
    if zeros != "gradient":
        for w in weights:
            w[hidden[len(w)]] = 0

    def gradient_of(w: Tensor, _: int) -> Tensor:
        g = torch.randn(w.shape)
        if zeros != "weight":
            g[hidden[len(w)]] = 0
        return g

    steps_are_those_of_double(rule, weights, gradient_of, backend, eps=eps)


def test_project_buffer(backend: str) -> None:
    options = {"project_buffer": True, "projection": "channel"}
    steps_are_those_of_double("SGDP", matrices(), lambda w, _: torch.randn(w.shape), backend, **options)


@EVERY_RULE
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_storage(rule: str, storage: str, kind: str, backend: str) -> None:
    """The first step, from weights and a gradient that are stored exactly."""
    dtype, options = STORAGES[storage]
    weights = [torch.randn(rows, cols).to(dtype) for cols in (1, 2, 3, 4, 5, 8, 9, 31, 33, 63) for rows in (4, 21, 600)]
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = build(rule, params, backend, **options)
    doubles = [Double(rule, w) for w in weights]
    wanted = []
    for p, double in zip(params, doubles, strict=True):
        p.grad = gradient(double.w, kind).to(dtype)
        wanted.append(double.step(p.grad))
    optimizer.step()
    for p, double, decision in zip(params, doubles, wanted, strict=True):
        assert optimizer.decisions()[p] == decision, tuple(p.shape)
        assert_close(p, double.w, f"{tuple(p.shape)}")


@EVERY_RULE
@pytest.mark.parametrize("g_size", [1e-30, 1e-12, 1e18])
@pytest.mark.parametrize("p_size", [1e-12, 1.0, 1e18])
@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_one_row_of_another_size(rule: str, p_size: float, g_size: float, eps: float, backend: str) -> None:
    """Among ordinary rows, and judged apart from them: its squares, or products of them, may leave float32."""
    for shape in [(300, 1), (600, 3), (200, 9), (90, 31)]:
        row_of_another_size_is_that_of_double(rule, shape, p_size, g_size, backend, eps=eps)


@EVERY_RULE
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(rule: str, kind: str, backend: str) -> None:
    bits_are_those_of_one_thread(rule, [torch.randn(shape) for shape in LARGE if shape[1] in {1, 4, 9}], kind, backend)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@EVERY_RULE
@pytest.mark.parametrize("gradients", LAYOUTS)
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("shape", [(700, 3, 3, 3), (90, 60, 3, 3), (300, 2, 7, 5)])
def test_layouts_of_weight_and_gradient(
    rule: str, shape: tuple[int, ...], weights: str, gradients: str, backend: str
) -> None:
    """More than a tile, some rows short: tensors that lie otherwise than the rest are gathered, by whatever plan."""
    values = LAYOUTS[weights](torch.randn(shape))
    seen = steps_are_those_of_double(
        rule, [values], lambda w, t: LAYOUTS[gradients](gradient(w, KINDS[t]).view(shape)), backend
    )
    assert len(seen) == 3
