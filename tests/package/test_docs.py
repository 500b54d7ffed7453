"""Documentation that is code runs; numbers, names and links in it are those of the code and of measured files.

In a page the python blocks run in order in one namespace. The comment behind a ``print`` is what it prints. A block
whose fence says ``python cuda`` needs a GPU, one that says ``python timm`` that package; both are compiled everywhere.
A table headed ``this`` and ``says`` has calls and their errors, "..." standing for what was left out; it runs at the
page's end.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import json
import re
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import adamp
import pytest
import torch
from test_precision import BYTES, MODES

import fused_adamp.adamp
import fused_adamp.sgdp
from fused_adamp import SGDP, AdamP
from fused_adamp.batch import Scalars
from fused_adamp.options import options_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
GUIDES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "bench/README.md", *GUIDES]
RUNNABLE = [page for page in PAGES if "```python" in (ROOT / page).read_text()]

RESULTS = "bench/results/amd-epyc-2026-11-29-09b71e7.json", "bench/results/amd-epyc-2026-11-30-344dc76.json"
MEASURED = [row for name in RESULTS for row in json.loads((ROOT / name).read_text())["rows"]]
WORKLOADS = {  # columns of the tables of speed
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_b16",
    "GPT-2 (124M)": "gpt2",
    "MobileNetV2": "mobilenet_v2",
    "3D Gaussians": "gaussians",
}
SPEEDS = {  # rows of the tables, and what the file calls the optimizer
    "AdamP over AdamW(fused=True)": "fused_adamp.AdamP",
    "the same, both sides clip gradients": "fused_adamp.AdamP",
    "clovaai's AdamP over AdamW(fused=True)": "clovaai.AdamP",
    "pytorch_optimizer's AdamP over AdamW(fused=True)": "pytorch_optimizer.AdamP",
    "SGDP over SGD(momentum=0.9, fused=True)": "fused_adamp.SGDP",
    "AdamP, bfloat16 moments, over AdamP in float32": "fused_adamp.AdamP float32, bf16 state",
    "AdamP, bfloat16 weights with remainder, over AdamP in float32": "fused_adamp.AdamP bf16, remainder",
}


def read(page: str) -> str:
    return (ROOT / page).read_text()


@pytest.mark.parametrize("module", [fused_adamp.adamp, fused_adamp.sgdp])
def test_docstrings(module: object) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_the_site_has_the_options_of_the_docstrings(cls: type[torch.optim.Optimizer], monkeypatch: Any) -> None:
    """`make docs` reads the table of options without importing the package, and so does not run it."""
    pytest.importorskip("griffe")
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(ROOT / "docs")
    static = importlib.import_module("docstrings").options(cls.__name__)
    assert static == {name: option.meaning for name, option in options_of(cls.__name__).items()}


# Code that runs.


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Each python block's need and its source, preceded by as many empty lines as the page has lines before it."""
    text = read(page)
    matches = list(re.finditer(r"^```python *(.*)\n((?s:.*?))^```$", text, re.MULTILINE))
    assert len(matches) == text.count("```python")
    for match in matches:
        yield match[1], "\n" * (text[: match.start()].count("\n") + 1) + match[2]


def there_is(need: str) -> bool:
    if need == "cuda":
        return torch.cuda.is_available()
    return not need or importlib.util.find_spec(need) is not None


def errors(page: str) -> Iterator[tuple[str, str]]:
    """The rows of the page's tables of errors: call and message."""
    for table in re.findall(r"^\| this \| says \|\n\|[-|]+\|\n((?:\|.*\n)+)", read(page) + "\n", re.MULTILINE):
        rows = re.findall(r"^\| `(.*)` \| `(.*)` \|$", table, re.MULTILINE)
        assert len(rows) == table.count("\n")
        yield from rows


@pytest.mark.parametrize("page", RUNNABLE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # these two are torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    namespace: dict[str, Any] = {}
    for need, source in blocks(page):
        code = compile(source, page, "exec")
        if not there_is(need):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, namespace)
        printed = iter(output.getvalue().splitlines())
        for line in re.findall(r"^ *print\(.*\)  # (.*)$", source, re.MULTILINE):
            assert line in printed, f"{page} says {line!r}, printed was {output.getvalue()!r}"
    for call, says in errors(page):
        with pytest.raises(Exception) as caught:  # noqa: PT011  # the table says which
            exec(call, namespace)
        pieces = f"{caught.type.__name__}: {caught.value}", *says.split("...")
        assert re.fullmatch("(?s)" + ".*".join(map(re.escape, pieces[1:])), pieces[0]), f"{says}\n{pieces[0]}"


def test_make_targets_that_the_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:`|^ {4})make ([a-z0-9-]+)", read(page), re.MULTILINE)) <= targets, page


# Links and anchors.


def anchors(page: Path) -> set[str]:
    """The headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = ROOT / page if not path else (ROOT / page).parent / path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page() -> None:
    """Notes may be one page further on."""
    links = {page: set(re.findall(r"\]\(([^)#\s]+)", read(page))) for page in PAGES}
    notes = {page for page in GUIDES if page.startswith("docs/notes/")}
    assert {*GUIDES} - notes <= links["README.md"]
    assert notes <= {f"docs/{link}" for page in GUIDES for link in links[page]}


# Names and numbers that the code has too.


def named(text: str) -> set[str]:
    """The names that stand first in a piece of code within the text."""
    return set(re.findall(r"`(?:\w+=[^`]*, )?([a-z_]+)", text)) | set(re.findall(r"\b([a-z_]+)=", text))


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_every_argument_is_explained(cls: type[torch.optim.Optimizer]) -> None:
    assert inspect.signature(cls).parameters.keys() <= named("".join(map(read, ["README.md", *GUIDES])))


@pytest.mark.parametrize(
    ("page", "theirs"), [("from-adamp", adamp.AdamP), ("from-adamp", adamp.SGDP), ("from-adamw", torch.optim.AdamW)]
)
def test_migration_covers_every_argument(page: str, theirs: type[torch.optim.Optimizer]) -> None:
    assert inspect.signature(theirs).parameters.keys() <= named(read(f"docs/{page}.md"))


def test_bytes_are_those_of_the_tests() -> None:
    """docs/precision.md: state, both, step, for AdamP and SGDP, against what test_precision.py measures."""
    table = re.findall(r"^\| ((?:b?float)\d+) \| (?:`(.*)` )?\| (.*) \|$", read("docs/precision.md"), re.MULTILINE)
    assert len(table) >= 7
    for weights, options, numbers in table:
        mode = getattr(torch, weights), eval(f"dict({options})", {"torch": torch})
        (name,) = (name for name, known in MODES.items() if known == mode)
        (both, step), size = BYTES[name][:2], mode[0].itemsize
        sgdp_both, sgdp_step = BYTES[name][2:]
        expected = [both - size, both, step, sgdp_both - size, sgdp_both, sgdp_step]
        assert [float(number) for number in numbers.split(" | ")] == expected, name


def ratios(workload: str, optimizer: str, *, clip: bool) -> str:
    """A cell of the tables of speed: plain / projected, a star where the peer was disturbed."""
    cells = []
    for case in ("none", "channel"):
        wanted = {"workload": workload, "optimizer": optimizer, "case": case, "clip": clip}
        (row,) = (row for row in MEASURED if wanted.items() <= row.items())
        (ratio,) = (value for key, value in row.items() if key.startswith("ratio_to"))
        cells.append(f"{ratio:.{1 if ratio > 3 else 2}f}" + "*" * row["disturbed"])
    return " / ".join(cells)


@pytest.mark.parametrize(
    ("page", "rows", "results"), [("README.md", 4, RESULTS), ("docs/performance.md", 7, RESULTS[:1])]
)
def test_speeds_are_those_of_the_result_files(page: str, rows: int, results: tuple[str, ...]) -> None:
    ((models, table),) = re.findall(
        r"^\| plain / projected \| (.*) \|\n\|[-|]+\|\n((?:\|.*\n)+)", read(page), re.MULTILINE
    )
    workloads = [WORKLOADS[model] for model in models.split(" | ")]
    measured = [line.strip("| ").split(" | ") for line in table.splitlines() if line[2:].split(" | ")[0] in SPEEDS]
    assert len(measured) == rows
    for name, *cells in measured:
        assert cells == [ratios(w, SPEEDS[name], clip="clip" in name) for w in workloads], name
    assert all(name in read(page) for name in results)


def test_the_plot_s_numbers_are_those_of_its_record() -> None:
    """docs/index.md: norm growth, effective step, accuracy."""
    record = json.loads(read("docs/images/digits.json"))
    table = dict(re.findall(r"^\| ([\w +]+) \| ([\d.]+ \| [\d.]+ \| [\d.]+) \|$", read("docs/index.md"), re.MULTILINE))
    assert table == {
        row["optimizer"]: f"{row['norm_growth']:.3f} | {1e3 * row['effective_step_rad']:.2f} | "
        f"{100 * fmean(row['test_accuracy']):.2f}"
        for row in record["rows"]
    }
    assert (ROOT / "docs/images/digits.png").stat().st_size < 100_000


def test_the_extension_reads_the_hyperparameters_in_the_same_order() -> None:
    header = read("csrc/algorithm.h")
    fields = re.search(r"struct Scalars \{\s*double ([^;]*);", header)
    assert fields
    assert re.split(r",\s*", fields.group(1)) == list(Scalars._fields)
