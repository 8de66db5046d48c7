import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from revnet.data import FileImages, ImageFolder, TensorImages

# Python warns of processes that are forked from one with threads, as torch's data loader does.
FORK = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
COLORS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def fill(root, splits=("train", "test"), count=10, size=(9, 7)):
    for split in splits:
        for name, color in COLORS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", size, color).save(folder / f"{index}.png")
    return root


def corrupt(file):
    file.write_bytes(b"not an image")
    return file


def sizes(data):
    return {name: len(images) for name, images in sorted(data.splits.items())}


def test_images_of_any_size_and_mode_become_one_tensor(tmp_path):
    root = fill(tmp_path, size=(9, 7))
    for index, mode in enumerate(("L", "LA", "P", "RGBA", "I;16", "1")):
        Image.new(mode, (1 + 3 * index, 40)).save(root / "train" / "red" / f"extra{index}.png")
    Image.new("CMYK", (50, 30), (0, 255, 255, 0)).save(root / "train" / "red" / "extra.jpg")
    data = ImageFolder(root, image_size=8, batch_size=4)
    assert (data.num_classes, data.image_shape, data.class_names) == (2, (3, 8, 8), ["blue", "red"])
    data.setup()
    train = data.splits["train"].dataset
    assert isinstance(train, TensorImages)
    assert train.images.shape == (27, 3, 8, 8)
    assert train.labels.tolist() == [0] * 10 + [1] * 17
    assert sizes(data) == {"test": 20, "train": 24, "val": 3}
    assert (data.splits["test"].images[0] == torch.tensor(COLORS["blue"]).view(3, 1, 1)).all()
    assert data.train_dataloader().num_workers == 0


def test_hidden_and_other_files_are_passed_over_and_subfolders_searched(tmp_path):
    root = fill(tmp_path, count=2)
    (root / "train" / ".cache").mkdir()
    (root / "train" / "red" / ".thumbnails").mkdir()
    Image.new("RGB", (2, 2)).save(root / "train" / "red" / ".thumbnails" / "0.png")
    (root / "train" / "red" / "notes.txt").write_text("red things")
    (root / "train" / "red" / "._0.png").write_bytes(b"")
    (root / "train" / "red" / "more").mkdir()
    Image.new("RGB", (2, 2)).save(root / "train" / "red" / "more" / "UPPER.PNG")
    data = ImageFolder(root, val_fraction=0)
    data.setup()
    assert sizes(data) == {"test": 4, "train": 5}


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "test"), {"test": 20, "train": 16, "val": 4}),
        (("train", "val"), {"test": 20, "train": 16, "val": 4}),
        (("train", "val", "test"), {"test": 20, "train": 20, "val": 20}),
    ],
)
def test_validation_is_a_folder_or_a_part_of_the_training_images(tmp_path, splits, expected):
    root = fill(tmp_path, splits)
    if len(splits) == 3:
        Image.new("RGB", (2, 2)).save(root / "test" / "red" / "one_more.png")
        expected = {**expected, "test": 21}
    data = ImageFolder(root, val_fraction=0.2)
    data.setup()
    assert sizes(data) == expected


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize(
    "options", [{"crop_area": (0.1, 1), "padding": 0}, {"color_jitter": (0.5, 0.5, 0.5, 0.1)}, {"memory_limit": 0}]
)
def test_images_are_read_by_workers_when_they_are_needed(tmp_path, options):
    root = fill(tmp_path)
    for index in range(10):
        Image.effect_noise((20, 30), 80).save(root / "train" / "red" / f"noise{index}.png")
    data = ImageFolder(root, image_size=6, batch_size=8, num_workers=1, **options)
    data.setup()
    train, val = data.splits["train"].dataset, data.splits["val"].dataset
    assert isinstance(train, FileImages)
    assert set(data.splits["train"].indices).isdisjoint(data.splits["val"].indices)
    loader = data.train_dataloader()
    assert loader.num_workers == 1
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, 6, 6)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    # What is validated on is read from the same files, but always in the same way.
    assert torch.equal(val[20][0], val[20][0])
    assert torch.equal(train[20][0], train[20][0]) == ("memory_limit" in options)


def test_both_ways_of_holding_images_give_the_same(tmp_path):
    root = fill(tmp_path)
    Image.effect_noise((64, 48), 80).save(root / "test" / "red" / "noise.png")
    held, read = (ImageFolder(root, 16, crop_ratio=0.8, memory_limit=limit, num_workers=0) for limit in (1, 0))
    for data in (held, read):
        data.setup()
    assert isinstance(held.splits["test"], TensorImages)
    assert isinstance(read.splits["test"], FileImages)
    for one, other in zip(held.test_dataloader(), read.test_dataloader(), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    torch.testing.assert_close(held.normalize.shift, read.normalize.shift)


def test_the_central_square_is_a_share_of_the_shorter_side(tmp_path):
    root = fill(tmp_path)
    image = Image.new("RGB", (300, 256))
    image.paste((255, 255, 255), (22 + 16, 16, 22 + 16 + 224, 16 + 224))
    image.save(root / "test" / "red" / "white_in_the_middle.png")
    data = ImageFolder(root, 224, crop_ratio=0.875, num_workers=0)
    data.setup()
    assert (data.splits["test"].images[-1] == 255).all()


def test_one_pixel_images(tmp_path):
    data = ImageFolder(fill(tmp_path, size=(1, 1)), 4, crop_area=(0.05, 1), padding=0, crop_ratio=0.875, num_workers=0)
    data.setup()
    assert data.splits["train"][0][0].shape == (3, 4, 4)
    assert data.splits["test"][0][0].flatten(1).unique(dim=1).flatten().tolist() == [0, 0, 255]


def test_an_unreadable_image_is_named_while_all_are_read(tmp_path):
    file = corrupt(fill(tmp_path) / "train" / "red" / "3.png")
    with pytest.raises(ValueError, match=f"^{file}: not a readable image"):
        ImageFolder(tmp_path).setup()


@pytest.mark.filterwarnings(FORK)
def test_an_unreadable_image_is_named_by_a_worker(tmp_path):
    data = ImageFolder(fill(tmp_path), memory_limit=0, num_workers=1, batch_size=4)
    data.setup()
    file = corrupt(tmp_path / "test" / "red" / "3.png")
    with pytest.raises(ValueError, match=f"\nValueError: {file}: not a readable image"):
        list(data.test_dataloader())


@pytest.mark.filterwarnings(FORK)
def test_workers_share_the_reading_of_many_images(tmp_path):
    root = fill(tmp_path, count=70, size=(2, 2))
    data = ImageFolder(root, num_workers=1)
    data.setup()
    assert data.splits["train"].dataset.images.shape == (140, 3, 32, 32)
    file = corrupt(root / "train" / "red" / "69.png")
    with pytest.raises(ValueError, match=f"\nValueError: {file}: not a readable image"):
        ImageFolder(root, num_workers=1).setup()


def test_unreadable_images_are_left_out_of_memory(tmp_path, caplog):
    caplog.set_level("WARNING")
    broken = [corrupt(fill(tmp_path) / "train" / "red" / "3.png"), corrupt(tmp_path / "test" / "blue" / "0.png")]
    data = ImageFolder(tmp_path, val_fraction=0, skip_unreadable=True)
    data.setup()
    assert sizes(data) == {"test": 19, "train": 19}
    assert data.splits["test"].labels.tolist() == [0] * 9 + [1] * 10
    assert caplog.messages == [f"2 unreadable images are skipped: {broken[0]}, {broken[1]}"]


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_readable_image_of_the_same_split_stands_in(tmp_path, caplog, num_workers):
    caplog.set_level("WARNING")
    fill(tmp_path)
    options = {"memory_limit": 0, "num_workers": num_workers, "batch_size": 9, "val_fraction": 0.1}
    data = ImageFolder(tmp_path, normalization="symmetric", skip_unreadable=True, **options)
    data.setup()
    train, val = (set(data.splits[name].indices) for name in ("train", "val"))
    paths = [
        data.splits["train"].dataset.paths[index] for index in sorted(train)[:4] + sorted(train)[-1:] + sorted(val)[:1]
    ]
    broken = [str(corrupt(Path(path))) for path in paths]
    for _ in range(2):  # the second time they are known
        batches = list(data.train_dataloader())
        assert [images.shape for images, _ in batches] == [(9, 3, 32, 32)] * 2
        labels = torch.cat([labels for _, labels in batches])
        assert labels.tolist().count(1) == 8  # 9, without the last one, for which the first readable one stands in
        blue = torch.cat([images for images, _ in batches])[labels == 0]
        assert (blue[:, 2] == 255).all()
    assert sum(len(images) for images, _ in data.val_dataloader()) == 2
    assert sum(len(images) for images, _ in data.test_dataloader()) == 20
    data.report_unreadable()
    data.teardown("fit")
    (line,) = caplog.messages
    assert line.startswith("6 unreadable images are skipped: ")
    assert line.endswith(" and 1 more")
    assert all(path in broken for path in line.partition(": ")[2].partition(" and ")[0].split(", "))


def test_nothing_but_unreadable_images(tmp_path):
    for file in (fill(tmp_path) / "test").rglob("*.png"):
        corrupt(file)
    data = ImageFolder(tmp_path, memory_limit=0, num_workers=0, skip_unreadable=True)
    data.setup()
    with pytest.raises(ValueError, match=r"none of 20 images can be read, .*0\.png among them"):
        next(iter(data.test_dataloader()))
    with pytest.raises(ValueError, match="none of 20 images can be read"):
        ImageFolder(tmp_path, skip_unreadable=True).setup()


@pytest.mark.parametrize("options", [{"trivial_augment": True}, {"random_erasing": 1.0}])
def test_training_images_are_changed_and_others_are_not(tmp_path, options):
    root = fill(tmp_path)
    Image.effect_noise((30, 30), 80).save(root / "train" / "red" / "0.png")
    Image.effect_noise((30, 30), 80).save(root / "test" / "red" / "0.png")
    data = ImageFolder(root, val_fraction=0, num_workers=0, **options)
    data.setup()
    seen = torch.stack([data.splits["train"][10][0] for _ in range(10)])
    assert len(seen.flatten(1).unique(dim=0)) > 5
    if "random_erasing" in options:
        mean = torch.tensor([124, 116, 104]).view(3, 1, 1)
        assert ((seen == mean).all(dim=1).sum(dim=(1, 2)) > 10).all()
    assert torch.equal(data.splits["test"][10][0], data.splits["test"][10][0])


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_an_epoch_that_is_interrupted_goes_on_with_the_same_crops(tmp_path, skip_unreadable):
    fill(tmp_path)
    for file in (tmp_path / "train").rglob("*.png"):
        Image.effect_noise((20, 30), 80).save(file)
    options = {"crop_area": (0.05, 0.5), "padding": 0, "batch_size": 3, "skip_unreadable": skip_unreadable}
    seen = []
    for num_workers in (0, 2):
        data = ImageFolder(tmp_path, 8, num_workers=num_workers, **options)
        data.setup()
        loader = data.train_dataloader()
        iterator = iter(loader)
        for _ in range(2):
            next(iterator)
        state = loader.state_dict()
        whole = [images for images, _ in iterator]
        assert len(whole) == 4
        torch.rand(3)  # the random numbers of the process do not matter
        data.num_workers = 2 - num_workers
        resumed = data.train_dataloader()
        resumed.load_state_dict(state)
        for one, other in zip(whole, (images for images, _ in resumed), strict=True):
            assert torch.equal(one, other)
        seen.append(whole)
    assert torch.equal(torch.cat(seen[0]), torch.cat(seen[1]))


def test_missing_and_empty_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/train: no such directory; put images into .*/CLASS/"):
        ImageFolder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/train has no class folders; put images into"):
        ImageFolder(tmp_path)
    fill(tmp_path, ["train"])
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} has neither test/ nor val/; put images into"):
        ImageFolder(tmp_path).setup()
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/val has no class folders"):
        ImageFolder(tmp_path).setup()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images(tmp_path, split):
    for file in (fill(tmp_path) / split / "red").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path}/{split}/red has no images"):
        ImageFolder(tmp_path).setup()


def test_classes_that_differ(tmp_path):
    fill(tmp_path)
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "green")
    with pytest.raises(ValueError, match=f"{tmp_path}/test has other classes .*: red lacking, green unknown"):
        ImageFolder(tmp_path).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 10}, "data has 2 classes, num_classes=10"),
        ({"image_size": 0}, "image_size=0: give"),
        ({"crop_ratio": 1.5}, "crop_ratio=1.5: give"),
        ({"crop_area": (0.5, 0.1), "padding": 0}, r"crop_area=\(0.5, 0.1\): give"),
        ({"crop_area": (0.5, 1)}, r"crop_area=\(0.5, 1\) and padding=4 both crop"),
        ({"color_jitter": (0.5, 0.5)}, r"color_jitter=\(0.5, 0.5\): give"),
        ({"random_erasing": 2}, "random_erasing=2: give"),
        ({"memory_limit": -1}, "memory_limit=-1: give"),
        ({"val_fraction": 2}, "val_fraction=2: give"),
    ],
)
def test_an_odd_argument_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(fill(tmp_path, count=1), **options)


def test_a_home_directory_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(fill(tmp_path, count=1)))
    assert ImageFolder("~").num_classes == 2


def test_the_seed_repeats_what_workers_do(tmp_path):
    data = ImageFolder(fill(tmp_path), crop_area=(0.05, 0.2), padding=0, num_workers=0, batch_size=8)
    for index in range(10):
        Image.effect_noise((20, 30), 80).save(tmp_path / "train" / "red" / f"{index}.png")
    data.setup()
    batches = []
    for _ in range(2):
        pl.seed_everything(3, verbose=False)
        batches.append(torch.cat([images for images, _ in data.train_dataloader()]))
    assert torch.equal(*batches)


def test_what_was_found_is_logged(tmp_path, caplog):
    root = fill(tmp_path, count=4)
    (root / "valid").mkdir()
    with caplog.at_level("INFO"):
        ImageFolder(root).setup()
    passed_over, found = caplog.messages
    assert re.fullmatch(".*: passed over, for they are none of train, val and test: valid", passed_over)
    assert re.fullmatch(r".*: images of 2 classes \(blue, red\): 8 in train, 8 in test", found)


def test_other_classes_than_those_of_a_checkpoint_are_refused(tmp_path):
    data = ImageFolder(fill(tmp_path, count=4))
    data.setup()
    state = data.state_dict()
    data.load_state_dict(state)
    for names, first in (["cat", "red"], "cat"), (["blue", "red", "sea"], "sea"):
        with pytest.raises(ValueError, match=f"trained on classes of which one is {first}, and these data have "):
            data.load_state_dict({**state, "class_names": names})
    data.load_state_dict({**state, "class_names": None})  # of data that do not say what their labels mean
