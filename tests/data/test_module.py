from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from revnet.data import Digits, Fake, ImageDataModule
from revnet.training import Continuation

# Without a validation split Lightning says that it has nothing to validate on.
NO_VALIDATION = "ignore:Total length of `list` across ranks is zero"
# Python warns of processes that are forked from one with threads, as torch's data loader does.
FORK = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"


class Linear(pl.LightningModule):
    """The simplest classifier; it keeps what it is fed."""

    def __init__(self, data: ImageDataModule) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.LazyLinear(data.num_classes))
        self.network(torch.zeros(1, *data.image_shape))
        self.fed: dict[str, list[torch.Tensor]] = {"train": [], "val": [], "test": []}
        self.losses: list[float] = []

    def step(self, split: str, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        self.fed[split].append(images)
        return nn.functional.cross_entropy(self.network(images).float(), labels)

    def training_step(self, batch, index):
        loss = self.step("train", batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.step("val", batch)

    def test_step(self, batch, index):
        self.step("test", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def make_trainer(tmp_path, **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def epoch(data: ImageDataModule, split: str, training: bool = False) -> torch.Tensor:
    loader = getattr(data, f"{split}_dataloader")()
    return torch.cat([data.preprocess(images, training) for images, _ in loader])


def test_one_step_of_a_real_trainer(tmp_path):
    data = Digits(batch_size=50, cutout=2)
    model = Linear(data)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(model, datamodule=data)
    loaded = data.splits
    trainer.test(model, datamodule=data, verbose=False)
    assert data.splits is loaded
    (trained,) = model.fed["train"]
    assert trained.shape == (50, 3, 8, 8)
    assert trained.dtype == torch.float32
    assert sum(map(len, model.fed["test"])) == 359
    # Only what is trained on has the zeros of padding and cutout, which no normalised pixel has.
    assert (trained == 0).any()
    # The sanity check of validation and the validation itself get the same images.
    assert not any((images == 0).any() for images in model.fed["val"] + model.fed["test"])
    assert torch.equal(model.fed["val"][0], epoch(data, "val")[:50])


def test_a_trainer_learns_from_fake_images(tmp_path):
    data = Fake(image_shape=(3, 8, 8), num_classes=4, batch_size=64, seed=1)
    model = Linear(data)
    make_trainer(tmp_path, max_epochs=5).fit(model, datamodule=data)
    assert model.losses[0] > 1
    assert model.losses[-1] < 0.5 * model.losses[0]


def test_the_precision_is_that_of_the_trainer(tmp_path):
    data = Fake(image_shape=(3, 4, 4), batch_size=16)
    model = Linear(data)
    make_trainer(tmp_path, max_steps=1, precision="bf16-true").fit(model, datamodule=data)
    assert model.fed["train"][0].dtype == torch.bfloat16


@pytest.mark.filterwarnings(NO_VALIDATION)
def test_all_images_train_without_a_validation_split(tmp_path):
    data = Fake(image_shape=(3, 4, 4), train_size=96, batch_size=32, val_fraction=0)
    model = Linear(data)
    make_trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert sum(map(len, model.fed["train"])) == 96
    assert model.fed["val"] == []
    assert data.val_dataloader() == []


def test_validation_and_test_images_are_never_augmented():
    data = Digits(flip=True, padding=2, cutout=3, batch_size=100)
    data.setup()
    for split in ("val", "test"):
        assert torch.equal(epoch(data, split), epoch(data, split))
    images, _ = next(iter(data.train_dataloader()))
    assert not torch.equal(data.preprocess(images, True), data.preprocess(images, True))
    assert torch.equal(data.preprocess(images, False), data.preprocess(images, False))


def test_splits_are_disjoint_and_the_same_in_every_instance():
    one, other, third = Digits(), Digits(batch_size=7), Digits(split_seed=1)
    for seed, data in enumerate((one, other, third)):
        torch.manual_seed(seed)
        data.setup()
    assert one.splits["val"].indices == other.splits["val"].indices != third.splits["val"].indices
    assert not set(one.splits["train"].indices) & set(one.splits["val"].indices)
    assert torch.equal(one.splits["test"].images, third.splits["test"].images)


def test_normalisation_is_measured_on_the_training_split_alone():
    data = Fake(image_shape=(3, 4, 4), val_fraction=0.5, normalization="mean_image")
    data.setup()
    images = data.splits["train"].dataset.images
    mean = images[data.splits["train"].indices].float().mean(dim=0)
    torch.testing.assert_close(data.preprocess(images, training=False), images.float() - mean)


def test_other_images_are_normalised_as_those_that_a_network_was_trained_with():
    data = Fake(image_shape=(3, 4, 4), normalization="mean_image")
    data.setup()
    images, state = data.splits["train"].dataset.images, data.state_dict()
    for when in ("before", "after"):
        other = Fake(image_shape=(3, 4, 4), normalization="mean_image", seed=1)
        for step in (other.setup, lambda other=other: other.load_state_dict(state))[:: 1 if when == "after" else -1]:
            step()
        assert torch.equal(other.preprocess(images, training=False), data.preprocess(images, training=False))
    told = Fake(image_shape=(3, 4, 4), normalization="symmetric")
    told.load_state_dict(state)
    told.setup()
    torch.testing.assert_close(told.preprocess(images, training=False), images / 127.5 - 1)
    with pytest.raises(
        ValueError, match=r"normalization=mean_image: .* shape \(3, 4, 4\), which images of shape \(3, 8, 8\)"
    ):
        Fake(image_shape=(3, 8, 8), normalization="mean_image").load_state_dict(state)


@pytest.mark.filterwarnings(NO_VALIDATION)
def test_the_middle_of_an_epoch_is_gone_on_with_in_batches_of_its_size(tmp_path):
    def run(batch_size, *callbacks, ckpt_path=None):
        data = Fake((1, 2, 2), train_size=60, batch_size=batch_size, val_fraction=0)
        trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[Continuation(), *callbacks])
        trainer.fit(Linear(data), datamodule=data, ckpt_path=ckpt_path, weights_only=True)

    run(10, Save(tmp_path / "some.ckpt", 9))
    with pytest.raises(ValueError, match=r"batch_size=5: .* the middle of an epoch in batches of 10; go on with these"):
        run(5, ckpt_path=tmp_path / "some.ckpt")


def test_training_is_shuffled_by_the_global_seed_and_drops_the_rest():
    data = Fake(image_shape=(1, 2, 2), batch_size=100, train_size=250, val_fraction=0)
    data.setup()
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(epoch(data, "train", training=True))
    assert len(orders[0]) == 200
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_every_pass_is_another_epoch_where_no_trainer_counts_them():
    torch.manual_seed(0)
    data = Fake(image_shape=(1, 2, 2), batch_size=100, train_size=200, val_fraction=0)
    data.setup()
    loader = data.train_dataloader()
    passes = [torch.cat([images for images, _ in loader]) for _ in range(3)]
    loader.sampler.set_epoch(0)
    again = torch.cat([images for images, _ in loader])
    assert torch.equal(again, passes[0])
    assert not any(torch.equal(passes[one], passes[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    assert not torch.equal(next(iter(loader))[0], next(iter(loader))[0])


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 2),
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, 8),
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, 3),  # not bound to its share
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, 2),  # srun --pty bash
        ({"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "RANK": "0"}, 2),  # srun torchrun
    ],
)
def test_a_device_has_its_share_of_the_processors(variables, number, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_NTASKS", "SLURM_JOB_NAME", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    data = Fake(image_shape=(3, 4, 4))
    data.trainer = SimpleNamespace(num_devices=4)
    assert data.workers([]) == number


def test_a_module_of_no_images_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match="ImageDataModule must define `load`"):
        ImageDataModule((3, 4, 4), 10).setup()


def test_images_in_memory_need_no_worker_but_can_have_some():
    data = Fake(image_shape=(3, 4, 4))
    data.setup()
    assert data.train_dataloader().num_workers == 0
    data = Fake(image_shape=(3, 4, 4), num_workers=1)
    data.setup()
    assert data.val_dataloader().num_workers == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_only_training_images_are_mixed(tmp_path, precision):
    data = Fake(image_shape=(3, 4, 4), batch_size=16, mixup=0.2, cutmix=1.0)
    labels = {}

    class Spy(Linear):
        def step(self, split, batch):
            labels[split] = batch[1]
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    model = Spy(data)
    trainer = make_trainer(tmp_path, max_steps=2, precision=precision)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert labels["train"].shape == (16, 10)
    assert labels["train"].is_floating_point()
    assert labels["val"].ndim == labels["test"].ndim == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -0.5}, "mixup=-0.5: give"),
        ({"cutmix": -1}, "cutmix=-1: give"),
        ({"num_classes": 7}, "data has 10 classes, num_classes=7: leave num_classes out"),
        ({"batch_size": 0}, "batch_size=0: give"),
        ({"batch_size": 2.5}, "batch_size=2.5: give"),
        ({"num_workers": -1}, "num_workers=-1: give"),
        ({"val_fraction": 1.0}, "val_fraction=1.0: give"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1: give"),
        ({"split_seed": -1}, "split_seed=-1: give a whole number from 0 to"),
        ({"split_seed": 2**32}, "split_seed=4294967296: give"),
        ({"split_seed": 0.5}, "split_seed=0.5: give"),
        ({"padding": -1}, "padding=-1: give"),
        ({"cutout": -2}, "cutout=-2: give"),
        ({"normalization": "mean"}, "normalization='mean': valid are mean_std, mean_image, symmetric, imagenet"),
    ],
)
def test_an_odd_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Digits(**options)


def test_a_batch_of_more_than_all_images_is_refused():
    data = Fake(train_size=100, batch_size=91)
    data.setup()
    with pytest.raises(ValueError, match="batch_size=91 is more than the 90 training images"):
        data.train_dataloader()


def test_the_normalisation_of_colours_needs_three_channels():
    with pytest.raises(ValueError, match="normalization='imagenet' is for 3 channels, the images have 1"):
        Fake(image_shape=(1, 4, 4), normalization="imagenet")


class Save(pl.Callback):
    """Saves after some batch."""

    def __init__(self, path, batch):
        self.path = path
        self.batch = batch

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.batch:
            trainer.save_checkpoint(self.path)


class Scheduled(Linear):
    """Asks for the number of steps, as one does who schedules the rate."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 12
        return super().configure_optimizers()


@pytest.mark.filterwarnings(NO_VALIDATION, FORK)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize("kind", [Linear, Scheduled])
def test_a_training_goes_on_with_any_number_of_processes(tmp_path, kind, before, after):
    path = tmp_path / "some.ckpt"

    def run(num_workers, *callbacks, ckpt_path=None):
        pl.seed_everything(5, verbose=False)
        data = Fake((1, 2, 2), train_size=60, batch_size=10, val_fraction=0, num_workers=num_workers)
        model = kind(data)
        trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[Continuation(), *callbacks])
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return model.fed["train"]

    whole = run(before, Save(path, 9))
    assert len(whole) == 12
    assert torch.equal(torch.stack(run(after, ckpt_path=path)), torch.stack(whole[9:]))


def test_what_a_batch_holds_is_known_without_the_other_processes():
    data = Fake((1, 2, 2), train_size=50, batch_size=5)
    data.setup()
    torch.manual_seed(1)
    seed = torch.initial_seed()
    strategy = Mock(root_device=torch.device("cpu"), broadcast=Mock(return_value=seed))
    data.trainer = Mock(world_size=2, global_rank=1, strategy=strategy, overfit_batches=0)
    data.trainer.fit_loop.epoch_progress.current.processed = 3
    images = [images for images, _ in data.train_dataloader()]
    assert strategy.broadcast.call_count == 1
    torch.manual_seed(2)  # the processes draw numbers of their own
    held = data.batch_indices(epoch=3, batch=2)
    assert torch.equal(data.load()[0].images[held], images[2])
    assert strategy.broadcast.call_count == 1
    data.trainer.overfit_batches = 1  # Lightning then takes an order of its own
    assert data.batch_indices(epoch=3, batch=2) == []
