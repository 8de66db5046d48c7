from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch

from revnet.data import ImageFolder, ShardedImages, write_shards
from revnet.data import sharded_images as module
from tests.data.folders import fill
from tests.data.test_module import Linear, make_trainer

OPTIONS = {"normalization": "symmetric", "num_workers": 0, "batch_size": 4, "padding": 0}


def convert(tmp_path, counts, shard_size=5):
    root, out = fill(tmp_path / "images", counts), tmp_path / "shards"
    write_shards(root, out, shard_size=shard_size, num_workers=0)
    return root, out


def by_content(loader):
    return sorted(
        (tuple(image.flatten().tolist()), label)
        for images, labels in loader
        for image, label in zip(images, labels.tolist(), strict=True)
    )


def test_the_images_are_those_of_the_folder(tmp_path):
    root, out = convert(tmp_path, {"train": 20, "val": 7, "test": 9})
    folder = ImageFolder(root, 8, crop_ratio=0.9, **OPTIONS)
    shards = ShardedImages(out, 8, crop_ratio=0.9, **OPTIONS)
    assert (shards.num_classes, shards.class_names, shards.image_shape) == (2, ["cat", "dog"], (3, 8, 8))
    for data in (folder, shards):
        data.setup()
    for split in ("train", "val", "test"):
        one, other = (getattr(data, f"{split}_dataloader")() for data in (folder, shards))
        assert by_content(one) == by_content(other)


def test_validation_takes_whole_shards(tmp_path):
    _, out = convert(tmp_path, {"train": 40, "test": 4})
    splits = []
    for seed in (0, 0, 1):
        data = ShardedImages(out, 8, val_fraction=0.25, split_seed=seed, **OPTIONS)
        data.setup()
        train, val = ({shard.file for shard in data.splits[name].shards} for name in ("train", "val"))
        assert (len(train), len(val), len(train & val)) == (6, 2, 0)
        splits.append(val)
    assert splits[0] == splits[1] != splits[2]
    data = ShardedImages(out, 8, val_fraction=0, **OPTIONS)
    data.setup()
    assert len(data.splits["train"]) == 10
    assert data.val_dataloader() == []


def test_statistics_are_measured_on_training_images(tmp_path):
    _, out = convert(tmp_path, {"train": 20, "test": 4})
    data = ShardedImages(out, 8, val_fraction=0, **{**OPTIONS, "normalization": "mean_std"})
    data.setup()
    images = torch.cat([data.preprocess(images, training=False) for images, _ in data.train_dataloader()])
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)


def test_a_trainer_sees_another_order_in_every_epoch(tmp_path):
    _, out = convert(tmp_path, {"train": 23, "test": 5})
    data = ShardedImages(out, 8, crop_area=(0.5, 1), flip=False, val_fraction=0.2, **OPTIONS)
    model = Linear(data)
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(model, datamodule=data)
    assert [len(images) for images in model.fed["train"]] == [4] * 8  # 18 images
    trainer.test(model, datamodule=data, verbose=False)
    assert sum(len(images) for images in model.fed["test"]) == 5
    assert not torch.equal(*(torch.cat(model.fed["train"][start : start + 4]) for start in (0, 4)))


def test_without_a_trainer_every_pass_is_the_next_epoch(tmp_path):
    _, out = convert(tmp_path, {"train": 40, "test": 4})
    data = ShardedImages(out, 8, val_fraction=0, **OPTIONS)
    data.setup()
    loader = data.train_dataloader()
    first, second = (torch.cat([images for images, _ in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    same = data.test_dataloader()
    assert torch.equal(*(torch.cat([images for images, _ in same]) for _ in range(2)))


def test_every_loader_is_for_as_many_processes_as_its_trainer_has(tmp_path):
    _, out = convert(tmp_path, {"train": 40, "test": 12})
    data = ShardedImages(out, 8, val_fraction=0, **OPTIONS)
    data.setup()
    assert sum(len(images) for images, _ in data.test_dataloader()) == 12
    data.trainer = Mock(world_size=2, global_rank=1, num_devices=2)
    data.trainer.fit_loop.epoch_progress.current.processed = 0
    assert sum(len(images) for images, _ in data.test_dataloader()) == 6
    assert sum(len(images) for images, _ in data.train_dataloader()) == 20
    data.trainer = Mock(world_size=1, global_rank=0, num_devices=1)
    data.trainer.fit_loop.epoch_progress.current.processed = 0
    assert sum(len(images) for images, _ in data.test_dataloader()) == 12


def test_damage_is_found_before_training(tmp_path):
    _, out = convert(tmp_path, {"train": 20, "test": 4})
    (out / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000002\.tar is missing; run revnet-shards again"):
        ShardedImages(out, 8).setup()


def test_odd_arguments_are_named(tmp_path, monkeypatch):
    _, out = convert(tmp_path, {"train": 8, "test": 4}, shard_size=10)
    with pytest.raises(ValueError, match="buffer=0: give"):
        ShardedImages(out, buffer=0)
    with pytest.raises(ValueError, match=r"val_fraction=0\.1 takes whole shards, and .* has one"):
        ShardedImages(out).setup()
    data = ShardedImages(out, val_fraction=0, batch_size=9)
    data.setup()
    with pytest.raises(ValueError, match="batch_size=9 is more than each device"):
        data.train_dataloader()
    with pytest.raises(FileNotFoundError, match=r"index\.json: no such file"):
        ShardedImages(tmp_path)
    monkeypatch.setattr(module.need_webdataset.__globals__["importlib"].util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'revnet\[shards\]'"):
        ShardedImages(out)
