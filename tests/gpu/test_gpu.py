"""Both GPU backends under both plans: numbers, size, repeatability, streams, waiting and compilation."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import test_shares
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_adamp
from fused_adamp.backends import BACKENDS, ENVIRONMENT, jobs
from fused_adamp.backends import cuda as cuda_backend
from fused_adamp.backends import triton as triton_backend
from fused_adamp.batch import Need, Sharing
from fused_adamp.reference import Decision, adamp_ref
from fused_adamp.verify import Case, cases, check, lay_out, make_gradient, shapes

if TYPE_CHECKING:
    from fused_adamp.batch import Batch
    from fused_adamp.optimizer import ProjectedOptimizer

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: nothing here was checked", allow_module_level=True)

PLANS = ("one_pass", "split")
TILES = {"triton": 1 << triton_backend._LOG_TILE, "cuda": cuda_backend._TILE}
"""By backend, the elements of a tile."""
COMPILED: dict[str, dict[Any, Any]] = {"triton": triton_backend._compiled, "cuda": cuda_backend._loaded}
"""By backend, the kernels that it has compiled and loaded."""
CASES = {
    name: cases() + [case for case in cases(tile) if shapes()[case.shape] != shapes(tile)[case.shape]]
    for name, tile in TILES.items()
}
"""Sizes around the widest row that a tile takes whole are in the first, around a tile in the second."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=product(TILES, PLANS), ids=" ".join)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces each backend and each plan in turn; the backend's name."""
    name, plan = request.param
    (chosen,) = (b for b in BACKENDS if b.name == name)
    if reason := chosen.unavailable(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(f"{name}: {reason}")
    monkeypatch.setenv(jobs.PLAN, plan)
    monkeypatch.setenv(ENVIRONMENT, name)
    return str(name)


def _compiled_together(backend: str, plan: str, case: Case) -> str:
    """Names what a case's kernels are compiled for, so that parallel test processes do not compile the same ones."""
    rule = "AdamP" if case.optimizer == "AdamP" else f"SGDP momentum {bool(case.options.get('momentum'))}"
    storage = case.options.get("state_dtype"), case.options.get("rounding")
    return f"{backend} {plan} {rule} {case.dtype} {case.gradient_dtype} {case.layout} {storage}"


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(
            (name, plan),
            case,
            id=f"{name} {plan} {case} tile {case.tile}",
            marks=pytest.mark.xdist_group(_compiled_together(name, plan, case)),
        )
        for name, plan in product(TILES, PLANS)
        for case in CASES[name]
    ],
    indirect=["backend"],
)
def test_every_step_equals_the_reference(backend: str, case: Case) -> None:
    outcome = check(case, backend, "cuda")
    assert outcome.passed(), outcome
    if "delta" not in case.options:
        assert {theirs for _, theirs in outcome.decisions} == {case.decision}, "the case is not what it says"


# Parameters whose elements 32 bits cannot number.

ROWS = (2**31 // 4096 + 1, 4096)
VECTOR = (2**31 + 17,)
LARGE = {
    # The second slice lies around 2^31 bytes, the third around 2^31 elements.
    "rows": (ROWS, (slice(0, 2), slice(ROWS[0] // 2 - 1, ROWS[0] // 2 + 1), slice(ROWS[0] - 2, None))),
    "vector": (VECTOR, (slice(0, 64), slice(2**30 - 32, 2**30 + 32), slice(2**31 - 32, None))),
}


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize(("shape", "slices"), LARGE.values(), ids=LARGE)
def test_a_parameter_of_more_than_two_to_the_31_elements(
    backend: str, shape: tuple[int, ...], slices: tuple[slice, ...]
) -> None:
    torch.cuda.empty_cache()
    needed = 6 * torch.bfloat16.itemsize * math.prod(shape)  # weight, gradient, two moments, room for two more
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    p = Parameter(torch.randn(shape, dtype=torch.bfloat16, device="cuda"))
    g = _quarter_turn(p.detach()) if p.ndim == 2 else torch.randn_like(p.detach())
    p.grad = g
    options = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.1}
    optimizer = fused_adamp.AdamP([p], **options, backend=backend)  # type: ignore[arg-type]
    before = [(p.detach()[part].double(), g[part].double()) for part in slices]
    optimizer.step()
    decision = Decision.CHANNEL if p.ndim == 2 else Decision.NONE
    assert optimizer.decisions()[p] is decision
    state = optimizer.state[p]
    for part, (weight, gradient) in zip(slices, before, strict=True):
        m, v = torch.zeros_like(weight), torch.zeros_like(weight)
        # Rows are tested and projected by themselves: those of a slice as if they were the whole.
        assert adamp_ref(weight, gradient, m, v, 1, **options) is decision  # type: ignore[arg-type]
        for got, want in ((p.detach(), weight), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
            torch.testing.assert_close(got[part].double(), want, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    assert torch.count_nonzero(state["exp_avg_sq"]) == torch.count_nonzero(g), "elements were left out"


def _quarter_turn(p: Tensor) -> Tensor:
    """Orthogonal to ``p`` in every row, without rounding: each pair of elements turned by 90 degrees."""
    g = torch.empty_like(p)
    g[:, 0::2] = p[:, 1::2]
    g[:, 1::2] = p[:, 0::2]
    g[:, 1::2].neg_()
    return g


# Small models.

MODEL: tuple[tuple[tuple[int, ...], Decision, str], ...] = (
    ((), Decision.NONE, "contiguous"),
    ((2049,), Decision.NONE, "contiguous"),
    ((300, 1), Decision.LAYER, "contiguous"),
    ((33, 65), Decision.CHANNEL, "offset"),
    ((96, 64, 3, 3), Decision.CHANNEL, "channels_last"),
    ((101, 1111), Decision.LAYER, "contiguous"),
    ((127, 131), Decision.NONE, "transposed"),
    ((3, 2056), Decision.CHANNEL, "contiguous"),
    ((2, 40001), Decision.CHANNEL, "contiguous"),
    ((513, 512), Decision.LAYER, "contiguous"),
)
"""Shape, decision and layout: the edges of tiles and every path through the kernels."""


def _model(seed: int, optimizer: str = "AdamP", backend: str | None = None) -> ProjectedOptimizer:
    """An optimizer on the device whose parameters have gradients, not stepped yet; None: the backend that is forced."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape, decision, layout in MODEL:
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        p = Parameter(lay_out(value.to("cuda", torch.float32), layout))
        # In float64 and of the rounded weight, so that the cosine is that of rounding once.
        gradient = make_gradient(p.detach().cpu().double(), decision, generator)
        p.grad = lay_out(gradient.to("cuda", torch.float32), layout)
        params.append(p)
    if optimizer == "AdamP":
        return fused_adamp.AdamP(params, lr=1e-4, weight_decay=0.1, backend=backend)
    return fused_adamp.SGDP(params, lr=1e-4, momentum=0.9, weight_decay=0.1, backend=backend)


def _results(optimizer: ProjectedOptimizer) -> list[Tensor]:
    """Weights and state, in a fixed order."""
    params = optimizer.param_groups[0]["params"]
    return [t for p in params for t in (p.detach(), *(optimizer.state[p][k] for k in sorted(optimizer.state[p])))]


@pytest.mark.parametrize("optimizer", ["AdamP", "SGDP"])
def test_a_small_model_equals_the_reference(backend: str, optimizer: str) -> None:
    """All kinds of parameters in one launch; also what runs under compute-sanitizer below."""
    ours, reference = _model(0, optimizer), _model(0, optimizer, "reference")
    for _ in range(2):
        ours.step()
        reference.step()
    assert list(ours.decisions().values()) == [decision for _, decision, _ in MODEL]
    for a, b in zip(_results(ours), _results(reference), strict=True):
        torch.testing.assert_close(a, b.to(a.device), rtol=2e-5, atol=2e-6)


def test_results_are_bitwise_equal_over_a_hundred_runs(backend: str) -> None:
    optimizer = _model(0)
    params = optimizer.param_groups[0]["params"]
    weights = [p.detach().clone() for p in params]

    def run() -> list[Tensor]:
        optimizer.state.clear()
        for p, weight in zip(params, weights, strict=True):
            p.detach().copy_(weight)
        optimizer.step()
        optimizer.step()
        return [t.clone() for t in _results(optimizer)]

    first = run()
    for number in range(1, 100):
        assert all(map(torch.equal, first, run())), f"run {number} differs from the first"


def test_two_streams_do_not_disturb_each_other(backend: str) -> None:
    steps, seeds = 20, (1, 2)
    alone = []
    for seed in seeds:
        optimizer = _model(seed)
        for _ in range(steps):
            optimizer.step()
        alone.append(_results(optimizer))
    optimizers = [_model(seed) for seed in seeds]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in seeds]
    for _ in range(steps):
        for stream, optimizer in zip(streams, optimizers, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for want, optimizer in zip(alone, optimizers, strict=True):
        assert all(map(torch.equal, want, _results(optimizer)))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # said once when it is switched on
@pytest.mark.parametrize("change", ["nothing", "lr", "gradients elsewhere", "a gradient missing"])
@pytest.mark.parametrize("optimizer", ["AdamP", "SGDP"])
def test_later_steps_do_not_synchronize(backend: str, optimizer: str, change: str) -> None:
    model = _model(0, optimizer)
    model.step()
    (group,) = model.param_groups
    held = []  # so that the allocator does not hand out the same addresses again
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3):
            if change == "lr":
                group["lr"] *= 0.5
            elif change == "gradients elsewhere":
                held += [p.grad for p in group["params"]]
                for p in group["params"]:
                    p.grad = p.grad.clone()
            elif change == "a gradient missing":
                group["params"][number].grad = None
            model.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_learning_rate_does_not_recompile(backend: str) -> None:
    model = _model(0)
    model.step()
    compiled = len(COMPILED[backend])
    assert compiled > 0
    for lr in (1e-3, 1.0, 0, 1e-5):
        model.param_groups[0]["lr"] = lr
        model.step()
    assert len(COMPILED[backend]) == compiled


# Parameters on several ranks, of which this is one.


def _shared(optimizer: str, backend: str) -> tuple[ProjectedOptimizer, Batch]:
    """A model that is said to lie on several ranks, each parameter in its way, and what others have told of it."""
    torch.manual_seed(0)
    model = _model(0, optimizer, backend)
    vectors = [p.ndim < 2 for p in model.param_groups[0]["params"]]
    sharings = [Sharing.SHARED if vector else Sharing(i % 3) for i, vector in enumerate(vectors)]
    bucket = test_shares.sharded(model, backend, sharings)
    assert bucket.shared is not None
    for i, (vector, sharing) in enumerate(zip(vectors, sharings, strict=True)):
        bucket.shared.needs[i] = Need.SQUARE if vector or not sharing else Need.TEST | Need.DOT
        if sharing:
            bucket.shared.verdicts[i, 0] = Decision.NONE if vector else Decision(i // 3 % 3)
            bucket.shared.verdicts[i, 1] = 0.25
    bucket.shared.row_projections.fill_(0.125)
    return model, test_shares.batch_of(model, bucket)


@pytest.mark.parametrize("optimizer", ["AdamP", "SGDP"])
def test_shares_and_steps_by_verdicts_equal_the_reference(backend: str, optimizer: str) -> None:
    runs = [_shared(optimizer, name) for name in (backend, "reference")]
    for _, batch in runs:
        batch.bucket.key.backend.measure(batch)
        assert batch.bucket.key.backend.step(batch) == -1
    (ours, batch), (theirs, expected) = runs
    assert batch.bucket.decisions.equal(expected.bucket.decisions)
    assert batch.bucket.shared is not None
    assert expected.bucket.shared is not None
    # Sums of up to 3e5 products; of orthogonal pairs they are what rounding leaves.
    for a, b in zip(batch.bucket.shared, expected.bucket.shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0.1)
    for a, b in zip(_results(ours), _results(theirs), strict=True):
        torch.testing.assert_close(a, b.to(a.device), rtol=2e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_measuring_and_stepping_by_verdicts_does_not_synchronize(backend: str) -> None:
    _, batch = _shared("AdamP", backend)
    for number in range(3):
        if number == 1:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            batch.bucket.key.backend.measure(batch)
            batch.bucket.key.backend.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Clipping, loss scaling, and CUDA graphs.


def _equal(ours: ProjectedOptimizer, theirs: ProjectedOptimizer) -> None:
    assert list(ours.decisions().values()) == list(theirs.decisions().values())
    for a, b in zip(_results(ours), _results(theirs), strict=True):
        torch.testing.assert_close(a, b.to(a.device), rtol=2e-5, atol=2e-6)


def _set_gradients(optimizer: ProjectedOptimizer, number: int, factor: float = 1.0) -> None:
    """New values in the old gradients, the same for every optimizer of the same weights."""
    generator = torch.Generator("cuda").manual_seed(number)
    for p in optimizer.param_groups[0]["params"]:
        p.grad.copy_(factor * torch.randn(p.shape, generator=generator, device="cuda"))


@pytest.mark.parametrize("optimizer", ["AdamP", "SGDP"])
def test_a_clipped_step_equals_the_reference(backend: str, optimizer: str) -> None:
    ours, reference = _model(0, optimizer), _model(0, optimizer, "reference")
    for number in range(3):
        expected = torch.nn.utils.get_total_norm([p.grad for p in ours.param_groups[0]["params"]])
        for each in (ours, reference):
            torch.testing.assert_close(each.clip_grad_norm_(1.0), expected, rtol=1e-5, atol=0)
            each.step()
            _set_gradients(each, number)
    _equal(ours, reference)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_clipping_does_not_synchronize(backend: str) -> None:
    model = _model(0)
    for number in range(3):
        if number == 1:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            model.clip_grad_norm_(1.0)
            model.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("clip", [False, True])
def test_a_grad_scaler_s_steps_equal_the_reference(backend: str, clip: bool) -> None:
    """With one overflow, which moves nothing and halves the scale."""
    ours, reference = _model(0), _model(0, backend="reference")
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10) for _ in range(2)]
    for number in range(4):
        for each, scaler in zip((ours, reference), scalers, strict=True):
            scaler.scale(torch.zeros(1, device="cuda"))  # makes the scale
            _set_gradients(each, number, scaler.get_scale())
            if number == 1:
                each.param_groups[0]["params"][3].grad[0, 0] = math.inf
                before = [t.clone() for t in _results(each)]
            if clip:
                scaler.unscale_(each)
                each.clip_grad_norm_(1.0)
            scaler.step(each)
            scaler.update()
            if number == 1:
                assert all(map(torch.equal, _results(each), before))
        assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0 ** (9 if number else 10)
    _equal(ours, reference)


@pytest.mark.parametrize("rounding", ["nearest", "remainder", "stochastic"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("optimizer", ["AdamP", "SGDP"])
def test_ten_replays_of_a_captured_training_step_equal_eager_ones(
    backend: str, optimizer: str, clip: bool, rounding: str
) -> None:
    """Bit for bit, with a learning rate that changes between replays, and eager steps among them."""
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    targets = [torch.randn(shape, device="cuda") for shape, _, _ in MODEL]
    rates = [1e-2 / (number + 1) for number in range(12)]
    settings = {"weight_decay": 0.1, "rounding": rounding, "backend": backend}
    settings |= {"momentum": 0.9} if optimizer == "SGDP" else {}

    def make(capturable: bool) -> tuple[ProjectedOptimizer, Tensor]:
        torch.manual_seed(0)
        rate = torch.tensor(rates[0], device="cuda")
        params = [Parameter(torch.randn(shape).to("cuda", dtype)) for shape, _, _ in MODEL]
        return getattr(fused_adamp, optimizer)(params, lr=rate, capturable=capturable, **settings), rate

    def train(stepped: ProjectedOptimizer) -> None:
        stepped.zero_grad(set_to_none=True)
        params = stepped.param_groups[0]["params"]
        sum((p.float() - target).square().sum() for p, target in zip(params, targets, strict=True)).backward()
        if clip:
            stepped.clip_grad_norm_(0.1)
        stepped.step()

    (captured, rate), (eager, eager_rate) = make(capturable=True), make(capturable=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.manual_seed(1)  # the first step draws the seeds of stochastic rounding
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(captured)
    torch.cuda.current_stream().wait_stream(stream)
    torch.manual_seed(1)
    for _ in range(3):
        train(eager)
    graph = torch.cuda.CUDAGraph()
    before = [t.clone() for t in _results(captured)]
    with torch.cuda.graph(graph):
        train(captured)
    assert all(map(torch.equal, _results(captured), before)), "a capture moves nothing"
    for number, lr in enumerate(rates):
        for each in (rate, eager_rate):
            each.fill_(lr)
        if number in (4, 9):
            train(captured)
        else:
            graph.replay()
        train(eager)
    assert all(map(torch.equal, _results(captured), _results(eager)))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_without_capturable_is_refused(backend: str) -> None:
    optimizer = _model(0)
    optimizer.step()
    before = [t.clone() for t in _results(optimizer)]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable=False: pass capturable=True"), torch.cuda.graph(graph):
        optimizer.step()
    assert all(map(torch.equal, _results(optimizer), before))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(backend: str, tool: str, capfd: pytest.CaptureFixture[str]) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on PATH: memory accesses and races were not checked")
    # torch asks the driver for what it may lack; that is no error of a kernel.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    sanitizer = [program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", *options]
    case = f"test_a_small_model_equals_the_reference and {backend} and {os.environ[jobs.PLAN]}"
    run = subprocess.run(
        [
            *sanitizer,
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "default",
            __file__,
            "-k",
            case,
        ],
        cwd=ROOT,
        # The allocator hands out pieces of large blocks, between which a stray access is not seen.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        check=False,
        timeout=100,
    )
    output = "".join(capfd.readouterr())
    if "Device not supported" in output:
        pytest.skip(f"compute-sanitizer does not know this device: {tool} was not run")
    assert run.returncode == 0, output[-4000:]
    assert "2 passed" in output, output[-4000:]
