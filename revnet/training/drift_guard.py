"""What a training does about drift: warn, stop, or leave the step out and go on with stored activations."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from revnet.reversible import ReconstructionWarning, ReversibleSequence, Watch
from revnet.reversible.watch import remedy

__all__ = ["DriftGuard"]


class DriftGuard(Callback):
    """Answer to the reconstruction error of every reversible sequence: warn, raise, or fall back.

    To fall back: the optimizer step that a sequence's error is part of, in any of its accumulated batches and on any
    process, is not applied, so that neither weights nor the optimizer's state change; from the next step on that
    sequence stores its activations, in a resumed training too; and one warning names the sequence. What the forward
    pass has done is right and stays (running statistics of normalisation), and trainer and schedule count the step.

    Args:
        warn_above: relative error above which a sequence warns; None: as its `watch` says.
        raise_above: relative error above which the backward pass raises `ReconstructionError`, as for one that is not
            finite; None: as the sequence's `watch` says, or never with `fall_back_above`. `math.inf` never raises.
        fall_back_above: relative error above which to fall back, as for one that is not finite; None: never fall back.
            Each optimizer step then waits for the device once, between its backward pass and its update.

    Attributes:
        fallen_back: names, in the network, of the sequences that store because of their drift; kept in checkpoints.

    At the step that is not applied the trainer's loggers receive `reconstruction_error/NAME` of the sequences that fall
    back and `sequences_fallen_back`, their number so far. A network without sequences is left alone. The thresholds
    hold while the training runs; then every sequence gets its own `watch` back.

    Raises:
        ValueError: a threshold is negative or no number; both `raise_above` and `fall_back_above` are given; or, when
            training starts, the strategy keeps the gradients to itself (DeepSpeed), so no step can be left out.

    Example:
        >>> import pytorch_lightning as pl
        >>> from revnet.training import DriftGuard
        >>> trainer = pl.Trainer(callbacks=[DriftGuard(fall_back_above=0.1)], logger=False)
    """

    def __init__(
        self, warn_above: float | None = None, raise_above: float | None = None, fall_back_above: float | None = None
    ) -> None:
        thresholds = {"warn_above": warn_above, "raise_above": raise_above, "fall_back_above": fall_back_above}
        for name, value in thresholds.items():
            if value is not None and (not isinstance(value, int | float) or not value >= 0):
                raise ValueError(f"{name}={value!r}: give a relative error, at least 0, or None")
        if raise_above is not None and fall_back_above is not None:
            raise ValueError(
                f"raise_above={raise_above} and fall_back_above={fall_back_above}: a step that is not applied leaves "
                "nothing to raise for; give one of the two"
            )
        self.warn_above = warn_above
        self.raise_above = raise_above
        self.fall_back_above = fall_back_above
        self.fallen_back: list[str] = []
        self._guarded: dict[str, tuple[ReversibleSequence, Watch]] = {}
        self._largest: dict[str, float] = {}
        self._clip_val: int | float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the thresholds in force, and let those sequences store that did when the training was interrupted."""
        network = getattr(pl_module, "network", pl_module)
        found = {name: m for name, m in network.named_modules() if isinstance(m, ReversibleSequence)}
        if found and self.fall_back_above is not None and trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"fall_back_above={self.fall_back_above}: {type(trainer.strategy).__name__} keeps the gradients to "
                "itself, so no step can be left out; give raise_above instead"
            )
        for name, sequence in found.items():
            self._guarded[name] = sequence, sequence.watch
            sequence.watch = self._watch(sequence.watch)
            if name in self.fallen_back:
                sequence.activations = "store"
            if isinstance(sequence.watch, _FallBackWatch) and name in self._largest:
                sequence.watch.largest = torch.tensor(self._largest[name], device=pl_module.device)
        self._largest = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Fall back where an error since the last step is beyond the threshold."""
        beyond = self._beyond_threshold(trainer, pl_module.device)
        if not beyond:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # a fused optimizer unscales in its step, and the scaler must see gradients
        for each in trainer.optimizers:  # without a gradient an optimizer touches neither parameter nor state
            each.zero_grad(set_to_none=True)
        if trainer.gradient_clip_val is not None:  # torch refuses to clip where there is no gradient at all
            self._clip_val, trainer.gradient_clip_val = trainer.gradient_clip_val, None
        step = trainer.global_step + 1
        for name, error in beyond.items():
            sequence = self._guarded[name][0]
            sequence.activations = "store"
            if name not in self.fallen_back:
                self.fallen_back.append(name)
            rank_zero_warn(
                f"the reconstructed input of the reversible sequence {name!r} is {error:.1e} off the true one "
                f"(relative), beyond fall_back_above={self.fall_back_above}: step {step} is not applied, and from the "
                "next one on this sequence stores its activations, which takes more memory. "
                f"{remedy(isinstance(sequence.watch, _FallBackWatch) and sequence.watch.exact)}",
                category=ReconstructionWarning,
                stacklevel=5,  # Lightning's line, which it prints without the source under it
            )
        metrics = {f"reconstruction_error/{name}": error for name, error in beyond.items()}
        metrics["sequences_fallen_back"] = float(len(self.fallen_back))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Clip gradients again."""
        self._clip_again(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge what has arrived of the last steps, and give the sequences their own thresholds back."""
        for sequence, _ in self._guarded.values():
            sequence.watch.judge_arrived()
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the sequences their own thresholds back, and keep the errors for a checkpoint that is to come."""
        self._clip_again(trainer)
        self._largest = self._errors()
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The names of the sequences that have fallen back, and the errors since the last optimizer step.

        (Of several processes those of the first, whose state a checkpoint keeps.)
        """
        return {"fallen_back": list(self.fallen_back), "largest": self._errors() if self._guarded else self._largest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.fallen_back = list(state_dict["fallen_back"])
        self._largest = dict(state_dict.get("largest", {}))

    def _watch(self, own: Watch) -> Watch:
        warn_above = own.warn_above if self.warn_above is None else self.warn_above
        if self.fall_back_above is not None:
            return _FallBackWatch(warn_above, self.fall_back_above)
        return Watch(warn_above, own.raise_above if self.raise_above is None else self.raise_above)

    def _beyond_threshold(self, trainer: pl.Trainer, device: torch.device) -> dict[str, float]:
        """The errors beyond the threshold since the last call, by name: the same on every process."""
        # Every process asks for the same sequences, whether or not they ran there: the reduction needs equal shapes.
        watches = {
            name: sequence.watch
            for name, (sequence, _) in self._guarded.items()
            if isinstance(sequence.watch, _FallBackWatch) and sequence.activations != "store"
        }
        if not watches:
            return {}
        errors = torch.stack([watch.take_largest(device) for watch in watches.values()])
        # The largest of some numbers and a nan is for the backend to choose.
        errors = torch.nan_to_num(errors, nan=math.inf, posinf=math.inf)
        values = trainer.strategy.reduce(errors, reduce_op="max").tolist()
        pairs = zip(watches.items(), values, strict=True)
        return {name: error for (name, watch), error in pairs if error > watch.fall_back_above}

    def _errors(self) -> dict[str, float]:
        """Those since the last optimizer step, by name."""
        watches = {name: sequence.watch for name, (sequence, _) in self._guarded.items()}
        return {
            name: float(watch.largest)
            for name, watch in watches.items()
            if isinstance(watch, _FallBackWatch) and watch.largest is not None
        }

    def _clip_again(self, trainer: pl.Trainer) -> None:
        if self._clip_val is not None:
            trainer.gradient_clip_val, self._clip_val = self._clip_val, None

    def _release(self) -> None:
        for sequence, own in self._guarded.values():
            sequence.watch = own
        self._guarded.clear()


class _FallBackWatch(Watch):
    """A watch that never raises, and keeps the largest error for the guard, which speaks of those that it acts on."""

    def __init__(self, warn_above: float | None, fall_back_above: float) -> None:
        super().__init__(warn_above, math.inf)
        self.fall_back_above = min(fall_back_above, torch.finfo(torch.float32).max)  # so that infinity is beyond it
        self.largest: Tensor | None = None
        self.exact = False

    def see(self, error: Tensor, autocast: bool, exact: bool) -> None:
        """Take the error of one backward pass."""
        self.largest = error if self.largest is None else torch.maximum(self.largest, error)
        self.exact = exact
        super().see(torch.where(error <= self.fall_back_above, error, 0.0), autocast, exact)

    def take_largest(self, device: torch.device) -> Tensor:
        """The largest error since the last call, 0 if there was none; a nan stays one."""
        error, self.largest = self.largest, None
        return torch.zeros((), device=device) if error is None else error.to(device, torch.float32)
