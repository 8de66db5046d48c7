"""NICE on MNIST as published: what log-likelihood does it reach on the test images? (The paper: 1980.50 nats.)

Trains `revnet-train experiment=nice_mnist` for at most so many minutes, and writes down the mean log-likelihood of
training, validation and test images after every epoch, the latter two with the running average of the weights. At the
end the average that was best on validation is tested, and inverted: the largest error of decode(encode(y)) over the
test images, of the whole flow and of its additive part.

Activations are stored: at this size they are nothing beside the weights, and to reconstruct them gives the same
gradients to the bit (see the tests) in 4/3 of the time.

    python experiments/nice_mnist.py [--root PATH] [--minutes 110] [--epochs 1500] [--precision 32-true]

The same command goes on with a run that was stopped. Result and curve: experiments/results/nice_mnist_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
from omegaconf import open_dict
from pytorch_lightning.callbacks import Callback
from recording import ROOT, hardware, record, resumed
from rich.console import Console
from torch import Tensor

from revnet.build import build
from revnet.cli import compose
from revnet.data import MNIST
from revnet.data.datasets import TensorImages
from revnet.flows import Flow
from revnet.reversible import ReversibleSequence
from revnet.train import train
from revnet.training import load_checkpoint, read_checkpoint
from revnet.training.density import seeded

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
PAPER = 1980.50
SPLITS = ("train", "val", "test")


class Epochs(Callback):
    """Writes a row, and the curve, after every epoch."""

    def __init__(self, theme: str, settings: dict[str, Any]) -> None:
        self.settings = dict(settings)
        self.path, known = resumed(theme, self.settings)
        self.rows = [row for row in known if "epoch" in row]
        self.start = self.cpu_start = 0.0
        self.test_nats = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows = self.rows[: trainer.current_epoch]
        self.start = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        self.cpu_start = time.process_time() - (self.rows[-1]["cpu_seconds"] if self.rows else 0.0)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here, because this is where the average of the weights stands in for them, as in the validation.
        if not trainer.sanity_checking:
            with seeded(0, pl_module.device):
                self.test_nats = test_nats(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        nats = {f"{split}_nats": float(trainer.callback_metrics[f"{split}/nats"]) for split in ("train", "val")}
        row = {"epoch": trainer.current_epoch + 1, **nats, "test_nats": self.test_nats}
        # Those of the processors too: a training that shares its machine, or is paused, takes longer by the clock.
        row |= {"seconds": time.perf_counter() - self.start, "cpu_seconds": time.process_time() - self.cpu_start}
        self.rows.append(row)
        record(self.path, self.settings, self.rows)
        draw(self.rows, self.path)


def test_nats(estimator: pl.LightningModule, data: Any) -> float:
    """Mean log-likelihood of the test images."""
    total, count = 0.0, 0
    for images, labels in data.test_dataloader():
        with estimator.trainer.precision_plugin.forward_context():
            nats = estimator(data.preprocess(images.to(estimator.device), training=False), labels)
        total, count = total + float(nats.double().sum()), count + len(images)
    return total / count


def draw(rows: list[Row], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for split in SPLITS:
        curve = [row[f"{split}_nats"] for row in rows]
        axis.plot([row["epoch"] for row in rows], curve, label=f"{split}, {curve[-1]:,.1f} at the end")
    axis.axhline(PAPER, color="grey", linestyle=":", label=f"the paper's test, {PAPER:,.1f}")
    low = sorted(row["test_nats"] for row in rows)[len(rows) // 10]
    axis.set(xlabel="epoch", ylabel="log-likelihood, nats", ylim=(low, None))
    axis.set_title(f"NICE on MNIST, {rows[-1]['seconds'] / 60:.0f} minutes on {hardware()['device']}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def inversion_errors(flow: Flow, y: Tensor) -> dict[str, float]:
    """Largest absolute errors of the inverse, on values in [0, 1].

    What is on the grid of exact mode comes back to the bit; rounding onto the grid is no matter of the inverse.
    """
    flow.dequantise = None  # whose floor would hide the errors
    additive = flow.stages[0]
    assert isinstance(additive, ReversibleSequence)
    with torch.no_grad():
        on_grid = additive.inverse(additive(y))
        return {
            "inversion_error": float((flow.decode(flow.encode(y)) - y).abs().max()),
            "inversion_error_additive": float((additive.inverse(additive(on_grid)) - on_grid).abs().max()),
            "rounding_onto_grid": float((on_grid - y).abs().max()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="directory of MNIST's four files; by default $REVNET_DATA/mnist, or data/mnist")
    parser.add_argument("--minutes", type=float, default=110, help="of training, those before an interruption counted")
    parser.add_argument("--epochs", type=int, default=1500)
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--run-dir", type=Path, metavar="PATH", help="by default runs/nice_mnist_PRECISION")
    parser.add_argument("--theme", default="nice_mnist", help="of the result's name")
    options = parser.parse_args()
    run_dir = options.run_dir or ROOT / f"runs/nice_mnist_{options.precision}"
    settings = {"experiment": "nice_mnist", "activations": "store", "precision": options.precision, "seed": 0}
    cfg = compose(
        "train",
        "experiment=nice_mnist",
        "callbacks=ema",
        f"run_dir='{run_dir}'",
        "model.activations=store",
        f"trainer.precision={options.precision}",
        f"trainer.max_epochs={options.epochs}",
        "ckpt_path=last",
        "callbacks.samples.every_n_epochs=20",
        "callbacks.progress_bar=null",
        *([] if options.root is None else [f"data.root='{options.root}'"]),
    )
    with open_dict(cfg):
        cfg.trainer.max_time = {"minutes": options.minutes}
        cfg.callbacks.epochs = {"_target_": "nice_mnist.Epochs", "theme": options.theme, "settings": settings}
    metrics = train(cfg)
    path, rows = resumed(options.theme, settings)
    best = max((row for row in rows if "epoch" in row), key=lambda row: row["val_nats"])["epoch"]
    result = {"shown": "best on validation", "best_epoch": best, "test_nats": metrics["test/nats"]}
    data, task = build(cfg)
    flow = task.network
    assert isinstance(data, MNIST)
    assert isinstance(flow, Flow)
    data.setup()
    checkpoint = str(run_dir / "checkpoints/best.ckpt")
    load_checkpoint(task, read_checkpoint(checkpoint), checkpoint)
    torch.manual_seed(0)
    test = data.splits["test"]
    assert isinstance(test, TensorImages)
    images = data.preprocess(test.images, training=False)
    with torch.no_grad():
        result["test_nats_float32"] = float(flow.log_prob(images).mean())
    assert flow.dequantise is not None
    result |= inversion_errors(flow, flow.dequantise(images))
    rows = [row for row in rows if "epoch" in row]
    record(path, settings, [*rows, result])
    Console().print(result)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


if __name__ == "__main__":
    main()
