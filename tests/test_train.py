import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock, call

import pytest
import torch
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from PIL import Image
from pytorch_lightning.callbacks import ModelSummary

from revnet import train as train_module
from revnet.build import build
from revnet.cli import compose
from revnet.training import Classifier
from tests.commands import invoke

TINY = (
    "data=fake",
    "data.image_shape=[3,8,8]",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "threads=1",
)
TINY += ("trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=2")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(*arguments: str) -> int:
    return invoke(train_module.main, *TINY, *arguments)


def rows(text: str) -> dict[str, str]:
    """What the summary says."""
    cells = [line.split("│") for line in text.splitlines() if line.count("│") == 3]
    return {row[1].strip(): row[2].strip() for row in cells}


def test_a_run_leaves_everything_and_says_so(tmp_path: Path) -> None:
    """In a process of its own, as `python -m`."""
    command = [sys.executable, "-m", "revnet.train", *TINY, "run_dir=here"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    summary = rows(run.stdout)
    assert "revnet38_fake" in run.stdout
    assert summary["parameters"] == "464,890"
    assert {"test accuracy", "test loss", "val accuracy", "train accuracy", "epochs"} <= summary.keys()
    assert {"seconds per epoch", "images per second", "peak memory of the process"} <= summary.keys()
    assert float(summary["largest reconstruction error"]) < 1e-4
    assert len(run.stdout.splitlines()) < 60  # a progress bar has not flooded it
    names = {str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "csv/version_0/metrics.csv"} <= names
    assert {".hydra/config.yaml", "train.log", "environment.json"} <= names
    assert any(name.startswith("tensorboard/version_0/events") for name in names)
    assert json.loads((tmp_path / "here/environment.json").read_text())["torch"]
    with (tmp_path / "here/csv/version_0/metrics.csv").open() as file:
        columns = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "test/loss", "test/accuracy"} <= columns
    assert {"images_per_second", "peak_memory_mb"} <= columns
    assert any(name.startswith("lr-SGD") for name in columns)
    assert any(name.startswith("reconstruction_error/") for name in columns)


def test_training_from_python(tmp_path: Path) -> None:
    cfg = compose("train", *TINY, "callbacks=none", "logger=none", "run_dir=here")
    metrics = train_module.train(cfg)
    names = {f"{split}/{name}" for split in ("train", "val", "test") for name in ("loss", "accuracy")}
    assert metrics.keys() == names
    assert all(isinstance(value, float) for value in metrics.values())
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["environment.json"]


@pytest.mark.parametrize("num_classes", [None, 3, "missing"])
def test_a_network_gets_as_many_classes_as_the_data_has(num_classes: int | str | None) -> None:
    cfg = compose("train", "data=fake", "data.num_classes=3", "model=resnet18")
    if num_classes == "missing":
        del cfg.model.num_classes
    else:
        cfg.model.num_classes = num_classes
    with torch.device("meta"):
        _, classifier = build(cfg)
    assert classifier.network.fc.out_features == 3
    assert classifier.config["model"]["num_classes"] == 3


@pytest.mark.slow
def test_two_processes_share_one_run_directory(tmp_path: Path) -> None:
    options = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "run_dir=here"]
    fewer = [option for option in TINY if option != "trainer=cpu"]
    command = [sys.executable, "-m", "revnet.train", *fewer, *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("test accuracy ") == run.stdout.count("epoch 0: ") == 1
    assert (tmp_path / "here/checkpoints/last.ckpt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_checkpoint_holds_plain_values_and_its_configuration() -> None:
    assert train("run_dir=here", "model=resnet32") == 0
    checkpoint = torch.load("here/checkpoints/best.ckpt", weights_only=True)
    config = checkpoint["config"]
    assert config["model"] == {"_target_": "revnet.models.resnet32", "num_classes": 10, "activations": "store"}
    assert config["data"]["_target_"].startswith("revnet.data.")
    assert not re.search(r"\$\{", json.dumps(config))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_precision_and_memory_format(precision: str, channels_last: bool, capsys: pytest.CaptureFixture) -> None:
    options = (f"trainer.precision={precision}", f"task.channels_last={channels_last}", "logger=none")
    assert train(*options, "callbacks=none", "model.activations=recompute") == 0
    assert rows(capsys.readouterr().out).keys() >= {"test accuracy", "test loss"}


def test_without_validation_the_last_weights_are_tested(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert train("run_dir=here", "data.val_fraction=0") == 0
    summary = rows(capsys.readouterr().out)
    assert summary["tested weights"] == "the last ones"
    assert "val accuracy" not in summary
    assert [path.name for path in (tmp_path / "here/checkpoints").iterdir()] == ["last.ckpt"]


def test_a_seed_is_a_result(capsys: pytest.CaptureFixture) -> None:
    losses = []
    for seed in (0, 0, 1):
        assert train("logger=none", "callbacks=none", f"seed={seed}", f"run_dir=run{len(losses)}") == 0
        losses.append(rows(capsys.readouterr().out)["test loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_run_is_resumed_in_its_directory(tmp_path: Path) -> None:
    assert train("run_dir=here") == 0
    first = (tmp_path / "here/csv/version_0/metrics.csv").read_bytes()
    assert train("run_dir=here", "ckpt_path=here/checkpoints/last.ckpt", "trainer.max_epochs=2") == 0
    assert torch.load("here/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert (tmp_path / "here/csv/version_0/metrics.csv").read_bytes() == first
    with (tmp_path / "here/csv/version_1/metrics.csv").open() as file:
        losses = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert losses == ["0", "1", "2", "3"]  # the whole training, nothing twice


def test_going_on_says_what_is_another_than_before_and_whether_nothing_is_left() -> None:
    assert train("run_dir=here", "logger=none") == 0
    with pytest.warns(UserWarning, match="the choice of the best begins anew"):
        assert train("run_dir=again", "ckpt_path=here/checkpoints/last.ckpt", "logger=none") == 0
    said = Path("again/train.log").read_text()
    assert "nothing was left to train: the checkpoint has its 2 steps already" in said
    assert "changed since the checkpoint" not in said
    more = ("data.seed=3", "task.channels_last=true", "trainer.max_epochs=2")
    with pytest.warns(UserWarning, match="the choice of the best begins anew"):
        assert train("run_dir=other", "ckpt_path=here/checkpoints/last.ckpt", "logger=none", *more) == 0
    said = Path("other/train.log").read_text()
    line = "changed since the checkpoint: task.channels_last=True (was False), data.seed=3 (was 0)"
    assert line in " ".join(said.split())
    assert "nothing was left" not in said


def test_a_network_of_the_user_is_found_in_the_working_directory(tmp_path: Path) -> None:
    """By the installed command, which Python starts from another directory."""
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/net.yaml").write_text("_target_: net.Net\nnum_classes: null\n")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))\n"
    )
    command = [str(Path(sys.executable).with_name("revnet-train")), "--config-dir", "mine", "model=net", *TINY]
    run = subprocess.run([*command, "logger=none", "run_dir=here"], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert rows(run.stdout)["parameters"] == "1,930"


def test_a_classifier_needs_two_classes(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "images" / split / "photos"
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    assert invoke(train_module.main, "data=image_folder", "data.root=images", "trainer=cpu") == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert only.startswith("revnet-train: the data has one class, photos, and a classifier needs two: is data.root ")


@pytest.mark.parametrize(("model", "warned"), [("revnet18", True), ("revnet38", False), ("resnet18", False)])
def test_images_that_shrink_to_one_pixel_are_warned_of(
    model: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        build(compose("train", "data=fake", "data.image_shape=[3,32,32]", f"model={model}"))
    assert ("of images of 32 pixels the last stage sees a single one" in caplog.text) == warned


def test_a_sequence_beyond_the_threshold_of_drift_stores_and_one_line_says_so(tmp_path: Path) -> None:
    """In a process of its own, as the console shows it."""
    drifts = ("model.exact=false", "callbacks.drift.fall_back_above=1e-9")
    command = [sys.executable, "-m", "revnet.train", *TINY, "run_dir=here", *drifts]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = [re.search(r"sequence '(\w+)' .* step 1 is not applied", line) for line in run.stderr.splitlines()]
    names = [match and match[1] for match in found]
    assert names == ["layer1", "layer2", "layer3"]
    checkpoint = torch.load("here/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["DriftGuard"]["fallen_back"] == names
    with Path("here/csv/version_0/metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["sequences_fallen_back"]]
    assert float(row["sequences_fallen_back"]) == 3
    assert float(row["reconstruction_error/layer3"]) > 1e-9


def test_a_sweep_runs_every_combination(tmp_path: Path) -> None:
    arguments = ("-m", *TINY, "model=revnet38,resnet32", "seed=0,1", "logger=csv", "callbacks=none")
    assert invoke(train_module.main, *arguments) == 0
    assert len(list(tmp_path.glob("runs/sweeps/*/[0-3]/csv/version_0/metrics.csv"))) == 4


class Spy(Callback):
    """Sees what a job gives to a sweeper."""

    returned: ClassVar[list[float | None]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: object) -> None:
        self.returned.append(job_return.return_value)


def test_a_sweeper_gets_the_metric_that_it_optimizes() -> None:
    quick = ("logger=none", "callbacks=none", "+hydra.callbacks.spy._target_=tests.test_train.Spy")
    assert train(*quick, "run_dir=a", "optimized_metric=val/loss") == 0
    assert train(*quick, "run_dir=b") == 0
    loss, nothing = Spy.returned
    assert loss is not None
    assert loss > 0
    assert nothing is None
    assert train("logger=none", "callbacks=none", "run_dir=c", "optimized_metric=val/acc") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["seed=early"], r"seed=early: give an integer from 0 to 2\*\*32 - 1"),
        (["seed=${nothing}"], r".*'nothing' not found.*"),
        (["model.num_classes=7"], r".*num_classes=7.* 10 classes.*"),
        (["model.activations=forget"], r"activations must be one of .*'forget'.*"),
        (["optimizer.lr=fast"], r"optimizer.*: .*"),
        (["optimizer.lr=-1"], r"optimizer: Invalid learning rate: -1"),
        (["scheduler=step", "scheduler.milestones=[40000]"], r"scheduler: milestones .*\[40000\]"),
        (["optimizer.momentum=0", "optimizer.nesterov=true"], r"optimizer: Nesterov .*"),
        (["trainer.max_epochs=-1"], r"trainer.max_epochs=-1: the schedule needs to know .*"),
        (["trainer.max_epochs=null"], r"trainer.max_epochs=null: the schedule needs to know .*"),
        (["trainer.max_epochs=1e2"], r"trainer.max_epochs=100.0: give a whole number"),
        (["trainer.accumulate_grad_batches=null"], r"trainer.accumulate_grad_batches=null: give a positive number; .*"),
        (["trainer.accumulate_grad_batches=2.5"], r"trainer.accumulate_grad_batches=2.5: give a whole number"),
        (["optimizer=adamw", "optimizer.betas=[0.9]"], r"optimizer: .*"),
        (["+model.width=3"], r"model: .*'width'.*"),
        (["+trainer.steps=3"], r".*trainer.*steps.*"),
        (["ckpt_path=nowhere.ckpt"], r"ckpt_path=nowhere.ckpt: no such file; .*"),
        (["+trainer.val_check_interval=100"], r".*`val_check_interval` \(100\) must be less than or equal to .*"),
        (["callbacks.drift.warn_above=-1"], r"warn_above=-1: give a relative error, at least 0, or None"),
        (["callbacks.progress_bar=false"], r"callbacks.progress_bar=False: null leaves it out; .*"),
        (["logger.tensorboard=false"], r"logger.tensorboard=False: null leaves it out; .*"),
        (["+trainer.callbacks=[]"], r"trainer.callbacks would not be looked at: it is given by \+callbacks.NAME.*"),
        (["+trainer.logger=false"], r"trainer.logger would not be looked at: it is given by logger=.*"),
        (
            ["+callbacks.other={_target_:pytorch_lightning.callbacks.ModelCheckpoint,monitor:val/accuracy,mode:max}"],
            r"Found more than one stateful callback .* \(callbacks.best.save_top_k keeps several .*\)",
        ),
        (
            ["model.exact=false", "callbacks.drift.raise_above=1e-9"],
            r"the reconstructed input .* lower optimizer.lr; callbacks.drift.fall_.*",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    assert train(*arguments) == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-train: " + line, only)


def test_a_second_training_in_a_directory_leaves_the_checkpoints_of_the_first(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """From Python, and in a sweep whose runs are given one directory."""
    quiet = ("logger=none", "model=resnet32", "callbacks.progress_bar=null", "callbacks.model_summary=null")
    cfg = compose("train", *TINY, *quiet, "run_dir=here")
    train_module.train(cfg)
    assert "test accuracy" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in Path("here/checkpoints").iterdir()}
    cfg.seed = 1
    with pytest.raises(ValueError, match=r"here/checkpoints/best.ckpt is of another training, and nothing is written"):
        train_module.train(cfg)
    assert {path: path.read_bytes() for path in Path("here/checkpoints").iterdir()} == before
    other = compose("train", *TINY, *quiet, "run_dir=there", "ckpt_path=here/checkpoints/last.ckpt")
    shutil.copytree("here", "there")
    with pytest.raises(ValueError, match=r"there/checkpoints/best.ckpt is of another training, and nothing is written"):
        train_module.train(other)
    sweep = ("-m", *TINY, *quiet, "seed=0,1", "hydra.sweep.subdir=same", "hydra.sweep.dir=sweep")
    capsys.readouterr()
    assert invoke(train_module.main, *sweep) == 1
    said = capsys.readouterr().err
    assert "seed=1: " in said
    assert "sweep/same/checkpoints/best.ckpt is of another training, and nothing is written over" in said


def test_without_a_progress_bar_there_is_none(capsys: pytest.CaptureFixture) -> None:
    trainers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "_fit", lambda trainer, *_: trainers.append(trainer) or sys.exit(7))
        options = ("logger=none", "callbacks.progress_bar=null", "callbacks.model_summary=null", "run_dir=here")
        assert train(*options) == 7
    (trainer,) = trainers
    assert trainer.progress_bar_callback is None
    assert not any(isinstance(callback, ModelSummary) for callback in trainer.callbacks)


def test_a_training_goes_on_with_another_seed_only_between_epochs(capsys: pytest.CaptureFixture) -> None:
    options = ("logger=none", "model=resnet32", "run_dir=here", "trainer.limit_train_batches=3")
    within = ("callbacks.last.every_n_train_steps=2",)
    with pytest.MonkeyPatch.context() as patch:  # stops in the middle of the epoch, behind the checkpoint of step 2
        patch.setattr(Classifier, "on_train_batch_end", lambda self, out, batch, index: index == 1 and sys.exit(9))
        assert train(*options, *within) == 9
    again = ("run_dir=here", "ckpt_path=last")
    assert invoke(train_module.main, *again, "seed=7") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "seed=7: the checkpoint is of the middle of an epoch, whose images seed=0 has put in order" in line
    assert invoke(train_module.main, *again) == 0
    capsys.readouterr()
    assert invoke(train_module.main, *again, "seed=7", "trainer.max_epochs=2", "optimizer.lr=0.01") == 0
    said = " ".join(capsys.readouterr().out.split())
    for change in ("seed=7 (was 0)", "optimizer.lr=0.01 (was 0.1)", "trainer.max_epochs=2 (was 1)"):
        assert change in said


def test_memory_that_python_itself_has_not_is_told_with_the_batch(capsys: pytest.CaptureFixture) -> None:
    def nothing_left(*arguments: object, **settings: object) -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", nothing_left)
        assert train("logger=none", "callbacks=none", "model=resnet32", "run_dir=here") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("revnet-train: out of memory at a batch of 32 images of shape (3, 8, 8): there are ")


def test_an_experiment_s_settings_of_a_callback_go_with_it() -> None:
    tiny = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
    arguments = ("experiment=nice_digits", "callbacks=none", "logger=none", "trainer.limit_test_batches=1", *tiny)
    assert invoke(train_module.main, *arguments, "run_dir=here") == 0
    said = Path("here/train.log").read_text()
    assert "callbacks.samples: these settings are of no callback that was chosen" in said


def test_one_of_several_loggers_can_be_left_out() -> None:
    assert train("run_dir=here", "logger.tensorboard=null") == 0
    assert {path.name for path in Path("here").iterdir()} & {"csv", "tensorboard"} == {"csv"}


def without_services() -> dict[str, str]:
    """The environment, without what the machine says of services of logging."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}


@pytest.mark.slow
def test_wandb_has_metrics_and_configuration(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "revnet.train", *TINY, "logger=wandb", "logger.wandb.offline=true", "run_dir=here"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=without_services())
    assert run.returncode == 0, run.stderr
    (kept,) = (tmp_path / "here/wandb").glob("offline-run-*/run-*.wandb")
    held = kept.read_bytes()
    assert [text for text in (b"test/accuracy", b"train/loss", b"lr-SGD", b"label_smoothing") if text not in held] == []


@pytest.mark.slow
def test_mlflow_has_metrics_and_configuration(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "revnet.train", *TINY, "logger=mlflow", "run_dir=here"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=without_services())
    assert run.returncode == 0, run.stderr
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        metrics, parameters = (
            {key for (key,) in database.execute(f"select key from {t}")} for t in ("metrics", "params")
        )
        status = database.execute("select name, status from runs").fetchall()
    assert {"test/accuracy", "train/loss", "lr-SGD/pg1"} <= metrics
    assert "task/loss/label_smoothing" in parameters
    assert status == [("revnet38_fake", "FINISHED")]


def test_the_jobs_of_a_sweep_have_runs_of_their_own_at_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train("logger=none", "callbacks=none", "run_dir=a") == 0
    assert train("logger=none", "optimizer.lr=-1", "run_dir=b") == 1
    assert wandb.finish.call_args_list == [call(exit_code=0), call(exit_code=1)]


def test_missing_data_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert invoke(train_module.main, "data=image_folder", "data.root=nowhere", "trainer=cpu") == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-train: .*nowhere.*", only)


def test_resuming_another_architecture_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert train("run_dir=here", "logger=none") == 0
    capsys.readouterr()
    assert train("ckpt_path=here/checkpoints/last.ckpt", "model=resnet32") == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.search("holds revnet38 for 10 classes .* not the resnet32 for 10 classes .* asked for", only)


def test_a_memory_budget_is_one_option(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert train("run_dir=here", "memory_budget=14MB", "data.image_shape=[3,16,16]") == 0
    said = (tmp_path / "here" / "train.log").read_text()
    assert re.search(r"memory_budget=14MB: 1[34]\.\d MB in all", said)
    assert re.search(r"layer1: .*store, \d reconstruct", said)
    capsys.readouterr()
    assert train("run_dir=there", "memory_budget=1MB") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"memory_budget=1MB: budget=1000000 is too small for RevNet .* the least possible is [\d,]+ bytes", line
    )
    assert train("run_dir=elsewhere", "memory_budget=1MB", "model=resnet18") == 1
    assert "has no ReversibleSequence" in capsys.readouterr().err


def test_compile_is_one_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(train_module, "compile_branches", compiled.append)
    assert train("compile=true", "callbacks=none", "logger=none") == 0
    assert [type(network).__name__ for network in compiled] == ["RevNet"]


def test_chunk_size_is_set_in_every_sequence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.nn.Module, int]] = []
    monkeypatch.setattr(train_module, "set_chunk_size", lambda *given: seen.append(given))
    assert train("chunk_size=4", "callbacks=none", "logger=none") == 0
    assert [(type(network).__name__, size) for network, size in seen] == [("RevNet", 4)]
    monkeypatch.undo()
    assert train("chunk_size=0", "callbacks=none", "logger=none") == 1
    assert capsys.readouterr().err == "revnet-train: chunk_size=0: give a number of layers, at least 1, or None\n"


def test_compile_of_a_network_without_sequences_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("compile=true", "model=resnet18", "callbacks=none", "logger=none") == 1
    assert "ResNet holds no ReversibleSequence" in capsys.readouterr().err.splitlines()[-1]


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an older GPU")
    trainer = compose("train", "trainer=gpu", "trainer.precision=bf16-mixed").trainer
    with pytest.raises(ValueError, match=r"precision=bf16-mixed is not for an older GPU: choose 16-mixed or"):
        train_module.refuse_contradictions(trainer)


def test_one_batch_is_learnt_by_heart(capsys: pytest.CaptureFixture) -> None:
    assert invoke(train_module.main, "debug=overfit", "trainer=cpu", "threads=1", "run_dir=here") == 0
    assert rows(capsys.readouterr().out)["train accuracy"] == "100.00 %"
