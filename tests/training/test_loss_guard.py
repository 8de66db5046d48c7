from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from revnet.training import Classifier, LastCheckpoint, LossGuard
from tests.training.tiny import tiny_batches, tiny_network


class Course(nn.CrossEntropyLoss):
    """Multiplies the training's losses by factors, one after the other, then by 1."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = list(factors)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        factor = self.factors.pop(0) if torch.is_grad_enabled() and self.factors else 1.0
        return super().forward(logits, labels) * factor


def classifier(*factors: float) -> Classifier:
    return Classifier(tiny_network(), partial(torch.optim.SGD, lr=0.1), loss=Course(*factors))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_of_such_a_loss_is_not_taken(factor: float, fit: Callable[..., pl.Trainer]) -> None:
    module = classifier(1, 1, factor)
    with pytest.raises(
        ValueError, match=rf"the loss is {factor} at step 3 \(epoch 0, batch 2\): the training diverges"
    ):
        fit(module, callbacks=[LossGuard()])
    assert all(tensor.isfinite().all() for tensor in module.network.state_dict().values())


def test_weights_that_are_not_finite_do_not_reach_a_checkpoint(fit: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    """The loss of the epoch's last step is finite, its gradients are not."""
    module = classifier(1, 1, 1, 1, 1, 1, 1)

    class Spoil(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 7:
                module.network[0].weight.grad.fill_(float("inf"))

    callbacks = [LossGuard(), Spoil(), LastCheckpoint(tmp_path)]
    with pytest.raises(ValueError, match=r"network.0.weight is not finite after step 8.* not written; resume"):
        fit(module, callbacks=callbacks, enable_checkpointing=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits_and_a_bad_loss_is_found_before_a_checkpoint(tmp_path: Path) -> None:
    guard, module = LossGuard(), classifier(1, 1, float("nan"))
    waits: list[str] = []

    class Watched(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            waits.append("none")

        def on_after_backward(self, trainer: pl.Trainer, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [Watched(), guard, LastCheckpoint(tmp_path)]
    trainer = pl.Trainer(accelerator="gpu", devices=1, max_epochs=1, callbacks=callbacks, **quiet)
    with pytest.raises(ValueError, match=r"the loss is nan at step 3 \(epoch 0, batch 2\)"):
        trainer.fit(module, tiny_batches(4), tiny_batches(1))
    assert waits
    assert not list(tmp_path.glob("*.ckpt"))
