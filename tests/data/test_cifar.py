import hashlib
import io
import pickle
import socket
import tarfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision

from revnet.data import CIFAR10, CIFAR100


def write(folder, files: dict[str, dict]) -> dict[str, str]:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in files}


def entry(count: int, seed: int, key: str, classes: int) -> dict:
    random = np.random.default_rng(seed)
    data = random.integers(256, size=(count, 3072), dtype=np.uint8)
    return {"data": data, key: [index % classes for index in range(count)]}


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Sixty images in the official format, unpacked, with their own checksums."""
    batches = {f"data_batch_{n}": entry(10, n, "labels", 10) for n in range(1, 6)}
    files = {**batches, "test_batch": entry(10, 6, "labels", 10), "batches.meta": {"label_names": ["x"] * 10}}
    sums = write(tmp_path / "cifar" / "cifar-10-batches-py", files)
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [[name, sums[name]] for name in batches])
    monkeypatch.setattr(source, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": sums["batches.meta"]})
    return tmp_path / "cifar", files


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_official_format_becomes_tensors(cifar10):
    root, files = cifar10
    data = CIFAR10(root, val_fraction=0.2, batch_size=8)
    assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))
    data.prepare_data()
    data.setup()
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [40, 10, 10]
    third = torch.from_numpy(files["data_batch_1"]["data"][3].reshape(3, 32, 32))
    image, label = data.splits["train"].dataset[3]
    assert torch.equal(image, third)
    assert label == 3


def test_an_archive_in_its_place_is_unpacked(cifar10, monkeypatch):
    root, _ = cifar10
    folder = root / "cifar-10-batches-py"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    for file in folder.iterdir():
        file.unlink()
    (root / "cifar-10-python.tar.gz").write_bytes(packed.getvalue())
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    data = CIFAR10(root)
    data.prepare_data()
    data.setup()
    assert len(data.splits["test"]) == 10


def test_an_archive_that_cannot_be_unpacked_is_not_asked_for_again(cifar10, monkeypatch):
    root, _ = cifar10
    (root / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(b"no archive").hexdigest())
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(
        FileNotFoundError, match=r"cifar-10-python.tar.gz cannot be unpacked .*No space left.*; unpack it"
    ):
        CIFAR10(root).prepare_data()


def test_cifar100_has_fine_labels(tmp_path, monkeypatch):
    files = {
        "train": entry(200, 0, "fine_labels", 100),
        "test": entry(100, 1, "fine_labels", 100),
        "meta": {"fine_label_names": ["x"] * 100},
    }
    sums = write(tmp_path / "cifar-100-python", files)
    source = torchvision.datasets.CIFAR100
    monkeypatch.setattr(source, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(source, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": sums["meta"]})
    data = CIFAR100(tmp_path, val_fraction=0)
    assert data.num_classes == 100
    data.prepare_data()
    data.setup()
    assert data.splits["test"].labels.unique().tolist() == list(range(100))


@pytest.mark.parametrize(
    ("data", "archive"), [(CIFAR10, "cifar-10-python.tar.gz"), (CIFAR100, "cifar-100-python.tar.gz")]
)
def test_missing_data_says_where_it_comes_from(tmp_path, data, archive):
    module = data(tmp_path / "none")
    module.prepare_data()
    with pytest.raises(FileNotFoundError, match=f"root={tmp_path}/none: .*data.download=true.*{archive}") as caught:
        module.setup()
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert not (tmp_path / "none").exists()


def test_a_damaged_file_counts_as_missing(cifar10):
    root, _ = cifar10
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"root={root}: CIFAR10 is not there or damaged"):
        CIFAR10(root).setup()


def test_a_failed_download_is_one_line(tmp_path, no_network):
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched from .*unreachable.*tar.gz") as caught:
        CIFAR10(tmp_path, download=True).prepare_data()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_contradicting_class_count(tmp_path):
    with pytest.raises(ValueError, match="data has 100 classes, num_classes=10"):
        CIFAR100(tmp_path, num_classes=10)
