import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from revnet import evaluate as evaluate_module
from revnet import sample as sample_module
from revnet import train as train_module
from tests.commands import invoke
from tests.test_train import TINY, rows

FLOW = (
    *("model=nice", "model.hidden=16", "model.layers=1", "data=fake", "data.image_shape=[1,4,4]"),
    *("data.num_classes=3", "data.normalization=unit", "data.train_size=96", "data.test_size=32"),
    *(
        "trainer=cpu",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=1",
        "optimizer=adamw",
        "callbacks.samples.every_n_epochs=1",
    ),
    *("callbacks.progress_bar=null", "callbacks.model_summary=null", "logger=csv"),
)


def trained(directory: Path, *options: str) -> Path:
    assert invoke(train_module.main, *FLOW, *options, f"run_dir={directory}") == 0
    return directory / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a flow with classes."""
    return trained(tmp_path_factory.mktemp("run") / "here", "model.classes=3")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sample(*arguments: str) -> int:
    return invoke(sample_module.main, *arguments)


def test_a_flow_is_trained_drawn_and_evaluated(run: Path, capsys: pytest.CaptureFixture) -> None:
    pictures = sorted(path.name for path in (run.parents[1] / "pictures").iterdir())
    assert pictures[-2:] == ["samples_0001.png", "samples_0002.png"]
    header, *lines = (run.parents[1] / "csv/version_0/metrics.csv").read_text().splitlines()
    tested = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    capsys.readouterr()
    assert invoke(evaluate_module.main, f"ckpt_path={run}", "trainer=cpu") == 0
    summary = rows(capsys.readouterr().out)
    assert summary["test bits/dim"] == f"{float(tested['test/bits_per_dim']):.4f}"
    assert summary["test log-likelihood"] == f"{float(tested['test/nats']):.2f} nats"


def test_a_grid_is_written_and_never_written_over(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert sample(f"ckpt_path={run}", "n=6") == 0
    with Image.open("samples.png") as grid:
        assert grid.size == (3 * 6 + 2, 2 * 6 + 2)  # three classes wide, 4 pixels and a frame of 2 each
    assert sample(f"ckpt_path={run}", "n=6") == 1
    assert re.fullmatch(r"revnet-sample: out=samples.png exists already: .*", capsys.readouterr().err.strip())


def test_seed_temperature_and_class_decide(run: Path) -> None:
    options = {"a": (), "again": (), "seed": ("seed=1",), "cold": ("temperature=0.5",), "one": ("class=2",)}
    for name, more in options.items():
        assert sample(f"ckpt_path={run}", "n=9", f"out=new/{name}.png", *more) == 0
    found = {name: Path(f"new/{name}.png").read_bytes() for name in options}
    assert found["a"] == found["again"]
    assert len(set(found.values())) == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("n=0",), r"n=0: give a whole number, at least 1"),
        (("temperature=-1",), r"temperature=-1: .*"),
        (("temperature=high",), r"temperature=high: .*"),
        (("temperature=null",), r"temperature=None: .*"),
        (("out=null",), r"out=None: give a picture's name, .*"),
        (("class=3",), r"class=3: give a class from 0 to 2"),
        (("out=samples",), r"out=samples: give a picture's name, .*"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert sample(f"ckpt_path={run}", *arguments) == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-sample: " + line, only)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_flow_s_checkpoint_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert invoke(train_module.main, *TINY, "logger=none", f"run_dir={tmp_path}/classifier") == 0
    torch.save({"state_dict": {}}, tmp_path / "anonymous.ckpt")
    capsys.readouterr()
    for argument, line in {
        "": r"ckpt_path is missing: .*",
        "ckpt_path=nowhere.ckpt": r"ckpt_path=nowhere.ckpt: no such file; .*",
        "ckpt_path=anonymous.ckpt": r"ckpt_path=anonymous.ckpt does not say how .*",
        "ckpt_path=classifier/checkpoints/best.ckpt": r"ckpt_path=.* is of revnet38, which has no density .*",
    }.items():
        assert sample(*filter(None, [argument])) == 1
        (only,) = capsys.readouterr().err.strip().splitlines()
        assert re.fullmatch("revnet-sample: " + line, only)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("data.normalization=mean_std",), r"data.normalization=mean_std, but the flow takes images in \[0, 1\]: .*"),
        (("model.classes=7",), r"model.classes=7, but the data has 3 classes: .*"),
        (("memory_budget=1GiB",), r"memory_budget=1GiB is for classifiers: .*"),
        (("task=classifier",), r".*Flow.*"),
        (("data.mixup=0.2",), r"data.mixup=0.2: this is for classifiers; set it to 0 for a flow"),
        (("data.cutout=2",), r"data.cutout=2: this is for classifiers; set it to 0 for a flow"),
        (
            ("trainer.precision=bf16-true",),
            r"trainer.precision=bf16-true, but the flow adds noise .* choose bf16-mixed .*",
        ),
    ],
)
def test_a_flow_that_does_not_go_with_the_rest_is_one_line(
    options: tuple[str, ...], line: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert invoke(train_module.main, *FLOW, *options, f"run_dir={tmp_path}/run") == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-train: " + line, only)


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_a_flow_of_grey_images_that_are_repeated_is_refused(
    data: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    options = ("model=nice", f"data={data}", "data.normalization=unit", "data.padding=0", f"run_dir={tmp_path}/run")
    assert invoke(train_module.main, *options) == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch(r"revnet-train: data.channels=3 repeats the grey images, .*: set data.channels=1", only)
