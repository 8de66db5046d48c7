from itertools import pairwise

import pytest
import torch
from torchvision.transforms import v2

from revnet.data import ShardBatches, ShardIndex, write_shards
from revnet.data.datasets import whole_batch
from revnet.data.epochs import Places
from revnet.data.shard_batches import ShardLoader
from tests.data.folders import fill

# Python warns of processes that are forked from one with threads, as torch's data loader does.
FORK = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
pytestmark = pytest.mark.filterwarnings(FORK)
COUNT = 47


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = fill(tmp_path_factory.mktemp("images"), {"train": COUNT, "test": 2})
    out = tmp_path_factory.mktemp("shards")
    write_shards(root, out, shard_size=10, num_workers=0)
    return out


def make(directory, batch_size=3, transform=None, **options):
    shards = ShardIndex.read(directory).splits["train"]
    return ShardBatches(directory, shards, transform or v2.PILToTensor(), batch_size, buffer=8, **options)


def load(batches, num_workers=0, epoch=0, **options):
    sampler = Places(batches, 1, 0, shuffle=False)
    sampler.set_epoch(epoch)
    options |= {"sampler": sampler, "num_workers": num_workers, "collate_fn": whole_batch}
    return ShardLoader(batches, batch_size=None, **options)


def names(loader):
    """Every image by its content, in batches."""
    return [[tuple(image.flatten().tolist()) for image in images] for images, _ in loader]


def flat(batches):
    return [image for batch in batches for image in batch]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_every_process_gets_as_many_batches_and_no_image_twice(directory, world_size, num_workers):
    """More processes and workers than shards (5), too."""
    parts = [
        names(load(make(directory, training=True, rank=rank, world_size=world_size), num_workers))
        for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {COUNT // (3 * world_size)}
    assert all(len(batch) == 3 for part in parts for batch in part)
    seen = [image for part in parts for image in flat(part)]
    assert len(set(seen)) == len(seen) == COUNT // (3 * world_size) * 3 * world_size


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_sees_every_image(directory, world_size, num_workers):
    parts = [names(load(make(directory, rank=rank, world_size=world_size), num_workers)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    seen = [image for part in parts for image in flat(part)]
    assert len(set(seen)) == COUNT
    assert len(seen) == -(-COUNT // world_size) * world_size
    assert flat(parts[0])[:2] == flat(names(load(make(directory))))[:2]


def test_the_order_is_of_the_seed_and_the_epoch(directory):
    def order(epoch=0, **options):
        return flat(names(load(make(directory, training=True, **options), epoch=epoch)))

    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)
    shards = flat(names(load(make(directory))))
    places = [shards.index(image) for image in order()]
    assert sum(abs(one - other) == 1 for one, other in pairwise(places)) < 10


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (0, 1), (1, 0), (1, 2), (2, 1), (2, 0)])
def test_an_epoch_that_is_interrupted_goes_on_with_the_next_batch(directory, before, after, caplog):
    """With as many processes as have begun it: each reads a part of it."""

    def loader(num_workers):
        varied = v2.Compose([v2.RandomResizedCrop(8), v2.PILToTensor()])
        options = {"persistent_workers": num_workers > 0}
        return load(make(directory, training=True, transform=varied), num_workers, epoch=4, **options)

    whole = names(loader(before))
    interrupted = loader(before)
    iterator = iter(interrupted)
    for _ in range(4):
        next(iterator)
    state = interrupted.state_dict()
    del iterator
    torch.rand(5)  # the random numbers of the process do not matter
    resumed = loader(after)
    resumed.load_state_dict(state)
    assert names(resumed) == whole[4:]
    assert resumed.state_dict() == {"batches": 0, "batch_size": 3, "parts": max(before, 1)}
    with pytest.raises(ValueError, match="batch_size=3: the checkpoint is of the middle of an epoch in batches of 2"):
        resumed.load_state_dict({"batches": 1, "batch_size": 2, "parts": max(before, 1)})
    said = f"num_workers={before}, as in the training that is gone on with, and not {after}: they read a part each"
    assert caplog.messages == ([] if max(before, 1) == max(after, 1) else [said])


def test_workers_that_persist_learn_of_the_epoch(directory):
    batches = make(directory, training=True)
    loader = load(batches, num_workers=1, persistent_workers=True)
    first = names(loader)
    loader.sampler.set_epoch(1)
    second = names(loader)
    assert sorted(flat(first)) != flat(first) != flat(second)
    assert second == names(load(batches, num_workers=1, epoch=1))


def test_a_damaged_image_is_named(directory, tmp_path):
    for file in directory.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(
            content.replace(b"IDAT", b"IDOT") if file.name == "train-000000.tar" else content
        )
    with pytest.raises(ValueError, match=r"train-000000\.tar: 000000\.png: not a readable image"):
        names(load(make(tmp_path)))
