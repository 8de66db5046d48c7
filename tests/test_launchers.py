"""Sweeps whose jobs run in other processes."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric.plugins.environments import SLURMEnvironment

from revnet import train
from revnet.cli import compose
from revnet.processes import rank, started_by_slurm
from tests.commands import invoke

TINY = (
    *("data=fake", "data.image_shape=[3,8,8]", "trainer=cpu", "threads=1", "debug=fast"),
    *("model=resnet32", "logger=csv", "callbacks=none"),
)
KEEPING = "+callbacks.continuation._target_=revnet.training.Continuation"  # which several processes ask for


def stops_here(*_: Any, **__: Any) -> None:
    raise ValueError("as far as fit")


def sweep(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "revnet.train", "-m", *TINY, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "launcher",
    [
        ("joblib", "hydra.launcher.n_jobs=2"),
        pytest.param(("submitit_local", "hydra.launcher.timeout_min=3"), marks=pytest.mark.slow),
    ],
)
def test_a_job_that_fails_leaves_the_others_alone(launcher: tuple[str, str], tmp_path: Path) -> None:
    name, option = launcher
    run = sweep(tmp_path, f"hydra/launcher={name}", option, "optimizer.lr=-1,0.1")
    assert run.returncode == 1, run.stderr
    (directory,) = tmp_path.glob("runs/sweeps/*")
    assert [path.parent.parent.parent.name for path in directory.glob("*/csv/*/metrics.csv")] == ["1"]
    stderr = run.stderr if name == "joblib" else "".join(f.read_text() for f in directory.rglob("*_log.err"))
    failed = [line for line in stderr.splitlines() if line.startswith("revnet-train: ")]
    assert len(failed) == 1
    assert failed[0].endswith("optimizer.lr=-1: optimizer: Invalid learning rate: -1")
    assert "Traceback" not in run.stderr


def test_the_slurm_launcher_takes_one_task_for_each_device() -> None:
    compose(
        "train", "hydra/launcher=slurm", "trainer=slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=4"
    )
    launcher = instantiate(HydraConfig.get().launcher)
    wanted = {"nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "name": "revnet", "timeout_min": 1440}
    assert type(launcher).__name__ == "SlurmLauncher"
    assert {key: launcher.params[key] for key in wanted} == wanted


def test_the_trainer_takes_its_devices_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    trainer = compose("train", "trainer=slurm").trainer
    assert (trainer.num_nodes, trainer.devices) == (2, 4)


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_the_trainer_takes_its_devices_from_torchrun(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compose("train", f"trainer={trainer}").trainer.devices == "auto"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    composed = compose("train", f"trainer={trainer}").trainer
    assert (composed.num_nodes, composed.devices) == (3, 8)


SHELL = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}  # of `srun --pty bash`
TASK = {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "5", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
        (TASK, 5),
        (SHELL, 0),
        (SHELL | {"LOCAL_RANK": "1"}, 1),
        (SHELL | {"RANK": "3", "LOCAL_RANK": "1"}, 3),
        (TASK | {"SLURM_JOB_NAME": "interactive"}, 1),
    ],
)
def test_every_launcher_numbers_the_processes(
    variables: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank() == number
    assert started_by_slurm() == SLURMEnvironment.detect()


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2", "RANK": "0"},
        {**TASK, "SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NUM_TASKS": "8"},
        {**TASK, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "2", "RANK": "0"},  # srun torchrun
    ],
)
def test_several_processes_that_would_all_train_alone_are_refused(
    variables: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("revnet.mistakes.SECONDS_TO_FIRST", 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert invoke(train.main, *TINY, "run_dir=here") == 1
    assert re.search(r"[28] processes were started, each .* by itself: choose trainer=ddp", capsys.readouterr().err)


def test_tasks_that_are_not_counted_by_the_node_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("revnet.mistakes.SECONDS_TO_FIRST", 0)
    for name, value in {**TASK, "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert invoke(train.main, *TINY, "run_dir=here") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Use `--ntasks-per-node=8` instead" in line


def test_processes_that_would_draw_the_same_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(train.main, *TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("revnet-train: callbacks.continuation is left out: without it all processes of a training")


def test_runs_of_a_sweep_that_would_start_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    several = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", KEEPING)
    assert invoke(train.main, "-m", *TINY, *several, "seed=0,1") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("revnet-train")]
    assert len(lines) == 2
    assert all("trainer.devices=2: the runs of a sweep (-m) start no further processes" in line for line in lines)


def test_runs_of_a_sweep_may_be_of_tasks_that_slurm_has_started(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of hydra/launcher=slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", stops_here)
    tasks = {**TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "8"}
    for name, value in {**tasks, "SLURM_STEP_NUM_TASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    several = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=8", KEEPING)
    assert invoke(train.main, "-m", *TINY, *several, "seed=0,1") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("revnet-train")]
    assert [line.rpartition(": ")[2] for line in lines] == ["as far as fit"] * 2


def test_a_sweep_under_torchrun_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert invoke(train.main, "-m", "data=fake", "seed=0,1") == 2
    assert re.fullmatch(r"revnet-train: a sweep \(-m\) starts each of its runs itself: .*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
