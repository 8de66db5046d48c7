"""The checkpoint that a training goes on from, whatever has stopped it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from revnet.training.continuation import in_mid_epoch

__all__ = ["LastCheckpoint"]


class LastCheckpoint(Checkpoint):
    """Save the state of a training as `last.ckpt`, and keep the one before as `previous.ckpt`.

    Saved is at the end of every epoch, every so many optimizer steps, and when the training is told to stop by SIGTERM
    or Ctrl-C (in a job of Slurm by SIGUSR1 as well, which scripts ask for ahead of the time limit): it then ends after
    the step at hand, or after the validation at hand, in the middle of which a training could not go on. (A second
    Ctrl-C ends it at once, unsaved.) Of several processes one that is told is enough: they agree at the end of every
    step and of every validation, so that all of them stop there. A test stops, unsaved, behind the batch at hand.

    Args:
        dirpath: directory of the checkpoints.
        every_n_train_steps: optimizer steps between two checkpoints within an epoch; None for the ends of epochs alone.

    Attributes:
        interrupted: whether Ctrl-C has stopped the training.

    Raises:
        ValueError: `every_n_train_steps` is no positive integer.
    """

    def __init__(self, dirpath: str | os.PathLike[str], every_n_train_steps: int | None = 500) -> None:
        if every_n_train_steps is not None and (not isinstance(every_n_train_steps, int) or every_n_train_steps < 1):
            raise ValueError(f"every_n_train_steps={every_n_train_steps}: give a number of steps, at least 1, or null")
        self.dirpath = Path(dirpath)
        self.every_n_train_steps = every_n_train_steps
        self.interrupted = False
        self._saved_step = 0
        self._told = False
        self._on_ctrl_c: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a training that nobody has told to stop."""
        if stage == "fit":
            self._told = self.interrupted = False

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to SIGTERM and Ctrl-C."""
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here, and listen to SIGTERM and Ctrl-C."""
        self._saved_step = trainer.global_step
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; later if the epoch's end or validation is to come first, which belongs to this step."""
        steps = self.every_n_train_steps
        due = steps is not None and trainer.global_step // steps > self._saved_step // steps
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if due and fetcher and not loop._is_training_done and not loop._should_check_val_fx(fetcher):
            self._save(trainer)
        self._stop_if_told(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a validation come to its end: told to stop, Lightning would leave it behind its first batch."""
        self._told |= trainer.received_sigterm
        trainer._signal_connector.received_sigterm = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if the training was told to, by now."""
        self._stop_if_told(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save."""
        if trainer.should_stop and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            rank_zero_warn(
                "the training ends within an epoch, whose other images it leaves out wherever it goes on; to end it "
                "where it can go on to the same bits, send SIGTERM, as `timeout 12h revnet-train ...` does"
            )
        self._save(trainer)
        self._stop_if_told(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to SIGTERM and Ctrl-C."""
        self._listen()

    def on_test_batch_end(self, trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        """Stop if the test was told to."""
        self._stop_if_told(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save if the training, and not a test, was told to stop: Lightning then stops between two steps."""
        if isinstance(exception, SIGTERMException) and trainer.training:
            loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
            if (
                in_mid_epoch(trainer)
                and fetcher
                and loop._should_check_val_fx(fetcher)
                and not loop._should_accumulate()
            ):
                # Behind a validation in mid-epoch Lightning goes on by counting the step that it belongs to again.
                loop._batches_that_stepped -= 1
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        last, written = self.dirpath / "last.ckpt", self.dirpath / "next.ckpt"
        trainer.save_checkpoint(written)
        if trainer.is_global_zero:
            if last.exists():
                last.replace(self.dirpath / "previous.ckpt")
            written.replace(last)
        self._saved_step = trainer.global_step

    def _listen(self) -> None:
        """Take the place of Lightning's handler of SIGTERM until Lightning, at its end, puts back those of before.

        Its own sends a tensor to the other processes at once, whatever they are exchanging at that moment.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) != self._on_signal:
            signal.signal(signal.SIGTERM, self._on_signal)
            self._on_ctrl_c = signal.signal(signal.SIGINT, self._on_signal)
            if "SLURM_JOB_ID" in os.environ and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
                signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._told = True
        if signum == signal.SIGINT:
            self.interrupted = True
            signal.signal(signal.SIGINT, self._on_ctrl_c)

    def _stop_if_told(self, trainer: pl.Trainer) -> None:
        """Let Lightning stop all processes at its next look if one of them was told to."""
        among_all = trainer.strategy.reduce_boolean_decision
        if among_all(self._told, all=False):
            self._told, self.interrupted = True, among_all(self.interrupted, all=False)
            trainer._signal_connector.received_sigterm = True
