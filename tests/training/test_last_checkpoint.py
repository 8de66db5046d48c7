import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from revnet.training import Classifier, LastCheckpoint
from tests.training.tiny import tiny_batches, tiny_network


def classifier() -> Classifier:
    return Classifier(tiny_network(), partial(torch.optim.SGD, lr=0.1))


class Record(pl.Callback):
    """The steps at which a checkpoint was made."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(("interval", "steps"), [(None, [4, 8]), (3, [3, 4, 6, 8]), (2, [2, 4, 6, 8])])
def test_it_saves_within_epochs_and_at_their_ends(
    interval: int | None, steps: list[int], fit: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    record, last = Record(), LastCheckpoint(tmp_path / "here", interval)
    fit(classifier(), callbacks=[record, last], enable_checkpointing=True)
    assert record.steps == steps
    found = {path.name: torch.load(path, weights_only=True)["global_step"] for path in (tmp_path / "here").iterdir()}
    assert found == {"last.ckpt": steps[-1], "previous.ckpt": steps[-2]}
    assert (tmp_path / "here/last.ckpt").is_file()


def test_a_checkpoint_that_validation_was_in_the_way_of_is_made_up_for(
    fit: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    record, last = Record(), LastCheckpoint(tmp_path / "here", 2)
    fit(classifier(), callbacks=[record, last], enable_checkpointing=True, val_check_interval=2)
    assert record.steps == [3, 4, 7, 8]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_left_to_others_when_the_training_has_ended(
    number: signal.Signals, fit: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    fit(classifier(), callbacks=[LastCheckpoint(tmp_path)], enable_checkpointing=True)
    assert signal.getsignal(number) is before


class Told(pl.Callback):
    """Sends SIGTERM in a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda *arguments: signal.raise_signal(signal.SIGTERM))


@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_sanity_check_end", 1), ("on_train_batch_start", 1), ("on_train_epoch_end", 4)],
)
def test_a_training_that_is_told_to_stop_saves_wherever_it_is(
    hook: str, step: int, fit: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SIGTERMException):
        fit(classifier(), callbacks=[Told(hook), LastCheckpoint(tmp_path)], enable_checkpointing=True)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step


def test_told_when_the_training_is_over_the_test_stops(fit: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    module = classifier()
    trainer = fit(module, callbacks=[Told("on_train_end"), LastCheckpoint(tmp_path)], enable_checkpointing=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == trainer.global_step == 8
    with pytest.raises(SIGTERMException):
        trainer.test(module, tiny_batches(2))


def test_it_can_be_used_again_after_it_was_told_to_stop(fit: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    last = LastCheckpoint(tmp_path)
    with pytest.raises(SIGTERMException):
        fit(classifier(), callbacks=[Told("on_train_epoch_end"), last], enable_checkpointing=True)
    assert fit(classifier(), callbacks=[last], enable_checkpointing=True).global_step == 8


@pytest.mark.parametrize("interval", [0, -1, 2.5])
def test_an_odd_interval_is_named(interval: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"every_n_train_steps={interval}: give a number of steps, at least 1"):
        LastCheckpoint(tmp_path, interval)  # type: ignore[arg-type]
