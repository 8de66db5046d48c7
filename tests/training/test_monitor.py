import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn

from revnet import AdditiveCoupling, ReversibleSequence
from revnet.training import Classifier, TrainingMonitor
from revnet.training.monitor import peak_memory
from tests.training.tiny import tiny_network

Fit = Callable[..., pl.Trainer]


class Recorder(DummyLogger):
    """Remembers what the monitor sends."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "images_per_second" in metrics:
            self.entries.append((step, metrics))


class Slow(Classifier):
    """A training step takes 20 ms, a validation step 200 ms."""

    def training_step(self, *args: Any) -> Tensor:
        time.sleep(0.02)
        return super().training_step(*args)

    def validation_step(self, *args: Any) -> None:
        time.sleep(0.2)
        super().validation_step(*args)


def slow_classifier() -> Slow:
    return Slow(tiny_network(), partial(torch.optim.SGD, lr=0.05))


def test_entries_come_every_n_steps_and_leave_validation_out(fit: Fit) -> None:
    recorder, monitor = Recorder(), TrainingMonitor()
    fit(slow_classifier(), logger=recorder, callbacks=[monitor], max_epochs=3, log_every_n_steps=3)
    assert [step for step, _ in recorder.entries] == [3, 6, 9, 12]
    # At most 5 images in 20 ms; with the 400 ms of an epoch's validation in it, a window has less than 40 a second.
    speeds = [entry["images_per_second"] for _, entry in recorder.entries]
    assert all(60 < speed <= 250 for speed in speeds)
    assert 60 < monitor.images_per_second <= 250
    assert 0.08 <= monitor.seconds_per_epoch < 0.35


def test_images_after_the_last_entry_count(fit: Fit) -> None:
    monitor = TrainingMonitor()
    fit(slow_classifier(), logger=Recorder(), callbacks=[monitor], max_epochs=2, log_every_n_steps=3)
    assert monitor.images_per_second * monitor.seconds_per_epoch == pytest.approx(20)


def test_peak_memory_is_that_of_the_process(fit: Fit) -> None:
    recorder, monitor = Recorder(), TrainingMonitor()
    before = peak_memory(torch.device("cpu")) / 10**6
    fit(slow_classifier(), logger=recorder, callbacks=[monitor])
    assert 10 < before <= recorder.entries[0][1]["peak_memory_mb"] <= monitor.peak_memory_mb < before + 500
    held = torch.ones(2**28 // 4)  # 256 MiB
    assert peak_memory(torch.device("cpu")) / 10**6 > min(before, 256)
    assert held.sum() == held.numel()


class TwoSequences(nn.Module):
    """Reversible sequences called `body.0` and `body.1`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        layers = [[AdditiveCoupling(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()))] for _ in range(2)]
        self.body = nn.ModuleList(ReversibleSequence(part, exact=False) for part in layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128, 4))

    def forward(self, images: Tensor) -> Tensor:
        halves = self.stem(images), self.stem(images)
        for sequence in self.body:
            halves = sequence(*halves)
        return self.head(torch.cat(halves, dim=1))


def test_reconstruction_errors_are_logged_by_name(fit: Fit) -> None:
    recorder, monitor = Recorder(), TrainingMonitor()
    network = TwoSequences()
    fit(Classifier(network, partial(torch.optim.SGD, lr=0.05)), logger=recorder, callbacks=[monitor])
    for _, entry in recorder.entries:
        assert 0 < entry["reconstruction_error/body.0"] < 1e-5
        assert 0 < entry["reconstruction_error/body.1"] < 1e-5
    errors = [value for _, entry in recorder.entries for name, value in entry.items() if "reconstruction" in name]
    assert monitor.reconstruction_error == max(errors)


def test_a_network_without_reversible_parts_has_no_reconstruction_error(fit: Fit) -> None:
    recorder, monitor = Recorder(), TrainingMonitor()
    fit(slow_classifier(), logger=recorder, callbacks=[monitor])
    assert not any("reconstruction" in name for _, entry in recorder.entries for name in entry)
    assert monitor.reconstruction_error is None


def test_an_epoch_without_validation_has_none_in_its_line(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "revnet.training.monitor"):
        fit(slow_classifier(), callbacks=[TrainingMonitor()], max_epochs=4, check_val_every_n_epoch=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "revnet.training.monitor"]
    assert ["val" in line for line in lines] == [False, True, False, True]


def test_an_epoch_is_one_line_in_the_log(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "revnet.training.monitor"):
        trainer = fit(slow_classifier(), callbacks=[TrainingMonitor()])
    lines = [record.getMessage() for record in caplog.records if record.name == "revnet.training.monitor"]
    assert len(lines) == 2
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert lines[1] == (
        f"epoch 1: train accuracy {100 * metrics['train/accuracy']:.2f} % loss {metrics['train/loss']:.4f}, "
        f"val accuracy {100 * metrics['val/accuracy']:.2f} % loss {metrics['val/loss']:.4f}"
    )
