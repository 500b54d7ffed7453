"""state_dtype and rounding: what is kept as what, remainders that lose nothing, rounding that is right on average.

test_backends.py compares single steps with the reference in float64; here is what these options promise.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_refusals import raises
from tolerances import assert_identical
from torch import Tensor, nn
from trajectory import RULES, assert_same_outcome, assert_snapshots_equal, gradient, snapshot

from fused_adamp.precision import ROUNDINGS, join, noise, round_stochastically, split, step_key
from fused_adamp.reference import Decision
from fused_adamp.verify import ADAMP_OPTIONS, SGDP_OPTIONS, lay_out, make_gradient

if TYPE_CHECKING:
    from collections.abc import Callable

    from fused_adamp import SGDP, AdamP

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (F32, {}),
    "float32, bfloat16 state": (F32, {"state_dtype": BF16}),
    "float32, stochastic bfloat16 state": (F32, {"state_dtype": BF16, "rounding": "stochastic"}),
    "bfloat16": (BF16, {}),
    "bfloat16, float32 state": (BF16, {"state_dtype": F32}),
    "bfloat16, stochastic": (BF16, {"rounding": "stochastic"}),
    "bfloat16, stochastic, float32 state": (BF16, {"rounding": "stochastic", "state_dtype": F32}),
    "bfloat16, remainder": (BF16, {"rounding": "remainder"}),
    "bfloat16, remainder, bfloat16 state": (BF16, {"rounding": "remainder", "state_dtype": BF16}),
}
"""Weight dtype and options."""

EVERY_MODE = pytest.mark.parametrize("mode", list(MODES))


def build(rule: str, params: Any, backend: str, **options: Any) -> AdamP | SGDP:
    cls, defaults = RULES[rule]
    return cls(params, **{**defaults, **options}, backend=backend)


def members(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def whole(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """The float32 weight: joined from both halves where there are two."""
    remainder = optimizer.state.get(p, {}).get("remainder")
    return p.detach().float() if remainder is None else join(p.detach(), remainder)


def give(p: Any, g: Tensor) -> None:
    """Hand ``p`` a gradient of whatever dtype."""
    p.grad = None
    p.grad_dtype = g.dtype
    p.grad = g


# Storage: state keys and dtypes.

DTYPES = (F32, F64, BF16, F16)
MOMENTS = {"AdamP": ("exp_avg", "exp_avg_sq"), "SGDP": ("momentum_buffer",)}


def expected_state(rule: str, weight: torch.dtype, state: torch.dtype | None, rounding: str) -> dict[str, torch.dtype]:
    """The table of the requirement: remainder and stochastic act where bfloat16 is written, and nowhere else."""
    remainder = rounding == "remainder" and weight == BF16
    moments = state or (F32 if remainder else weight)
    keys = dict.fromkeys(MOMENTS[rule], moments)
    if rule == "AdamP":
        keys["step"] = F32
    if remainder:
        keys["remainder"] = torch.int16
    if rounding == "stochastic" and BF16 in (weight, moments):
        keys["rounding_seed"] = torch.int64
    return keys


@EVERY_RULE
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("state_dtype", [None, *DTYPES], ids=str)
def test_state_of_a_mixed_group(rule: str, rounding: str, state_dtype: torch.dtype | None, backend: str) -> None:
    """Keys, dtypes and shapes of every weight dtype in one group, before and after a trip through a file."""
    params = [nn.Parameter(torch.randn(3, 5).to(dtype)) for dtype in DTYPES]
    optimizer = build(rule, params, backend, state_dtype=state_dtype, rounding=rounding)
    for trip in (False, True):
        if trip:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = build(rule, params, backend)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            assert optimizer.param_groups[0]["rounding"] == rounding
            assert optimizer.param_groups[0]["state_dtype"] == state_dtype
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for p in params:
            state = optimizer.state[p]
            assert {k: t.dtype for k, t in state.items()} == expected_state(rule, p.dtype, state_dtype, rounding)
            assert all(t.shape == (() if k in ("step", "rounding_seed") else p.shape) for k, t in state.items())
            assert all(t.device == p.device for t in state.values())
            assert p.isfinite().all()


@EVERY_RULE
@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
def test_other_dtypes_of_the_group_stay_plain(rule: str, rounding: str, backend: str) -> None:
    """Bit for bit what they are without the option, in a group with bfloat16 weights."""
    dtypes = (F32, BF16, F64, F16)
    values = [torch.randn(6, 10).to(dtype) for dtype in dtypes]
    runs = [
        build(rule, [nn.Parameter(v.clone()) for v in values], backend, rounding=option)
        for option in (rounding, "nearest")
    ]
    for _ in range(4):
        grads = [torch.randn_like(v) for v in values]
        for optimizer in runs:
            for p, g in zip(members(optimizer), grads, strict=True):
                p.grad = g
            optimizer.step()
    for p, q, dtype in zip(members(runs[0]), members(runs[1]), dtypes, strict=True):
        if dtype == BF16:
            assert set(runs[0].state[p]) - set(runs[1].state[q]) == {
                {"stochastic": "rounding_seed", "remainder": "remainder"}[rounding]
            }
        else:
            assert_identical(p, q)
            assert runs[0].state[p].keys() == runs[1].state[q].keys()
            for name, t in runs[0].state[p].items():
                assert_identical(t, runs[1].state[q][name], name)


@pytest.mark.parametrize(
    ("rounding", "keys"), [("nearest", set()), ("stochastic", {"rounding_seed"}), ("remainder", {"remainder"})]
)
def test_without_momentum_nothing_else_is_kept(rounding: str, keys: set[str], backend: str) -> None:
    params = [nn.Parameter(torch.randn(3, 5).to(dtype)) for dtype in (BF16, F32)]
    optimizer = build("SGDP", params, backend, momentum=0, rounding=rounding)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert [set(optimizer.state.get(p, {})) for p in params] == [keys, set()]


# Bytes.

BYTES: dict[str, tuple[float, float, float, float]] = {
    "float32": (12, 28, 8, 20),
    "float32, bfloat16 state": (8, 20, 6, 16),
    "float32, stochastic bfloat16 state": (8, 20, 6, 16),
    "bfloat16": (6, 14, 4, 10),
    "bfloat16, float32 state": (10, 22, 6, 14),
    "bfloat16, stochastic": (6, 14, 4, 10),
    "bfloat16, stochastic, float32 state": (10, 22, 6, 14),
    "bfloat16, remainder": (12, 26, 8, 18),
    "bfloat16, remainder, bfloat16 state": (8, 18, 6, 14),
}
"""Per parameter: what weight and state take, and what a step that reads everything once moves; AdamP, then SGDP.

The gradient has the weight's dtype. It is read; weight and state are read and written.
"""


@EVERY_RULE
@EVERY_MODE
def test_bytes_per_parameter(rule: str, mode: str, backend: str) -> None:
    """Measured on the storages that the state really holds."""
    dtype, options = MODES[mode]
    p = nn.Parameter(torch.randn(1024, 512).to(dtype))
    p.grad = torch.randn_like(p)
    optimizer = build(rule, [p], backend, **options)
    optimizer.step()
    held = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in optimizer.state[p].values())}
    allocated = sum(held.values())
    weight, moved = BYTES[mode][:2] if rule == "AdamP" else BYTES[mode][2:]
    assert (p.nbytes + allocated) / p.numel() == pytest.approx(weight, abs=1e-3)
    assert (p.grad.nbytes + 2 * (p.nbytes + allocated)) / p.numel() == pytest.approx(moved, abs=1e-3)


# Remainders, by themselves.

PICKED = {
    "zero": 0x00000000,
    "negative zero": 0x80000000,
    "smallest subnormal": 0x00000001,
    "largest subnormal below half a bfloat16": 0x00007FFF,
    "subnormal tie": 0x00008000,
    "negative subnormal tie": 0x80008000,
    "largest subnormal": 0x007FFFFF,
    "smallest normal": 0x00800000,
    "one": 0x3F800000,
    "just above one": 0x3F800001,
    "just below a tie": 0x3F807FFF,
    "tie, even below": 0x3F808000,
    "tie, odd below": 0x3F818000,
    "negative tie": 0xBF808000,
    "just above a tie": 0x3F808001,
    "just below the next exponent": 0x3FFFFFFF,
    "largest bfloat16": 0x7F7F0000,
    "last that rounds to a number": 0x7F7F7FFF,
    "first that rounds to infinity": 0x7F7F8000,
    "largest": 0x7F7FFFFF,
    "most negative": 0xFF7FFFFF,
    "infinity": 0x7F800000,
    "negative infinity": 0xFF800000,
    "signalling NaN": 0x7F800001,
    "NaN": 0x7FC00000,
    "negative NaN": 0xFFC00000,
    "NaN of all bits": 0xFFFFFFFF,
}


def floats(bits: list[int] | Tensor) -> Tensor:
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(F32)


def patterns() -> Tensor:
    """Every upper half of a float32 with lower halves from all parts of their range: 65536 x 12."""
    low = torch.tensor([0, 1, 2, 0x3FFF, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xC000, 0xFFFE, 0xFFFF])
    return floats((torch.arange(1 << 16)[:, None] << 16) + low)


def check_split(w: Tensor) -> None:
    high, low = split(w)
    assert high.dtype == BF16
    assert low.dtype == torch.int16
    joined = join(high, low)
    nan = w.isnan()
    assert_identical(joined[~nan], w[~nan])
    assert (joined[nan].view(torch.int32) == 0x7FC00000).all()
    # The bfloat16 is as near as torch's, and differs from it in ties alone: there it is the one further from zero.
    finite = w.isfinite()
    x, ours, torchs = w[finite], high[finite], w[finite].bfloat16()
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert_identical(ours[~tie], torchs[~tie])
    bits = ours[tie].view(torch.int16).int() & 0x7FFF
    assert torch.equal(bits, (x[tie].view(torch.int32) >> 16 & 0x7FFF) + 1)
    assert torch.equal(ours.signbit(), x.signbit())
    assert_identical(high[w.isinf()], w[w.isinf()].bfloat16())


@pytest.mark.parametrize("bits", list(PICKED.values()), ids=list(PICKED))
def test_split_of_picked_numbers(bits: int) -> None:
    check_split(floats([bits]))


def test_split_of_every_upper_half() -> None:
    check_split(patterns().flatten())


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=50))
def test_split_of_drawn_bits(bits: list[int]) -> None:
    check_split(floats(bits))
    check_split(floats(bits).repeat(2, 1).t())  # of a strided tensor


@EVERY_RULE
def test_a_step_of_no_length_keeps_every_float(rule: str, backend: str) -> None:
    """The backends' own split and join: lr=0 leaves every finite number's weight and remainder as they are."""
    w = patterns()
    w = w[w.isfinite().all(dim=1)]
    high, low = split(w)
    p = nn.Parameter(torch.zeros_like(high))
    optimizer = build(rule, [p], backend, lr=0, rounding="remainder")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.data.copy_(high)
    optimizer.state[p]["remainder"].copy_(low)
    optimizer.step()
    assert_identical(p, high)
    assert_identical(optimizer.state[p]["remainder"], low)


# Remainders: the float32 run.


def twins(rule: str, values: list[Tensor], layout: str, backend: str, **options: Any) -> list[AdamP | SGDP]:
    """An optimizer of bfloat16 weights with remainders, and one of float32 weights of the same values and strides."""
    options = {"rounding": "remainder"} | options
    fitting = [layout if layout != "channels_last" or v.ndim == 4 else "contiguous" for v in values]
    return [
        build(rule, [nn.Parameter(lay_out(v.bfloat16().to(dtype), f)) for v, f in zip(values, fitting, strict=True)],
              backend, **(options if dtype == BF16 else {k: o for k, o in options.items() if k != "rounding"}))
        for dtype in (BF16, F32)
    ]  # fmt: skip


GRADIENTS = [(d, late) for late in (False, True) for d in Decision if not late or d is not Decision.CHANNEL]
"""Decisions, with and without first rows that mislead a guess from them."""


def train_twins(
    runs: list[AdamP | SGDP], steps: int, max_norm: float | None = None, layout: str = "contiguous"
) -> set[Any]:
    """Steps both on the same gradients and compares after each. Returns the decisions."""
    half, full = runs
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for t in range(steps):
        for i, (p, q) in enumerate(zip(members(half), members(full), strict=True)):
            decision, late = GRADIENTS[(t + i) % len(GRADIENTS)]
            g = make_gradient(q.detach().contiguous(), decision, generator, late=late)
            g = lay_out(g.to(F32 if t % 2 else BF16), layout)
            give(p, g)
            give(q, g.float())
        if max_norm is not None:
            norms = [optimizer.clip_grad_norm_(max_norm) for optimizer in runs]
            assert_identical(norms[0], norms[1].to(norms[0].dtype), "norm")
        for optimizer in runs:
            optimizer.step()
        for p, q in zip(members(half), members(full), strict=True):
            check_twin(half, p, full, q)
            seen.add(half.decisions()[p])
            assert half.decisions()[p] is full.decisions()[q]
    return seen


def check_twin(half: Any, p: Tensor, full: Any, q: Tensor) -> None:
    assert q.isfinite().all()
    assert_identical(whole(half, p), q.detach(), "weight")
    for name, t in full.state[q].items():
        assert_identical(half.state[p][name], t, name)
    assert set(half.state[p]) == {*full.state[q], "remainder"}
    away = (p.detach().double() - q.detach().double()).abs()
    assert (away <= (q.detach().bfloat16().double() - q.detach().double()).abs()).all(), "not the nearest bfloat16"


TILE = 32768
TWINS = {
    "small": [(37,), (), (12, 20), (16, 8, 3, 3), (1, 300), (40, 3), (0, 5)],
    "many tiles": [(TILE + 1,), (42, 1111), (130, 512), (8, 64, 9, 9)],
    "rows wider than a tile": [(2, TILE + 1), (1, 2 * TILE + 5)],
    "short rows": [(5 * TILE // 8, 2)],
}
"""Every plan of the CPU: untested, one tile, speculative with right and wrong guesses, split."""


SHORT_AND_LONG = pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.exhaustive)])
"""In ten steps every kind of gradient comes in both dtypes."""


@EVERY_RULE
@SHORT_AND_LONG
@pytest.mark.parametrize("shapes", list(TWINS))
def test_remainder_is_the_float32_run(rule: str, shapes: str, steps: int, backend: str) -> None:
    """Steps on gradients in bfloat16 and float32 in turn, bit for bit: weights, moments, decisions."""
    runs = twins(rule, [torch.randn(shape) for shape in TWINS[shapes]], "contiguous", backend)
    assert train_twins(runs, steps) == set(Decision)


@EVERY_RULE
@SHORT_AND_LONG
@pytest.mark.parametrize("gradient_layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps", "offset"])
def test_remainder_in_every_layout(rule: str, layout: str, gradient_layout: str, steps: int, backend: str) -> None:
    """Tiles that are gathered: the same as the float32 run in the same strides."""
    values = [torch.randn(shape) for shape in ((12, 20), (16, 8, 3, 3), (40, 830), (600, 3))]
    runs = twins(rule, values, layout, backend)
    assert train_twins(runs, steps, layout=gradient_layout) == set(Decision)


@EVERY_RULE
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_remainder_where_no_kernel_reads_16_bits(rule: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX2, blocks are converted before the kernels and after."""
    monkeypatch.setenv("FUSED_ADAMP_CPU", "baseline")
    runs = twins(rule, [torch.randn(shape) for shape in ((12, 20), (40, 830), (600, 3))], layout, "cpu")
    assert train_twins(runs, 10) == set(Decision)


VARIANTS = [("AdamP", options) for options in ADAMP_OPTIONS] + [("SGDP", options) for options in SGDP_OPTIONS]


@SHORT_AND_LONG
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize(("rule", "options"), VARIANTS, ids=str)
def test_remainder_with_every_option(
    rule: str, options: dict[str, Any], max_norm: float | None, steps: int, backend: str
) -> None:
    """Large steps among them, where rows shrink by more than half and the sweep does not dare; clipped and not."""
    runs = twins(rule, [torch.randn(12, 20), torch.randn(42, 830)], "contiguous", backend, **options)
    train_twins(runs, steps if options["lr"] < 1 else 10, max_norm)


@EVERY_RULE
@SHORT_AND_LONG
def test_remainder_beside_bfloat16_state(rule: str, steps: int, backend: str) -> None:
    """The weight is that of a float32 run whose state is bfloat16."""
    values = [torch.randn(shape) for shape in ((12, 20), (42, 830), (37,))]
    assert train_twins(twins(rule, values, "contiguous", backend, state_dtype=BF16), steps) == set(Decision)


@EVERY_RULE
def test_remainder_with_loss_scaling(rule: str, backend: str) -> None:
    """Unscaled as read; and a step with an infinity in it moves nothing."""
    runs = twins(rule, [torch.randn(12, 20)], "contiguous", backend)
    for t in range(6):
        before = snapshot(runs[0])
        g = torch.randn(12, 20).bfloat16()
        for optimizer in runs:
            (p,) = members(optimizer)
            p.grad = g.to(p.dtype)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor([3.0]), torch.tensor([float(t == 3)])
            optimizer.step()
        if t == 3:
            assert_snapshots_equal(snapshot(runs[0]), before)
        check_twin(runs[0], members(runs[0])[0], runs[1], members(runs[1])[0])


@EVERY_RULE
@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_remainder_of_broken_numbers(rule: str, where: str, backend: str) -> None:
    """NaN and infinity spread as in the float32 run, and no further; large and tiny weights come through."""
    special = [math.nan, math.inf, -math.inf, 3.3895e38, -3.3895e38, 1e-40, -1e-40, 0.0, -0.0]
    runs = twins(rule, [torch.randn(40, len(special)), torch.randn(len(special))], "contiguous", backend)
    for t in range(4):
        for p, q in zip(members(runs[0]), members(runs[1]), strict=True):
            g = torch.randn(p.shape).bfloat16()
            if where == "gradient" and t == 1:
                g[..., 0] = math.nan
                g[..., 1] = math.inf
            if where == "weight" and t == 0:
                p.data[..., :] = q.data[..., :] = torch.tensor(special).bfloat16()
            give(p, g)
            give(q, g.float())
        for optimizer in runs:
            optimizer.step()
        for p, q in zip(members(runs[0]), members(runs[1]), strict=True):
            joined, expected = whole(runs[0], p), q.detach()
            assert torch.equal(joined.isnan(), expected.isnan())
            assert_identical(joined.nan_to_num(7.0), expected.nan_to_num(7.0))
            assert (p.detach()[p.isnan()].view(torch.int16) == 0x7FC0).all()
            assert runs[0].decisions()[p] is runs[1].decisions()[q]
    assert members(runs[0])[1].isfinite().any()


@EVERY_RULE
def test_weights_that_are_set_to_zero_stay_finite(rule: str, backend: str) -> None:
    """Pruning writes zeros into the weights: what is left in the remainders must not make NaNs of them."""
    p = nn.Parameter(torch.randn(16, 16).bfloat16())
    optimizer = build(rule, [p], backend, rounding="remainder")
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        with torch.no_grad():
            p.mul_(torch.randn_like(p) > 0)
    assert p.isfinite().all()


# Stochastic rounding, by itself.


@pytest.mark.parametrize(
    "bits", [0x3F800000, 0x3F800001, 0x3F804000, 0xBF80C000, 0x3FFFFFFF, 0x00000123, 0x7F7F1234, 0x80008001]
)
def test_every_random_number_once_gives_the_value(bits: int) -> None:
    """As many of all 16-bit numbers round away from zero as the lower half says: the mean is the value."""
    up = round_stochastically(floats([bits]).expand(1 << 16), torch.arange(1 << 16)).view(torch.int16).int() & 0xFFFF
    assert torch.equal(
        up.sort().values.unique(), torch.tensor([bits >> 16, (bits >> 16) + 1][: 1 + (bits & 0xFFFF > 0)]).int()
    )
    assert int((up == (bits >> 16) + 1).sum()) == bits & 0xFFFF


@EVERY_RULE
def test_what_bfloat16_holds_is_never_rounded(rule: str, backend: str) -> None:
    """All finite bfloat16 numbers through a step of no length; NaN stays NaN and infinity infinity in the rounding."""
    w = torch.arange(1 << 16).to(torch.int16).view(BF16)
    w = w[w.isfinite()].reshape(-1, 32)
    p = nn.Parameter(w.clone())
    optimizer = build(rule, [p], backend, lr=0, rounding="stochastic")
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_identical(p, w)
    broken = torch.tensor([math.inf, -math.inf, math.nan]).repeat(1000)
    rounded = round_stochastically(broken, torch.randint(1 << 16, broken.shape))
    assert torch.equal(rounded.view(torch.int16), torch.tensor([0x7F80, -0x80, 0x7FC0]).repeat(1000).short())


def test_noise_is_uniform_and_uncorrelated() -> None:
    """Between the streams of a parameter, its next steps, other parameters, and neighbours at any distance."""
    n = 1 << 16
    seeds = [1, 2, 3, 12345, 12346, 1 << 40, (1 << 62) - 1]
    drawn = torch.stack([noise(seed, torch.arange(n), stream) for seed in seeds for stream in range(3)])
    assert drawn.min() >= 0
    assert drawn.max() < 1 << 16
    for bits in (drawn >> 8, drawn & 0xFF):  # chi square of 256 bins, 255 +- 22.6
        counts = torch.stack([row.bincount(minlength=256) for row in bits]).double()
        chi = ((counts - n / 256) ** 2 / (n / 256)).sum(dim=1)
        assert (chi - 255).abs().max() < 5 * 22.6
    unit = (drawn.double() - 32767.5) / (65536 / math.sqrt(12))
    assert unit.mean(dim=1).abs().max() < 5 / math.sqrt(n)
    correlation = unit @ unit.T / n - torch.eye(len(unit))
    assert correlation.abs().max() < 6 / math.sqrt(n)
    for lag in (1, 2, 3, 7, 8, 16, 64, 100, 256, 1000, 1024, 4096, 12288, 32768):
        # A hash of two rounds leaves its upper half a correlation of up to 0.05 between elements 4096 k apart (over 300
        # seeds; 0.01 elsewhere). Nothing adds up: the sums of blocks below spread like those of independent numbers.
        bound = 0.1 if lag % 4096 == 0 else 5 / math.sqrt(n - lag)
        assert (unit[:, lag:] * unit[:, :-lag]).mean(dim=1).abs().max() < bound
    for block in (16, 256, 4096, 16384):
        means = unit.reshape(-1, block).mean(dim=1) * math.sqrt(block)
        assert abs(means.var() - 1) < 5 * math.sqrt(2 / len(means))
    odd = (drawn & 1).double() * 2 - 1  # the least bit, which decides between values next to a bfloat16
    assert (odd @ odd.T / n - torch.eye(len(odd))).abs().max() < 6 / math.sqrt(n)


def test_noise_of_seed_0() -> None:
    """Nobody draws it, but it is the seed that somebody writes into a state first."""
    streams = [noise(0, torch.arange(4096), stream) for stream in range(3)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert int((streams[i] == streams[j]).sum()) < 10
    assert all(len(stream[:16].unique()) > 8 for stream in streams)


def test_keys_of_steps_differ() -> None:
    keys = [step_key(seed) for seed in range(10_000)]
    assert len({low for low, _ in keys}) > 9_990
    assert len({high for _, high in keys}) > 9_990


# Stochastic rounding, in the optimizer.

N = 100_000
STEP: dict[str, dict[str, Any]] = {
    "AdamP": {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0, "delta": 0},
    "SGDP": {"momentum": 0, "dampening": 0, "weight_decay": 0, "delta": 0},
}
"""With gradients of +-1 the weight moves by lr: AdamP divides the gradient by its magnitude."""


def moves(optimizer: Any, p: Any, sign: float) -> None:
    p.grad = torch.full_like(p, -sign)
    optimizer.step()


def z_score(values: Tensor, expected: float, ulp: float) -> float:
    """How many standard deviations the mean of values, each rounded at random to a multiple of ulp, is off."""
    fraction = abs(expected) / ulp % 1
    return float(values.double().mean() - expected) / (ulp * math.sqrt(fraction * (1 - fraction) / values.numel()))


@EVERY_RULE
@pytest.mark.parametrize("fraction", [1 / 256, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("sign", [1, -1])
def test_mean_of_100_000_roundings(rule: str, fraction: float, sign: int, backend: str) -> None:
    """One step of 100,000 weights from 1.5 to a number between two bfloat16: only those two come out, in proportion."""
    ulp = 2.0**-7
    p = nn.Parameter(torch.full((N,), 1.5 * sign, dtype=BF16))
    optimizer = build(rule, [p], backend, **STEP[rule], lr=fraction * ulp, rounding="stochastic")
    moves(optimizer, p, sign)
    expected = (torch.tensor(1.5) + torch.tensor(fraction * ulp)).item() * sign
    assert p.unique().tolist() == sorted([1.5 * sign, (1.5 + ulp) * sign])
    assert abs(z_score(p.detach(), expected, ulp)) < 4


@EVERY_RULE
def test_mean_over_steps(rule: str, backend: str) -> None:
    """The same over 100 steps of 1,000 weights, each from 1.5: the steps' noise is unbiased too, and uncorrelated."""
    ulp, steps = 2.0**-7, 100
    p = nn.Parameter(torch.empty(N // steps, dtype=BF16))
    optimizer = build(rule, [p], backend, **STEP[rule], lr=ulp / 2, rounding="stochastic")
    rounded = []
    for _ in range(steps):
        p.data.fill_(1.5)
        moves(optimizer, p, 1)
        rounded.append(p.detach().double())
    up = torch.stack(rounded)
    assert abs(z_score(up, 1.5 + ulp / 2, ulp)) < 4
    up = (up - 1.5) / ulp * 2 - 1
    assert (up @ up.T / p.numel() - torch.eye(steps)).abs().max() < 5.5 / math.sqrt(p.numel())
    assert (up.T @ up / steps - torch.eye(p.numel())).abs().max() < 7 / math.sqrt(steps)


@EVERY_RULE
@pytest.mark.parametrize("weight", [F32, BF16], ids=str)
def test_mean_of_moments(rule: str, weight: torch.dtype, backend: str) -> None:
    """Each moment is unbiased too; and where one goes up says nothing about the others and the weight."""
    g = 1.0 + 2.0**-8 + 2.0**-12
    own: dict[str, Any] = {"AdamP": {"betas": (0.5, 0.75)}, "SGDP": {"momentum": 0.5}}[rule]
    p = nn.Parameter(torch.full((N,), 1.5, dtype=weight))
    options = STEP[rule] | own | {"state_dtype": BF16, "rounding": "stochastic", "lr": 2.0**-8}
    optimizer = build(rule, [p], backend, **options)
    give(p, torch.full((N,), g))
    optimizer.step()
    expected = {"exp_avg": 0.5 * g, "exp_avg_sq": 0.25 * g * g, "momentum_buffer": g}
    ups: list[Tensor] = []
    for name in MOMENTS[rule]:
        moment = optimizer.state[p][name]
        value = torch.tensor(expected[name], dtype=F32).item()
        ulp = 2.0 ** (math.floor(math.log2(value)) - 7)
        assert abs(z_score(moment, value, ulp)) < 4
        ups.append(moment)
    if weight == BF16:
        ups.append(p.detach())
    assert all(len(x.unique()) == 2 for x in ups)
    correlation = torch.stack(ups).double().corrcoef() if len(ups) > 1 else torch.eye(1)
    assert (correlation - torch.eye(len(ups))).abs().max() < 4 / math.sqrt(N)


@EVERY_RULE
def test_parameters_are_uncorrelated(rule: str, backend: str) -> None:
    params = [nn.Parameter(torch.full((N // 5,), 1.5, dtype=BF16)) for _ in range(5)]
    optimizer = build(rule, params, backend, **STEP[rule], lr=2.0**-8, rounding="stochastic")
    for p in params:
        p.grad = torch.full_like(p, -1)
    optimizer.step()
    assert len({int(optimizer.state[p]["rounding_seed"]) for p in params}) == len(params)
    correlation = torch.stack([p.detach().double() for p in params]).corrcoef()
    assert (correlation - torch.eye(len(params))).abs().max() < 4 / math.sqrt(N // 5)


@EVERY_RULE
def test_vanishing_updates(rule: str, backend: str) -> None:
    """Steps that are far below the distance to the next bfloat16: lost, right on average, and right."""
    steps, n, lr, ulp = 100, 2_000, 1e-4, 2.0**-8  # below 1.0
    moved = {}
    full = nn.Parameter(torch.ones(n))
    for rounding in (*ROUNDINGS, None):
        p = full if rounding is None else nn.Parameter(torch.ones(n, dtype=BF16))
        optimizer = build(rule, [p], backend, **STEP[rule], lr=lr, **({"rounding": rounding} if rounding else {}))
        for _ in range(steps):
            moves(optimizer, p, -1)
        moved[rounding] = whole(optimizer, p)
    assert (moved["nearest"] == 1).all()
    assert_identical(moved["remainder"], moved[None])
    assert moved[None].double().mean().item() == pytest.approx(1 - steps * lr, abs=1e-5)
    fraction = lr / ulp
    deviation = ulp * math.sqrt(steps * fraction * (1 - fraction) / n)
    assert abs(moved["stochastic"].double().mean().item() - (1 - steps * lr)) < 4 * deviation


def run_stochastic(rule: str, backend: str, seed: int, steps: int = 4) -> AdamP | SGDP:
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.ones(shape, dtype=BF16)) for shape in ((20, 10), (30,))]
    optimizer = build(rule, params, backend, rounding="stochastic")
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()
    return optimizer


@EVERY_RULE
def test_the_seed_decides(rule: str, backend: str) -> None:
    """torch.manual_seed before the first step gives the same run again, bit for bit, and another seed another run."""
    first, same, other = (run_stochastic(rule, backend, seed) for seed in (3, 3, 4))
    assert_same_outcome(first, same)
    for p, q in zip(members(first), members(other), strict=True):
        assert not torch.equal(p, q)
        for name in MOMENTS[rule]:
            assert not torch.equal(first.state[p][name], other.state[q][name])


@EVERY_RULE
def test_the_seed_counts_steps(rule: str, backend: str) -> None:
    """One more with every step that the parameter takes; not without a gradient, nor where an infinity was found."""
    params = [nn.Parameter(torch.ones(6, 5, dtype=BF16)) for _ in range(3)]
    optimizer = build(rule, params, backend, rounding="stochastic")

    def step(*with_gradient: int, inf: bool = False) -> list[int]:
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if i in with_gradient else None
        optimizer.found_inf = torch.tensor([float(inf)])
        optimizer.step()
        return [int(optimizer.state[p]["rounding_seed"]) for p in params]

    first = step(0, 1, 2)
    assert step(0, 1, 2) == [seed + 1 for seed in first]
    before = snapshot(optimizer)
    assert step(0, 1, 2, inf=True) == [seed + 1 for seed in first]
    assert_snapshots_equal(snapshot(optimizer), before)
    assert step(1) == [first[0] + 1, first[1] + 2, first[2] + 1]
    assert step(0, 1, 2) == [first[0] + 2, first[1] + 3, first[2] + 2]
    for p in params:
        seed = optimizer.state[p]["rounding_seed"]
        assert seed.dtype == torch.int64
        assert seed.shape == ()


# Numbers for which every backend's float32 arithmetic is the same: factors that are powers of two; for AdamP a second
# moment whose root is the gradient's magnitude, so that no two operations of one rounding each can be fused into one.
EXACT: dict[str, dict[str, Any]] = {
    "AdamP": {"lr": 2.0**-5, "betas": (0.5, 0.0), "eps": 0.0, "weight_decay": 0, "projection": "none"},
    "SGDP": {"lr": 2.0**-5, "momentum": 0.5, "dampening": 0, "weight_decay": 0, "projection": "none"},
}


def run_exactly(
    rule: str, backend: str, value: Tensor, layout: str, seed: int, dtype: torch.dtype, **options: Any
) -> tuple[Any, Any]:
    torch.manual_seed(5)
    p = nn.Parameter(lay_out(value.to(dtype), layout))
    optimizer = build(rule, [p], backend, **EXACT[rule], rounding="stochastic", **options)
    generator = torch.Generator().manual_seed(0)
    for t in range(4):
        g = torch.randn(p.shape, generator=generator)
        give(p, (g + g.sign() * 2.0**-10).to(dtype))
        optimizer.step()
        if t == 0:
            optimizer.state[p]["rounding_seed"].fill_(seed)
    return optimizer, p


SAME_BITS = [
    ((37,), "contiguous"),
    ((), "contiguous"),
    ((12, 21), "contiguous"),
    ((12, 21), "transposed"),
    ((12, 21), "gaps"),
    ((12, 21), "offset"),
    ((6, 4, 3, 5), "contiguous"),
    ((6, 4, 3, 5), "transposed"),
    ((6, 4, 3, 5), "channels_last"),
    ((TILE + 1,), "contiguous"),
    ((70, 500), "contiguous"),
    ((70, 500), "transposed"),
    ((2, TILE + 3), "contiguous"),
]


@EVERY_RULE
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("shape", "layout"), SAME_BITS, ids=str)
def test_every_backend_takes_the_same_chances(
    rule: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, backend: str
) -> None:
    """Noise goes by an element's number, row by row, in every layout: where arithmetic agrees, so does the rest."""
    value, runs = torch.randn(shape), []
    for name in (backend, "reference"):
        runs.append(run_exactly(rule, name, value, layout, 1 << 33, dtype, state_dtype=BF16))
    (ours, p), (theirs, q) = runs
    for name in MOMENTS[rule]:
        assert_identical(ours.state[p][name], theirs.state[q][name], name)
    assert_identical(p, q)
    assert_identical(ours.state[p]["rounding_seed"], theirs.state[q]["rounding_seed"])


@EVERY_RULE
@pytest.mark.parametrize("channel_dim", [1, -1, (0, 1)], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5), (5, 60, 130)], ids=str)
def test_every_backend_takes_the_same_chances_for_other_channels(
    rule: str, shape: tuple[int, ...], channel_dim: int | tuple[int, ...], backend: str
) -> None:
    value = torch.randn(shape)
    results = [
        run_exactly(rule, name, value, "contiguous", 77, BF16, channel_dim=channel_dim)[1]
        for name in (backend, "reference")
    ]
    assert_identical(*results)


@EVERY_RULE
def test_every_backend_takes_the_same_chances_from_any_seed(rule: str, backend: str) -> None:
    value = torch.randn(5, 7)

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, (1 << 62) - 1))
    def compare(seed: int) -> None:
        results = []
        for name in (backend, "reference"):
            results.append(run_exactly(rule, name, value, "contiguous", seed, BF16)[1])
        assert_identical(*results)

    compare()


@EVERY_RULE
def test_chances_do_not_depend_on_the_number_of_threads(rule: str, backend: str) -> None:
    value, results = torch.randn(130, 512), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run_exactly(rule, backend, value, "contiguous", 9, BF16)[1])
    assert_identical(*results)


# Restart.


def through_file(optimizer: Any, make: Callable[[Any], Any]) -> Any:
    """Weights and state_dict through torch.save, into parameters and an optimizer that are new."""
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in members(optimizer)], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    new = make([nn.Parameter(w) for w in loaded["weights"]])
    new.load_state_dict(loaded["optimizer"])
    return new


def through_state_dict(optimizer: Any, make: Callable[[Any], Any]) -> Any:
    new = make([nn.Parameter(p.detach().clone()) for p in members(optimizer)])
    new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return new


TRIPS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "file": through_file,
    "state_dict": through_state_dict,
    "deepcopy": lambda optimizer, make: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, make: pickle.loads(pickle.dumps(optimizer)),
}
STEPS = 5


def clipped_step(optimizer: Any, t: int) -> None:
    """Step t of a run in which gradients are clipped, some are missing, and GradScaler finds an infinity once."""
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(members(optimizer)):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if t == 0 or (i + t) % 4 else None
    optimizer.clip_grad_norm_(0.3 + t)
    optimizer.found_inf = torch.tensor([float(t == 2)])
    optimizer.step()


def check_restarts(rule: str, backend: str, params: list[nn.Parameter], options: dict[str, Any]) -> None:
    """Restarts from every step in every way; into an optimizer that was given no options, where one is made."""
    optimizer = build(rule, params, backend, **options)
    restarted = []
    for t in range(STEPS):
        if t:
            trips = TRIPS.values()
            restarted += [(t, trip(optimizer, lambda params: build(rule, params, backend))) for trip in trips]
        before = snapshot(optimizer)
        clipped_step(optimizer, t)
        moved = any(not torch.equal(p, w) for p, w in zip(params, before["weights"], strict=True))
        assert moved is (t != 2)
    for t, other in restarted:
        for later in range(t, STEPS):
            clipped_step(other, later)
        assert_same_outcome(other, optimizer)


@EVERY_RULE
@EVERY_MODE
def test_restart_from_any_step_is_exact(rule: str, mode: str, backend: str) -> None:
    """Weights, moments, remainders and seeds, bit for bit, with clipping in the loop."""
    dtype, options = MODES[mode]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 10), (70, 470), (9,), (4, 3, 2, 2))]
    check_restarts(rule, backend, params, options)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_restart_without_momentum_is_exact(rounding: str, backend: str) -> None:
    params = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((6, 10), (9,))]
    check_restarts("SGDP", backend, params, {"momentum": 0, "rounding": rounding})


@EVERY_RULE
def test_restart_before_a_parameter_has_taken_part(rule: str, backend: str) -> None:
    """Its seed is drawn after the restart, at its first gradient: from torch's generator, which the run restores."""
    results = []
    for restart in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.ones(6, 5, dtype=BF16)) for _ in range(2)]
        optimizer = build(rule, params, backend, rounding="stochastic")
        for t in range(4):
            if t == 2 and restart:
                state = torch.get_rng_state()
                optimizer = through_file(optimizer, lambda params: build(rule, params, backend))
                torch.set_rng_state(state)
            first, second = members(optimizer)
            first.grad = torch.full_like(first, 0.3)
            second.grad = torch.full_like(second, 0.3) if t >= 2 else None
            optimizer.step()
        results.append(optimizer)
    assert_same_outcome(*results)


@EVERY_RULE
def test_restart_draws_no_random_numbers(rule: str, backend: str) -> None:
    """A resumed run finds torch's generator as an uninterrupted one does, or its dropout masks would be others."""
    optimizer = run_stochastic(rule, backend, 0)
    states = []
    for other in (optimizer, through_state_dict(optimizer, lambda params: build(rule, params, backend))):
        torch.manual_seed(1)
        for p in members(other):
            p.grad = torch.ones_like(p)
        other.step()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@EVERY_RULE
def test_float32_weights_draw_no_random_numbers(rule: str, backend: str) -> None:
    """An option that has no effect has none on the generator."""
    before = torch.get_rng_state()
    optimizer = build(rule, [nn.Parameter(torch.ones(3, 4))], backend, rounding="stochastic")
    members(optimizer)[0].grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


# Options that change between steps.

BF16_MODES = [mode for mode, (dtype, _) in MODES.items() if dtype == BF16]
DEFAULTS = {"state_dtype": None, "rounding": "nearest"}


@EVERY_RULE
@pytest.mark.parametrize("new", BF16_MODES)
@pytest.mark.parametrize("old", BF16_MODES)
def test_change_of_mode(rule: str, old: str, new: str, backend: str) -> None:
    """After a change of mode, the next step equals that of a new optimizer that is given weight and state.

    That is the weight (with its remainder if both modes have one), the moments in the dtype that the group names, or
    unchanged if it names none, and a seed.
    """
    params = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((6, 10), (9,))]
    optimizer = build(rule, params, backend, **MODES[old][1])
    for t in range(3):
        clipped_step(optimizer, t)
    options = DEFAULTS | MODES[new][1]
    other = build(rule, [nn.Parameter(p.detach().clone()) for p in params], backend, **options)
    for p, q in zip(params, members(other), strict=True):
        keys = expected_state(rule, BF16, options["state_dtype"], options["rounding"])
        state = optimizer.state[p]
        kept = {} if options["state_dtype"] else {name: t.dtype for name, t in state.items()}
        dtypes = {name: kept.get(name, dtype) for name, dtype in keys.items()}
        other.state[q] = {name: state[name].to(dtype, copy=True) for name, dtype in dtypes.items() if name in state}
    optimizer.param_groups[0].update(options)
    for t in range(3, 6):
        for run in (optimizer, other):
            torch.manual_seed(t)
            clipped_step(run, t)
    for p, q in zip(params, members(other), strict=True):
        assert_identical(p, q, "weight")
        for name, t in other.state[q].items():
            assert_identical(optimizer.state[p][name], t, name)


@EVERY_RULE
@pytest.mark.parametrize("between", ["nearest", "stochastic"])
def test_remainder_off_and_on_again(rule: str, between: str, backend: str) -> None:
    """It goes on from the weight as it stands then, not from that plus what was left over before it moved on."""
    p = nn.Parameter(torch.randn(12, 20).bfloat16())
    optimizer = build(rule, [p], backend, rounding="remainder")
    for rounding in ("remainder", between):
        optimizer.param_groups[0]["rounding"] = rounding
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
    weight = p.detach().float()
    optimizer.param_groups[0].update(rounding="remainder", lr=0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert_identical(whole(optimizer, p), weight)


@EVERY_RULE
def test_stochastic_off_and_on_again(rule: str, backend: str) -> None:
    """The seed is kept meanwhile and goes on: no noise is used twice."""
    p = nn.Parameter(torch.ones(6, 5, dtype=BF16))
    optimizer = build(rule, [p], backend, rounding="stochastic")
    seeds = []
    for rounding in ("stochastic", "nearest", "stochastic"):
        optimizer.param_groups[0]["rounding"] = rounding
        p.grad = torch.randn_like(p)
        optimizer.step()
        seeds.append(int(optimizer.state[p]["rounding_seed"]))
    assert seeds == [seeds[0], seeds[0], seeds[0] + 1]


@EVERY_RULE
def test_change_of_mode_moves_no_other_group(rule: str, backend: str) -> None:
    """Buckets are made anew for the group that has changed; the others' weights and state are what they would be."""
    runs = []
    for change in (False, True):
        torch.manual_seed(0)
        groups = [{"params": [nn.Parameter(torch.randn(6, 10).bfloat16())]} for _ in range(3)]
        optimizer = build(rule, groups, backend, rounding="stochastic")
        for t in range(4):
            if change and t == 2:
                optimizer.param_groups[1].update(rounding="remainder", state_dtype=F32)
            clipped_step(optimizer, 4 * t + 1)
        runs.append(optimizer)
    for i, (p, q) in enumerate(zip(members(runs[0]), members(runs[1]), strict=True)):
        assert torch.equal(p, q) is (i != 1)
        if i != 1:
            for name, t in runs[0].state[p].items():
                assert_identical(runs[1].state[q][name], t, name)


# Loading what was saved with other options.


def started(rule: str, backend: str, dtype: torch.dtype = BF16, **options: Any) -> Any:
    optimizer = build(rule, [nn.Parameter(torch.randn(6, 10).to(dtype))], backend, **options)
    for t in (1, 2, 3):
        clipped_step(optimizer, t)
    return optimizer


@EVERY_RULE
@pytest.mark.parametrize("source", ["ours", "ours before there were these options"])
def test_checkpoint_without_remainder(rule: str, source: str, backend: str) -> None:
    """Options come from the checkpoint where it has them, as in torch, and stay where it has not. In either case a
    remainder starts at nothing: the run goes on as float32 from the bfloat16 weights.
    """
    optimizer = started(rule, backend)
    saved = copy.deepcopy(optimizer.state_dict())
    if source != "ours":
        for name in ("state_dtype", "rounding", "projection", "channel_dim"):
            del saved["param_groups"][0][name]
    (p,) = members(optimizer)
    half = build(rule, [nn.Parameter(p.detach().clone())], backend, rounding="remainder", state_dtype=F32)
    half.load_state_dict(saved)
    (group,) = half.param_groups
    assert group["rounding"] == ("nearest" if source == "ours" else "remainder")
    group.update(rounding="remainder", state_dtype=F32)
    full = build(rule, [nn.Parameter(p.detach().float())], backend)
    (q,) = full.param_groups[0]["params"]
    full.state[q] = {name: t.float() for name, t in optimizer.state[p].items()}
    train_twins([half, full], 5)


@EVERY_RULE
@pytest.mark.parametrize(
    ("old", "new"), [(F32, BF16), (BF16, F32), (F32, F64), (F16, F32), (F64, BF16), (F32, F16)], ids=str
)
def test_state_keeps_the_dtype_it_was_saved_in(rule: str, old: torch.dtype, new: torch.dtype, backend: str) -> None:
    """Weights that became another dtype since: the state is what it was, and the group says so from then on."""
    source = started(rule, backend, old)
    (p,) = members(source)
    optimizer = build(rule, [nn.Parameter(p.detach().to(new))], backend)
    told = build(rule, [nn.Parameter(p.detach().to(new))], backend, state_dtype=old)
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["state_dtype"] == old
    told.state[members(told)[0]] = {name: t.clone() for name, t in source.state[p].items()}
    for t in (1, 2, 3):
        for run in (optimizer, told):
            clipped_step(run, t)
            state = run.state[members(run)[0]]
            assert {state[name].dtype for name in MOMENTS[rule]} == {old}
        again = build(rule, [nn.Parameter(members(optimizer)[0].detach().clone())], backend)
        again.load_state_dict(optimizer.state_dict())
        optimizer = again
    assert_same_outcome(optimizer, told)


@EVERY_RULE
def test_state_keeps_its_dtypes_where_they_differ_within_a_group(rule: str, backend: str) -> None:
    """One weight was float32 when it was saved and the other bfloat16; both are bfloat16 now. Nothing gets narrower."""
    source = build(rule, [nn.Parameter(torch.randn(6, 10).to(dtype)) for dtype in (F32, BF16)], backend)
    clipped_step(source, 1)
    clipped_step(source, 2)
    optimizer = build(rule, [nn.Parameter(p.detach().bfloat16()) for p in members(source)], backend)
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    clipped_step(optimizer, 1)
    clipped_step(optimizer, 2)
    first, second = ({optimizer.state[p][name].dtype for name in MOMENTS[rule]} for p in members(optimizer))
    assert first == {F32}
    assert second in ({BF16}, {F32})


@EVERY_RULE
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loading_changes_no_option(rule: str, dtype: torch.dtype, rounding: str, backend: str) -> None:
    """State in the dtype that it has by default is no reason to name one."""
    source = started(rule, backend, dtype, rounding=rounding)
    (p,) = members(source)
    optimizer = build(rule, [nn.Parameter(p.detach().clone())], backend)
    optimizer.load_state_dict(source.state_dict())
    assert_same_outcome(optimizer, source)


def test_adamw_checkpoint_in_float32_goes_on_with_a_remainder(backend: str) -> None:
    """From torch's float32 training to bfloat16 weights without losing the moments."""
    q = nn.Parameter(torch.randn(6, 10))
    adamw = torch.optim.AdamW([q], lr=0.01)
    for _ in range(3):
        q.grad = torch.randn_like(q)
        adamw.step()
    p = nn.Parameter(q.detach().bfloat16())
    optimizer = build("AdamP", [p], backend, rounding="remainder")
    optimizer.load_state_dict(adamw.state_dict())
    clipped_step(optimizer, 1)
    assert {k: t.dtype for k, t in optimizer.state[p].items()} == expected_state("AdamP", BF16, None, "remainder")
    assert optimizer.state[p]["step"].item() == 4


# Errors, besides those in test_refusals.py.


@EVERY_RULE
@pytest.mark.parametrize("rounding", ["nearest", "remainder"])
@pytest.mark.parametrize("door", ["step", "load_state_dict"])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("state_dtype", torch.int8, TypeError),
        ("state_dtype", torch.complex64, TypeError),
        ("state_dtype", "float32", TypeError),
        ("rounding", "up", ValueError),
    ],
)
def test_refused_options_leave_seeds_and_remainders(
    rule: str, rounding: str, door: str, name: str, value: Any, error: type[Exception], backend: str
) -> None:
    """Weights and state stay bit for bit, and once it is undone, training goes on."""
    optimizer = started(rule, backend, rounding=rounding)
    undisturbed = copy.deepcopy(optimizer)
    (group,) = optimizer.param_groups
    saved, good = copy.deepcopy(optimizer.state_dict()), group[name]
    if door == "step":
        group[name] = value
    saved["param_groups"][0][name] = value
    (p,) = group["params"]
    p.grad = torch.randn_like(p)
    before = snapshot(optimizer)
    for _ in range(2):
        with raises(error, f"{name}={value!r}"):
            optimizer.step() if door == "step" else optimizer.load_state_dict(saved)
        assert_snapshots_equal(snapshot(optimizer), before)
    optimizer.param_groups[0][name] = good
    for run in (optimizer, undisturbed):
        clipped_step(run, 5)
    assert_same_outcome(optimizer, undisturbed)


BAD_STATE: dict[str, tuple[str, Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "remainder of another shape": ("remainder", lambda r: r[:-1], ("'remainder'", "(5, 10)", "(6, 10)")),
    "floating remainder": ("remainder", lambda r: r.float(), ("'remainder'", "torch.float32", "torch.int16")),
    "wide remainder": ("remainder", lambda r: r.int(), ("'remainder'", "torch.int32", "torch.int16")),
    "floating seed": ("rounding_seed", lambda s: s.double(), ("'rounding_seed'", "torch.float64", "torch.int64")),
    "seed of every element": ("rounding_seed", lambda s: s.repeat(6, 10), ("'rounding_seed'", "(6, 10)", "()")),
}
"""State key, how it is spoilt, the pieces of the message."""


@EVERY_RULE
@pytest.mark.parametrize("kind", list(BAD_STATE))
def test_bad_state_in_a_checkpoint(rule: str, kind: str, backend: str) -> None:
    name, spoil, pieces = BAD_STATE[kind]
    optimizer = started(rule, backend, rounding="remainder" if name == "remainder" else "stochastic")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = spoil(saved["state"][0][name])
    before = snapshot(optimizer)
    with raises(ValueError, *pieces):
        optimizer.load_state_dict(saved)
    assert_snapshots_equal(snapshot(optimizer), before)


@EVERY_RULE
@pytest.mark.parametrize("moment", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_state_of_another_shape_in_a_step(rule: str, count: int, moment: bool, backend: str) -> None:
    """A part of what was there, that begins at the same address: seen all the same, and refused."""
    params = [nn.Parameter(torch.randn(6, 10).bfloat16()) for _ in range(count)]
    optimizer = build(rule, params, backend, rounding="remainder")
    clipped_step(optimizer, 0)
    name = MOMENTS[rule][0] if moment else "remainder"
    optimizer.state[params[-1]][name] = optimizer.state[params[-1]][name][:-1]
    before = snapshot(optimizer)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(2):
        with raises(ValueError, f"{name!r}", f"parameter {count - 1} of group 0", "(5, 10)", "(6, 10)"):
            optimizer.step()
        assert_snapshots_equal(snapshot(optimizer), before)


@EVERY_RULE
def test_refused_gradient_leaves_seeds_and_remainders(rule: str, backend: str) -> None:
    """A bad gradient in another group: no seed is counted up, no remainder touched."""
    groups = [{"params": [nn.Parameter(torch.randn(6, 10).bfloat16())], "rounding": rounding} for rounding in ROUNDINGS]
    bad = nn.Parameter(torch.randn(6, 10))
    optimizer = build(rule, [*groups, {"params": [bad]}], backend)
    for t in (1, 5):
        for p in members(optimizer):
            p.grad = gradient(p, "free")
        if t == 5:
            bad.grad = torch.ones_like(bad).to_sparse()
            before = snapshot(optimizer)
            with raises(TypeError, "gradient of parameter 0 of group 3"):
                optimizer.step()
            assert_snapshots_equal(snapshot(optimizer), before)
        else:
            optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("size", [1, 100])
def test_ties_go_to_the_even_neighbour(size: int, momentum: float, backend: str) -> None:
    """A step of half a unit of bfloat16: exact in float32, and as far from the one neighbour as from the other."""
    values = torch.tensor([1.0, 1.0078125, -1.0, -1.0078125]).repeat(size)
    p = torch.nn.Parameter(values.bfloat16())
    p.grad = -torch.ones_like(p)
    RULES["SGDP"][0]([p], lr=2.0**-8, momentum=momentum, backend=backend).step()
    expected = (values + 2.0**-8).bfloat16()  # as torch rounds
    assert torch.equal(p.detach(), expected)
    assert not torch.equal(expected.float(), values)


def test_float16_overflows_as_in_torch(backend: str) -> None:
    values = torch.tensor([65504.0, 65472.0, -65504.0, 1.0] * 20)
    p = torch.nn.Parameter(values.half())
    p.grad = -torch.sign(p.detach())
    RULES["SGDP"][0]([p], lr=32.0, momentum=0, backend=backend).step()
    expected = (values + 32 * values.sign()).half()
    assert expected.isinf().any()
    assert torch.equal(p.detach(), expected)
