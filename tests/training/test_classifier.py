from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from revnet.training import Classifier, TrainingMonitor, constant_rate, step_decay
from tests.training.tiny import CLASSES, tiny_batches, tiny_network

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
Fit = Callable[..., pl.Trainer]


def test_training_learns_and_logs(fit: Fit) -> None:
    trainer = fit(Classifier(tiny_network(), SGD, constant_rate), max_epochs=30)
    metrics = trainer.callback_metrics
    assert set(metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    assert metrics["train/accuracy"] >= 0.9
    assert metrics["val/accuracy"] >= 0.6


def test_reported_numbers_are_those_of_the_whole_split(fit: Fit) -> None:
    classifier = Classifier(tiny_network(), SGD)
    trainer = fit(classifier)
    images, labels = (torch.cat(parts) for parts in zip(*tiny_batches(7), strict=True))
    trainer.test(classifier, DataLoader(TensorDataset(images, labels), 20), verbose=False)  # 20 and 15 images
    with torch.no_grad():
        logits = classifier.eval()(images)
    assert trainer.callback_metrics["test/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item())
    correct = (logits.argmax(1) == labels).float().mean().item()
    assert trainer.callback_metrics["test/accuracy"].item() == pytest.approx(correct)


def test_flipped_images_are_averaged_in_validation_and_test_but_not_in_training(fit: Fit) -> None:
    plain, flipping = (Classifier(tiny_network(), SGD, test_time_flip=flip) for flip in (False, True))
    flipping.load_state_dict(plain.state_dict())
    images, labels = (torch.cat(parts) for parts in zip(*tiny_batches(7), strict=True))
    fit(flipping)
    plain.load_state_dict(flipping.state_dict())
    trainer = pl.Trainer(**{"logger": False, "enable_progress_bar": False, "enable_model_summary": False})
    trainer.test(flipping, DataLoader(TensorDataset(images, labels), 20), verbose=False)
    with torch.no_grad():
        logits = (plain.eval()(images) + plain(images.flip(-1))) / 2
    assert trainer.callback_metrics["test/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item())
    calls: list[int] = []
    flipping.network.register_forward_hook(lambda *_: calls.append(1))
    flipping.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    flipping.training_step((images, labels), 0)
    assert len(calls) == 1


def test_the_schedule_is_stepped_every_step_over_the_trainer_s_total(fit: Fit) -> None:
    totals = []

    def schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        totals.append(total_steps)
        return step_decay(optimizer, total_steps)

    trainer = fit(Classifier(tiny_network(), SGD, schedule), max_epochs=4, accumulate_grad_batches=2)
    assert totals == [8]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0005)


def test_groups_reach_the_optimizer(fit: Fit) -> None:
    trainer = fit(Classifier(tiny_network(), SGD))
    decay = [(group["weight_decay"], len(group["params"])) for group in trainer.optimizers[0].param_groups]
    assert decay == [(1e-3, 2), (0.0, 3)]


def test_label_smoothing(fit: Fit) -> None:
    classifier = Classifier(tiny_network(), SGD, loss=nn.CrossEntropyLoss(label_smoothing=0.2))
    trainer = fit(classifier, max_epochs=10)
    assert trainer.callback_metrics["val/loss"] > 0.4  # the entropy of a smoothed label is 0.59


def test_channels_last_reaches_weights_and_images() -> None:
    seen: list[Tensor] = []
    network = tiny_network()
    network[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 4, 4)
    logits = Classifier(network, channels_last=True)(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits, Classifier(network)(images))
    assert seen[1].is_contiguous()
    assert network[0].weight.is_contiguous()


def test_norm_momentum() -> None:
    assert Classifier(tiny_network()).network[1].momentum == 0.1
    assert Classifier(tiny_network(), norm_momentum=0.02).network[1].momentum == 0.02


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_precision(fit: Fit, precision: str, dtype: torch.dtype) -> None:
    seen = []
    network = tiny_network()
    network[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer = fit(Classifier(network, SGD), precision=precision)
    assert set(seen) == {dtype}
    assert trainer.callback_metrics["train/loss"].dtype == torch.float32


@pytest.mark.gpu
def test_steps_between_log_entries_do_not_wait_for_the_gpu(tmp_path: Path) -> None:
    """From the second batch on, when the metrics are where they belong, a synchronising call is an error."""

    class Strict(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
            torch.cuda.set_sync_debug_mode("error" if index else "default")

        def on_train_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        callbacks=[Strict(), TrainingMonitor()],
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(Classifier(tiny_network(), SGD, constant_rate), tiny_batches(4), tiny_batches(1))
    assert trainer.callback_metrics["train/accuracy"] >= 0


def test_a_classifier_without_optimizer_is_for_evaluation(fit: Fit) -> None:
    classifier = Classifier(tiny_network())
    assert classifier(torch.zeros(2, 3, 4, 4)).shape == (2, CLASSES)
    with pytest.raises(ValueError, match="optimizer=None"):
        fit(classifier)


def test_an_endless_training_has_no_schedule(fit: Fit) -> None:
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        fit(Classifier(tiny_network(), SGD, step_decay), max_epochs=-1)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        (partial(torch.optim.SGD, lr=-1.0), None, "optimizer: Invalid learning rate: -1.0"),
        (SGD, partial(step_decay, milestones=[3]), "scheduler: milestones"),
        (SGD, partial(step_decay, gama=3), "scheduler: .*'gama'"),
    ],
)
def test_a_bad_value_of_a_factory_is_a_value_error(
    fit: Fit, optimizer: Callable, scheduler: Callable | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Classifier(tiny_network(), optimizer, scheduler))


def test_lightning_loads_a_checkpoint_by_itself(fit: Fit, tmp_path: Path) -> None:
    trainer = fit(Classifier(tiny_network(), SGD))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    trained = trainer.lightning_module
    again = Classifier.load_from_checkpoint(tmp_path / "some.ckpt", network=tiny_network(), weights_only=True)
    assert all(value.equal(trained.state_dict()[name]) for name, value in again.state_dict().items())


def test_predictions_are_logits_in_the_order_of_the_images(fit: Fit) -> None:
    classifier = Classifier(tiny_network(), SGD, test_time_flip=True)
    trainer = fit(classifier)
    images = torch.cat([images for images, _ in tiny_batches(3)])
    alone = DataLoader(images, batch_size=5)
    for batches in (tiny_batches(3), alone):
        found = torch.cat(trainer.predict(classifier, batches))
        with torch.no_grad():
            assert found.equal((classifier.eval()(images) + classifier(images.flip(-1))) / 2)
