"""Steps inside torch.compile: one operator in one graph, the numbers of eager, nothing compiled anew for a new lr."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from fused_adamp import SGDP, AdamP

pytestmark = [  # torch's own, raised while it compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

BACKENDS = ["eager", pytest.param("aot_eager", marks=pytest.mark.exhaustive), "inductor"]
"""Inductor compiles what aot_eager only traces."""
KINDS = [(AdamP, {}), (SGDP, {"momentum": 0.9}), (SGDP, {"momentum": 0})]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_grad_enabled(True)


def problem(kind=AdamP, lr=1e-2, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
    first, second = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first}, {"params": second, "weight_decay": 0.1}]
    return model, kind(groups, lr=lr, **options)


def backward(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = None
    model(torch.randn(4, 6)).square().mean().backward()


def assert_same(pairs):
    (model, optimizer), (twin, other) = pairs
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name in optimizer.state[p]:
            assert torch.equal(optimizer.state[p][name], other.state[q][name]), name


def follow(backend, step, between=lambda optimizer, i: None, steps=5, fullgraph=True, make=problem):
    """Steps compiled and eager side by side, compares after each; returns the operators per compiled graph."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=fullgraph)
    pairs = make(), make()
    for i in range(steps):
        for (model, optimizer), function in zip(pairs, (compiled, step), strict=True):
            backward(model, i)
            if hasattr(optimizer, "no_grad_at") and i in optimizer.no_grad_at:
                model[2].weight.grad = None
            function(model, optimizer)
            between(optimizer, i)
        assert_same(pairs)
    return [sum("fused_adamp" in str(node.target) for node in graph.graph.nodes) for graph in counter.graphs]


def plain(model, optimizer):
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_one_operator_for_every_hyperparameter(backend, kind, options, path):
    def between(optimizer, i):
        for group in optimizer.param_groups:
            group.update(lr=group["lr"] * 0.7, weight_decay=0.01 * i, delta=0.1 + 0.1 * i, nesterov=bool(i % 2))

    assert follow(backend, plain, between, make=lambda: problem(kind, backend=path, **options)) == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_gradients_compile_once_more(backend):
    def make():
        model, optimizer = problem()
        optimizer.no_grad_at = {1, 3}
        return model, optimizer

    assert follow(backend, plain, make=make) == [1, 1]


def test_inductor_copies_nothing():
    model, optimizer = problem()
    backward(model, 0)
    _, (code, *_) = run_and_get_code(torch.compile(lambda: optimizer.step(), fullgraph=True))
    call = code[code.index("def call") : code.index("return ()")]
    assert call.count("torch.ops.fused_adamp.optimizer_step.default(") == 1
    assert "empty_strided" not in call
    assert "copy" not in call


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_lr_changed_in_the_graph(backend):
    def step(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"].mul_(0.5)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"].mul_(0.9)

    assert follow(backend, step, make=lambda: problem(lr=torch.tensor(0.01))) == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_gradients_changed_in_the_graph(backend):
    def step(model, optimizer):
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.1, 0.1)
                p.grad = p.grad * 4
        optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)

    assert follow(backend, step) == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_hyperparameters_or_state_changed_before_the_step_run_it_outside_the_graph(backend):
    def lower(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5
        optimizer.step()

    def reset(model, optimizer):
        for p in model.parameters():
            optimizer.state[p] = {}
        optimizer.step()

    for step in (lower, reset):
        torch._dynamo.reset()
        follow(backend, step, fullgraph=False)
    model, optimizer = problem()
    backward(model, 0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="hyperparameters or state were changed before step"):
        torch.compile(lower, backend=backend, fullgraph=True)(model, optimizer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_share_memory_are_stepped_outside_the_graph(backend):
    def make():
        model, _ = problem()
        flat = torch.randn(200)
        with torch.no_grad():
            model[0].weight = torch.nn.Parameter(flat[:96].view(16, 6))
            model[2].weight = torch.nn.Parameter(flat[96:176].view(5, 16))
        return model, AdamP(model.parameters())

    assert sum(follow(backend, plain, fullgraph=False, make=make)) == 0


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_loaded_cleared_and_grown(backend):
    def between(optimizer, i):
        if i == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if i == 2:
            optimizer.state.clear()

    assert follow(backend, plain, between) == [1]


def test_schedulers_and_hooks():
    def make():
        model, optimizer = problem()
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: None)
        optimizer.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return model, optimizer

    # torch wraps step() of an optimizer that has a scheduler in a function that Dynamo does not trace, hence no
    # fullgraph; what it calls is compiled on its own.
    assert follow("aot_eager", plain, lambda o, i: o.scheduler.step(), fullgraph=False, make=make) == [1]


def test_pre_hook_that_changes_lr():
    def make():
        model, optimizer = problem()

        def halve(optimizer, args, kwargs):
            optimizer.param_groups[0]["lr"] *= 0.5

        optimizer.register_step_pre_hook(halve)
        return model, optimizer

    follow("aot_eager", plain, fullgraph=False, make=make)


def test_closure_and_whole_iteration():
    def with_closure(model, optimizer):
        def closure():
            for p in model.parameters():
                p.grad = None
            loss = model(torch.ones(2, 6)).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure)

    assert sum(follow("eager", with_closure, fullgraph=False)) == 1


def test_compiled_method():
    model, optimizer = problem()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    for i in range(3):
        backward(model, i)
        step()
        optimizer.param_groups[0]["lr"] *= 0.5
    assert counter.frame_count == 1
    assert optimizer.state[model[0].weight]["step"] == 3


def test_two_optimizers_and_copies_keep_apart():
    compiled = torch.compile(lambda optimizer: optimizer.step(), backend="aot_eager", fullgraph=True)
    first = problem()
    backward(first[0], 0)
    compiled(first[1])
    for model, optimizer in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        before = [p.clone() for p in (*first[0].parameters(), *model.parameters())]
        backward(model, 1)
        compiled(optimizer)
        moved = [
            not torch.equal(p, q) for p, q in zip((*first[0].parameters(), *model.parameters()), before, strict=True)
        ]
        assert moved == [False] * 4 + [True] * 4


def test_compiled_code_keeps_no_optimizer_alive():
    model, optimizer = problem()
    backward(model, 0)
    compiled = torch.compile(lambda o: o.step(), backend="aot_eager", fullgraph=True)
    compiled(optimizer)
    alive = weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_come_through(backend):
    model, optimizer = problem()
    backward(model, 0)
    compiled = torch.compile(lambda: optimizer.step(), backend=backend, fullgraph=True)
    compiled()
    weights = copy.deepcopy(model.state_dict())
    optimizer.state[model[2].weight]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state 'exp_avg' of parameter 0 of group 1 has shape"):
        compiled()
    for name, p in model.state_dict().items():
        assert torch.equal(p, weights[name])


def test_operator():
    model, optimizer = problem()
    backward(model, 0)
    params = [p.detach() for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    args = (params, grads, [], [0, 1, 2, 3], [], optimizer._handle)
    torch.library.opcheck(torch.ops.fused_adamp.optimizer_step.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_runs_outside_the_graph(backend):
    def step(model, optimizer):
        optimizer.clip_grad_norm_(1e-3)
        optimizer.step()

    assert follow(backend, step, fullgraph=False) == [1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tensor", [False, True])
def test_the_option_clips_inside_of_the_operator(backend, tensor):
    """In one graph, for every value; the norm is eager's."""
    norms = []

    def between(optimizer, i):
        norms.append(optimizer.grad_norm)
        for group in optimizer.param_groups:
            if tensor:
                group["max_grad_norm"].fill_(10.0 ** -(i + 2) / 2)
            else:
                group["max_grad_norm"] = 10.0**-i

    def make():
        return problem(max_grad_norm=torch.tensor(1e-3) if tensor else 1e-3)

    assert follow(backend, plain, between, make=make) == [1]
    assert all(torch.equal(a, b) for a, b in zip(norms[::2], norms[1::2], strict=True))
    assert len({norm.item() for norm in norms}) == 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("always", [True, False], ids=["from the start", "in between"])
def test_gradients_of_another_dtype_are_stepped_outside_the_graph(backend, always):
    """Dynamo takes no tensor whose gradient has another dtype."""

    def make():
        p = torch.nn.Parameter(torch.arange(24.0).view(4, 6) / 24)
        return p, AdamP([p], lr=torch.tensor(0.1))

    pairs = make(), make()
    compiled = torch.compile(lambda optimizer: optimizer.step(), backend=backend)
    for i in range(4):
        dtype = torch.bfloat16 if always or i in (1, 2) else torch.float32
        gradient = torch.randn(4, 6).to(dtype)
        for (p, optimizer), step in zip(pairs, (compiled, AdamP.step), strict=True):
            p.grad = None
            p.grad_dtype = dtype
            p.grad = gradient.clone()
            step(optimizer)
        assert torch.equal(pairs[0][0], pairs[1][0]), i
        assert pairs[0][1].state[pairs[0][0]]["step"] == i + 1


def test_a_step_that_dynamo_gives_up_on_is_made_all_the_same():
    """Then it runs what it has traced so far, and calls the rest as Python."""
    model, optimizer = problem()
    twin, other = problem()
    for _ in range(2):
        backward(model, 0)
        backward(twin, 0)
        optimizer._traced_step()
        other.step()
        assert_same([(model, optimizer), (twin, other)])


@pytest.mark.parametrize("call", ["decisions", "projection_report", "grad_norm"])
def test_what_a_compiled_function_reads_is_of_the_step_before_it(call):
    """Dynamo would read it while it traces, when the step has not run."""

    def step(optimizer):
        optimizer.step()
        if call == "grad_norm":
            return optimizer.grad_norm
        found = getattr(optimizer, call)()
        return list(found.values()) if call == "decisions" else list(found)

    results = []
    for function in (step, torch.compile(step, backend="eager")):
        model, optimizer = problem(max_grad_norm=1.0)
        results.append([])
        for i in range(3):
            backward(model, i)
            results[-1].append(repr(function(optimizer)))
    assert results[0] == results[1]


def test_the_operator_takes_gradients_and_gives_them_back(backend: str) -> None:
    """Compiled code may hand it copies. A parameter that it leaves out is stepped as if it had no gradient."""
    ours, expected = ([torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)] for _ in range(2))
    for p in ours:
        p.grad = torch.full_like(p, 7.0)
    before = [p.grad for p in ours]
    given = torch.full((3, 4), -2.0)
    optimizer = AdamP(ours, lr=0.1, backend=backend)
    torch.ops.fused_adamp.optimizer_step.default([ours[0]], [given], [], [0], [], optimizer._handle)
    assert all(p.grad is g for p, g in zip(ours, before, strict=True))
    expected[0].grad = given
    AdamP(expected, lr=0.1, backend=backend).step()
    assert all(map(torch.equal, ours, expected))


def test_a_clip_that_a_subclass_changes_is_changed_once() -> None:
    class Halved(AdamP):
        def clip_grad_norm_(self, max_norm: Any, *arguments: Any) -> Any:
            return super().clip_grad_norm_(max_norm / 2, *arguments)

    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    optimizer = Halved([p])
    torch.compile(lambda: optimizer.clip_grad_norm_(1.0), backend="eager")()
    assert optimizer._memory.clipping is not None
    assert optimizer._memory.clipping.max_norm == 0.5
