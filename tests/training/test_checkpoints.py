import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from revnet.training import (
    AtomicCheckpoints,
    Classifier,
    checkpoint_config,
    load_checkpoint,
    newest_checkpoint,
    one_cycle,
    read_checkpoint,
)
from tests.training.tiny import tiny_network

Fit = Callable[..., pl.Trainer]
CONFIG = {"model": {"_target_": "somewhere.tiny", "num_classes": 4}, "data": {"root": None, "sizes": [4, 4]}}


def classifier(network: nn.Module | None = None, config: dict[str, Any] | None = CONFIG) -> Classifier:
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return Classifier(network or tiny_network(), optimizer, one_cycle, config=config)


def test_a_checkpoint_describes_itself_in_plain_values(fit: Fit, tmp_path: Path) -> None:
    callback = pl.callbacks.ModelCheckpoint(tmp_path / "kept", monitor="val/accuracy", mode="max")
    fit(classifier(), callbacks=[callback], enable_checkpointing=True)
    checkpoint = torch.load(callback.best_model_path, weights_only=True)
    assert checkpoint["config"] == CONFIG
    assert read_checkpoint(callback.best_model_path).keys() == checkpoint.keys()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(fit: Fit, tmp_path: Path) -> None:
    keep_all = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = classifier(), classifier()
    fit(whole, max_epochs=4, callbacks=[keep_all], enable_checkpointing=True)
    fit(resumed, max_epochs=4, ckpt=tmp_path / "epoch=1.ckpt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)


def test_weights_are_loaded(fit: Fit, tmp_path: Path) -> None:
    trained = classifier()
    fit(trained).save_checkpoint(tmp_path / "a.ckpt")
    fresh = classifier()
    load_checkpoint(fresh, read_checkpoint(tmp_path / "a.ckpt"), "a.ckpt")
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=0, atol=0)


def wider() -> nn.Sequential:
    network = tiny_network()
    network[4] = nn.Linear(128, 7)
    return network


def deeper() -> nn.Sequential:
    return tiny_network().append(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("network", "difference"),
    [
        (wider, r"network.4.weight is \(4, 128\) there and \(7, 128\) here"),
        (deeper, r"network.5.weight is nothing there and \(4, 4\) here"),
        (lambda: tiny_network()[:4], r"network.4.weight is \(4, 128\) there and nothing here"),
    ],
)
def test_another_architecture_is_refused(
    fit: Fit, tmp_path: Path, network: Callable[[], nn.Module], difference: str
) -> None:
    fit(classifier()).save_checkpoint(tmp_path / "a.ckpt")
    other = classifier(network(), {"model": {"_target_": "somewhere.other", "num_classes": 7}})
    message = rf"a.ckpt holds tiny for 4 classes \(.* values\), not the other for 7 classes .* asked for: {difference}"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(other, read_checkpoint(tmp_path / "a.ckpt"), "a.ckpt")


def test_a_checkpoint_without_configuration_is_refused_by_its_sizes(fit: Fit, tmp_path: Path) -> None:
    fit(classifier(config=None)).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds unnamed network"):
        load_checkpoint(classifier(wider()), read_checkpoint(tmp_path / "a.ckpt"), "a.ckpt")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=.*missing.ckpt: no such file"):
        read_checkpoint(tmp_path / "missing.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save(nn.Linear(2, 2), tmp_path / "module.ckpt")
    for name in ("text.ckpt", "empty.ckpt", "module.ckpt"):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint"):
            read_checkpoint(tmp_path / name)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="'state_dict'"):
        read_checkpoint(tmp_path / "weights.ckpt")


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.ckpt"
    AtomicCheckpoints().save_checkpoint({"state_dict": {}, "epoch": 1}, path)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("revnet.training.checkpoints.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: no checkpoint .*some.ckpt"):
        AtomicCheckpoints().save_checkpoint({"state_dict": {}, "epoch": 2}, path)
    assert read_checkpoint(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_that_can_be_read_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for age, name in enumerate(("best", "next", "last", "previous", "other")):
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": {}, "optimizer_states": []}, path)
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "next.ckpt").write_bytes((tmp_path / "next.ckpt").read_bytes()[:100])
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert newest_checkpoint(tmp_path) == tmp_path / "previous.ckpt"
    for name in ("previous", "other"):
        (tmp_path / f"{name}.ckpt").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "best.ckpt"


def damaged(content: bytes) -> Iterator[bytes]:
    """Cut short, as by a full disk, or with a tail that never reached it."""
    for part in range(40):
        place = part * len(content) // 40
        yield content[:place]
        yield content[:place] + bytes(len(content) - place)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("values", [100, 5_000, 50_000])
def test_a_damaged_file_of_any_size_is_named_and_passed_over(values: int, zipped: bool, tmp_path: Path) -> None:
    checkpoint = {"state_dict": {"a": torch.randn(values)}, "optimizer_states": []}
    torch.save(checkpoint, tmp_path / "old.ckpt", _use_new_zipfile_serialization=zipped)
    os.utime(tmp_path / "old.ckpt", (1000, 1000))
    whole = (tmp_path / "old.ckpt").read_bytes()
    for content in damaged(whole):
        (tmp_path / "new.ckpt").write_bytes(content)
        if zipped or len(content) < len(whole):  # the other format does not tell zeros from values
            with pytest.raises(ValueError, match=r"new\.ckpt is not a checkpoint of tensors"):
                read_checkpoint(tmp_path / "new.ckpt")
            assert newest_checkpoint(tmp_path) == tmp_path / "old.ckpt"


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {}}, tmp_path / "some.ckpt")

    def refuse(path: Path, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(PermissionError, match=r"some\.ckpt"):
        newest_checkpoint(tmp_path)


def test_the_file_that_a_network_began_with_is_not_asked_for_again() -> None:
    given = {"config": {"model": {"name": "net", "weights": "gone.safetensors"}, "data": {}}}
    assert checkpoint_config(given, "a.ckpt") == {"model": {"name": "net", "weights": None}, "data": {}}
    assert given["config"]["model"]["weights"] == "gone.safetensors"
