"""The tasks: small ones of the kinds on which the paper compares the optimizers. None downloads anything.

The paper's values are those of the tables on the authors' project page, https://clovaai.github.io/AdamP/.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1]))

from digits import Block, build_network, conv_bn, cpu_name
from gpt import build_gpt, sources
from training import Metric, Split, Task

__all__ = ["TASKS", "corruptions", "cpu_name"]


def splits_of(*parts: Tensor, train: int, validation: int, test: int, labels: Tensor | None = None) -> dict[str, Split]:
    """Disjoint random examples for each split; with labels, each class has its share in each split."""
    rest = np.arange(len(parts[0]))
    found = {}
    for seed, (name, size) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        stratify = None if labels is None else labels[rest]
        chosen, rest = (
            train_test_split(rest, train_size=size, stratify=stratify, random_state=seed)
            if size < len(rest)
            else (rest, rest[:0])
        )
        found[name] = tuple(part[torch.as_tensor(chosen)] for part in parts)
    return found


def images() -> tuple[Tensor, Tensor]:
    """The digits ``(1797, 1, 8, 8)`` between 0 and 1, and their classes."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


# Classification, and robustness of the same networks.


@cache
def load_images() -> dict[str, Split]:
    x, y = images()
    return splits_of(x, y, train=500, validation=500, test=797, labels=y)


def classification_loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(network(x), y)


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (network(x).argmax(dim=1) == y).double().mean().item()


def rotated(x: Tensor, degrees: float) -> Tensor:
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]]).expand(len(x), 2, 3)
    return functional.grid_sample(x, functional.affine_grid(turn, list(x.shape), False), align_corners=False)


def corruptions(x: Tensor) -> dict[str, Tensor]:
    """Images between 0 and 1, corrupted in eight ways; always the same for the same images."""
    generator = torch.Generator().manual_seed(0)
    noise, chance = torch.randn(x.shape, generator=generator), torch.rand(x.shape, generator=generator)
    hole = torch.zeros(len(x), 1, 8, 8)
    for image, (row, column) in zip(hole, torch.randint(0, 6, (len(x), 2), generator=generator).tolist(), strict=True):
        image[:, row : row + 3, column : column + 3] = 1
    corrupted = {
        "Gaussian noise": x + 0.3 * noise,
        "salt and pepper": torch.where(chance < 0.1, (chance < 0.05).float(), x),
        "blur": functional.avg_pool2d(x, 3, stride=1, padding=1),
        "pixelate": functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2),
        "contrast": 0.5 + 0.3 * (x - 0.5),
        "brightness": x + 0.4,
        "occlusion": x * (1 - hole),
        "rotation": rotated(x, 25),
    }
    return {name: image.clamp(0, 1) for name, image in corrupted.items()}


def measure_images(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    by_kind = {name: accuracy(network, image, y) for name, image in corruptions(x).items()}
    return {"accuracy": accuracy(network, x, y), "corrupted": sum(by_kind.values()) / len(by_kind), **by_kind}


# Retrieval.


@cache
def load_few_images() -> dict[str, Split]:
    x, y = images()
    return splits_of(x, y, train=100, validation=800, test=897, labels=y)


class Embedder(nn.Module):
    """A vector of length 1 for each image; each trained class has a proxy, which is normalized too."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = build_network()
        self.trunk.linear = nn.Linear(24, 16, bias=False)
        self.proxies = nn.Parameter(torch.randn(10, 16))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(self.trunk(x), dim=1)


def retrieval_loss(network: Embedder, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(16 * network(x) @ functional.normalize(network.proxies, dim=1).T, y)


def measure_retrieval(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """How often the nearest other image is of the same class."""
    embedded = network(x)
    nearest = (embedded @ embedded.T).fill_diagonal_(-math.inf).argmax(dim=1)
    return {"recall": 100 * (y[nearest] == y).double().mean().item()}


# Audio.

RATE, SAMPLES, TIMBRES = 8000, 2048, 10


@cache
def load_sounds() -> dict[str, Split]:
    """Synthesised notes. A class is the strengths of eight harmonics and a decay. Pitch, phases, noise are random."""
    generator = torch.Generator().manual_seed(0)
    strengths = torch.rand(TIMBRES, 8, generator=generator) ** 2
    decays = 2 + 10 * torch.rand(TIMBRES, 1, generator=generator)
    count = 1600
    y = torch.arange(count) % TIMBRES
    pitch = 150 * 2 ** (1.5 * torch.rand(count, 1, 1, generator=generator))  # 150 to 424 Hz
    phases = 2 * math.pi * torch.rand(count, 8, 1, generator=generator)
    jitter = 0.6 * torch.randn(count, 8, 1, generator=generator)  # the same instrument does not sound the same twice
    time = torch.arange(SAMPLES) / RATE
    harmonics = torch.sin(2 * math.pi * pitch * torch.arange(1, 9).view(1, 8, 1) * time + phases)
    notes = (strengths[y].unsqueeze(2) * jitter.exp() * harmonics).sum(dim=1) * torch.exp(-decays[y] * time)
    notes = notes / notes.square().mean(dim=1, keepdim=True).sqrt()
    notes = notes + 0.7 * torch.randn(count, SAMPLES, generator=generator)
    spectrum = torch.stft(notes, 256, 128, window=torch.hann_window(256), return_complex=True).abs().square()
    x = (mel_filters() @ spectrum + 1e-3).log().unsqueeze(1)
    return splits_of((x - x.mean()) / x.std(), y, train=500, validation=400, test=700, labels=y)


def mel_filters(bands: int = 16, bins: int = 129) -> Tensor:
    """Triangles ``(bands, bins)``, spaced evenly on the mel scale."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)
    low, middle, high = (edges[i : bands + i].unsqueeze(1) for i in range(3))
    frequencies = torch.linspace(0, RATE / 2, bins)
    return torch.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)).clamp(min=0)


# Language modelling.

CONTEXT = 64


@cache
def load_text() -> dict[str, Split]:
    """Windows of the standard library's sources; validation and test are halves of the files that are held out."""
    train, held_out = sources()
    half = len(held_out) // 2
    parts = {"train": train, "validation": held_out[:half], "test": held_out[half:]}
    windows = {name: text.unfold(0, CONTEXT + 1, CONTEXT) for name, text in parts.items()}
    even = {name: w if name == "train" else w[:: max(1, len(w) // 400)] for name, w in windows.items()}
    return {name: (window,) for name, window in even.items()}


def language_loss(network: nn.Module, window: Tensor) -> Tensor:
    window = window.long()
    return functional.cross_entropy(network(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def measure_text(network: nn.Module, windows: Tensor) -> dict[str, float]:
    losses = [language_loss(network, part).item() * len(part) for part in windows.split(64)]
    return {"bits": sum(losses) / len(windows) / math.log(2)}


# Detection.

CANVAS, STRIDE, OBJECTS = 24, 4, 3
CELLS = CANVAS // STRIDE


@cache
def load_canvases() -> dict[str, Split]:
    """Canvases with one to three digits of sizes 6 to 10; boxes ``(3, 4)`` as x0, y0, x1, y1; labels, -1 for none.

    Each split has its own images of digits.
    """
    generator = torch.Generator().manual_seed(0)
    digits = splits_of(*images(), train=900, validation=400, test=497)
    sizes = {"train": 800, "validation": 300, "test": 500}
    return {name: canvases(*digits[name], count, generator) for name, count in sizes.items()}


def canvases(x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> Split:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    pictures = 0.15 * torch.rand(count, 1, CANVAS, CANVAS, generator=generator)
    boxes, labels = torch.zeros(count, OBJECTS, 4), torch.full((count, OBJECTS), -1)
    for i in range(count):
        taken = torch.zeros(CANVAS, CANVAS, dtype=torch.bool)
        for k in range(draw(1, OBJECTS)):
            size, which = draw(6, 10), draw(0, len(x) - 1)
            left, top = draw(0, CANVAS - size), draw(0, CANVAS - size)
            area = slice(top, top + size), slice(left, left + size)
            if not taken[area].any():
                taken[area] = True
                digit = functional.interpolate(x[which : which + 1], (size, size), mode="bilinear")
                pictures[i, 0][area] += digit[0, 0]
                boxes[i, k] = torch.tensor([left, top, left + size, top + size])
                labels[i, k] = y[which]
    return pictures, boxes, labels


def build_detector() -> nn.Sequential:
    """From canvases to 15 numbers for each cell: object or not, box, class. A cell sees the objects centred in it."""
    head = nn.Conv2d(24, 15, 1)
    nn.init.constant_(head.bias[:1], -2.5)  # most cells have no object
    return nn.Sequential(conv_bn(1, 12), nn.ReLU(), Block(12, 16, 2), Block(16, 24, 2), Block(24, 24, 1), head)


def cells_of(network: nn.Module, x: Tensor) -> Tensor:
    return network(x).flatten(2).transpose(1, 2)


def centres() -> Tensor:
    """Of the cells, ``(cells, 2)`` as x, y."""
    along = (torch.arange(CELLS) + 0.5) * STRIDE
    return torch.cartesian_prod(along, along).flip(1)


def boxes_of(output: Tensor) -> Tensor:
    """The network's four numbers are the offset of the centre, in strides, and the logarithms of the size over 8."""
    middle = centres() + STRIDE * output[..., 1:3]
    half = 4 * output[..., 3:5].clamp(-2, 2).exp()
    return torch.cat([middle - half, middle + half], dim=-1)


def detection_loss(network: nn.Module, x: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    output = cells_of(network, x)
    image, slot = (labels >= 0).nonzero(as_tuple=True)
    wanted, label = boxes[image, slot], labels[image, slot]
    column, row = ((wanted[:, :2] + wanted[:, 2:]) / 2 / STRIDE).long().clamp(max=CELLS - 1).unbind(dim=1)
    cell = row * CELLS + column
    there = torch.zeros(output.shape[:2]).index_put((image, cell), torch.ones(len(cell)))
    objectness = functional.binary_cross_entropy_with_logits(output[..., 0], there, reduction="sum")
    place = functional.smooth_l1_loss(boxes_of(output)[image, cell] / STRIDE, wanted / STRIDE)
    return objectness / len(cell) + 4 * place + functional.cross_entropy(output[image, cell, 5:], label)


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``(..., n, 4)`` with boxes ``(..., m, 4)``: ``(..., n, m)``."""
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (a, b)]
    shared = sides.prod(dim=-1)
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-9)


def measure_canvases(network: nn.Module, x: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean over the classes of the average precision; a hit overlaps by half with an object that is not taken yet."""
    output = cells_of(network, x)
    overlap = overlaps(boxes_of(output), boxes)
    confidence, kind = output[..., 5:].softmax(dim=-1).max(dim=-1)
    score = output[..., 0].sigmoid() * confidence
    return {"precision": 100 * sum(average_precision(c, score, kind, overlap, labels) for c in range(10)) / 10}


def average_precision(label: int, score: Tensor, kind: Tensor, overlap: Tensor, labels: Tensor) -> float:
    """The area under precision over recall, where a precision counts as the best one at that recall or above."""
    image, cell = ((kind == label) & (score > 0.01)).nonzero(as_tuple=True)
    order = score[image, cell].argsort(descending=True)
    image, cell = image[order], cell[order]
    same = torch.where(labels[image] == label, overlap[image, cell], 0.0)
    taken, hits = set(), []
    for i, overlapping in zip(image.tolist(), same.tolist(), strict=True):
        best = max(range(OBJECTS), key=lambda k: -1.0 if (i, k) in taken else overlapping[k])
        hits.append(overlapping[best] >= 0.5 and (i, best) not in taken)
        if hits[-1]:
            taken.add((i, best))
    found = np.cumsum(hits)
    precision = np.maximum.accumulate((found / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float((precision * hits).sum() / max(1, int((labels == label).sum())))


# Each task beside the paper's tables.

TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits",
            about="A residual network of 21,694 weights learns 500 of scikit-learn's 8x8 digits. Every convolution is "
            "followed by BatchNorm. 500 others are for validation and 797 for the test.",
            load=load_images,
            build=build_network,
            loss=classification_loss,
            measure=measure_images,
            metrics=(
                Metric(
                    key="accuracy",
                    claim="Image classification",
                    name="test accuracy, %",
                    paper="""Table 1, ImageNet, top-1 accuracy in %:

| network | SGD | SGDP | Adam | AdamP |
|---|---|---|---|---|
| MobileNetV2 | 71.61 | 72.18 | 72.12 | 72.57 |
| ResNet18 | 70.28 | 70.73 | 70.41 | 70.81 |
| ResNet50 | 76.64 | 76.71 | 76.65 | 76.94 |
| ResNet50 + CutMix | 77.61 | 77.72 | 78.00 | 78.31 |""",
                ),
                Metric(
                    key="corrupted",
                    claim="Robustness",
                    name="accuracy under corruption, %",
                    note="The networks are those of the classification above. Their test images are corrupted in eight "
                    "ways: Gaussian noise, salt and pepper, blur, pixelation, low contrast, brightness, occlusion, "
                    "rotation. The value is the mean over the eight. The paper trains against attacks and on biased "
                    "data instead.",
                    paper="""Table 4, accuracy in %; attacked: Wide-ResNet, CIFAR-10, PGD-10 attacks:

| test | Adam | AdamP |
|---|---|---|
| attacked, l-infinity, 4/255 | 56.58 | 66.28 |
| attacked, l-2, 80/255 | 70.33 | 83.59 |
| Biased-MNIST, unbiased, mean | 61.9 | 68.0 |
| 9-Class ImageNet, unbiased | 92.6 | 94.5 |
| 9-Class ImageNet, ImageNet-A | 31.2 | 32.9 |""",
                ),
            ),
            steps=300,
            batch=16,
        ),
        Task(
            name="retrieval",
            about="The same trunk embeds digits as vectors of length 1 and learns 100 of them, with a normalized proxy "
            "for each class. Each other image is a query among the others of its split: 800 for validation and 897 for "
            "the test. Unlike in the paper, the classes are those of the training: they are too few to leave some out.",
            load=load_few_images,
            build=Embedder,
            loss=retrieval_loss,
            measure=measure_retrieval,
            metrics=(
                Metric(
                    key="recall",
                    claim="Retrieval",
                    name="recall@1, %",
                    paper="""Table 6, recall@1 in %, ResNet50:

| data | triplet, Adam | triplet, AdamP | ProxyAnchor, Adam | ProxyAnchor, AdamP |
|---|---|---|---|---|
| CUB | 57.9 | 58.2 | 69.28 | 69.5 |
| Cars-196 | 59.8 | 59.9 | 86.7 | 86.9 |
| InShop | 62.7 | 62.8 | 85.2 | 87.4 |
| SOP | 62.0 | 62.6 | 76.5 | 78.0 |""",
                ),
            ),
            steps=250,
            batch=16,
            invariant=("conv", "linear", "proxies"),
        ),
        Task(
            name="audio",
            about="The same network learns ten timbres from log-mel spectrograms (16 bands, 17 frames). The sounds are "
            "synthesised, not recorded: notes of random pitch with noise. 500 are for training, 400 for validation and "
            "700 for the test.",
            load=load_sounds,
            build=build_network,
            loss=classification_loss,
            measure=lambda network, x, y: {"accuracy": accuracy(network, x, y)},
            metrics=(
                Metric(
                    key="accuracy",
                    claim="Audio classification",
                    name="test accuracy, %",
                    paper="""Table 5, Harmonic CNN:

| task | Adam | AdamP |
|---|---|---|
| music tagging, ROC-AUC | 91.12 | 91.35 |
| music tagging, PR-AUC | 45.61 | 45.79 |
| keyword spotting, accuracy | 96.47 | 96.89 |
| sound event tagging, F1 score | 55.24 | 56.04 |""",
                ),
            ),
            steps=250,
            batch=16,
        ),
        Task(
            name="language",
            about="A GPT of two blocks of width 48 with QK-norm reads the sources of Python's standard library byte by "
            "byte, in windows of 64. Every tenth file is held out: one half of them is for validation, the other for "
            "the test.",
            load=load_text,
            build=lambda: build_gpt(width=48, depth=2, heads=4, norms="qk"),
            loss=language_loss,
            measure=measure_text,
            metrics=(
                Metric(
                    key="bits",
                    claim="Language modelling",
                    name="test loss, bits per byte (lower is better)",
                    higher_is_better=False,
                    paper="""Table 7, WikiText103, perplexity (lower is better):

| model | AdamW | AdamP |
|---|---|---|
| Transformer-XL | 23.38 | 23.26 |
| Transformer-XL, weight normalization | 23.96 | 22.77 |""",
                ),
            ),
            steps=250,
            batch=8,
            invariant=("query", "key"),
        ),
        Task(
            name="detection",
            about="The same trunk with an anchor-free head finds one to three digits of sizes 6 to 10 on a canvas of "
            "24x24 with noise: 800 canvases for training, 300 for validation and 500 for the test, made of different "
            "digits.",
            load=load_canvases,
            build=build_detector,
            loss=detection_loss,
            measure=measure_canvases,
            metrics=(
                Metric(
                    key="precision",
                    claim="Detection",
                    name="mean average precision at an overlap of 0.5, %",
                    paper="""Table 3, MS-COCO, average precision in %:

| model | start | Adam | AdamP |
|---|---|---|---|
| CenterNet | scratch | 26.57 | 27.11 |
| CenterNet | ImageNet | 28.29 | 29.05 |
| SSD | scratch | 27.10 | 27.97 |
| SSD | ImageNet | 28.39 | 28.67 |""",
                ),
            ),
            steps=600,
            batch=16,
        ),
    )
}
