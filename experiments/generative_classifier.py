"""One reversible network, two losses: what does a likelihood cost a classifier, and what does it buy?

NICE on scikit-learn's digits, with a linear head on its latents: the loss is the cross-entropy of the head plus a
weight times the negative log-likelihood per dimension. For each weight: accuracy, bits/dim, samples, and the error of
the inverse.

    python experiments/generative_classifier.py [--epochs 40] [--weights 0 0.01 0.1 1 10]

Result and picture: experiments/results/generative_classifier_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from recording import hardware, record, result_path
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchvision.utils import make_grid

from revnet.data import Digits
from revnet.flows import nice

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]


class GenerativeClassifier(nn.Module):
    """Logits and log-densities of the same latents."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = nice((1, 8, 8), hidden=128, layers=2)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.flow.encode_and_log_det(images)
        return self.head(z), self.flow.prior.log_prob(z) + log_det


def train(data: Digits, weight: float, epochs: int) -> tuple[GenerativeClassifier, Row]:
    torch.manual_seed(0)
    network = GenerativeClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.1)
    loader = data.train_dataloader()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for images, labels in loader:
            logits, nats = network(data.preprocess(images, training=True))
            loss = F.cross_entropy(logits, labels) - weight * nats.mean() / network.flow.dims
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    test = data.splits["test"]
    images = data.preprocess(test.images, training=False)
    with torch.no_grad():
        logits, nats = network(images)
        y = network.flow.dequantise(images)  # type: ignore[misc]
        dequantise, network.flow.dequantise = network.flow.dequantise, None  # its floor would hide the error
        error = float((network.flow.decode(network.flow.encode(y)) - y).abs().max())
        network.flow.dequantise = dequantise
    return network, {
        "weight": weight,
        "test_accuracy": float((logits.argmax(1) == test.labels).float().mean()),
        "test_bits_per_dim": float(network.flow.bits_per_dim(nats.mean())),
        "test_nats": float(nats.mean()),
        "inversion_error": error,
    }


def draw(rows: list[Row], samples: list[Tensor], path: Path) -> None:
    figure = plt.figure(figsize=(2.2 * len(rows), 6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3, 2])  # type: ignore[misc]
    accuracy = above.subplots()
    places = range(len(rows))
    accuracy.plot(places, [100 * row["test_accuracy"] for row in rows], "o-", color="C0")
    accuracy.set_xticks(places, [f"{row['weight']:g}" for row in rows])
    accuracy.set_xlabel("weight of the likelihood")
    accuracy.set_ylabel("test accuracy, %", color="C0")
    bits = accuracy.twinx()
    bits.plot(places, [row["test_bits_per_dim"] for row in rows], "s--", color="C1")
    bits.set_yscale("log")
    bits.set_ylabel("test bits/dim", color="C1")
    accuracy.grid(alpha=0.3)
    for axes, row, images in zip(below.subplots(1, len(rows)), rows, samples, strict=True):
        axes.imshow(make_grid(images, nrow=6, padding=1).permute(1, 2, 0))
        axes.set_title(f"samples at {row['weight']:g}", fontsize=9)
        axes.axis("off")
    figure.suptitle(f"NICE with a class head on digits, {hardware()['device']}", fontsize=10)
    figure.savefig(path.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--weights", type=float, nargs="+", default=[0, 0.01, 0.1, 1, 10])
    options = parser.parse_args()
    torch.manual_seed(0)
    data = Digits(channels=1, batch_size=64, normalization="unit", val_fraction=0.0)
    data.setup()
    rows, samples = [], []
    for weight in track(options.weights, "weights"):
        network, row = train(data, weight, options.epochs)
        rows.append(row)
        torch.manual_seed(0)
        samples.append(network.flow.sample(36))
    path = result_path("generative_classifier")
    record(path, {"epochs": options.epochs}, rows)
    draw(rows, samples, path)
    table = Table("weight", "accuracy, %", "bits/dim", "nats", "inversion error")
    for row in rows:
        figures = f"{100 * row['test_accuracy']:.2f}", f"{row['test_bits_per_dim']:.3f}", f"{row['test_nats']:.1f}"
        table.add_row(f"{row['weight']:g}", *figures, f"{row['inversion_error']:.1e}")
    Console().print(table)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


if __name__ == "__main__":
    main()
