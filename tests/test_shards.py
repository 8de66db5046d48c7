import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from revnet import shards
from tests.commands import invoke
from tests.data.folders import fill


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def contents(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_a_conversion_that_is_killed_goes_on_and_ends_in_the_same_bytes(capsys: pytest.CaptureFixture) -> None:
    """Killed in a process of its own, in the middle."""
    fill(Path("images"), {"train": 600, "val": 5})
    options = ("root=images", "shard_size=2", "num_workers=0")
    assert invoke(shards.main, *options, "out=whole") == 0
    said = capsys.readouterr().out
    assert "train: 600 images of 2 classes in 300 shards\n" in said
    assert "val: 5 images of 2 classes in 3 shards\n" in said
    process = subprocess.Popen(
        [sys.executable, "-m", "revnet.shards", *options, "out=killed"], stdout=subprocess.DEVNULL
    )
    while len(list(Path("killed").glob("*.tar"))) < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in Path("killed").glob("*.tar")}
    assert len(finished) < 303
    assert not Path("killed/index.json").exists()
    assert invoke(shards.main, *options, "out=killed") == 0
    assert contents("killed") == contents("whole")
    written_again = [name for name, time in finished.items() if Path("killed", name).stat().st_mtime_ns != time]
    assert len(written_again) <= 1  # one that was finished, but not yet recorded
    assert sorted(path.name for path in Path().iterdir()) == ["images", "killed", "whole"]


def test_unreadable_images_are_named_or_left_out(capsys: pytest.CaptureFixture) -> None:
    fill(Path("images"), {"train": 9, "val": 5})
    Path("images/train/cat/000.png").write_bytes(b"no image")
    assert invoke(shards.main, "root=images", "out=shards", "num_workers=0") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("revnet-shards: 1 images in images cannot be read: train/cat/000.png (")
    assert invoke(shards.main, "root=images", "out=shards", "num_workers=0", "skip_unreadable=true") == 0
    assert "train: 8 images of 2 classes in 1 shards, 1 unreadable left out" in capsys.readouterr().out


FORK = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_full_disk_is_one_line_and_the_conversion_goes_on(
    num_workers: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(Path("images"), {"train": 9, "val": 5})
    options = ("root=images", "out=shards", f"num_workers={num_workers}")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name, file in ((os, "fsync", "train-000000.part"), (Path, "write_text", "finished.jsonl.part")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            assert invoke(shards.main, *options) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"revnet-shards: [Errno 28] No space left on device: 'shards/{file}'"
    assert invoke(shards.main, *options) == 0


@pytest.mark.filterwarnings(FORK)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_may_not_be_read_is_one_line(
    num_workers: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(Path("images"), {"train": 9, "val": 5})

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert invoke(shards.main, "root=images", "out=shards", f"num_workers={num_workers}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"revnet-shards: \[Errno 13\] Permission denied: 'images/train/.*png'", line)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["out=shards"], r".*root.*"),
        (["root=images", "out=shards", "seed=-1"], r"seed=-1: give .*"),
        (["root=nowhere", "out=shards"], r".*nowhere/train: no such directory; .*"),
        (["root=images", "out=shards", "shard_size=0"], r"shard_size=0: give .*"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    fill(Path("images"), {"train": 2, "val": 2})
    assert invoke(shards.main, *options) in (1, 2)
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-shards: " + line, only)


def test_without_webdataset_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert invoke(shards.main, "root=images", "out=shards") == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert only.endswith("pip install 'revnet[shards]'")
