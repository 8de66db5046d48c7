from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from revnet.training import Classifier, constant_rate, one_cycle
from tests.training.tiny import tiny_network

Fit = Callable[..., pl.Trainer]


def classifier(scheduler: Any = None, **settings: Any) -> Classifier:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, **settings})
    return Classifier(tiny_network(), optimizer, scheduler)


class Rates(pl.Callback):
    """The settings of the first group at every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append((group["lr"], group["momentum"], group["weight_decay"]))


def rates(fit: Fit, module: Classifier, **settings: Any) -> list[tuple[float, float, float]]:
    found = Rates()
    fit(module, callbacks=[found], max_epochs=4, **settings)
    return found.seen


@pytest.fixture
def half(fit: Fit, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of the first two of four epochs."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    def half(module: Classifier) -> Path:
        fit(module, callbacks=[Stop()], max_epochs=4).save_checkpoint(tmp_path / "half.ckpt")
        return tmp_path / "half.ckpt"

    return half


@pytest.mark.parametrize("scheduler", [None, constant_rate, one_cycle])
def test_changed_settings_take_effect_when_a_training_goes_on(
    scheduler: Any, fit: Fit, half: Callable[..., Path]
) -> None:
    path = half(classifier(scheduler))
    whole, other = rates(fit, classifier(scheduler)), rates(fit, classifier(scheduler, lr=0.3, weight_decay=0.5))
    assert rates(fit, classifier(scheduler), ckpt=path) == whole[8:]
    resumed = rates(fit, classifier(scheduler, lr=0.3, weight_decay=0.5), ckpt=path)
    assert torch.allclose(torch.tensor(resumed), torch.tensor(other[8:]), rtol=1e-6)


def test_a_longer_training_goes_on_at_the_rate_of_its_own_schedule(fit: Fit, tmp_path: Path) -> None:
    module = classifier(one_cycle)
    fit(module, max_epochs=2).save_checkpoint(tmp_path / "short.ckpt")
    whole, longer = rates(fit, classifier(one_cycle)), rates(fit, classifier(one_cycle), ckpt=tmp_path / "short.ckpt")
    assert longer == whole[8:]


@pytest.mark.parametrize("batches", [2, 1])
def test_with_fewer_steps_an_epoch_a_schedule_goes_on_at_its_share_of_the_way(
    batches: int, fit: Fit, half: Callable[..., Path]
) -> None:
    path = half(classifier(one_cycle))
    settings: dict[str, Any] = {"accumulate_grad_batches": 4 // batches}
    whole, resumed = (rates(fit, classifier(one_cycle), ckpt=ckpt, **settings) for ckpt in (None, path))
    assert resumed == whole[len(whole) // 2 :]  # of the batches: the rates of each step


def test_a_schedule_of_torch_is_not_gone_on_with_in_epochs_of_other_lengths(
    fit: Fit, half: Callable[..., Path]
) -> None:
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)
    path = half(classifier(cycle))
    with pytest.raises(ValueError, match=r"scheduler: OneCycleLR cannot go on in epochs of 0\.5 times as many steps"):
        rates(fit, classifier(cycle), ckpt=path, accumulate_grad_batches=2)


def test_a_schedule_that_has_no_place_goes_on(fit: Fit, half: Callable[..., Path]) -> None:
    def chained(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)])

    path, whole = half(classifier(chained)), rates(fit, classifier(chained))
    assert rates(fit, classifier(chained), ckpt=path) == whole[8:]


def test_what_a_schedule_has_made_of_other_settings_is_kept(fit: Fit, half: Callable[..., Path]) -> None:
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)
    path, whole = half(classifier(cycle)), rates(fit, classifier(cycle))
    resumed = rates(fit, classifier(cycle, weight_decay=0.5), ckpt=path)
    assert resumed == [(lr, momentum, 0.5) for lr, momentum, _ in whole[8:]]


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "line"),
    [
        (partial(torch.optim.SGD, lr=0.1, nesterov=True), None, "optimizer: Nesterov"),
        (partial(torch.optim.SGD, lr=0.1), partial(one_cycle, rise=2), "scheduler: rise .* got 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_there_is_data(optimizer: Any, scheduler: Any, line: str) -> None:
    module = Classifier(tiny_network(), optimizer, scheduler)
    with pytest.raises(ValueError, match=line):
        module.try_settings()


def test_a_training_without_end_has_no_schedule(fit: Fit) -> None:
    with pytest.raises(ValueError, match="the schedule needs to know when training ends"):
        fit(classifier(one_cycle), max_epochs=-1)


def test_the_state_of_another_optimizer_is_refused(fit: Fit, half: Callable[..., Path]) -> None:
    path = half(classifier())
    adam = Classifier(tiny_network(), partial(torch.optim.Adam, lr=0.1))
    with pytest.raises(
        ValueError, match=r"optimizer: the checkpoint has the state of SGD .* Adam .* begin another run"
    ):
        fit(adam, ckpt=path)


def test_no_gradients_are_held_while_the_next_batch_runs_forward(fit: Fit) -> None:
    held: list[bool] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            held.append(any(p.grad is not None for p in pl_module.parameters()))

    fit(classifier(), callbacks=[Look()])
    fit(classifier(), callbacks=[Look()], accumulate_grad_batches=2)
    assert held == [False] * 8 + [False, True] * 4
