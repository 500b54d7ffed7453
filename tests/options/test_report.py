"""projection_report: every number against one computed by hand from what the optimizer was given."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from trajectory import KINDS, RULES, gradient, parameters

from fused_adamp.reference import Decision, cosine_ratio, project
from fused_adamp.report import ProjectionRecord, ProjectionReport

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
SHAPES = ((4, 3, 3, 3), (6, 10), (300, 400), (9,), ())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ParameterList(parameters(*SHAPES))


def stepped(
    rule: str, backend: str, steps: int = 3, **options: object
) -> tuple[Net, torch.optim.Optimizer, list[Tensor]]:
    """A few steps, of which the last decides channel, layer, none, ...; the weights before the last."""
    cls, defaults = RULES[rule]
    net = Net()
    optimizer = cls(net.parameters(), **{**defaults, **options}, backend=backend)
    for _ in range(steps):
        for i, p in enumerate(net.parameters()):
            p.grad = gradient(p, KINDS[i % 3])
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
    return net, optimizer, before


@EVERY_RULE
def test_every_number(rule: str, backend: str) -> None:
    net, optimizer, before = stepped(rule, backend)
    (group,) = optimizer.param_groups
    report = optimizer.projection_report(net)
    assert [record.name for record in report] == [name for name, _ in net.named_parameters()]
    assert {record.decision for record in report} == {"channel", "layer", "none"}
    for record, p, old in zip(report, net.parameters(), before, strict=True):
        decision = optimizer.decisions()[p]
        assert record.decision == decision.name.lower()
        assert record.shape == tuple(p.shape)
        assert_close(torch.tensor(record.norm, dtype=torch.float64), p.detach().norm(), "norm")
        if p.ndim >= 2:
            cosine = cosine_ratio(p.grad, old, group["delta"], group["eps"])
            assert record.cosine == pytest.approx(cosine.item(), rel=1e-9, abs=1e-12)
            assert (record.cosine < 1) == (decision is Decision.CHANNEL)
            assert record.growth == pytest.approx((p.detach().norm() / old.norm()).item() - 1, rel=1e-6, abs=1e-13)
        else:
            assert math.isnan(record.cosine)
            assert math.isnan(record.growth)
        state = optimizer.state[p]
        if rule == "AdamP":
            (beta1, beta2), t = group["betas"], state["step"].item()
            u = state["exp_avg"] / (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**t) + group["eps"])
            u = u / (1 - beta1**t)
        else:
            u = state["momentum_buffer"]
        turn = group["lr"] * project(u, p.detach(), decision, 0.0).norm() / p.detach().norm()
        assert record.effective_step == pytest.approx(turn.item(), rel=1e-9)


@EVERY_RULE
def test_the_effective_step_is_the_next_steps_turn(rule: str, backend: str) -> None:
    """At so small a rate that the update hardly changes from one step to the next."""
    cls, _ = RULES[rule]
    p = nn.Parameter(torch.randn(20, 30, dtype=torch.float64))
    options = {"betas": (0.999, 0.999)} if rule == "AdamP" else {"momentum": 0.999, "dampening": 0.999}
    optimizer = cls([p], lr=1e-6, **options, backend=backend)
    g = gradient(p, "channel")
    for _ in range(3):
        p.grad = g.clone()
        optimizer.step()
    (record,) = optimizer.projection_report()
    old = p.detach().clone()
    p.grad = torch.zeros_like(p) if rule == "SGDP" else g.clone()
    optimizer.step()
    angle = (p.detach() / p.detach().norm() - old / old.norm()).norm().item()
    assert angle == pytest.approx(record.effective_step, rel=1e-2)


@EVERY_RULE
def test_a_projected_norm_hardly_grows(rule: str, backend: str) -> None:
    net, optimizer, _ = stepped(rule, backend, weight_decay=0.0)
    growth = {record.decision: record.growth for record in optimizer.projection_report(net) if len(record.shape) > 1}
    assert 0 <= growth["channel"] < 0.1
    free = stepped(rule, backend, weight_decay=0.0, projection="none")[1].projection_report()
    assert all(math.isnan(record.growth) for record in free), "what is not tested is not measured"


@EVERY_RULE
def test_parameters_that_were_not_stepped_are_left_out(rule: str, backend: str) -> None:
    cls, options = RULES[rule]
    params = parameters((3, 4), (4,))
    optimizer = cls(params, **options, backend=backend)
    assert optimizer.projection_report() == []
    assert str(optimizer.projection_report()).startswith("parameter")
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    (record,) = optimizer.projection_report()
    assert record.name == "parameter 1 of group 0"


@EVERY_RULE
def test_names(rule: str, backend: str) -> None:
    cls, options = RULES[rule]
    net = Net()
    optimizer = cls(net.named_parameters(), **options, backend=backend)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.projection_report()[1].name == "parameter 'members.1'"
    assert optimizer.projection_report(net)[1].name == "members.1"


@EVERY_RULE
def test_broken_gradient(rule: str, backend: str) -> None:
    cls, options = RULES[rule]
    (p,) = parameters((3, 4))
    optimizer = cls([p], **options, backend=backend)
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    (record,) = optimizer.projection_report()
    assert record.decision == "none"
    assert not record.cosine < 1
    assert math.isnan(record.norm)


@EVERY_RULE
@pytest.mark.parametrize("rounding", ["nearest", "remainder", "stochastic"])
def test_other_storage_and_channel_dim(rule: str, rounding: str, backend: str) -> None:
    cls, options = RULES[rule]
    p = nn.Parameter(torch.randn(8, 70).bfloat16())
    optimizer = cls([p], **options, rounding=rounding, channel_dim=1, backend=backend)
    p.grad = torch.randn(8, 70).bfloat16()
    old, g = p.detach().double(), p.grad.double()
    optimizer.step()
    (record,) = optimizer.projection_report()
    group = optimizer.param_groups[0]
    assert record.cosine == pytest.approx(cosine_ratio(g.T, old.T, group["delta"], group["eps"]).item(), rel=1e-5)
    assert record.norm == pytest.approx(p.detach().double().norm().item(), rel=5e-3)
    assert record.growth == pytest.approx(record.norm / old.norm().item() - 1, abs=1e-6)


def test_records_are_plain(backend: str) -> None:
    """For any logger: a named tuple of numbers and strings."""
    net, optimizer, _ = stepped("AdamP", backend)
    report = optimizer.projection_report(net)
    assert isinstance(report, ProjectionReport)
    assert all(isinstance(record, ProjectionRecord) for record in report)
    assert json.loads(json.dumps([record._asdict() for record in report]))[0]["decision"] == report[0].decision
    lines = str(report).splitlines()
    assert lines[0].split() == ["parameter", "shape", "decision", "cosine", "norm", "growth", "effective", "step"]
    assert [line.split()[0] for line in lines[1:]] == [record.name for record in report]
    assert lines[3].split()[1] == "300x400"


@EVERY_RULE
def test_the_report_moves_nothing(rule: str, backend: str) -> None:
    net, optimizer, _ = stepped(rule, backend)
    before = [p._version for p in net.parameters()], repr(optimizer.state_dict())
    optimizer.projection_report(net)
    assert ([p._version for p in net.parameters()], repr(optimizer.state_dict())) == before


@EVERY_RULE
def test_at_delta_0_nothing_is_tested(rule: str, backend: str) -> None:
    """Also where a parameter is several tiles."""
    cls, options = RULES[rule]
    params = parameters((3, 4), (600, 128))
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = cls(params, **options, delta=0, backend=backend)
    optimizer.step()
    for record in optimizer.projection_report():
        assert record.decision == "none"
        assert math.isnan(record.cosine)
        assert math.isnan(record.growth)
