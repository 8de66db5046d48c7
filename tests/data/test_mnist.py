import gzip
from pathlib import Path

import pytest
import torch
from torchvision import datasets

from revnet.data import MNIST

FILES = {"train-images-idx3-ubyte": (60, 28, 28), "t10k-images-idx3-ubyte": (10, 28, 28)}
FILES |= {"train-labels-idx1-ubyte": (60,), "t10k-labels-idx1-ubyte": (10,)}


def written(folder: Path, compress: bool = False) -> dict[str, torch.Tensor]:
    """Files of the IDX format, and what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, shape in FILES.items():
        found[name] = torch.randint(256 if len(shape) == 3 else 10, shape, dtype=torch.uint8)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        content = header + found[name].numpy().tobytes()
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return found


@pytest.mark.parametrize(("layout", "compress"), [("", False), ("", True), ("MNIST/raw", False)])
def test_the_four_files_are_read(tmp_path: Path, layout: str, compress: bool) -> None:
    held = written(tmp_path / layout, compress)
    data = MNIST(tmp_path, channels=1, val_fraction=1 / 6)
    data.setup()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 50, "val": 10, "test": 10}
    assert torch.equal(data.splits["val"].images[:, 0], held["train-images-idx3-ubyte"][50:])
    assert torch.equal(data.splits["val"].labels, held["train-labels-idx1-ubyte"][50:].long())
    assert torch.equal(data.splits["test"].images[:, 0], held["t10k-images-idx3-ubyte"])
    assert torch.equal(data.splits["train"].dataset.labels, held["train-labels-idx1-ubyte"][:50].long())


def test_grey_is_repeated_for_networks_of_coloured_images(tmp_path: Path) -> None:
    written(tmp_path)
    data = MNIST(tmp_path, val_fraction=0.0)
    data.setup()
    assert data.image_shape == (3, 28, 28)
    images, _ = data.splits["test"][range(10)]
    assert images.shape == (10, 3, 28, 28)
    assert "val" not in data.splits
    with pytest.raises(ValueError, match="channels=2: give 1, or 3"):
        MNIST(tmp_path, channels=2)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte is not there.*data\.download=true"):
        MNIST(tmp_path).setup()
    written(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte is damaged"):
        MNIST(tmp_path).setup()
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is damaged"):
        MNIST(tmp_path).setup()


def test_files_that_are_there_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    fetched = []
    monkeypatch.setattr(datasets, "MNIST", lambda root, download: fetched.append(root))
    MNIST(tmp_path, download=True).prepare_data()
    assert fetched == []
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    MNIST(tmp_path, download=True).prepare_data()
    assert fetched == [tmp_path]


def test_a_compressed_file_is_damaged_wherever_it_is(tmp_path: Path) -> None:
    written(tmp_path)
    plain = tmp_path / "t10k-images-idx3-ubyte"
    pixels = torch.randint(3, (10 * 28 * 28,), dtype=torch.uint8).numpy().tobytes()  # few values: they are packed
    packed = gzip.compress(plain.read_bytes()[:16] + pixels)
    plain.unlink()
    for place in range(10, len(packed) - 8, max(1, len(packed) // 50)):  # between the header and the checksum
        content = bytearray(packed)
        content[place : place + 2] = bytes(255 - byte for byte in content[place : place + 2])
        plain.with_name(f"{plain.name}.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged \(.*\): get it again"):
            MNIST(tmp_path).setup()
