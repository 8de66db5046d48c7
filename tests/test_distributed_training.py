"""Commands with two processes, which train as one with the batches of both, and end when one of them does."""

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from revnet import evaluate, train
from revnet.reversible import Merge, ReversibleBlock, ReversibleSequence, Split
from tests.commands import invoke
from tests.test_faults import differences

SECONDS = 120
OPTIONS = (  # a batch is the whole data set, in any order
    "model._target_=tests.test_distributed_training.network",
    *("data=fake", "data.image_shape=[3,8,8]", "data.train_size=32", "data.test_size=16", "data.val_fraction=0"),
    *("scheduler=constant", "trainer.max_epochs=5", "trainer.log_every_n_steps=1", "threads=1", "logger=csv"),
)


def network(num_classes: int, activations: str, exact: bool | None) -> nn.Module:
    """A RevNet whose normalisation does not look at the batch."""

    def branch() -> nn.Module:
        return nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False))

    blocks = [ReversibleBlock(branch(), branch()) for _ in range(3)]
    sequence = ReversibleSequence([Split(), *blocks, Merge()], activations, exact)
    return nn.Sequential(nn.Conv2d(3, 8, 3), sequence, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


class NotANumber(nn.CrossEntropyLoss):
    """A loss that is nan in process 1."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(logits, labels) * (float("nan") if os.environ["RANK"] == "1" else 1)


class AtExit(Callback):
    """Writes whether there is a group of processes still when Python ends."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        file = Path(f"group_{trainer.global_rank}")
        atexit.register(lambda: file.write_text(str(torch.distributed.is_initialized())))


def environment(**variables: Any) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}


def torchrun(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "revnet.train",
    ]
    return subprocess.run(
        [*command, *OPTIONS, "trainer.accelerator=cpu", "data.batch_size=16", *arguments],
        **{"cwd": directory, "env": environment(), "capture_output": True, "text": True, "timeout": SECONDS},
    )


def said(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("revnet-train")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of one process with the doubled batch."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    assert invoke(train.main, *OPTIONS, "trainer=cpu", "data.batch_size=32", f"run_dir={directory}") == 0
    return torch.load(directory / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("trainer", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_as_one_with_the_doubled_batch(
    trainer: str, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit = "+callbacks.at_exit._target_=tests.test_distributed_training.AtExit"
    run = torchrun(tmp_path, f"trainer={trainer}", at_exit)  # its directory is named by the time, and is still only one
    assert run.returncode == 0, run.stderr
    assert [(tmp_path / f"group_{number}").read_text() for number in (0, 1)] == ["False", "False"]
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    together = torch.load(checkpoint, weights_only=True)
    assert together["global_step"] == alone["global_step"] == 5
    torch.testing.assert_close(together["state_dict"], alone["state_dict"], rtol=1.3e-6, atol=1e-6)
    assert run.stdout.count("test accuracy ") == 1
    assert len(list(tmp_path.glob("runs/*/*"))) == 1
    monkeypatch.chdir(tmp_path)
    assert invoke(evaluate.main, f"ckpt_path={checkpoint}", "trainer=cpu") == 0


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{file.name} was not written in {SECONDS} s"
        time.sleep(0.05)


@contextmanager
def two_processes(directory: Path, trainer: str, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """What torchrun would start, without torchrun, which would end the other at once; they have saved a checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> subprocess.Popen[str]:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
        world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        options = (f"trainer={trainer}", "trainer.accelerator=cpu", "data.batch_size=16", "run_dir=here")
        return subprocess.Popen(
            [sys.executable, "-m", "revnet.train", *OPTIONS, *options, "trainer.max_epochs=100000", *arguments],
            **{"cwd": directory, "env": environment(**ranks, **world), "text": True},
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE},
        )

    with ExitStack() as stack:
        first = stack.enter_context(start(0))
        stack.callback(first.kill)
        wait_for(directory / "here/.hydra/overrides.yaml", first)
        second = stack.enter_context(start(1))
        stack.callback(second.kill)
        wait_for(directory / "here/checkpoints/last.ckpt", first)
        yield [first, second]


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ("ddp", (1, 0)),
        pytest.param("fsdp", (0, 1), marks=pytest.mark.slow),
        pytest.param("ddp", (0,), marks=pytest.mark.slow),
        pytest.param("ddp", (1,), marks=pytest.mark.slow),
    ],
)
def test_a_run_of_two_processes_stops_where_both_are_whenever_one_is_told_to(
    trainer: str, told: tuple[int, ...], tmp_path: Path
) -> None:
    with two_processes(tmp_path, trainer) as processes:
        for process in told:
            processes[process].send_signal(signal.SIGTERM)
            time.sleep(0.003)  # within a step or between two, before or after the other takes part in an exchange
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    lines = [line for line in "".join(errors).splitlines() if "stopped by SIGTERM after step" in line]
    assert [process.returncode for process in processes] == [143, 143], errors
    assert "Traceback" not in "".join(errors)
    steps = {re.search("after step ([0-9]+):", line)[1] for line in lines}
    (step,) = steps
    stopped = torch.load(tmp_path / "here/checkpoints/last.ckpt", weights_only=True)
    assert stopped["global_step"] == int(step)
    assert len(stopped["continuation"]["processes"]) == 2


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_a_process_is_killed_the_other_says_so_and_the_run_can_be_resumed(victim: int, tmp_path: Path) -> None:
    checkpoint = tmp_path / "here/checkpoints/last.ckpt"
    with two_processes(tmp_path, "ddp") as processes:
        processes[victim].send_signal(signal.SIGKILL)
        _, errors = processes[1 - victim].communicate(timeout=SECONDS)
    assert processes[1 - victim].returncode == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("revnet-train")]
    assert re.search("another process of the run has ended .* ckpt_path=last", line)
    assert "Traceback" not in errors

    before = torch.load(checkpoint, weights_only=True)
    run = torchrun(tmp_path, "run_dir=here", "ckpt_path=last", f"trainer.max_epochs={before['epoch'] + 3}")
    assert run.returncode == 0, run.stderr
    assert torch.load(checkpoint, weights_only=True)["global_step"] == before["global_step"] + 2


@pytest.mark.slow
def test_a_process_that_hangs_is_waited_for_as_long_as_the_timeout_says(tmp_path: Path) -> None:
    with two_processes(tmp_path, "ddp", "trainer.strategy.timeout.minutes=0.25") as (first, second):
        second.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        _, errors = first.communicate(timeout=SECONDS)
        waited = time.monotonic() - begun
    assert first.returncode == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("revnet-train")]
    assert re.search("another process of the run has ended .* ckpt_path=last", line)
    assert 10 < waited < 60


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_a_run_of_two_processes_that_is_told_to_stop_goes_on_to_the_same_bits(trainer: str, tmp_path: Path) -> None:
    augmented = ("data.train_size=224", "data.padding=2", "data.flip=true", "trainer.max_epochs=2")  # seven batches
    options = (f"trainer={trainer}", "trainer.accumulate_grad_batches=2", *augmented)
    fault = "+callbacks.fault={_target_:tests.test_faults.Fault,batch:3,signal:SIGTERM}"
    assert torchrun(tmp_path, *options, "run_dir=whole").returncode == 0
    assert torchrun(tmp_path, *options, "run_dir=part", fault).returncode != 0
    whole, part = (tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "part"))
    stopped = torch.load(part, weights_only=True)
    assert stopped["global_step"] == 1
    first, second = stopped["continuation"]["processes"]
    assert first["gradients"].keys() == second["gradients"].keys() != set()
    assert not torch.equal(first["random"]["torch"], second["random"]["torch"])
    resumed = torchrun(tmp_path, *options, "run_dir=part", "ckpt_path=last", "callbacks.fault=null")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (torch.load(path, weights_only=True) for path in (whole, part))
    for key in ("global_step", "state_dict", "optimizer_states"):
        assert differences(expected[key], found[key]) == []
    for key in ("processes", "metrics"):
        assert differences(expected["continuation"][key], found["continuation"][key]) == []
    logs = [(path.parents[1] / f"csv/version_{n}/metrics.csv").read_text() for path, n in ((whole, 0), (part, 1))]
    assert [log.count("\n") for log in logs] == [logs[0].count("\n")] * 2


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_is_told_by_it(tmp_path: Path) -> None:
    loss = ("task.loss._target_=tests.test_distributed_training.NotANumber", "trainer.strategy.timeout.minutes=1")
    run = torchrun(tmp_path, "trainer=ddp", *loss, "run_dir=here")
    assert run.returncode == 1
    assert any(
        re.search(r"process 1\): the loss is nan at step 1 .*training images [\d, ]+ and", line) for line in said(run)
    )


@pytest.mark.slow
def test_synchronised_batch_normalisation_on_a_cpu_is_refused_in_one_line(tmp_path: Path) -> None:
    run = torchrun(tmp_path, "trainer=ddp", "trainer.sync_batchnorm=true", "run_dir=here")
    assert run.returncode == 1
    (line,) = said(run)
    assert line == "revnet-train: trainer.sync_batchnorm=true needs GPUs: on CPUs leave it out"


@pytest.mark.slow
def test_a_number_of_devices_that_is_not_torchruns_is_refused_in_one_line(tmp_path: Path) -> None:
    run = torchrun(tmp_path, "trainer=ddp", "trainer.devices=3", "run_dir=here")
    assert run.returncode == 1
    (line,) = said(run)
    assert re.search(r"devices=3.* does not match the world size \(2\)", line)
