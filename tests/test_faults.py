"""A training that is stopped at any moment and goes on ends as if it had never been stopped, to the bit."""

import csv
import errno
import inspect
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import read_write
from torch import Tensor, nn

from revnet import train as train_module
from revnet.cli import compose
from revnet.training import Classifier, DensityEstimator
from tests.commands import invoke
from tests.test_train import rows

TRAINING = (
    "data=fake",
    "data.image_shape=[3,8,8]",
    "data.train_size=214",  # six batches an epoch, and the rest of one
    "data.padding=1",
    "data.flip=true",
    "trainer=cpu",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=2",
    "threads=1",
    "logger=csv",
    "callbacks.last.every_n_train_steps=4",
    *("callbacks.model_summary=null", "+trainer.enable_model_summary=false"),
    *("callbacks.progress_bar=null", "+trainer.enable_progress_bar=false"),
)
# Averaged weights, and clipped gradients of two batches each: the odd last batch of an epoch is a step alone.
AVERAGE = (
    "data.train_size=250",  # seven batches an epoch
    "callbacks=ema",
    "callbacks.ema.update_every_n_steps=1",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=0.5",
)
KILL = """
import itertools, os, signal
from revnet.training import LastCheckpoint
calls, own = itertools.count(1), LastCheckpoint.{hook}
def kill(*args):
    own(*args)
    if next(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
LastCheckpoint.{hook} = kill
"""
TIMES = {"images_per_second", "peak_memory_mb"}


def train(directory: Path, *overrides: str) -> int:
    return invoke(train_module.main, f"run_dir={directory}", *overrides)


def start(directory: Path, *overrides: str, script: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start a training in a process of its own; `script` is run there before it."""
    code = f"{script}\nfrom revnet.train import main\nmain()"
    command = [sys.executable, "-c", code, f"run_dir={directory}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def outcome(directory: Path) -> dict[str, Any]:
    """Everything that a training leaves, but for times."""
    last = torch.load(directory / "checkpoints/last.ckpt", weights_only=True)
    best = torch.load(directory / "checkpoints/best.ckpt", weights_only=True)
    newest = max((directory / "csv").iterdir(), key=lambda version: int(version.name.partition("_")[2]))
    with (newest / "metrics.csv").open() as file:
        lines = [
            {key: text for key, text in line.items() if text and key not in TIMES} for line in csv.DictReader(file)
        ]
    return {
        "lines": lines,
        **{key: last[key] for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")},
        "average": last.get("averaging_state"),
        "weights": last.get("current_model_state"),
        "random": [process["random"] for process in last["continuation"]["processes"]],
        "best": best["state_dict"],
    }


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(one.keys() ^ other.keys())}"]
        return [found for key in one for found in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{where}[{index}]")]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What a training with these overrides leaves that nothing has stopped."""
    outcomes: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(*overrides: str) -> dict[str, Any]:
        if overrides not in outcomes:
            directory = tmp_path_factory.mktemp("undisturbed") / "run"
            assert train(directory, *TRAINING, *overrides) == 0
            outcomes[overrides] = outcome(directory)
        return outcomes[overrides]

    return run


@pytest.mark.parametrize(
    ("hook", "call", "options"),
    [
        ("on_train_batch_end", 11, ()),
        pytest.param("on_train_batch_end", 11, AVERAGE, marks=pytest.mark.slow),
        pytest.param("on_train_batch_end", 11, ("optimizer=muon",), marks=pytest.mark.slow),
        ("on_train_epoch_end", 2, ()),
    ],
    ids=["in the middle of an epoch", "with an average of the weights", "with Muon", "at the end of an epoch"],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    hook: str, call: int, options: tuple[str, ...], undisturbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    killed = start(tmp_path / "run", *TRAINING, *options, script=KILL.format(hook=hook, call=call))
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert train(tmp_path / "run", "ckpt_path=last") == 0
    expected = undisturbed(*options)
    assert bool(expected["average"]) == ("callbacks=ema" in options)
    assert differences(expected, outcome(tmp_path / "run")) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_training_killed_at_a_random_moment_goes_on_to_the_same_bits(
    seed: int, undisturbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    longer = ("trainer.max_epochs=40", *(AVERAGE if seed % 2 else ()))
    process = start(tmp_path / "run", *TRAINING, *longer)
    while not (tmp_path / "run/environment.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 8))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # and the training had not ended before
    saved = tmp_path / "run/checkpoints/last.ckpt"
    step = torch.load(saved, weights_only=True)["global_step"] if saved.exists() else 0
    print(f"killed after step {step}")
    assert train(tmp_path / "run", "ckpt_path=last") == 0
    assert differences(undisturbed(*longer), outcome(tmp_path / "run")) == []


class Fault(pl.Callback):
    """Sends a signal to this process at the end of a batch of `stage`, counted from 1; in training from its start."""

    def __init__(self, batch: int, signal: str, stage: str = "train") -> None:
        self.batch = batch
        self.signal = signal
        self.stage = stage
        self.counts = {"validation": 0, "test": 0}

    def _at(self, stage: str, batch: int) -> None:
        if (stage, batch) == (self.stage, self.batch):
            for process in [*multiprocessing.active_children()]:  # of the loaders
                os.kill(process.pid, getattr(signal, self.signal))
            os.kill(os.getpid(), getattr(signal, self.signal))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._at("train", trainer.fit_loop.total_batch_idx + 1)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.counts["validation"] += 1
            self._at("validation", self.counts["validation"])

    def on_test_batch_end(self, *args: Any) -> None:
        self.counts["test"] += 1
        self._at("test", self.counts["test"])


VALIDATED = ("data.batch_size=16", "data.train_size=224", "data.val_fraction=0.35")  # nine batches an epoch, then five
FLOW = ("model=nice", "model.hidden=8", "model.layers=1", "data.normalization=unit", "data.flip=false")


@pytest.mark.parametrize(
    ("name", "batch", "step", "status", "options"),
    [
        ("SIGTERM", 9, 9, 143, ()),
        pytest.param("SIGTERM", 9, 9, 143, FLOW, marks=pytest.mark.slow),
        ("SIGTERM", 12, 12, 143, ()),  # an epoch's last
        ("SIGINT", 10, 10, 130, ()),
        pytest.param("SIGTERM", 9, 9, 143, ("data.num_workers=1",), marks=pytest.mark.slow),
        pytest.param("SIGTERM", 9, 4, 143, ("trainer.accumulate_grad_batches=2",), marks=pytest.mark.slow),
        ("SIGTERM", 9, 5, 143, AVERAGE),
        pytest.param("SIGTERM", 9, 9, 143, ("trainer.max_steps=16",), marks=pytest.mark.slow),
        pytest.param("SIGTERM", 12, 12, 143, ("trainer.max_steps=16",), marks=pytest.mark.slow),
        pytest.param("SIGTERM", 9, 9, 143, VALIDATED, marks=pytest.mark.slow),  # a validation of five batches follows
        pytest.param("SIGINT", 3, 3, 130, (*VALIDATED, "+trainer.val_check_interval=3"), marks=pytest.mark.slow),
    ],
)
def test_a_training_that_is_told_to_stop_saves_and_says_how_to_go_on(
    name: str,
    batch: int,
    step: int,
    status: int,
    options: tuple[str, ...],
    undisturbed: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    expected = undisturbed(*options)
    capsys.readouterr()
    fault = f"+callbacks.fault={{_target_:tests.test_faults.Fault,batch:{batch},signal:{name}}}"
    assert train(tmp_path / "run", *TRAINING, *options, fault) == status
    (line,) = capsys.readouterr().err.splitlines()
    what = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}[name]
    command = f"run_dir={tmp_path / 'run'} ckpt_path=last"
    assert line == f"revnet-train: stopped by {what} after step {step}: go on with revnet-train {command}"
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    assert train(tmp_path / "run", "ckpt_path=last") == 0
    assert differences(expected, outcome(tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("name", "batch", "step", "options"),
    [
        pytest.param("SIGTERM", 2, 9, (), marks=pytest.mark.slow),
        ("SIGINT", 7, 18, ()),
        pytest.param(
            "SIGTERM", 7, 18, ("callbacks=ema", "callbacks.ema.update_every_n_steps=1"), marks=pytest.mark.slow
        ),
        pytest.param("SIGTERM", 2, 3, ("+trainer.val_check_interval=3",), marks=pytest.mark.slow),
        ("SIGTERM", 7, 3, ("+trainer.val_check_interval=3", "trainer.accumulate_grad_batches=2")),
        pytest.param("SIGTERM", 5, 9, (), marks=pytest.mark.slow),  # the last of a validation
    ],
)
def test_a_training_that_is_told_to_stop_while_it_validates_goes_on_to_the_same_bits(
    name: str,
    batch: int,
    step: int,
    options: tuple[str, ...],
    undisturbed: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    expected = undisturbed(*VALIDATED, *options)
    capsys.readouterr()
    fault = f"+callbacks.fault={{_target_:tests.test_faults.Fault,batch:{batch},signal:{name},stage:validation}}"
    assert train(tmp_path / "run", *TRAINING, *VALIDATED, *options, fault) == {"SIGTERM": 143, "SIGINT": 130}[name]
    (line,) = capsys.readouterr().err.splitlines()
    assert f" after step {step}: go on with " in line
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.fault=null") == 0
    assert differences(expected, outcome(tmp_path / "run")) == []


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)])
def test_a_signal_to_every_process_of_a_training_leaves_its_loaders_alive(
    name: str, status: int, tmp_path: Path
) -> None:
    """As a terminal, torchrun and `timeout` send it; most of the time the training waits for its two loaders."""
    processes = ("data.num_workers=2", "trainer.max_epochs=100000", "data.val_fraction=0.4")
    process = start(tmp_path / "run", *TRAINING, *processes, start_new_session=True)
    while not (tmp_path / "run/checkpoints/last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.killpg(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    (line,) = [line for line in errors.splitlines() if line.startswith("revnet-train")]
    step = re.search(r"stopped by \S+ after step (\d+): go on with", line)
    assert step is not None
    assert process.returncode == status, errors
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == int(step[1])


@pytest.mark.parametrize(("name", "status", "what"), [("SIGTERM", 143, "SIGTERM"), ("SIGINT", 130, "Ctrl-C")])
def test_a_test_that_is_told_to_stop_leaves_the_training_as_it_ended(
    name: str,
    status: int,
    what: str,
    undisturbed: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    expected = undisturbed()
    capsys.readouterr()
    fault = f"+callbacks.fault={{_target_:tests.test_faults.Fault,batch:1,signal:{name},stage:test}}"
    assert train(tmp_path / "run", *TRAINING, fault) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"revnet-train: stopped by {what} after step 18: go on with ")
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.fault=null") == 0
    assert differences(expected, outcome(tmp_path / "run")) == []


@pytest.mark.slow
def test_a_validation_that_was_the_last_thing_saved_counts_once(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Killed with nothing but the best checkpoint there, which is written in a hook of the validation."""
    options = (*VALIDATED, "+trainer.val_check_interval=3", "callbacks.last.every_n_train_steps=500")
    expected = undisturbed(*options)
    killed = start(tmp_path / "run", *TRAINING, *options, script=KILL.format(hook="on_train_batch_end", call=5))
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["best.ckpt"]
    assert train(tmp_path / "run", "ckpt_path=last") == 0
    assert differences(expected, outcome(tmp_path / "run")) == []


@pytest.mark.slow
def test_a_best_checkpoint_of_an_epoch_s_end_goes_on_with_the_next_epoch(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """With a validation after every other epoch it is written ahead of the epoch's last hooks."""
    options = (*VALIDATED, "trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4")
    assert train(tmp_path / "run", *TRAINING, *options, "trainer.max_epochs=2", "scheduler=constant") == 0
    best = tmp_path / "run/checkpoints/best.ckpt"
    assert train(tmp_path / "run", "ckpt_path=" + str(best), *TRAINING, *options, "scheduler=constant") == 0
    expected, found = undisturbed(*options, "scheduler=constant"), outcome(tmp_path / "run")
    for side in (expected, found):  # the accuracy of the epoch that ended so is in no checkpoint
        side["lines"] = [line for line in side["lines"] if "train/accuracy" not in line or line["epoch"] != "1"]
    assert differences(expected, found) == []


@pytest.mark.parametrize("ended", ["trainer.max_epochs=3", "trainer.max_steps=18"])
def test_an_ended_training_still_knows_its_metrics(ended: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As one that was killed in its test."""
    assert train(tmp_path / "run", *TRAINING, ended) == 0
    said = rows(capsys.readouterr().out)
    assert train(tmp_path / "run", "ckpt_path=last", "optimized_metric=val/accuracy") == 0
    again = rows(capsys.readouterr().out)
    names = ("train accuracy", "val accuracy", "val loss", "test accuracy", "test loss")
    assert [again[name] for name in names] == [said[name] for name in names]


def test_a_line_of_the_log_that_was_cut_short_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stopped(tmp_path / "run", capsys)
    log = tmp_path / "run/csv/version_0/metrics.csv"
    header, *lines = log.read_text().splitlines()
    place = header.split(",").index("step")
    log.write_text("\n".join([header, *lines[:-1], ",".join(lines[-1].split(",")[:place])]))
    with pytest.warns(UserWarning, match=f"has {len(lines) - 1} lines of the {len(lines)} that it had"):
        assert train(tmp_path / "run", "ckpt_path=last", "callbacks.fault=null") == 0


def test_what_was_refused_is_no_part_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stopped(tmp_path / "run", capsys)
    before = {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")}
    again = ("ckpt_path=last", "callbacks.fault=null")
    for refused in ("optimizer.lr=-1", "optimizer.lr=fast", "data.batch_size=1000"):
        assert train(tmp_path / "run", *again, refused, "seed=7") == 1
        assert {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")} == before
    assert train(tmp_path / "run", *again) == 0
    assert "seed=7" not in (tmp_path / "run/.hydra_1/overrides.yaml").read_text()
    assert (tmp_path / "run/environment_1.json").is_file()


@pytest.mark.parametrize("refused", ["optimizer.lr=-1", "optimizer.lr=fast", "data.batch_size=1000", "data=cifar10"])
def test_a_training_that_was_refused_leaves_its_directory_to_the_next(refused: str, tmp_path: Path) -> None:
    """The last two when the loggers have written already."""
    options = [option for option in TRAINING if not option.startswith("data.")] if "data=" in refused else TRAINING
    assert train(tmp_path / "run", *options, "logger=default", refused) == 1
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    assert train(tmp_path / "run", *options, refused) == 1
    assert list((tmp_path / "run").iterdir()) == []
    assert train(tmp_path / "run", *TRAINING, "trainer.max_steps=1") == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_job_of_a_sweep_that_is_started_again_goes_on(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As a cluster does it that has put a job off: the same function of the same configuration, nothing else."""
    expected = undisturbed()
    stopped(tmp_path / "run", capsys)
    directory = f"run_dir={tmp_path / 'run'}"
    other = compose("train", *TRAINING, directory, "seed=1")
    assert not train_module._was_begun(other)  # another job of the sweep, in the same directory by mistake
    cfg = compose("train", *TRAINING, directory)
    hydra = HydraConfig.instance().cfg.hydra
    with read_write(hydra):
        hydra.mode, hydra.runtime.output_dir = RunMode.MULTIRUN, str(tmp_path / "run")
    inspect.unwrap(train_module.main)(cfg)
    assert differences(expected, outcome(tmp_path / "run")) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_job_of_slurm_is_told_of_its_time_limit(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    before = signal.getsignal(signal.SIGUSR1)
    fault = "+callbacks.fault={_target_:tests.test_faults.Fault,batch:5,signal:SIGUSR1}"
    assert train(tmp_path / "run", *TRAINING, f"data.num_workers={workers}", fault) == 143
    assert "after step 5: go on with" in capsys.readouterr().err
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_run_that_was_moved_goes_on_and_remembers_its_best(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped(tmp_path / "run", capsys)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train(tmp_path / "moved", "ckpt_path=last", "callbacks.fault=null") == 0
    assert differences(undisturbed(), outcome(tmp_path / "moved")) == []


def test_another_rate_takes_effect_when_a_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stopped(tmp_path / "run", capsys)
    changed = ("optimizer.lr=0.001", "optimizer.weight_decay=0.5", "scheduler=constant")
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.fault=null", *changed) == 0
    groups = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0][
        "param_groups"
    ]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.001, 0.5), (0.001, 0)]
    capsys.readouterr()
    assert train(tmp_path / "run", "ckpt_path=last", "trainer.max_epochs=4", "optimizer=adamw") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"optimizer: the checkpoint has the state of SGD .* AdamW .*; choose the optimizer of", line)


def stopped(directory: Path, capsys: pytest.CaptureFixture) -> None:
    """A training that was stopped after step 9: `previous.ckpt` is of step 8."""
    fault = "+callbacks.fault={_target_:tests.test_faults.Fault,batch:9,signal:SIGTERM}"
    assert train(directory, *TRAINING, fault) == 143
    capsys.readouterr()


def test_a_checkpoint_cut_short_is_passed_over(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped(tmp_path / "run", capsys)
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.fault=null") == 0
    said = (tmp_path / "run/train.log").read_text()
    assert re.search(r"last.ckpt cannot be read \(cut short\?\) and is passed over", said)
    assert re.search(r"going on from .*previous.ckpt", said)
    assert differences(undisturbed(), outcome(tmp_path / "run")) == []


def test_a_checkpoint_of_weights_alone_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stopped(tmp_path / "run", capsys)
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    weights = tmp_path / "run/checkpoints/weights.ckpt"
    torch.save({key: value for key, value in checkpoint.items() if key != "optimizer_states"}, weights)
    assert train(tmp_path / "run", f"ckpt_path={weights}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"revnet-train: ckpt_path={weights} holds weights alone, and a training cannot go on from")
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.fault=null") == 0
    assert "weights.ckpt holds weights alone and is passed over" in (tmp_path / "run/train.log").read_text()


def test_a_training_goes_on_from_where_its_checkpoints_were_put(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fault = "+callbacks.fault={_target_:tests.test_faults.Fault,batch:9,signal:SIGTERM}"
    assert train(tmp_path / "run", *TRAINING, f"callbacks.last.dirpath={tmp_path}/elsewhere", fault) == 143
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.fault=null") == 0
    last = torch.load(tmp_path / "elsewhere/last.ckpt", weights_only=True)
    expected = undisturbed()
    for key in ("global_step", "state_dict", "optimizer_states"):
        assert differences(expected[key], last[key]) == []


def test_a_training_goes_on_in_another_directory_with_its_log(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped(tmp_path / "run", capsys)
    last = tmp_path / "run/checkpoints/last.ckpt"
    with pytest.warns(UserWarning, match=r"the best checkpoint of before, .* the choice of the best begins anew"):
        assert train(tmp_path / "other", *TRAINING, f"ckpt_path={last}") == 0
    expected, found = undisturbed(), outcome(tmp_path / "other")
    for key in ("state_dict", "optimizer_states", "random"):
        assert differences(expected[key], found[key]) == []
    lines = [[line for line in each["lines"] if "test/loss" not in line] for each in (expected, found)]
    assert differences(*lines) == []


def test_a_training_that_began_elsewhere_goes_on_from_where_its_checkpoints_were_put(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped(tmp_path / "run", capsys)
    first, place = tmp_path / "run/checkpoints/last.ckpt", f"callbacks.last.dirpath={tmp_path}/elsewhere"
    fault = "+callbacks.fault={_target_:tests.test_faults.Fault,batch:11,signal:SIGTERM}"
    with pytest.warns(UserWarning, match="the choice of the best begins anew"):
        assert train(tmp_path / "other", *TRAINING, f"ckpt_path={first}", place, fault) == 143
    for best in (tmp_path / "other/checkpoints").glob("*.ckpt"):
        best.unlink()
    assert train(tmp_path / "other", "ckpt_path=last", "callbacks.fault=null") == 0
    assert f"going on from {tmp_path}/elsewhere/last.ckpt" in " ".join(
        (tmp_path / "other/train.log").read_text().split()
    )


def test_a_training_that_was_ended_early_has_ended(tmp_path: Path) -> None:
    stop = "+callbacks.stop={_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/loss,stopping_threshold:99}"
    assert train(tmp_path / "run", *TRAINING, stop) == 0
    steps = outcome(tmp_path / "run")["global_step"]
    assert steps < 18
    assert train(tmp_path / "run", "ckpt_path=last") == 0
    assert outcome(tmp_path / "run")["global_step"] == steps
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.stop.stopping_threshold=0") == 0
    assert outcome(tmp_path / "run")["global_step"] == 18


def test_a_training_that_was_ended_for_want_of_patience_goes_on_with_more(tmp_path: Path) -> None:
    stop = (
        "+callbacks.stop={_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/loss,min_delta:9,patience:1}"
    )
    assert train(tmp_path / "run", *TRAINING, stop) == 0
    assert outcome(tmp_path / "run")["global_step"] == 12
    assert train(tmp_path / "run", "ckpt_path=last") == 0
    assert outcome(tmp_path / "run")["global_step"] == 12
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.stop.patience=5") == 0
    assert outcome(tmp_path / "run")["global_step"] == 18


def test_a_training_that_ends_within_an_epoch_says_what_it_leaves_out(tmp_path: Path) -> None:
    stop = "+callbacks.stop={_target_:tests.test_faults.StopInMidEpoch}"
    with pytest.warns(UserWarning, match="the training ends within an epoch, whose other images it leaves out"):
        assert train(tmp_path / "run", *TRAINING, stop) == 0


def test_a_run_without_a_checkpoint_that_can_be_read_does_not_begin_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped(tmp_path / "run", capsys)
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        checkpoint.write_bytes(b"")
    assert train(tmp_path / "run", "ckpt_path=last", "callbacks.fault=null") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"revnet-train: ckpt_path=last: no checkpoint in .*/checkpoints can be read and gone on from; .*", line
    )


@pytest.mark.parametrize(
    ("function", "number"),
    [("os.fsync", errno.ENOSPC), ("Path.open", errno.EACCES), ("Path.open", errno.EROFS), ("Path.replace", errno.EIO)],
)
def test_a_full_disk_or_one_that_fails_ends_in_one_line_and_leaves_the_older_checkpoints(
    function: str,
    number: int,
    undisturbed: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fourth checkpoint of `last` does not find room, or a directory that can be written."""
    owner, name = {"os": os, "Path": Path}[function.partition(".")[0]], function.partition(".")[2]
    call = getattr(owner, name)
    written: list[object] = []

    def fail(file: Any, *arguments: Any, **keywords: Any) -> Any:
        if name == "fsync" or file.name.endswith(".part"):
            written.append(file)
            if len(written) == 6:
                raise OSError(number, os.strerror(number))
        return call(file, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        assert train(tmp_path / "run", *TRAINING) == 1
    assert len(written) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"revnet-train: .*{os.strerror(number)}: no checkpoint could be .*ckpt'", line)
    folder = tmp_path / "run/checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    steps = [torch.load(folder / f"{name}.ckpt", weights_only=True)["global_step"] for name in ("previous", "last")]
    assert steps[0] < steps[1] < 18
    assert train(tmp_path / "run", "ckpt_path=last") == 0
    assert differences(undisturbed(), outcome(tmp_path / "run")) == []


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "run", *TRAINING, f"callbacks.last.dirpath={tmp_path}/file/checkpoints") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"revnet-train: .*Not a directory: .*file/checkpoints/next.ckpt.*", line)


class StopInMidEpoch(pl.Callback):
    """What a limit of time does."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = True


class NotANumber(nn.CrossEntropyLoss):
    """A loss that is nan from one call on."""

    def __init__(self, call: int, label_smoothing: float) -> None:
        super().__init__(label_smoothing=label_smoothing)
        self.calls_left = call

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.calls_left -= 1
        return super().forward(logits, labels) * (float("nan") if self.calls_left < 1 else 1)


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[Tensor] = []
    step = Classifier.training_step

    def spy(self: Classifier, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        fed.append(batch[1].clone())
        self.data = self.trainer.datamodule
        indices = self.data.batch_indices(self.trainer.current_epoch, batch_index)
        assert torch.equal(self.data.load()[0].labels[indices], batch[1])
        return step(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", spy)
    loss = ("task.loss._target_=tests.test_faults.NotANumber", "+task.loss.call=10")
    assert train(tmp_path / "run", *TRAINING, *loss) == 1
    (line,) = capsys.readouterr().err.splitlines()
    found = re.search(
        r"the loss is nan at step 10 \(epoch 1, batch 3, training images ([\d, ]+) and 24 more.*\), the largest "
        r"reconstruction error last seen is 0.0e\+00, in 'layer\d': .* lower optimizer.lr",
        line,
    )
    assert found is not None, line
    assert len(found[1].split(", ")) == 8
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 8
    assert all(tensor.isfinite().all() for tensor in last["state_dict"].values())


@pytest.mark.parametrize(
    ("task", "options", "remedy"),
    [
        (Classifier, (), r", and the training takes \d+ MB: something else holds the rest"),
        (DensityEstimator, FLOW, "; try a smaller data.batch_size"),
    ],
)
def test_a_step_that_takes_more_memory_than_there_is_says_what_fits(
    task: type[pl.LightningModule],
    options: tuple[str, ...],
    remedy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(task, "training_step", fail)
    assert train(tmp_path / "run", *TRAINING, *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        rf"out of memory at a batch of 32 images of shape \(3, 8, 8\): there are [\d,]+ MB in all{remedy}", line
    )


# Behind the first step, which has started torch's threads.
LIMIT = """
import resource
from pathlib import Path
from revnet.training import LastCheckpoint
own = LastCheckpoint.on_train_batch_end
def limit(*args):
    own(*args)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, resource.getrlimit(resource.RLIMIT_AS)[1]))
LastCheckpoint.on_train_batch_end = limit
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_a_process_that_gets_no_more_memory_ends_in_one_line(tmp_path: Path) -> None:
    process = start(tmp_path / "run", *TRAINING, "data.image_shape=[3,64,64]", "data.batch_size=128", script=LIMIT)
    line = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 1
    assert re.search(
        r"out of memory at a batch of 128 images of shape \(3, 64, 64\): there are [\d,]+ MB in all, and the training "
        r"takes \d+ MB: something else holds the rest",
        line,
    ), line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["trainer.precision=16-mixed"], r"trainer.precision=16-mixed needs a GPU: on a CPU choose bf16-mixed .*"),
        (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1"], r"trainer.strategy=ddp is for several .*"),
        (
            ["trainer=ddp", "trainer.accelerator=cpu", "trainer.sync_batchnorm=true"],
            r"trainer.sync_batchnorm=true needs GPUs: .*",
        ),
        (["trainer.accumulate_grad_batches=0"], r"trainer.accumulate_grad_batches=0: give a positive number; 1 for .*"),
        (["trainer.check_val_every_n_epoch=0"], r".*=0: give a positive number; limit_val_batches=0 trains without .*"),
        (["+trainer.val_check_interval=0"], r".*=0: give a positive number; limit_val_batches=0 trains without .*"),
        (
            ["+trainer.val_check_interval='00:10:00'"],
            r".*_interval=00:10:00: give a number of batches, or .*",
        ),
        (["trainer.gradient_clip_val=-1"], r"trainer.gradient_clip_val=-1: give a norm, or null to clip nothing"),
        (["memory_budget=1MB"], r".* the least possible is [\d,]+ bytes.*"),
        (
            ["best.monitor=val/loss"],
            r"best.monitor=val/loss with best.mode=max takes the worst for the best: set best.mode=min",
        ),
        (
            ["+callbacks.stop={_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/accuracy}"],
            r"callbacks.stop.monitor=val/accuracy with callbacks.stop.mode=min takes the worst .*: set .*mode=max",
        ),
        (["+callbacks.best.save_top_k=3"], r"callbacks.best.save_top_k=3: several checkpoints need several names, .*"),
        (["callbacks=ema", "+callbacks.best.save_weights_only=true"], r".*save_weights_only=true leaves averaged .*"),
        (["~optimizer"], r"optimizer=None: a network needs an optimizer factory to be trained"),
    ],
)
def test_settings_that_contradict_say_so_before_data_is_loaded(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("revnet.data.Fake.load", lambda self: pytest.fail("data was loaded"))
    assert train(tmp_path / "run", *TRAINING, *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"revnet-train: {message}", line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt_path=last"], r".* its directory is needed: run_dir=.*"),
        (["ckpt_path=last", "run_dir=nowhere"], r"run_dir=nowhere: no run was started there .*"),
    ],
)
def test_there_must_be_a_run_to_go_on_with(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(train_module.main, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"revnet-train: {message}", line)
    assert list(tmp_path.iterdir()) == []


def test_overrides_given_now_hold_on_top_of_those_that_were_saved(tmp_path: Path) -> None:
    assert train(tmp_path / "run", *TRAINING, "trainer.max_epochs=1") == 0
    assert train(tmp_path / "run", "ckpt_path=last", "trainer.max_epochs=2") == 0
    assert train(tmp_path / "run", "ckpt_path=last") == 0  # it has ended: it is tested again
    config = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["config"]
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["train_size"] == 214
    assert outcome(tmp_path / "run")["global_step"] == 12


@pytest.mark.slow
def test_a_training_killed_before_its_first_checkpoint_begins_again(
    undisturbed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    kill = "revnet.train.build = lambda cfg: os.kill(os.getpid(), signal.SIGKILL)"
    killed = start(tmp_path / "run", *TRAINING, script=f"import os, signal, revnet.train\n{kill}")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert train(tmp_path / "run", "ckpt_path=last") == 0
    assert differences(undisturbed(), outcome(tmp_path / "run")) == []


def test_the_command_to_go_on_with_is_one_that_shell_and_hydra_read(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    directory = tmp_path / "a run, lr=0.1 (ä)"
    fault = "+callbacks.fault={_target_:tests.test_faults.Fault,batch:3,signal:SIGTERM}"
    assert invoke(train_module.main, f"run_dir='{directory}'", *TRAINING, fault) == 143
    command = capsys.readouterr().err.partition("go on with revnet-train ")[2]
    assert invoke(train_module.main, *shlex.split(command), "callbacks.fault=null") == 0
    assert outcome(directory)["global_step"] == 18


def test_a_monitor_of_early_stopping_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stop = "+callbacks.stop={_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/acc}"
    assert train(tmp_path / "run", *TRAINING, stop) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"revnet-train: Early stopping conditioned on metric `val/acc` which is not available\..*val/acc", line
    )
