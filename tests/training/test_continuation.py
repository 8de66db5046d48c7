import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from revnet.training import Classifier, Continuation
from tests.training.tiny import tiny_network


class Draw(pl.Callback):
    """Draws from every generator at every batch, and saves at one of them."""

    def __init__(self, file: Path, save_at: int | None = None) -> None:
        self.file = file
        self.save_at = save_at
        self.drawn: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))  # noqa: NPY002
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.file)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("save_at", [2, 5, 6])
def test_random_numbers_and_sums_go_on(save_at: int, fit: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    """The loader here does not keep its place: batches begin again, so that only their number is that of before."""

    def run(draw: Draw, ckpt: Path | None = None) -> list[float]:
        module = Classifier(tiny_network(), partial(torch.optim.SGD, lr=0.0))
        counts: list[float] = []

        class Count(pl.Callback):
            def on_train_epoch_end(self, *args: Any) -> None:
                counts.append(float(module.train_accuracy.tp.sum() + module.train_accuracy.fn.sum()))

        fit(module, callbacks=[draw, Count(), Continuation()], ckpt=ckpt)
        return counts

    pl.seed_everything(1, verbose=False)
    first = Draw(tmp_path / "some.ckpt", save_at)
    assert run(first) == [20, 20]  # images in an epoch
    pl.seed_everything(2, verbose=False)
    second = Draw(tmp_path / "none.ckpt")
    counts = run(second, tmp_path / "some.ckpt")
    assert second.drawn == first.drawn[save_at:]
    assert counts == [20, 20][-len(counts) :]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize("validate", [True, False])
def test_what_was_validated_before_is_no_finding_of_a_training_without_validation(
    validate: bool, fit: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    module = partial(Classifier, tiny_network(), partial(torch.optim.SGD, lr=0.1))

    def best() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "best", monitor="val/loss", enable_version_counter=False)

    first = fit(module(), callbacks=[Continuation(), best()], max_epochs=1, enable_checkpointing=True)
    assert "val/accuracy" in first.callback_metrics
    first.save_checkpoint(tmp_path / "some.ckpt")
    settings = {"ckpt": tmp_path / "some.ckpt", "validate": validate, "enable_checkpointing": True}
    again = fit(module(), callbacks=[Continuation(), best()], **settings)
    assert bool(again.checkpoint_callback.best_model_path) == validate  # else an earlier best one would be tested
    assert ("val/accuracy" in again.callback_metrics) == validate
    assert "train/accuracy" in again.callback_metrics


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_what_was_validated_before_stays_where_the_validation_is_still_to_come(
    fit: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    """Stopped in an epoch without validation: until the next one the last one counts."""
    module = partial(Classifier, tiny_network(), partial(torch.optim.SGD, lr=0.1))
    settings = {"max_epochs": 3, "check_val_every_n_epoch": 2}
    whole = fit(module(), callbacks=[Draw(tmp_path / "some.ckpt", 10), Continuation()], **settings)
    resumed = fit(module(), callbacks=[Continuation()], ckpt=tmp_path / "some.ckpt", **settings)
    assert "val/accuracy" in whole.callback_metrics.keys() & resumed.callback_metrics.keys()


def test_a_checkpoint_without_such_a_state_is_taken_as_it_is(fit: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    module = partial(Classifier, tiny_network(), partial(torch.optim.SGD, lr=0.1))
    fit(module(), max_epochs=1).save_checkpoint(tmp_path / "some.ckpt")
    assert fit(module(), callbacks=[Continuation()], ckpt=tmp_path / "some.ckpt").global_step == 8
