"""Replays of CUDA graphs, by replaying the launches of compiled kernels; and hyperparameters on the device.

See emulated_steps.py.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import emulated_range
import emulated_shares
import pytest
import test_shares
import torch
from harness import BACKEND, Emulated
from models import (
    ADAMP,
    MODEL,
    PLAN,
    SGDP_,
    Shapes,
    every_alignment,
    grad_of,
    model,
    params_of,
    tensors,
    usual_under,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_adamp import SGDP, AdamP
from fused_adamp.backends import device, tables
from fused_adamp.batch import Need
from fused_adamp.reference import Decision

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn import Parameter

    from fused_adamp.backends.device import DeviceBackend
    from fused_adamp.batch import Batch, Scalars
    from fused_adamp.optimizer import ProjectedOptimizer

pytestmark = pytest.mark.usefixtures("emulated")


class OnDevice(AdamP):
    """AdamP whose lr and betas are tensors that the host must not read. On a GPU they lie there; here there is none."""

    learning_rate: Tensor

    def scalars(self, group: dict[str, Any]) -> Scalars:
        row = super().scalars(group)
        lr = self.learning_rate.double().reshape(())
        beta = torch.full((), float(row.beta2), dtype=torch.float64)
        return row._replace(lr=lr, beta2=beta, gain2=1 - beta)


def on_device(params: list[Parameter], **options: Any) -> OnDevice:
    optimizer = OnDevice(params, **options, backend=BACKEND)
    optimizer.learning_rate = torch.tensor(float(options["lr"]), dtype=torch.float32)
    return optimizer


@every_alignment
def test_hyperparameters_on_the_device_are_copied_there_in_every_step(
    whole: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, expected = on_device(model(whole[3:6]), **ADAMP), AdamP(model(whole[3:6]), **ADAMP, backend=BACKEND)
    uploads = 0
    upload = tables.Tables.upload

    def counted(*arguments: Any) -> None:
        nonlocal uploads
        uploads += 1
        upload(*arguments)

    monkeypatch.setattr(tables.Tables, "upload", counted)
    for number, lr in enumerate((0.5, 0.25, 1.0)):
        ours.learning_rate.fill_(lr)
        expected.param_groups[0]["lr"] = lr
        uploads = 0
        ours.step()
        assert (uploads == 0) == (number > 0)
        expected.step()
    assert all(map(torch.equal, tensors(ours), tensors(expected)))


class Graph(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands for a CUDA graph. A capture records operators and launches, and runs none that writes to existing tensors.

    A replay repeats all of them on the capture's tensors.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []
        self._patch = monkeypatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
            return args[0] if func._schema.returns else None
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and "empty" not in str(func):
            self.calls.append(lambda: out.copy_(func(*args, **kwargs)))
        return out

    def capture(self, step: Callable[[], object]) -> None:
        with self._patch.context() as patch:
            patch.setattr(device, "_capturing", lambda device: True)
            start = Emulated.start
            patch.setattr(Emulated, "start", lambda run: self.calls.append(lambda: start(run)))
            with self:
                step()

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.mark.parametrize("whole", [usual_under("split", emulated_shares.SHARED_MODEL, id="aligned")])
def test_replays_of_a_graph_share_and_go_by_the_verdicts_of_the_day(
    whole: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [emulated_shares.shared_model(whole, options=ADAMP | {"capturable": flag})[1] for flag in (True, False)]
    for batch in batches:
        for tensor in test_shares.state_of(batch.rule, batch.bucket):
            tensor.fill_(0.5)

    def train(batch: Batch) -> list[Tensor]:
        batch.bucket.key.backend.measure(batch)
        batch.bucket.key.backend.step(batch)
        return results_of(batch)

    def results_of(batch: Batch) -> list[Tensor]:
        stored = test_shares.state_of(batch.rule, batch.bucket)
        assert batch.bucket.shared is not None
        return [*batch.params, *stored, batch.bucket.decisions, *batch.bucket.shared[1:3]]

    captured, eager = batches
    train(captured), train(eager)
    graph = Graph(monkeypatch)
    graph.capture(lambda: train(captured))
    for number, replays in enumerate((True, False, True)):
        for batch in batches:
            shared = batch.bucket.shared
            assert shared is not None
            shared.needs.fill_((Need.TEST, Need.DOT, Need.SQUARE)[number])
            shared.verdicts[:4] = torch.tensor([number, 0.5])
            shared.row_projections.fill_(0.25 * number)
        found = [t.clone() for t in train(eager)]
        if replays:
            graph.replay()
        else:
            train(captured)
        assert all(map(torch.equal, results_of(captured), found)), number


@pytest.mark.parametrize(
    ("clip", "rounding"),
    [
        ("no", "nearest"),
        ("call", "nearest"),
        usual_under("split", "option", "nearest"),
        usual_under("split", "no", "stochastic"),
    ],
)
@every_alignment
def test_replays_of_a_graph_step_like_eager_steps(
    clip: str, rounding: str, whole: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32 if rounding == "nearest" else torch.bfloat16
    targets = [torch.randn(p.shape, dtype=dtype) for p in model(whole[2:7])]

    def train(optimizer: ProjectedOptimizer) -> None:
        with torch.no_grad():
            for p, target in zip(params_of(optimizer), targets, strict=True):
                p.grad = 2 * (p.detach() - target)
            if clip == "call":
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()

    options = ADAMP | {"rounding": rounding}
    limit = torch.tensor(1.0)
    options |= {"max_grad_norm": limit} if clip == "option" else {}
    captured, eager = (on_device(model(whole[2:7], dtype), **options, capturable=flag) for flag in (True, False))
    graph = Graph(monkeypatch)
    for optimizer in (captured, eager):
        torch.manual_seed(0)  # the first step draws the seeds of stochastic rounding
        train(optimizer)
    before = copy.deepcopy(tensors(captured))
    graph.capture(lambda: train(captured))
    assert all(map(torch.equal, tensors(captured), before))
    norm = captured.grad_norm
    for number, replays in enumerate((True, True, False, True)):
        for optimizer in (captured, eager):
            optimizer.learning_rate.fill_(0.5 ** (number % 3))
        limit.fill_(0.5**number)
        if replays:
            graph.replay()
        else:
            train(captured)
        train(eager)
        assert all(map(torch.equal, tensors(captured), tensors(eager))), number
        assert captured.buckets[0].decisions.equal(eager.buckets[0].decisions)
        if norm is not None and replays:
            assert norm.equal(eager.grad_norm)


def test_a_capture_measures_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped before the capture, stepped in it: a replay must not use what was measured once."""
    optimizer = on_device(model(MODEL[3:6]), **ADAMP, capturable=True)
    optimizer.step()
    optimizer.clip_grad_norm_(1.0)
    graph = Graph(monkeypatch)
    grids: list[int] = []

    def noted(it: DeviceBackend, kernel: Any, grid: int, *_: Any) -> Emulated:
        grids.append(grid)
        return Emulated(kernel, grid, ())

    with monkeypatch.context() as patch:
        of = type(optimizer.buckets[0].key.backend)
        patch.setattr(of, "run", noted)
        patch.setattr(of, "resident", lambda it, device: 2)
        graph.capture(optimizer.step)
    assert max(grids) > 1
    if PLAN == "split":
        assert grids[0] > 1


def test_a_capture_is_refused_where_it_would_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    p, late = model(tuple(((3, 8), Decision.NONE) for _ in range(2)))
    optimizer = AdamP([p], **ADAMP, backend=BACKEND)
    monkeypatch.setattr(device, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="take a step like the one to be captured before the capture"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    monkeypatch.setattr(device, "_capturing", lambda device: True)
    before = copy.deepcopy(tensors(optimizer))
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"capturable=False: pass capturable=True to the optimizer"):
            call()
    assert all(map(torch.equal, tensors(optimizer), before))
    # A group that does not take part may be as it likes.
    optimizer.param_groups[0]["capturable"] = True
    late.grad = None
    optimizer.add_param_group({"params": [late], "capturable": False})


@pytest.mark.parametrize("clip", [usual_under("split", False), usual_under("split", True)])
def test_a_replay_does_again_what_has_left_float32(clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch of a replay is not the host's: stages mark, and look for marks, under the one on the device."""
    shapes = emulated_range.RANGE_MODEL[1:]
    captured, eager = (
        SGDP(emulated_range.range_model(1.0, 1.0, shapes), **SGDP_, capturable=flag, backend=BACKEND)
        for flag in (True, False)
    )

    def train(optimizer: ProjectedOptimizer) -> None:
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    for optimizer in (captured, eager):
        train(optimizer)
    graph = Graph(monkeypatch)
    graph.capture(lambda: train(captured))
    for number, size in enumerate((1.0, 1e20, 1.0, 1.0, 1e20)):
        for optimizer in (captured, eager):
            values = emulated_range.range_model(size, size, shapes)
            for p, value in zip(params_of(optimizer), values, strict=True):
                p.data.copy_(value.data)
                grad_of(p).copy_(grad_of(value))
        graph.replay()
        train(eager)
        assert all(map(torch.equal, tensors(captured), tensors(eager))), number
        assert captured.buckets[0].decisions.equal(eager.buckets[0].decisions)
