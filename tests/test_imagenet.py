"""The recipes for ImageNet, on a folder of few and odd images."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from revnet import evaluate as evaluate_module
from revnet import shards as shards_module
from revnet import train as train_module
from tests.commands import invoke
from tests.test_train import rows

# Python warns of processes that are forked from one with threads, as torch's data loader does.
FORK = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
pytestmark = pytest.mark.filterwarnings(FORK)

SMALL = (
    "data.image_size=64",
    "data.batch_size=4",
    "data.num_workers=1",
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "threads=1",
    "logger=none",
    "run_dir=here",
)
FEW = ("trainer.limit_val_batches=1", "trainer.limit_test_batches=1")
# How each recipe says that training ends after one or two epochs of two steps.
ENDS = {
    "imagenet_revnet104_paper": ("trainer.max_steps=2", "trainer.max_steps=4"),
    "imagenet_revnet50_modern": ("trainer.max_epochs=1", "trainer.max_epochs=2"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is found in ImageNet and other collections: any size, gray, CMYK, palettes with transparency, 16 bits."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, count in {"train": 9, "val": 3, "test": 3}.items():
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                width, height = random.integers(40, 130, 2)
                pixels = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
                mode = ("RGB", "L", "CMYK")[number % 3]
                image = Image.fromarray(pixels).resize((width, height)).convert(mode)
                image.save(root / split / name / f"{number}.JPEG")
    Image.new("RGB", (1, 1), (9, 99, 199)).save(root / "train" / "cat" / "pixel.JPEG")
    Image.new("P", (50, 70)).save(root / "train" / "cat" / "palette.png", transparency=0)
    Image.fromarray(random.integers(0, 2**16, (60, 40), dtype=np.uint16)).save(root / "train" / "dog" / "deep.png")
    Image.new("LA", (80, 60)).save(root / "train" / "dog" / "gray.png")
    return root


@pytest.fixture(scope="module")
def sharded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    assert invoke(shards_module.main, f"root={folder}", f"out={out}", "shard_size=5", "num_workers=0") == 0
    return out


def train(*arguments: str) -> int:
    return invoke(train_module.main, *SMALL, *arguments)


def evaluate(checkpoint: str, capsys: pytest.CaptureFixture, *options: str) -> tuple[str, str]:
    """Accuracy and loss, as `revnet-eval` finds them."""
    capsys.readouterr()
    assert invoke(evaluate_module.main, f"ckpt_path={checkpoint}", "trainer=cpu", *options) == 0
    summary = rows(capsys.readouterr().out)
    return summary["test accuracy"], summary["test loss"]


@pytest.mark.parametrize(
    "experiment", ["imagenet_revnet50_modern", pytest.param("imagenet_revnet104_paper", marks=pytest.mark.slow)]
)
def test_two_steps_validation_checkpoint_and_two_more(
    experiment: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = (f"experiment={experiment}", f"data.root={folder}", "trainer.limit_train_batches=2", *FEW)
    end, later_end = ENDS[experiment]
    assert train(*recipe, end) == 0
    summary = rows(capsys.readouterr().out)
    assert {"train accuracy", "val accuracy", "test accuracy"} <= summary.keys()
    assert summary["tested weights"].endswith("best.ckpt")
    assert torch.load("here/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert evaluate("here/checkpoints/best.ckpt", capsys, FEW[-1]) == (summary["test accuracy"], summary["test loss"])
    assert train(*recipe, later_end, "ckpt_path=here/checkpoints/last.ckpt") == 0
    assert torch.load("here/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


SMALLER = ("experiment=imagenet_revnet50_modern", "model=revnet38", "data.image_size=32")


def test_the_average_of_the_weights_is_what_counts(folder: Path, capsys: pytest.CaptureFixture) -> None:
    quick = (*SMALLER, f"data.root={folder}", "trainer.max_epochs=2", "callbacks.ema.update_every_n_steps=1")
    assert train(*quick, "callbacks.ema.decay=0.5") == 0
    summary = rows(capsys.readouterr().out)
    checkpoint = torch.load("here/checkpoints/last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert averaged.keys() == current.keys()
    name = next(name for name in averaged if name.endswith("conv.weight") or name.endswith("fc.weight"))
    assert not torch.equal(averaged[name], current[name])
    assert checkpoint["averaging_state"]["n_averaged"] == checkpoint["global_step"]
    # The best checkpoint, tested by the trainer and by another process, is the average as well.
    best = evaluate("here/checkpoints/best.ckpt", capsys)
    assert best == (summary["test accuracy"], summary["test loss"])
    swapped = torch.load("here/checkpoints/best.ckpt", weights_only=True)
    swapped["state_dict"] = swapped["current_model_state"]
    torch.save(swapped, "current.ckpt")
    assert evaluate("current.ckpt", capsys)[1] != best[1]


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_a_resumed_training_ends_in_the_same_weights(kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    data = ("data=imagenet_shards",) if kind == "sharded" else ()
    quick = (*SMALLER, *data, f"data.root={root}", "callbacks.ema.decay=0.5", "scheduler=constant", "~scheduler.warmup")
    assert train(*quick, "trainer.max_epochs=2", "run_dir=whole") == 0
    assert train(*quick, "trainer.max_epochs=1", "run_dir=parts") == 0
    assert train(*quick, "trainer.max_epochs=2", "run_dir=parts", "ckpt_path=parts/checkpoints/last.ckpt") == 0
    whole, parts = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 10
    for state in ("state_dict", "current_model_state"):
        for name, tensor in whole[state].items():
            assert torch.equal(tensor, parts[state][name]), name


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy with two files that are no images."""
    root = tmp_path / "broken"
    for file in folder.rglob("*.*"):
        copy = root / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes()[:-200] if file.name == "3.JPEG" else file.read_bytes())
    return root


def test_an_unreadable_image_is_one_line(broken: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(*SMALLER, f"data.root={broken}", "trainer.max_epochs=1", "callbacks=none") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("revnet-train")]
    assert re.fullmatch(rf"revnet-train: {broken}/train/\w+/3.JPEG: not a readable image .*", line)


def test_unreadable_images_are_skipped_and_counted(broken: Path) -> None:
    options = (*SMALLER, f"data.root={broken}", "trainer.max_epochs=2", "data.skip_unreadable=true")
    assert train(*options) == 0
    said = " ".join(Path("here/train.log").read_text().split())
    assert re.search(rf"2 unreadable images are skipped: {broken}/train/cat/3.JPEG, {broken}/train/dog/3.JPEG", said)


def damage(write: Callable[[Path], None], sharded: Path, tmp_path: Path) -> Path:
    root = tmp_path / "damaged"
    root.mkdir()
    for file in sharded.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    write(root / "train-000001.tar")
    return root


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1024]), r"train-000001.tar has [\d,]+ bytes instead of"),
        (lambda file: file.unlink(), r"train-000001.tar is missing"),
    ],
)
def test_a_damaged_shard_is_one_line_before_training(
    write: Callable[[Path], None], line: str, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = damage(write, sharded, tmp_path)
    assert train(*SMALLER, "data=imagenet_shards", f"data.root={root}", "trainer.max_epochs=1") == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(rf"revnet-train: {root}/{line}.*; run revnet-shards again: it writes what is not there", only)
