import re
from pathlib import Path

import pytest
import torch

from revnet import evaluate as evaluate_module
from revnet import train as train_module
from tests.commands import invoke
from tests.test_train import TINY, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run."""
    directory = tmp_path_factory.mktemp("run") / "here"
    options = ("trainer.precision=bf16-mixed", "task.loss.label_smoothing=0.1", "logger=csv")
    assert invoke(train_module.main, *TINY, *options, f"run_dir={directory}") == 0
    return directory


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluate(*arguments: str) -> int:
    return invoke(evaluate_module.main, "trainer.limit_test_batches=2", *arguments)


def found_by(run: Path) -> tuple[str, str]:
    """What the run's own test has found."""
    header, *lines = (run / "csv/version_0/metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    return f"{100 * float(row['test/accuracy']):.2f} %", f"{float(row['test/loss']):.4f}"


@pytest.mark.parametrize("overrides", [[], ["trainer=cpu"], ["model.activations=store"]])
def test_it_finds_what_the_run_has_found(
    run: Path, overrides: list[str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert evaluate(f"ckpt_path={run}/checkpoints/best.ckpt", *overrides) == 0
    summary = rows(capsys.readouterr().out)
    assert (summary["test accuracy"], summary["test loss"]) == found_by(run)
    assert list(tmp_path.iterdir()) == []  # it writes nothing


def test_single_values_of_the_run_are_changed(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate(f"ckpt_path={run}/checkpoints/best.ckpt", "task.loss.label_smoothing=0") == 0
    summary = rows(capsys.readouterr().out)
    accuracy, loss = found_by(run)
    assert summary["test accuracy"] == accuracy
    assert summary["test loss"] != loss


@pytest.mark.parametrize(
    ("status", "overrides", "line"),
    [
        (1, ["model=resnet32"], r"ckpt_path=.* holds revnet38 for 10 classes .* not the resnet32 for 10 classes .*"),
        (1, ["data.num_classes=7"], r".*10.* 7 classes.*"),
        (1, ["data.num_classes=7", "model.num_classes=null"], r".* holds revnet38 for 10 classes .* 7 classes .*"),
        (2, ["data=fike"], r"unknown data 'fike'; did you mean 'fake'\? valid: .*checkpoint.*"),
        (2, ["data.batchsize=3"], r"unknown key 'data.batchsize'; did you mean 'batch_size'\? .*"),
        (2, ["optimizer=adamw"], r"Could not override 'optimizer'.*"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, status: int, overrides: list[str], line: str, capsys: pytest.CaptureFixture
) -> None:
    assert evaluate(f"ckpt_path={run}/checkpoints/best.ckpt", *overrides) == status
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-eval: " + line, only)


def test_what_is_no_checkpoint_of_a_run_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "anonymous.ckpt")
    for arguments, line in {
        (): "ckpt_path is missing: .*",
        ("ckpt_path=nowhere.ckpt",): "ckpt_path=nowhere.ckpt: no such file",
        ("ckpt_path=anonymous.ckpt",): "ckpt_path=anonymous.ckpt does not say how .*",
        ("ckpt_path=a.ckpt,b.ckpt", "-m"): "ckpt_path=a.ckpt,b.ckpt: .*one checkpoint at a time",
    }.items():
        assert evaluate(*arguments) == 2
        (only,) = capsys.readouterr().err.strip().splitlines()
        assert re.fullmatch("revnet-eval: " + line, only)


def test_help_needs_no_checkpoint(capsys: pytest.CaptureFixture) -> None:
    assert invoke(evaluate_module.main, "--help") == 0
    assert "revnet-eval ckpt_path=" in capsys.readouterr().out
