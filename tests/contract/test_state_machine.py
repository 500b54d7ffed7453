"""Calls in any order: whatever came before, a step is what a model computes that remembers nothing but a pending clip.

tests/support/machine.py has the model and says what each operation does; here hypothesis strings them together. Every
run is the same one, and short. For a longer search, with new examples each time:

    python -m pytest tests/contract/test_state_machine.py --hypothesis-profile long
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from distributed import backends, run
from each_plan import PLANS, under_each_plan
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from machine import COUNT, OPTIONS, Machine, Op, begin, do
from trajectory import KINDS, RULES

from fused_adamp.backends import triton

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_RULE = pytest.mark.parametrize("optimizer", list(RULES))


def op(name: str, /, **options: SearchStrategy[Any]) -> SearchStrategy[Op]:
    return st.builds(Op, st.just(name), st.fixed_dictionaries(options))


SEED = st.integers(0, 99)
ONE = st.integers(0, COUNT - 1)
GROUP = st.integers(0, 1)
SOME = st.sampled_from([None, None, (0, 1, 4, 5), (2, 3, 6)]) | st.sets(ONE).map(tuple)
"""Parameters: None is all of them; all of one dtype; any."""
FACTOR = st.sampled_from([0.1, 0.5, 20.0])
LIMIT = st.sampled_from([0.5, 0.05, 3.0, 1e6, 0.0, math.inf])
NORM = st.sampled_from([2.0, 2.0, 2.0, 1.0, math.inf])
SCALE = st.sampled_from([None, None, None, 2.0**-4, 1024.0])
HOW = st.sampled_from(["in place", "replace", "data", "inference"])
WRITTEN = st.sampled_from(["in place", "data"])

GIVE = op("give", which=SOME, kind=st.sampled_from([*KINDS, *KINDS, "zero"]), how=HOW, seed=SEED)
CLIP = op("clip", max_norm=LIMIT, norm_type=NORM)
STEP = op(
    "step",
    scale=SCALE,
    found_inf=st.sampled_from([None, None, None, 0.0, 1.0]),
    hook=st.none() | st.none() | st.tuples(LIMIT, NORM),
    closure=st.none() | st.none() | st.lists(GIVE | CLIP, max_size=2),
)
TENSORS = st.one_of(
    op("swap_gradients"),  # the first program of a search takes the first everywhere
    GIVE,
    op("scale_gradients", which=SOME, factor=FACTOR, how=WRITTEN),
    op("drop", which=SOME),
    op("zero_grad", set_to_none=st.booleans()),
    op("move", i=ONE, kind=st.sampled_from(["gradient", "random"]), how=WRITTEN | st.just("storage"), seed=SEED),
    op("replace", i=ONE, keep_state=st.booleans(), keep_gradient=st.booleans(), seed=SEED),
)
SETTINGS = st.one_of(
    op("option", group=GROUP, name=st.sampled_from(list(OPTIONS)), pick=st.integers(0, 3)),
    op("scale", scale=SCALE),
    op("limit", max_norm=st.none() | LIMIT),
    op("reorder", group=GROUP),
)
TEST = op("option", group=GROUP, name=st.sampled_from(["delta", "projection", "eps"]), pick=st.integers(0, 3))
STATE = st.one_of(
    op("forget", i=ONE),
    op("write_state", i=ONE, factor=FACTOR, how=st.sampled_from(["in place", "replace"])),
    op("save"),
    op("load", saved=st.booleans()),
)
FAILURE = op("clip_infinite", i=ONE) | op(
    "fail",
    kind=st.sampled_from(["freed", "sparse", "shape", "closure", "hook"]),
    call=st.sampled_from(["step", "clip"]),
    i=ONE,
)
CHANGE = st.sampled_from([TENSORS, GIVE, TENSORS, TEST, SETTINGS, STATE, FAILURE]).flatmap(lambda kind: kind)


class Calls(RuleBasedStateMachine):
    """Draws operations; ``start`` gives a function that does them, and returns what the run has met so far."""

    def __init__(self, start: Callable[[], Callable[[Op], Counter[str]]], met: Counter[str]) -> None:
        super().__init__()
        self.act, self.met = start(), met
        self.last: Counter[str] = Counter()

    def do(self, op: Op) -> None:
        self.last = self.act(op)

    def teardown(self) -> None:
        self.met.update(self.last)

    @initialize(kind=st.sampled_from(KINDS))
    def begin(self, kind: str) -> None:
        self.do(Op("give", {"which": None, "kind": kind, "how": "replace", "seed": 0}))

    @rule(op=CHANGE)
    def change(self, op: Op) -> None:
        self.do(op)

    @rule(op=CLIP)
    def clip(self, op: Op) -> None:
        self.do(op)

    @rule(op=STEP)
    def step(self, op: Op) -> None:
        self.do(op)

    @rule(
        clip=CLIP,
        between=st.lists(CHANGE, min_size=1, max_size=3),
        step=STEP,
        after=st.just([]) | st.tuples(GIVE, STEP),
    )
    def clipped_step(self, clip: Op, between: list[Op], step: Op, after: list[Op]) -> None:
        """The others may come to the same, but do so seldom."""
        for op in (clip, *between, step, *after):
            self.do(op)


def search(start: Callable[[], Callable[[Op], Counter[str]]], count: int) -> None:
    """That many searches of a few programs each; in profile "long" more, and new ones. All that matters must be met.

    One search of many programs would try small changes of a few: it is meant to find rare failures, not wide ones.
    """
    met: Counter[str] = Counter()
    profile = settings()
    long = max(profile.max_examples // 100, 1)
    chosen = settings(
        profile,
        max_examples=3,
        stateful_step_count=20,
        derandomize=False,  # the seed decides
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    first = random.getrandbits(32) if long > 1 else 0  # from where on even two meet all
    for number in range(first, first + count * long):
        factory = seed(number)(lambda: Calls(start, met))
        run_state_machine_as_test(factory, settings=chosen)  # type: ignore[no-untyped-call]
    missing = {
        *("step: held", "step: changed", "step: blind", "step: other test", "step: clipped"),
        *("step: by option", "failed step", "failed clip", "NONE", "CHANNEL", "LAYER"),
    } - {name for name, count in met.items() if count}
    assert not missing, f"met {dict(met)}"


@EVERY_RULE
@pytest.mark.parametrize("count", [10, pytest.param(25, marks=pytest.mark.exhaustive)])
def test_one_process(optimizer: str, count: int, backend: str) -> None:
    def start() -> Callable[[Op], Counter[str]]:
        machine = Machine(optimizer, backend)

        def act(op: Op) -> Counter[str]:
            machine.do(op)
            return machine.met

        return act

    search(start, 2 if backend == "triton" else count)


@pytest.mark.parametrize(("optimizer", "name"), [*zip(RULES, backends(), strict=False)])
@pytest.mark.skipif(triton.interpreted(), reason="the ranks have been tried without Triton's interpreter")
def test_two_ranks(optimizer: str, name: str) -> None:
    def start() -> Callable[[Op], Counter[str]]:
        run(2, begin, optimizer, name)
        return lambda op: run(2, do, op)[0]  # type: ignore[no-any-return]

    search(start, 2)


@pytest.fixture(scope="module")
def sessions(request: pytest.FixtureRequest) -> dict[str, tuple[int, str]]:
    profile = request.config.getoption("--hypothesis-profile")
    given = ["--hypothesis-profile", profile] if profile else []
    given += ["-W", "ignore"]  # the interpreter's
    return under_each_plan(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "one_process and triton", *given
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.skipif(triton.load() is not None, reason=str(triton.load()))
def test_both_plans(plan: str, sessions: dict[str, tuple[int, str]]) -> None:
    status, output = sessions[plan]
    assert status == 0, output
    assert "2 passed" in output, output
