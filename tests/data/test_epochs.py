from itertools import islice

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from revnet.data import Fake, FileImages
from revnet.data.datasets import repeatable, whole_batch
from revnet.data.epochs import EpochLoader, Epochs, Places
from tests.data.test_module import NO_VALIDATION, Linear, make_trainer

# Python warns of processes that are forked from one with threads, as torch's data loader does.
FORK = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"


def noise(image: Image.Image) -> torch.Tensor:
    return torch.randint(256, (3, 2, 2), dtype=torch.uint8)


@pytest.fixture
def images(tmp_path):
    """Seven images whose random transform draws all there is to see."""
    Image.new("RGB", (2, 2)).save(tmp_path / "image.png")
    return FileImages([str(tmp_path / "image.png")] * 7, torch.arange(7), noise)


def load(images, batch_size=2, num_workers=0, seed=0, epoch=0):
    places = Places(images, 1, 0, seed=seed)
    places.set_epoch(epoch)
    options = {"sampler": places, "num_workers": num_workers, "persistent_workers": num_workers > 0}
    return EpochLoader(Epochs(images, seed), batch_size, collate_fn=whole_batch, drop_last=True, **options)


def seen(batches):
    return [(tuple(pictures.flatten().tolist()), labels.tolist()) for pictures, labels in batches]


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (0, 1), (1, 0), (1, 2), (2, 1)])
def test_an_epoch_goes_on_with_any_number_of_processes(images, before, after):
    whole = seen(load(images, epoch=3))
    assert len(whole) == 3
    left = load(images, num_workers=before, epoch=3)
    assert seen(islice(left, 2)) == whole[:2]
    state = left.state_dict()
    resumed = load(images, num_workers=after, epoch=3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert seen(resumed) == whole[2:]
    resumed.sampler.set_epoch(4)
    assert seen(resumed) == seen(load(images, epoch=4))  # the next one is whole


def test_an_epoch_that_was_handed_out_is_followed_by_the_next(images):
    loader = load(images)
    assert loader.state_dict()["batches"] == 0
    iterator = iter(loader)
    for place in (1, 2, 0):
        next(iterator)
        assert loader.state_dict()["batches"] == place
    assert len(loader) == len(seen(loader)) == 3


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_is_changed_in_another_way_in_every_epoch(images, num_workers):
    """Of batches of one image, too, which are the same in every epoch but for their order."""
    loader = load(images, batch_size=1, num_workers=num_workers)
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        epochs.append(seen(loader))
    pictures = {picture for epoch in epochs for picture, _ in epoch}
    assert len(pictures) == 3 * 7
    assert epochs[1] == seen(load(images, batch_size=1, epoch=1))
    assert epochs[1] != seen(load(images, batch_size=1, epoch=1, seed=1))


def test_random_numbers_of_the_process_go_on_and_those_of_a_gpu_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    state = torch.get_rng_state()
    with repeatable(1, "a"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    with repeatable(1, "a"):
        assert torch.equal(torch.rand(3), first)
    with repeatable(1, "b"):
        assert not torch.equal(torch.rand(3), first)


def test_processes_share_the_places_of_an_epoch():
    parts = [Places(range(5), 2, rank, seed=3, drop_last=True) for rank in range(2)]
    for part in parts:
        part.set_epoch(2)
    places = [place for part in parts for place in part]
    assert len(set(places)) == 4
    assert set(places) <= set(range(10, 15))


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled", NO_VALIDATION)
def test_overfitting_goes_on_where_it_was(tmp_path):
    """Lightning puts a sampler of its own into the loader then, for the first images in their order."""
    data = Fake((1, 2, 2), num_classes=2, train_size=8, batch_size=2, val_fraction=0, seed=4)
    model = Linear(data)
    make_trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(model, datamodule=data)
    fed = model.fed["train"]
    assert [len(batch) for batch in fed] == [2] * 4
    assert torch.equal(torch.stack(fed[:2]), torch.stack(fed[2:]))
    images = Epochs(data.splits["train"], 0)
    loader = EpochLoader(images, 2, collate_fn=whole_batch)
    loader.load_state_dict({"batches": 3})  # of a checkpoint that does not know the size
    assert seen(loader) == seen(DataLoader(images, 2, collate_fn=whole_batch))[3:]
