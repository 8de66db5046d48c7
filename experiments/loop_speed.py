"""How much of the speed of a bare training step is left in a whole `revnet-train`? Where does an epoch go?

Bare is forward pass, loss, backward pass and optimizer step on a batch that is there already, in a plain loop. Against
it stands an epoch of `revnet-train experiment=cifar10_fast` with everything that belongs to it: loader, augmentation,
metrics, logs, callbacks, progress bar, and Lightning's profiler, which says where the time goes. In every epoch as many
bare steps follow on a copy of the network, so that what disturbs the machine disturbs both; an epoch's first step,
which starts the loader, is left out of its rate, and the first epoch warms up.

    python experiments/loop_speed.py [--networks resnet32 revnet38] [--batch 128] [--steps 20] [--rounds 5]
        [--device cpu]

Table, JSON and picture: experiments/results/loop_speed_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import open_dict
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import SimpleProfiler
from recording import allocator_keeps_memory, hardware, record, result_path
from rich.console import Console
from rich.table import Table

from revnet.cli import compose
from revnet.train import train
from revnet.training import Task

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
PARTS = ("loader", "augmentation", "forward", "backward", "optimizer", "callbacks", "other")


class Rates(Callback):
    """Images per second of every epoch, and of the bare steps behind it."""

    def __init__(self, optimizer: Any, path: str) -> None:
        self.make_optimizer = optimizer
        self.path = Path(path)
        self.rows: list[dict[str, float]] = []
        self.start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.device = pl_module.device
        assert isinstance(pl_module, Task)
        self.network = copy.deepcopy(pl_module.network)
        self.optimizer = self.make_optimizer(self.network.parameters())
        data = trainer.datamodule  # type: ignore[attr-defined]
        images = torch.randn(data.batch_size, *data.image_shape, device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(data.num_classes, (data.batch_size,), device=self.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.start = self._now()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        images = (int(trainer.num_training_batches) - 1) * len(self.images)
        loop = images / (self._now() - self.start)
        self._bare_step()
        start = self._now()
        for _ in range(int(trainer.num_training_batches) - 1):
            self._bare_step()
        self.rows.append({"loop": loop, "bare": images / (self._now() - start)})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        profiler = trainer.profiler  # type: ignore[attr-defined]
        assert isinstance(profiler, SimpleProfiler)
        content = {"epochs": self.rows, "parts": parts(profiler.recorded_durations, len(self.rows))}
        self.path.write_text(json.dumps(content))

    def _bare_step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.network(self.images), self.labels, label_smoothing=0.1)
        loss.backward()
        self.optimizer.step()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def parts(durations: dict[str, list[float]], epochs: int) -> dict[str, float]:
    """Seconds of a step in each of `PARTS`, without the first epoch; callbacks within a step, not at an epoch's end."""

    def seconds(*ends: str, start: str = "[") -> float:
        found = [times for name, times in durations.items() if name.startswith(start) and name.endswith(ends)]
        return sum(sum(times[len(times) // epochs :]) for times in found) / steps

    steps = len(durations["run_training_batch"]) * (epochs - 1) // epochs
    forward, backward = seconds(".training_step", start="[Strategy]"), seconds(".backward", start="[Strategy]")
    augmentation = seconds(".on_after_batch_transfer")  # which Lightning counts with the transfer as well
    inside = seconds("_zero_grad", "_backward", "_optimizer_step", start="[Callback]")
    found = {
        "loader": seconds(".train_dataloader_next", ".batch_to_device") - augmentation,
        "augmentation": augmentation,
        "forward": forward,
        "backward": backward,
        "optimizer": seconds(".optimizer_step", start="[LightningModule]") - forward - backward - inside,
        "callbacks": inside + seconds("_batch_start", "_batch_end", start="[Callback]"),
    }
    whole = seconds("run_training_epoch", start="run")
    return found | {"other": whole - sum(found.values())}


def run(network: str, options: argparse.Namespace, directory: Path) -> Row:
    """Trains one epoch more than `rounds`."""
    cfg = compose(
        "train",
        "experiment=cifar10_fast",
        f"model={network}",
        "data=fake",
        f"data.train_size={options.steps * options.batch}",
        "data.val_fraction=0",
        "data.padding=4",
        "data.flip=true",
        "data.cutout=8",
        f"data.batch_size={options.batch}",
        "optimizer.lr=0.01",
        f"trainer={'cpu' if options.device == 'cpu' else 'gpu'}",
        f"trainer.max_epochs={options.rounds + 1}",
        f"run_dir='{directory}'",
    )
    path = directory / "rates.json"
    with open_dict(cfg):
        cfg.trainer.profiler = {"_target_": "pytorch_lightning.profilers.SimpleProfiler", "dirpath": str(directory)}
        cfg.trainer.profiler.filename = "profile"
        cfg.callbacks.rates = {"_target_": "loop_speed.Rates", "optimizer": cfg.optimizer, "path": str(path)}
    train(cfg)
    content = json.loads(path.read_text())
    epochs = content["epochs"][1:]
    return {
        "network": network,
        "loop_images_per_second": median(epoch["loop"] for epoch in epochs),
        "bare_images_per_second": median(epoch["bare"] for epoch in epochs),
        "loop_over_bare": median(epoch["loop"] / epoch["bare"] for epoch in epochs),
        "seconds_of_a_step": content["parts"],
        "epochs": epochs,
    }


def show(rows: list[Row], title: str) -> None:
    table = Table("", "loop, images/s", "bare", "loop/bare", *(f"{part}, ms" for part in PARTS), title=title)
    for row in rows:
        table.add_row(
            row["network"],
            f"{row['loop_images_per_second']:,.0f}",
            f"{row['bare_images_per_second']:,.0f}",
            f"{row['loop_over_bare']:.3f}",
            *(f"{1000 * row['seconds_of_a_step'][part]:,.1f}" for part in PARTS),
        )
    Console(width=160).print(table)


def draw(rows: list[Row], title: str, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 1.8 + 0.6 * len(rows)), layout="constrained")
    names = [f"{row['network']}\nloop/bare {row['loop_over_bare']:.3f}" for row in rows]
    left = [0.0] * len(rows)
    for part in PARTS:
        values = [1000 * row["seconds_of_a_step"][part] for row in rows]
        axis.barh(names, values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set(xlabel="ms of a training step", title=title)
    axis.invert_yaxis()
    figure.legend(ncols=len(PARTS), fontsize=8, loc="outside lower center")
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet32", "revnet38"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5, help="epochs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    allocator_keeps_memory()
    path = result_path("loop_speed", options.device)
    title = f"bf16, batch {options.batch}, {hardware(options.device)['device']}"
    rows: list[Row] = []
    for network in options.networks:
        with tempfile.TemporaryDirectory() as directory:
            rows.append(run(network, options, Path(directory, "run")))
        record(path, vars(options), rows, options.device)
    draw(rows, title, path)
    show(rows, title)
    Console().print(f"Written to {path}.json and {path}.png", soft_wrap=True)


if __name__ == "__main__":
    main()
