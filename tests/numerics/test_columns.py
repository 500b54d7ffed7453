"""Rows that lie side by side in memory, as in a transposed matrix, which the CPU takes column by column."""

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
from tolerances import assert_close, assert_identical
from torch import Tensor, nn
from trajectory import KINDS, MOMENTS, RULES, gradient

from fused_adamp import Decision

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))

SHAPES = [(16, 64), (17, 65), (33, 200), (100, 129), (700, 190), (4_099, 70), (65, 4_500)]
"""Rows and columns: at what takes the path, parts of a vector, several jobs by rows and by columns."""

SHORT = [(16, 2), (700, 3), (2_100, 48), (5_000, 9), (33_000, 2)]
"""Rows that are short, a part of a vector of them, more than a block, more than a tile."""


def with_gaps(x: Tensor) -> Tensor:
    """Columns that lie further apart than they are long."""
    return x.new_zeros(x.size(1), x.size(0) + 3)[:, : x.size(0)].t().copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "with gaps": with_gaps,
    "in a line": lambda x: x.contiguous(),
}


@EVERY_RULE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["transposed", "with gaps"])
def test_every_shape(rule: str, kind: str, layout: str, backend: str) -> None:
    weights = [LAYOUTS[layout](torch.randn(shape)) for shape in SHAPES + SHORT]
    seen = steps_are_those_of_double(rule, weights, lambda w, _: LAYOUTS[layout](gradient(w, kind).float()), backend)
    assert len(seen) == 1


@EVERY_RULE
@pytest.mark.parametrize("gradients", LAYOUTS)
@pytest.mark.parametrize("weights", LAYOUTS)
def test_layouts_of_weight_and_gradient(rule: str, weights: str, gradients: str, backend: str) -> None:
    values = [LAYOUTS[weights](torch.randn(shape)) for shape in SHAPES[2:5] + SHORT[1:4]]
    seen = steps_are_those_of_double(
        rule, values, lambda w, t: LAYOUTS[gradients](gradient(w, KINDS[t]).float()), backend
    )
    assert len(seen) == 3


@EVERY_RULE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [(8, 16, 3, 3), (5, 33, 4, 4), (40, 100, 1, 2), (3, 700, 9, 7), (9, 4_099, 2, 5), (3, 5_000, 2, 2), (1, 40, 7, 5)],
)
def test_deconvolutions(rule: str, shape: tuple[int, ...], kind: str, backend: str) -> None:
    """Of (input channels, output channels, height, width): a row's elements lie in runs of a kernel each."""
    w = torch.randn(shape)
    flat = w.transpose(0, 1).flatten(1)
    g = gradient(flat.double(), kind).float().view_as(w.transpose(0, 1)).transpose(0, 1).contiguous()
    p, double = nn.Parameter(w.clone()), Double(rule, flat)
    optimizer = build(rule, [p], backend, channel_dim=1)
    for _ in range(2):
        p.grad = g
        wanted = double.step(g.transpose(0, 1).flatten(1))
        optimizer.step()
        assert optimizer.decisions()[p] == wanted
        assert_close(p.transpose(0, 1).flatten(1), double.w, f"{shape}")


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamP with nesterov": ("AdamP", {"nesterov": True}),
    "AdamP without a test": ("AdamP", {"delta": 0.0}),
    "AdamP, no projection": ("AdamP", {"projection": "none"}),
    "AdamP by channel": ("AdamP", {"projection": "channel"}),
    "AdamP by layer": ("AdamP", {"projection": "layer"}),
    "SGDP with nesterov": ("SGDP", {"nesterov": True, "dampening": 0.0}),
    "SGDP without momentum": ("SGDP", {"momentum": 0.0, "dampening": 0.0}),
    "SGDP by layer": ("SGDP", {"projection": "layer"}),
    "SGDP, projected buffer": ("SGDP", {"project_buffer": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, dtype: torch.dtype, backend: str) -> None:
    rule, options = OPTIONS[case]
    weights = [LAYOUTS["transposed"](torch.randn(shape, dtype=dtype)) for shape in SHAPES[1:5] + SHORT[1:4]]
    steps_are_those_of_double(
        rule, weights, lambda w, t: LAYOUTS["transposed"](gradient(w, KINDS[t])), backend, **options
    )


@pytest.mark.parametrize("rounded", ["exp_avg", "exp_avg_sq"])
def test_a_moment_of_16_bits(rounded: str, backend: str) -> None:
    """The update follows from the moments before they are rounded, as it does where rows are contiguous."""
    w, g = torch.randn(100, 129), torch.randn(100, 129)
    results = []
    for layout in ("transposed", "in a line"):
        p = nn.Parameter(LAYOUTS[layout](w.clone()))
        p.grad = LAYOUTS[layout](g.clone())
        optimizer = build("AdamP", [p], backend)
        moments = {name: torch.zeros_like(p.detach()) for name in MOMENTS["AdamP"]}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments, rounded: moments[rounded].bfloat16()}
        for _ in range(2):
            optimizer.step()
        assert optimizer.state[p][rounded].dtype == torch.bfloat16
        results.append(p.detach())
    assert_close(results[0], results[1].double(), "weight")


def test_random_bits_do_not_depend_on_the_layout(backend: str) -> None:
    """Each element draws by its number in the tensor, not by where it lies."""
    w, g = torch.randn(2, 100, 129).bfloat16()
    results = []
    for layout in ("transposed", "in a line"):
        torch.manual_seed(0)
        p = nn.Parameter(LAYOUTS[layout](w.clone()))
        p.grad = LAYOUTS[layout](g.clone())
        optimizer = build("AdamP", [p], backend, rounding="stochastic", state_dtype=torch.float32)
        for _ in range(2):
            optimizer.step()
        results.append(p.detach())
    assert_identical(*results)


@EVERY_RULE
@pytest.mark.parametrize("kind", ["layer", "free"])
@pytest.mark.parametrize("place", [0, 0.5, 0.97])
def test_one_row_among_many(rule: str, place: float, kind: str, backend: str) -> None:
    """All rows pass the test but a few."""

    def mixed(w: Tensor, _: int) -> Tensor:
        g = gradient(w, "channel")
        first = int(place * len(w))
        g[first : first + 2] = gradient(w[first : first + 2], kind)
        return LAYOUTS["transposed"](g)

    steps_are_those_of_double(
        rule, [LAYOUTS["transposed"](torch.randn(shape)) for shape in SHAPES[3:] + SHORT[2:]], mixed, backend
    )


@EVERY_RULE
@pytest.mark.parametrize("g_size", [1e-30, 1e-12, 1e18])
@pytest.mark.parametrize("p_size", [1e-12, 1.0, 1e18])
@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_one_row_of_another_size(rule: str, p_size: float, g_size: float, eps: float, backend: str) -> None:
    """Its squares, or products of them, may leave float32: they are added up again in double."""
    for shape in SHAPES[:5] + SHORT[:2]:
        row_of_another_size_is_that_of_double(
            rule, shape, p_size, g_size, backend, eps=eps, layout=LAYOUTS["transposed"]
        )


@pytest.mark.parametrize("kind", ["channel", "free"])
@pytest.mark.parametrize(("p_size", "g_size"), [(1e25, 1.0), (1.0, 1e25), (1e-28, 1.0), (1.0, 1e-28)])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_one_row_whose_squares_leave_float32(p_size: float, g_size: float, eps: float, kind: str, backend: str) -> None:
    """Other rows pass the test or fail it: if they pass, this row decides."""
    for shape in SHAPES[:4] + SHORT[:3]:
        row_of_another_size_is_that_of_double(
            "SGDP", shape, p_size, g_size, backend, eps=eps, kind=kind, layout=LAYOUTS["transposed"]
        )


@EVERY_RULE
@pytest.mark.parametrize("shape", [(100, 129), (3_000, 9)])
def test_a_nan_stays_in_its_row(rule: str, shape: tuple[int, int], backend: str) -> None:
    """No view passes: cosines with a NaN pass no test. Only its own elements become NaN."""
    p = nn.Parameter(LAYOUTS["transposed"](torch.randn(shape)))
    g = gradient(p, "channel")
    g[60, 7] = torch.nan
    p.grad = LAYOUTS["transposed"](g)
    optimizer = build(rule, [p], backend)
    optimizer.step()
    assert optimizer.decisions()[p] == Decision.NONE
    assert_identical(p.isnan(), g.isnan())


@EVERY_RULE
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(rule: str, kind: str, backend: str) -> None:
    weights = [LAYOUTS["transposed"](torch.randn(shape)) for shape in [(700, 900), (4_099, 200), (40_001, 3)]]
    bits_are_those_of_one_thread(rule, weights, kind, backend)


@EVERY_RULE
@pytest.mark.parametrize("kind", KINDS)
def test_channel_dim_is_the_transposed_matrix(rule: str, kind: str, backend: str) -> None:
    w = torch.randn(130, 300)
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.clone().t())
    g = LAYOUTS["transposed"](gradient(w.t(), kind))
    p.grad, q.grad = g.t(), g
    build(rule, [p], backend, channel_dim=1).step()
    build(rule, [q], backend).step()
    assert_identical(p.detach().t(), q.detach())


def test_without_a_test_the_order_of_elements_is_free(backend: str) -> None:
    """A permuted weight without projection is stepped as a flat one, bit for bit."""
    w, g = torch.randn(6, 5, 40, 30), torch.randn(6, 5, 40, 30)
    results = []
    for order in [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)]:
        back = [order.index(d) for d in range(4)]
        p = nn.Parameter(w.permute(order).clone(memory_format=torch.contiguous_format).permute(back))
        p.grad = g.permute(order).contiguous().permute(back)
        build("AdamP", [p], backend, projection="none").step()
        results.append(p.detach())
    for other in results[1:]:
        assert_identical(other, results[0])


def test_gaps_are_not_stepped(backend: str) -> None:
    """Without state and without projection, a weight and a gradient with the same gaps."""
    p = nn.Parameter(with_gaps(torch.randn(33, 200)))
    p.grad = with_gaps(torch.randn(33, 200))
    assert p.grad.stride() == p.stride()
    double = Double("SGDP", p, momentum=0.0, dampening=0.0, projection="none")
    double.step(p.grad)
    build("SGDP", [p], backend, momentum=0.0, dampening=0.0, projection="none").step()
    assert_close(p, double.w, "weight")
