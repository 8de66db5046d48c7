"""The table that ends a training or an evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping

import rich
from rich.table import Table

from revnet.training.monitor import TrainingMonitor
from revnet.training.task import Task

__all__ = ["print_summary"]


def print_summary(
    title: str,
    task: Task,
    metrics: Mapping[str, float],
    epochs: int | None = None,
    monitor: TrainingMonitor | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Print what a reader wants to know first.

    Args:
        title: what was trained, on what.
        task: what was trained, for the number of its parameters.
        metrics: values of `{test,val,train}/accuracy` and `.../loss`, or `.../bits_per_dim` and `.../nats`; splits that
            are not there are left out.
        epochs: how many were trained; None leaves them out.
        monitor: of the training; None leaves speed and memory out.
        files: names and paths to end with, shown as seen from the working directory where that is shorter.
    """
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("parameters", f"{sum(p.numel() for p in task.network.parameters()):,}")
    for split in ("test", "val", "train"):
        if f"{split}/accuracy" in metrics:
            table.add_row(f"{split} accuracy", f"{100 * metrics[f'{split}/accuracy']:.2f} %")
            table.add_row(f"{split} loss", f"{metrics[f'{split}/loss']:.4f}")
        if f"{split}/nats" in metrics:
            table.add_row(f"{split} bits/dim", f"{metrics[f'{split}/bits_per_dim']:.4f}")
            table.add_row(f"{split} log-likelihood", f"{metrics[f'{split}/nats']:.2f} nats")
    if epochs is not None:
        table.add_row("epochs", str(epochs))
    if monitor is not None:
        memory = "device" if task.device.type == "cuda" else "process"
        table.add_row("seconds per epoch", f"{monitor.seconds_per_epoch:.2f}")
        table.add_row("images per second", f"{monitor.images_per_second:,.0f}")
        table.add_row(f"peak memory of the {memory}", f"{monitor.peak_memory_mb:,.0f} MB")
        if monitor.reconstruction_error is not None:
            table.add_row("largest reconstruction error", f"{monitor.reconstruction_error:.1e}")
    for name, path in (files or {}).items():
        table.add_row(name, min(path, os.path.relpath(path), key=len) if os.path.isabs(path) else path)
    rich.print(table)
