import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from revnet.flows import Flow, NonFiniteError, nice, realnvp
from revnet.training import DensityEstimator, LastCheckpoint, LossGuard, SampleGrids, WeightAverage, constant_rate

ADAM = partial(torch.optim.Adam, lr=2e-2)
Fit = Callable[..., pl.Trainer]
SHAPE = (1, 4, 4)


def tiny_flow(**options: Any) -> Flow:
    return nice(SHAPE, hidden=16, layers=1, **options)


def levels(batches: int, size: int = 20) -> DataLoader:
    """Dark images of class 0, bright ones of class 1."""
    generator = torch.Generator().manual_seed(batches)
    labels = torch.arange(batches * size) % 2
    images = torch.randint(100, (batches * size, *SHAPE), generator=generator) + 150 * labels.view(-1, 1, 1, 1)
    data = list(zip(images / 255, labels, strict=True))
    return DataLoader(data, size, generator=generator)  # type: ignore[arg-type]


@pytest.fixture
def fit_flow(tmp_path: Path) -> Fit:
    def fit_flow(estimator: DensityEstimator, **settings: Any) -> pl.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        settings = {**quiet, "enable_model_summary": False, "max_epochs": 2, **settings}
        trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **settings)
        trainer.fit(estimator, levels(4), levels(2))
        return trainer

    return fit_flow


def test_training_learns_and_logs(fit_flow: Fit) -> None:
    trainer = fit_flow(DensityEstimator(tiny_flow(), ADAM, constant_rate), max_epochs=25, gradient_clip_val=1.0)
    metrics = trainer.callback_metrics
    names = {f"{split}/{name}" for split in ("train", "val") for name in ("nats", "bits_per_dim")}
    assert set(metrics) == {"train/loss", *names}
    assert metrics["val/bits_per_dim"] < 8.5  # 10.1 at the start
    nats, bits = metrics["val/nats"], metrics["val/bits_per_dim"]
    assert bits.item() == pytest.approx((16 * math.log(256) - nats.item()) / (16 * math.log(2)))


def test_the_loss_is_nats_per_dimension(fit_flow: Fit) -> None:
    flow = tiny_flow(dequantise=False)
    estimator = DensityEstimator(flow, ADAM)
    images, labels = next(iter(levels(1)))
    estimator.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    loss = estimator.training_step((images, labels), 0)
    torch.testing.assert_close(loss, -flow.log_prob(images).mean() / 16)


def test_reported_numbers_are_those_of_the_whole_split(fit_flow: Fit) -> None:
    flow = tiny_flow(dequantise=False)
    estimator = DensityEstimator(flow, ADAM)
    trainer = fit_flow(estimator)
    images, labels = (torch.stack(parts) for parts in zip(*levels(2).dataset, strict=True))
    trainer.test(estimator, DataLoader(list(zip(images, labels, strict=True)), 27), verbose=False)  # 27 and 13 images
    with torch.no_grad():
        assert trainer.callback_metrics["test/nats"].item() == pytest.approx(flow.log_prob(images).mean().item())


def test_the_noise_of_a_test_is_the_same_every_time_and_leaves_other_random_numbers_alone(fit_flow: Fit) -> None:
    estimator = DensityEstimator(tiny_flow(), ADAM)
    trainer = fit_flow(estimator)
    before, found = torch.get_rng_state(), []
    for _ in range(2):
        trainer.test(estimator, levels(2), verbose=False)
        found.append(trainer.callback_metrics["test/nats"].item())
        torch.rand(1)
    assert found[0] == found[1]
    torch.set_rng_state(before)
    trainer.test(estimator, levels(2), verbose=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_are_the_condition_of_a_flow_with_classes(fit_flow: Fit) -> None:
    flow = tiny_flow(classes=2)
    estimator = DensityEstimator(flow, ADAM)
    fit_flow(estimator, max_epochs=40)
    images, labels = next(iter(levels(1)))
    with torch.no_grad():
        right, wrong = estimator(images, labels).mean(), estimator(images, 1 - labels).mean()
    assert right > wrong + 1
    samples = flow.sample(200, context=torch.arange(200) % 2)
    assert samples[1::2].mean() > samples[::2].mean() + 0.2


def test_what_has_no_density_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no density"):
        DensityEstimator(nn.Linear(2, 2))


def test_pictures_are_drawn_and_change_nothing(fit_flow: Fit, tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [SampleGrids(tmp_path / "pictures", every_n_epochs=2, rows=4, columns=5)]):
        torch.manual_seed(0)
        estimator = DensityEstimator(tiny_flow(), ADAM)
        fit_flow(estimator, max_epochs=4, callbacks=callbacks)
        ends.append(estimator.state_dict())
    names = ("interpolations", "reconstructions", "samples")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        f"{name}_{epoch:04}.png" for name in names for epoch in (2, 4)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_pictures_are_drawn_at_the_first_validation_that_comes(fit_flow: Fit, tmp_path: Path) -> None:
    pictures = SampleGrids(tmp_path / "pictures", every_n_epochs=2, rows=2, columns=2)
    fit_flow(DensityEstimator(tiny_flow(), ADAM), max_epochs=7, check_val_every_n_epoch=3, callbacks=[pictures])
    assert sorted(path.name for path in (tmp_path / "pictures").glob("samples*")) == [
        "samples_0003.png",
        "samples_0006.png",
    ]


def test_a_training_that_goes_on_draws_when_it_would_have_and_another_one_anew(fit_flow: Fit, tmp_path: Path) -> None:
    def drawn() -> set[str]:
        return {path.stem[-1] for path in (tmp_path / "pictures").glob("samples*")}

    pictures = SampleGrids(tmp_path / "pictures", every_n_epochs=3, rows=2, columns=2)
    trainer = fit_flow(DensityEstimator(tiny_flow(), ADAM), max_epochs=4, callbacks=[pictures])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SampleGrids(tmp_path / "pictures", every_n_epochs=3, rows=2, columns=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=5, callbacks=[again], enable_model_summary=False, **quiet)
    trainer.fit(
        DensityEstimator(tiny_flow(), ADAM), levels(4), levels(2), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    assert drawn() == {"3"}
    fit_flow(DensityEstimator(tiny_flow(), ADAM), max_epochs=2, callbacks=[pictures])
    assert drawn() == {"3"}


def test_reconstructions_stand_below_their_images() -> None:
    images, labels = next(iter(levels(1)))
    pictures = SampleGrids("nowhere", rows=2, columns=10)._pictures(
        DensityEstimator(tiny_flow(classes=2)), images, labels
    )
    drawn, columns = pictures["reconstructions"]
    assert columns == 10
    torch.testing.assert_close(drawn[:10], images[:10])
    torch.testing.assert_close(drawn[10:20], images[:10])
    path, columns = pictures["interpolations"]
    torch.testing.assert_close(path[0], images[0])
    torch.testing.assert_close(path[columns - 1], images[-2])


def test_the_average_of_the_weights_is_validated(fit_flow: Fit) -> None:
    """And not the weights of training, which are further on."""
    found = []
    for decay in (0.0, 0.9):
        torch.manual_seed(0)
        estimator = DensityEstimator(tiny_flow(), ADAM)
        trainer = fit_flow(estimator, callbacks=[WeightAverage(decay=decay, update_every_n_steps=1)])
        found.append(float(trainer.callback_metrics["val/nats"]))
        (again,) = trainer.validate(estimator, levels(2), verbose=False)
        assert again["val/nats"] == pytest.approx(found[-1], rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


class Overflow(pl.Callback):
    """Makes the weights of one coupling infinite before the sixth step."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Tensor, index: int
    ) -> None:
        if trainer.global_step == 5:
            with torch.no_grad():
                pl_module.network.stages[0][3].branch.first.weight.fill_(math.inf)  # type: ignore[union-attr, index]


def test_a_flow_that_overflows_is_named_and_the_last_good_checkpoint_kept(fit_flow: Fit, tmp_path: Path) -> None:
    estimator = DensityEstimator(tiny_flow(), ADAM)
    keep = LastCheckpoint(tmp_path / "checkpoints")
    with pytest.raises(NonFiniteError, match=r"stages\.0\.3 \(AdditiveCoupling\) .* \(at step 6 \(epoch \d, batch \d"):
        fit_flow(estimator, callbacks=[keep, LossGuard(), Overflow()], enable_checkpointing=True)
    weights = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_realnvp_is_inverted_after_training(fit_flow: Fit) -> None:
    flow = realnvp(SHAPE, scales=1, blocks=1, width=8, dequantise=False)
    fit_flow(DensityEstimator(flow, ADAM), max_epochs=5, gradient_clip_val=1.0)
    images, _ = next(iter(levels(1)))
    with torch.no_grad():
        torch.testing.assert_close(flow.decode(flow.encode(images)), images, atol=1e-3, rtol=0)
