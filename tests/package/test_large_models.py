"""docs/large-models.md: its numbers are those of its results, its claims hold, and its script runs and goes on."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fused_adamp import AdamP

if TYPE_CHECKING:
    from torch import Tensor

pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "large-models.md"
NORMS = ("pre", "qk", "sandwich")
CHANCE = math.erf(0.1 / math.sqrt(2))
TINY = {
    "width": 16,
    "depth": 1,
    "heads": 2,
    "context": 8,
    "batch": 2,
    "steps": 4,
    "seeds": 1,
    "every": 1,
    "others": ((1e-2, 0.5),),
    "draws": 20,
    "walk": 10,
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of examples/paper by its name."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "paper")
    return importlib.import_module


# The page and its results.


def test_the_tables_are_those_of_the_results(module: Any) -> None:
    page, large_models = module("large_models_page"), module("large_models")
    results = json.loads(large_models.RESULTS.read_text())
    assert results["settings"] == json.loads(json.dumps(vars(large_models.Settings())))
    assert results["runs"].keys() == large_models.jobs(large_models.Settings()).keys()
    assert page.filled(PAGE.read_text(), results) == PAGE.read_text()


def test_the_figures_are_there_and_small() -> None:
    figures = re.findall(r"\]\((images/large-models-.*\.svg)\)", PAGE.read_text())
    assert len(figures) == 2
    for figure in figures:
        text = (PAGE.parent / figure).read_text()
        assert len(text) < 150_000
        assert "dc:date" not in text


def test_the_page_refuses_missing_and_double_marks(module: Any) -> None:
    page, results = module("large_models_page"), json.loads(module("large_models").RESULTS.read_text())
    for text in ("", PAGE.read_text() * 2):
        with pytest.raises(ValueError, match=r"the page has [02] parts between <!-- decisions -->"):
            page.filled(text, results)


# The script.


def test_a_run_goes_on_where_it_stopped(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model with the most norms."""
    large_models = module("large_models")
    monkeypatch.setattr(large_models, "NORMS", NORMS[-1:])
    settings, path = large_models.Settings(**TINY), tmp_path / "results.json"
    console = module("rich.console").Console(quiet=True)
    train, trained = large_models.train, []
    monkeypatch.setattr(large_models, "HELD_OUT_BATCHES", 1)

    def train_two(norms: str, *arguments: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(norms)
        return train(norms, *arguments)

    monkeypatch.setattr(large_models, "train", train_two)
    with pytest.raises(KeyboardInterrupt):
        large_models.run_all(settings, path, console)
    part = json.loads(path.read_text())["runs"]
    monkeypatch.setattr(large_models, "train", train)
    whole = large_models.run_all(settings, path, console)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text()) == whole
    assert whole["runs"].keys() == large_models.jobs(settings).keys()
    name = next(name for name in part if name.startswith("sandwich"))
    assert whole["runs"][name] == part[name]
    assert train("sandwich", "AdamW", settings.lr, 0.1, 0, settings) == part[name], "a run is the same when repeated"

    monkeypatch.setattr(large_models, "train", None)
    assert large_models.run_all(settings, path, console) == whole, "nothing is left to run"
    weights = whole["runs"]["sandwich, AdamP, lr 0.01, decay 0.1, seed 0"]["weights"]
    assert {len(w["layer"]) for w in weights.values()} == {large_models.PHASES}
    assert all(weights[f"block1.{name}.weight"]["layer"] == [1.0] * 4 for name in ("attention.query", "mlp.down"))


def test_the_figures_can_be_drawn(module: Any, tmp_path: Path) -> None:
    page, results = module("large_models_page"), json.loads(module("large_models").RESULTS.read_text())
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text())
    page.draw(results, copy, tmp_path)
    assert copy.read_text() == PAGE.read_text()
    assert len([*tmp_path.glob("*.svg")]) == 2


def test_other_settings_start_over(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large_models, path = module("large_models"), tmp_path / "results.json"
    monkeypatch.setattr(large_models, "jobs", lambda settings: {"draws": (lambda: {"n": settings.draws}, ())})
    console = module("rich.console").Console(quiet=True)
    for draws in (1, 2):
        assert large_models.run_all(large_models.Settings(draws=draws), path, console)["runs"] == {
            "draws": {"n": draws}
        }


# The claims.


@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (2, 64), (3, 64), (16, 16)])
def test_random_weights_pass_as_often_as_the_page_says(module: Any, rows: int, cols: int) -> None:
    """Within five standard deviations of a count of independent draws; the seed is fixed."""
    draws = 1000
    rates = module("large_models").pass_rates(rows, cols, draws)
    for rate, expected in ((rates["channel"], CHANCE**rows), (sum(rates.values()), CHANCE)):
        assert abs(rate - expected) < 5 * math.sqrt(expected * (1 - expected) / draws) + 1e-3


@pytest.mark.parametrize("norms", NORMS)
def test_the_weights_before_a_norm_have_no_length(module: Any, norms: str) -> None:
    """Three times the weight leaves the loss where it is, for these weights alone; the norms' eps is 1e-16 here."""
    gpt = module("gpt")
    model = gpt.build_gpt(16, 1, 2, norms).double()
    x, y = torch.randint(256, (2, 4, 16))

    def loss() -> Tensor:
        return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    with torch.no_grad():
        before = loss().item()
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(3)
                change = abs(loss().item() - before)
                p.div_(3)
                invariant = gpt.kind_of(name) in gpt.NORMALIZED[norms]
                assert change < 1e-12 if invariant else change > 1e-4, name


def test_the_radial_gradients_of_a_product_s_factors_are_equal(module: Any) -> None:
    gpt = module("gpt")
    model = gpt.build_gpt(16, 1, 2, "pre").double()
    x, y = torch.randint(256, (2, 4, 16))
    functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    radial = {gpt.kind_of(name): (p * p.grad).sum().item() for name, p in model.named_parameters() if p.ndim > 1}
    for a, b in (("query", "key"), ("value", "out")):
        assert radial[a] == pytest.approx(radial[b], rel=1e-9)
    assert radial["up"] != pytest.approx(radial["down"], rel=1e-2)


def test_of_a_gated_mlp_before_a_norm_the_gate_alone_has_a_length() -> None:
    x = torch.randn(8, 16, dtype=torch.float64)
    weights = {name: torch.randn(16, 16, dtype=torch.float64) for name in ("gate", "up", "down")}

    def output(scaled: str = "") -> Tensor:
        w = {name: weight * (3 if name == scaled else 1) for name, weight in weights.items()}
        return functional.rms_norm((functional.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], (16,))

    changed = {name for name in weights if (output(name) - output()).abs().max() > 1e-6}
    assert changed == {"gate"}


def test_fixed_norm_and_projection_are_equal_to_first_order() -> None:
    """Half the learning rate, a quarter of the difference; the norm grows by the square of AdamP's step alone."""
    start, gradient = torch.randn(2, 1, 64, dtype=torch.float64)
    differences = []
    for lr in (1e-3, 5e-4):
        stepped = {}
        for projection in ("layer", "none"):
            w = nn.Parameter(start.clone())
            w.grad = gradient
            AdamP([w], lr=lr, projection=projection).step()
            stepped[projection] = w.detach()
        fixed = stepped["none"] * start.norm() / stepped["none"].norm()
        differences.append((stepped["layer"] - fixed).norm().item())
        step = stepped["layer"] - start
        assert stepped["layer"].norm().item() == pytest.approx(math.hypot(start.norm(), step.norm()), rel=1e-9)
    assert differences[0] / differences[1] == pytest.approx(4, rel=0.01)


def test_the_random_walks_settle_where_the_page_predicts(module: Any) -> None:
    runs = json.loads(module("large_models").RESULTS.read_text())["runs"]
    for name, ratio in (("AdamW", 1 / 19), ("0.1", 0.1), ("1/19", 1 / 19)):
        norm, turn = math.sqrt(1e-2 * 4096 / (2 * 19 * ratio)), math.sqrt(2e-2 * ratio)
        walk = runs[f"walk {name}"]
        assert 0.92 * norm < walk["norm"] < norm
        assert walk["turn"] == pytest.approx(turn, rel=0.01)
