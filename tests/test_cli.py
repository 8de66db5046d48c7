import errno
import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pytest
import pytorch_lightning  # noqa: F401  (before a command takes its loggers over)
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset

from revnet.cli import command, compose
from revnet.mistakes import is_out_of_memory, leave, mistake
from revnet.reversible import split_halves
from revnet.run_directory import KeepRuns
from revnet.saved_overrides import with_saved_overrides
from revnet.training import read_checkpoint
from tests.commands import invoke


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def raised(function: Callable[..., Any], *args: Any) -> BaseException:
    with pytest.raises(Exception) as info:  # noqa: PT011
        function(*args)
    return info.value


def split_three_channels(*_: Any) -> Any:
    return split_halves(torch.zeros(1, 3))


def split_a_number(*_: Any) -> Any:
    return split_halves(3)  # type: ignore[arg-type]


def convert_text(*_: Any) -> Any:
    return int("three")


def fail_without_a_path(*_: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class InWorker(Dataset):
    """Calls a function in the worker of a data loader."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.function()


def test_what_the_package_refuses_is_a_mistake() -> None:
    assert str(mistake(raised(read_checkpoint, "nowhere.ckpt"))).startswith("ckpt_path=nowhere.ckpt: no such file; ")
    assert str(mistake(raised(split_three_channels))).startswith("cannot split 3 channels")


@pytest.mark.parametrize("function", [split_a_number, convert_text, lambda: {}["key"], lambda: 1 / 0])
def test_an_error_of_the_program_is_none(function: Callable[[], Any]) -> None:
    """Be it raised outside the package, or within it but by no `raise` statement."""
    assert mistake(raised(function)) is None


def test_a_mistake_is_known_in_a_worker_of_a_data_loader() -> None:
    def first(function: Callable[[], Any]) -> BaseException:
        return raised(next, iter(DataLoader(InWorker(function), num_workers=1, multiprocessing_context="fork")))

    assert str(mistake(first(split_three_channels))).startswith("cannot split 3 channels")
    assert mistake(first(convert_text)) is None
    assert mistake(first(partial(open, "nowhere"))) == "[Errno 2] No such file or directory: 'nowhere'"
    assert mistake(first(fail_without_a_path)) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_mistake_though_it_names_no_path(number: int) -> None:
    error = OSError(number, os.strerror(number))
    assert str(mistake(error)) == f"{error}: make room where this command writes, or choose another disk"
    assert mistake(OSError(errno.EIO, os.strerror(errno.EIO))) is None


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"_target_": "revnet.training.read_checkpoint", "path": "a.ckpt"}, r"ckpt_path=a.ckpt: no such file; .*"),
        ({"_target_": "torch.nn.Linear", "width": 3}, r"torch.nn.*Linear: .* unexpected keyword argument 'width'"),
        ({"_target_": "torch.nn.Linaer"}, r"torch.nn.Linaer: .*"),
        ({"_target_": "pytorch_lightning.Trainer", "accelerator": "abacus"}, r".*abacus.*"),
        ({"_target_": "pytorch_lightning.Trainer", "precision": "3"}, r".*Precision '3' is invalid.*"),
        ({"inner": {"_target_": "torch.nn.Linear", "width": 3}}, r"inner: .* unexpected keyword argument 'width'"),
        ({"_target_": "builtins.open", "file": "nowhere"}, r".*No such file or directory: 'nowhere'"),
        ({"_target_": "tests.test_cli.divide"}, None),
    ],
)
def test_a_mistake_is_known_in_what_hydra_instantiates(config: dict[str, Any], line: str | None) -> None:
    found = mistake(raised(instantiate, OmegaConf.create(config)))
    assert (found is None) if line is None else re.fullmatch(line, str(found))


def divide() -> float:
    return 1 / 0


def test_compose_resolves_everything() -> None:
    cfg = compose("train", "model=resnet32", "optimizer.lr=0.5", "run_dir=here")
    assert "hydra" not in cfg
    assert cfg.callbacks.best.dirpath == "here/checkpoints"
    assert cfg.name == "resnet32_digits"
    assert cfg.optimizer.lr == 0.5


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["model=revnet83"],
            r"unknown model 'revnet83'; did you mean 'revnet38'\? valid: .*, resnet32, .*, revnet56.*",
        ),
        (["data=sifar10"], r"unknown data 'sifar10'; did you mean 'cifar10'\? valid: .*digits.*"),
        (["experiment=digits"], r"unknown experiment 'digits'; .*valid: .*, digits_quickstart, .*"),
        (["trainer=quantum"], r"unknown trainer 'quantum'; valid: auto, cpu, ddp, fsdp, gpu, slurm"),
        (["debug=overfitt"], r"unknown debug 'overfitt'; did you mean 'overfit'\? valid: fast, overfit"),
        (["hydra/launcher=joblb"], r"unknown hydra/launcher 'joblb'; did you mean 'joblib'\? valid: basic, joblib, .*"),
        (["hydra/lancher=joblib"], r"unknown group 'hydra/lancher'; did you mean 'hydra/launcher'\? valid: .*"),
        (["lr=0.1"], r"unknown key 'lr'; did you mean 'optimizer.lr'\?"),
        (["max_epochs=3"], r"unknown key 'max_epochs'; did you mean 'trainer.max_epochs'\?"),
        (
            ["task.loss.label_smoothng=0.1"],
            r"unknown key 'task.loss.*'; did you mean 'label_smoothing'\? .*",
        ),
        (["hydra.launcher.n_job=2"], r"unknown key 'hydra.launcher.n_job'; hydra.launcher has no keys .*"),
        (["scheduler=null"], r"scheduler=null names no option; valid: constant, cosine, one_cycle, step"),
        (["seed=1", "scheduler=3"], r"scheduler=3 names no option; valid: constant, .*"),
        (["+optimizer=adam"], r"unknown optimizer 'adam'; did you mean 'adamw'\? valid: adamw, muon, sgd"),
        (["+optimizer=sgd"], r"optimizer has an option already: choose another by optimizer=OPTION, without the \+"),
        (["+experiment=cifar10_fast"], r"experiment has an option already: choose another by experiment=OPTION, .*"),
        (["lr", "0.1"], r"cannot read 'lr': write KEY=VALUE, such as optimizer.lr=0.05"),
        (["~nothing"], r"Could not delete from config. 'nothing' does not exist."),
        (["name=${nothing}"], r"Interpolation key 'nothing' not found .*"),
        (["--hepl"], r"unrecognized arguments: --hepl; did you mean '--help'\? valid: --cfg, .*"),
        (["--cfg", "jobs"], r"argument --cfg/-c: invalid choice: 'jobs' \(choose from .*job.*"),
        (["-m", "--cfg", "job"], r"Only one of --run, --multirun, --cfg, .*"),
        (["modle=revnet38"], r"unknown key 'modle'; did you mean 'model'\? .*, run_dir, .*"),
        (["experimant=x"], r"unknown key 'experimant'; did you mean 'experiment'\? .*"),
        (["modle.activations=store"], r"unknown key 'modle'; did you mean 'model'\? .*"),
        (["optimizer.learning_rate=1"], r"unknown key 'optimizer.learning_rate'; valid: lr, momentum, .*"),
        (["model.activation=store"], r"unknown key 'model.activation'; did you mean 'activations'\? .*"),
        (["optimizer.lr={"], r"cannot read 'optimizer.lr={': .*"),
        (["data.root=~/images"], r"cannot read 'data.root=~/images': .*; quote .*: \"data.root='~/images'\""),
        (["model=revnet38,resnet32"], r".*Ambiguous value .*--multirun.*"),
        (["--config-dir", "nowhere", "seed=1"], r".*nowhere' not found"),
        (["-m", "model=revnet38,revnet83"], r"unknown model 'revnet83'; .*"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    main = command("train")(lambda cfg: pytest.fail("the job was started"))
    assert invoke(main, *arguments) == 2
    (only,) = lines(capsys.readouterr().err)
    assert re.fullmatch("revnet-train: " + line, only)
    if arguments[0] != "-m":
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "argument", "near"),
    [
        ("profile", "batch_sise=3", "batch_size"),
        ("sample", "temprature=1", "temperature"),
        ("shards", "shard_sise=1", "shard_size"),
    ],
)
def test_every_command_names_the_nearest_of_its_own(
    name: str, argument: str, near: str, capsys: pytest.CaptureFixture
) -> None:
    assert invoke(command(name)(lambda cfg: pytest.fail("the job was started")), argument) == 2
    (only,) = lines(capsys.readouterr().err)
    mistyped = argument.partition("=")[0]
    assert only.startswith(f"revnet-{name}: unknown key {mistyped!r}; did you mean {near!r}? valid: ")


@pytest.mark.parametrize("defaults", ["", "defaults:\n- override /data: digits\n"])
def test_an_experiment_that_would_change_nothing_is_one_line(
    defaults: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    file = tmp_path / "mine/experiment/my_run.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"{defaults}optimizer:\n  lr: 0.5\n")
    main = command("train")(lambda cfg: pytest.fail("the job was started"))
    assert invoke(main, "--config-dir", str(tmp_path / "mine"), "experiment=my_run") == (2 if defaults else 1)
    (only,) = lines(capsys.readouterr().err)
    assert only.startswith(
        "revnet-train: experiment=my_run changes nothing: begin experiment/my_run.yaml with the line "
    )
    file.write_text(f"# @package _global_\n{defaults}optimizer:\n  lr: 0.5\n")
    seen: list[float] = []
    main = command("train")(lambda cfg: seen.append(cfg.optimizer.lr))
    assert invoke(main, "--config-dir", str(tmp_path / "mine"), "experiment=my_run") == 0
    assert seen == [0.5]


def test_a_mistake_in_the_job_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert invoke(command("train")(split_three_channels)) == 1
    (only,) = lines(capsys.readouterr().err)
    assert only.startswith("revnet-train: cannot split 3 channels")


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("trainer.max_epochs=many", "give a value of type int or null"),
        ("trainer.benchmark=maybe", r"give a value of type bool \(true or false\) or null"),
        ("trainer.deterministic=no", r"give a value of type bool \(true or false\) or 'warn' or null"),
        ("task.channels_last=no", r"give a value of type bool \(true or false\)"),
        ("compile=off", r"give a value of type bool \(true or false\)"),
        ("model.exact=no", r"give a value of type bool \(true or false\) or null"),
        ("optimizer.lr=", "give a value of type float or Tensor"),
        ("task.loss.label_smoothing=x", "give a value of type float"),
        (
            "+optimizer.momentun=0.9",
            "torch.optim.SGD has no such argument; did you mean 'momentum'\\? valid: .*, lr, .*",
        ),
    ],
)
def test_what_a_target_cannot_take_is_one_line(argument: str, line: str, capsys: pytest.CaptureFixture) -> None:
    assert invoke(command("train")(lambda cfg: pytest.fail("the job was started")), argument) == 1
    (only,) = lines(capsys.readouterr().err)
    assert re.fullmatch(f"revnet-train: {re.escape(argument)}: {line}", only)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["data=cifar10", "data.flip=no"]),
        ("train", ["data=imagenet_shards", "data.trivial_augment=off"]),
        ("train", ["logger=wandb", "logger.wandb.offline=yes"]),
        ("shards", ["skip_unreadable=no"]),
        ("profile", ["channels_last=no"]),
        ("profile", ["compile=yes"]),
    ],
)
def test_text_is_no_truth_for_any_command(name: str, arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert invoke(command(name)(lambda cfg: pytest.fail("the job was started")), *arguments) == 1
    (only,) = lines(capsys.readouterr().err)
    assert only == f"revnet-{name}: {arguments[-1]}: give a value of type bool (true or false)"


@pytest.mark.parametrize(
    "argument",
    [
        *("compile=true", "compile=null", "trainer.deterministic=warn", "model.activations=store"),
        *("trainer.precision=bf16-mixed", "trainer.devices=auto", "trainer.max_epochs=null", "trainer.max_epochs=3"),
        *("data.normalization=symmetric", "run_dir=elsewhere", "+model.nothing=3", "model=resnet32", "optimizer.lr=1"),
    ],
)
def test_what_a_target_may_take_is_left_to_it(argument: str) -> None:
    assert invoke(command("train")(lambda cfg: None), argument) == 0


def test_an_argument_that_a_builder_passes_on_is_suggested() -> None:
    error = raised(instantiate, {"_target_": "revnet.models.revnet38", "num_clases": 3})
    assert str(mistake(error)).endswith("unexpected keyword argument 'num_clases'; did you mean 'num_classes'?")


def test_another_process_that_does_not_answer_is_a_mistake() -> None:
    line = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3501"
    assert "another process of the run has ended or hangs" in str(mistake(RuntimeError(line)))
    assert mistake(RuntimeError("something else")) is None


def test_the_first_process_of_a_run_speaks_first(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            leave("train", "no", 1)
    assert lines(capsys.readouterr().err) == ["revnet-train: no", "revnet-train (process 1): no"]
    assert len(waits) == 1


def test_an_error_in_the_job_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        invoke(command("train")(lambda cfg: 1 / 0))


def test_every_traceback_comes_back_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="cannot split 3 channels"):
        invoke(command("train")(split_three_channels))


def test_the_switch_of_tracebacks_is_left_as_it_was() -> None:
    seen = []
    assert invoke(command("train")(lambda cfg: seen.append("HYDRA_FULL_ERROR" in os.environ))) == 0
    assert seen == [False]
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_jobs_of_a_sweep_fail_one_by_one(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    seeds = []

    def job(cfg: DictConfig) -> None:
        seeds.append(cfg.seed)
        if cfg.seed > 1:
            split_three_channels()

    assert invoke(command("train")(job), "-m", "seed=1,2,3", "model=resnet32") == 1
    assert seeds == [1, 2, 3]
    failed = [line for line in lines(capsys.readouterr().err) if line.startswith("revnet-train: ")]
    assert [re.sub("channels.*", "channels", line) for line in failed] == [
        "revnet-train: seed=2 model=resnet32: cannot split 3 channels",
        "revnet-train: seed=3 model=resnet32: cannot split 3 channels",
    ]
    (sweep,) = tmp_path.glob("runs/sweeps/*")
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "2", "multirun.yaml"]


def test_an_error_in_a_job_of_a_sweep_keeps_its_traceback(capsys: pytest.CaptureFixture) -> None:
    seeds = []

    def job(cfg: DictConfig) -> float:
        seeds.append(cfg.seed)
        return 1 / (cfg.seed - 2)

    assert invoke(command("train")(job), "-m", "seed=1,2,3") == 1
    assert seeds == [1, 2, 3]
    said = lines(capsys.readouterr().err)
    assert "revnet-train: seed=2: ZeroDivisionError: division by zero" in said
    assert said.count("Traceback (most recent call last):") == 1


def test_a_job_that_fails_leaves_its_memory_to_the_others() -> None:
    class Held:
        pass

    there: list[weakref.ref] = []

    def job(cfg: DictConfig) -> None:
        if there:
            gc.collect()
            assert there[0]() is None
        else:
            activations = Held()
            there.append(weakref.ref(activations))
            try:
                split_three_channels()
            except ValueError as error:
                raise ValueError("again") from error

    assert invoke(command("train")(job), "-m", "seed=1,2") == 1
    assert there[0]() is None


def test_a_lack_of_memory_is_a_mistake() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    error = raised(torch.empty, 2**60)
    assert is_out_of_memory(error)
    assert re.fullmatch(r"out of memory: .*; give a smaller data.batch_size, .*", mistake(error) or "")
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert mistake(OSError(errno.ENOMEM, "Cannot allocate memory"))
    worker = RuntimeError(
        "Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: can't allocate memory"
    )
    assert (mistake(worker) or "").startswith("out of memory: RuntimeError: can't allocate memory; give")
    driver = RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")
    assert is_out_of_memory(driver)
    assert (mistake(driver) or "").startswith("out of memory: CUDA error: out of memory; give")
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("something else"))


def test_processes_that_do_not_arrive_are_told_in_one_line() -> None:
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, world_size=2, wait_for_workers=False)
    error = raised(lambda name: store.wait([name], timedelta(seconds=0.01)), "other")
    assert (mistake(error) or "").startswith("another process of the run has ended or hangs; go on with")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments", [["run_dir=mine"], ["hydra.run.dir=mine"], ["-m", "hydra.sweep.dir=mine", "seed=1,2"]]
)
def test_a_directory_with_something_in_it_is_left_untouched(
    arguments: list[str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    (tmp_path / "mine/checkpoints/last.ckpt").write_text("precious")
    before = contents(tmp_path)
    assert invoke(command("train")(lambda cfg: pytest.fail("the job was started")), *arguments) == 2
    (only,) = lines(capsys.readouterr().err)
    assert only.startswith("revnet-train: mine is not empty and nothing is written over: choose another ")
    assert contents(tmp_path) == before


def test_a_run_that_still_goes_on_is_left_alone(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    Path("run.py").write_text(
        "import time\n"
        "from revnet.cli import command\n"
        "command('train')(lambda cfg: (print('begun', flush=True), time.sleep(100)))()\n"
    )
    again = ("run_dir=mine", "ckpt_path=last")
    running = subprocess.Popen([sys.executable, "run.py", "run_dir=mine"], stdout=subprocess.PIPE, text=True)
    with running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "begun\n"
            before = contents(tmp_path)
            assert invoke(command("train")(lambda cfg: pytest.fail("the job was started")), *again) == 2
            (line,) = lines(capsys.readouterr().err)
            assert line == "revnet-train: the run in mine still goes on: wait for its end, or stop it"
            assert contents(tmp_path) == before
        finally:
            running.kill()
    assert invoke(command("train")(lambda cfg: None), *again) == 0


def test_a_run_of_a_sweep_that_still_goes_on_is_left_alone(capsys: pytest.CaptureFixture) -> None:
    Path("sweep.py").write_text(
        "import time\n"
        "from revnet.cli import command\n"
        "command('train')(lambda cfg: (print('begun', flush=True), time.sleep(100)))()\n"
    )
    arguments = ["-m", "seed=1,2", "hydra.sweep.dir=mine"]
    with subprocess.Popen([sys.executable, "sweep.py", *arguments], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            while running.stdout.readline() != "begun\n":
                assert running.poll() is None
            again = command("train")(lambda cfg: pytest.fail("the job was started"))
            assert invoke(again, "run_dir=mine/0", "ckpt_path=last") == 2
            (line,) = lines(capsys.readouterr().err)
            assert line == "revnet-train: the run in mine/0 still goes on: wait for its end, or stop it"
        finally:
            running.kill()


def test_batches_of_a_sweep_and_an_unexpanded_home_are_refused(capsys: pytest.CaptureFixture) -> None:
    train = command("train")(lambda cfg: pytest.fail("the job was started"))
    assert invoke(train, "-m", "seed=1,2", "hydra.sweeper.max_batch_size=1") == 2
    assert invoke(train, "run_dir='~/runs/a'") == 2
    assert invoke(train, "-m", "seed=1,2", "hydra.sweep.dir='~/sweeps'") == 2
    batches, home, sweeps = lines(capsys.readouterr().err)
    assert batches.startswith("revnet-train: hydra.sweeper.max_batch_size: a job that fails would take later")
    assert home == "revnet-train: run_dir=~/runs/a: nobody expands this ~; write $HOME/runs/a"
    assert sweeps == "revnet-train: hydra.sweep.dir=~/sweeps: nobody expands this ~; write $HOME/sweeps"
    assert not Path("~").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("full", ["0", "1"])
def test_what_ends_before_it_has_begun_is_no_part_of_the_run(
    error: type[BaseException], full: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its overrides would hold for the next one that goes on there."""

    def end(cfg: DictConfig) -> None:
        raise error

    assert invoke(command("train")(lambda cfg: None), "run_dir=mine", "seed=1") == 0
    before = contents(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", full)
    with suppress(error):
        invoke(command("train")(end), "run_dir=mine", "ckpt_path=last", "seed=2")
    assert contents(tmp_path) == before
    assert with_saved_overrides(LAST) == ["seed=1", *LAST]


@pytest.mark.parametrize("begin", [KeepRuns.on_run_start, KeepRuns.on_multirun_start])
def test_a_directory_is_taken_at_once(begin: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    directories = ["hydra.run.dir=mine", "hydra.sweep.dir=mine", "hydra.job.config_name=train"]
    with hydra.initialize_config_module("revnet.conf", version_base="1.3"):
        cfg = hydra.compose("train", directories, return_hydra_config=True)
    begin(KeepRuns(), cfg)
    with pytest.raises(SystemExit) as stop:
        begin(KeepRuns(), cfg)
    assert stop.value.code == 2
    assert "mine is not empty" in capsys.readouterr().err


def test_a_run_dir_is_not_that_of_a_sweep(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert invoke(command("train")(lambda cfg: None), "-m", "run_dir=mine", "seed=1,2") == 2
    (only,) = lines(capsys.readouterr().err)
    assert "hydra.sweep.dir" in only
    assert list(tmp_path.iterdir()) == []


def test_resuming_goes_on_in_a_directory_and_keeps_what_is_there(tmp_path: Path) -> None:
    main = command("train")(lambda cfg: None)
    assert invoke(main, "run_dir=mine") == 0
    before = contents(tmp_path / "mine")
    for seed in "12":
        assert invoke(main, "run_dir=mine", "ckpt_path=mine/checkpoints/last.ckpt", f"seed={seed}") == 0
    after = contents(tmp_path / "mine")
    assert after.items() >= before.items()
    assert OmegaConf.load("mine/.hydra_1/config.yaml").seed == 1
    assert OmegaConf.load("mine/.hydra_2/config.yaml").seed == 2


def test_a_run_with_checkpoints_does_not_go_on_from_those_of_another(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    main = command("train")(lambda cfg: None)
    for run in ("mine", "other"):
        Path(run, "checkpoints").mkdir(parents=True)
        Path(run, "checkpoints/best.ckpt").write_text(run)
    before = contents(tmp_path)
    assert invoke(main, "run_dir=mine", "ckpt_path=other/checkpoints/best.ckpt") == 2
    (only,) = lines(capsys.readouterr().err)
    assert "mine is not empty" in only
    assert "go on from other/checkpoints/best.ckpt in another run_dir" in only
    assert contents(tmp_path) == before
    assert invoke(main, "run_dir=mine", f"ckpt_path={tmp_path}/mine/checkpoints/best.ckpt") == 0


def record(name: str, *overrides: str, config_dirs: Sequence[str] = ()) -> None:
    directory = Path("mine", name)
    directory.mkdir(parents=True)
    OmegaConf.save(list(overrides), directory / "overrides.yaml")
    sources = [{"path": path, "provider": "command-line"} for path in config_dirs]
    OmegaConf.save({"hydra": {"runtime": {"config_sources": sources}}}, directory / "hydra.yaml")


LAST = ["run_dir=mine", "ckpt_path=last"]


def test_a_copy_beside_the_records_of_a_run_is_none_of_them() -> None:
    record(".hydra", "seed=1", "run_dir=mine")
    record(".hydra_3", "seed=3", "run_dir=mine")
    record(".hydra_backup", "seed=9")
    assert with_saved_overrides(LAST) == ["seed=3", *LAST]
    assert invoke(command("train")(lambda cfg: None), "run_dir=mine", "ckpt_path=other.ckpt") == 0
    assert OmegaConf.load("mine/.hydra_4/config.yaml").ckpt_path == "other.ckpt"


@pytest.mark.parametrize("saved", [[], ["ckpt_path=null"], ["ckpt_path=last"]])
def test_a_run_without_a_checkpoint_begins_anew(saved: list[str]) -> None:
    record(".hydra", *saved, "seed=1")
    assert with_saved_overrides(LAST) == ["seed=1", *LAST]


def test_a_run_without_a_checkpoint_of_its_own_begins_where_it_was_to() -> None:
    record(".hydra", "run_dir=mine", "ckpt_path=old/other.ckpt", "seed=1")
    assert with_saved_overrides([*LAST, "seed=2"]) == ["run_dir=mine", "ckpt_path=old/other.ckpt", "seed=2"]
    Path("mine/checkpoints").mkdir()
    Path("mine/checkpoints/last.ckpt").touch()
    assert with_saved_overrides(LAST) == ["seed=1", *LAST]


def test_a_run_goes_on_with_configurations_of_the_user() -> None:
    record(".hydra", "seed=1", config_dirs=["/mine"])
    assert with_saved_overrides(LAST) == ["--config-dir=/mine", "seed=1", *LAST]
    other = ["--config-dir", "other"]
    assert with_saved_overrides([*other, *LAST]) == [*other, "seed=1", *LAST]


def test_a_run_goes_on_with_a_configuration_of_the_user_from_the_command_line(tmp_path: Path) -> None:
    Path("own/experiment").mkdir(parents=True)
    Path("own/experiment/my_run.yaml").write_text("# @package _global_\nseed: 17\n")
    seen = []
    start = command("train")(lambda cfg: seen.append(cfg.seed))
    again = command("train", lambda: sys.argv.__setitem__(slice(1, None), with_saved_overrides(sys.argv[1:])))
    assert invoke(start, "--config-dir", "own", "experiment=my_run", "run_dir=mine") == 0
    assert invoke(again(lambda cfg: seen.append(cfg.seed)), *LAST) == 0
    assert invoke(again(lambda cfg: seen.append(cfg.seed)), "--config-dir", "own", *LAST) == 0
    assert seen == [17, 17, 17]


def test_other_processes_of_a_distributed_run_may_join_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    joined = []
    main = command("train")(lambda cfg: joined.append(cfg.seed))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.log").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert invoke(main, "run_dir=mine", "seed=3") == 0
    assert joined == [3]


def test_help_tells_a_newcomer_what_to_type(capsys: pytest.CaptureFixture) -> None:
    assert invoke(command("train")(lambda cfg: None), "--help") == 0
    text = capsys.readouterr().out
    for part in ("revnet-train experiment=digits_quickstart", "-m ", "model: ", "revnet38", "cifar10", "optimizer:\n"):
        assert part in text


def test_a_reader_of_the_help_may_stop_reading() -> None:
    command = f"{sys.executable} -m revnet.train --help | head -n 1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert run.stdout.startswith("revnet-train trains a network")
    assert run.stderr == ""


def test_help_and_a_mistyped_name_do_not_wait_for_lightning(tmp_path: Path) -> None:
    code = "import sys, revnet.train, revnet.evaluate, revnet.profile; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hydra" in run.stdout.split()
    assert "pytorch_lightning" not in run.stdout.split()
    assert "torch._dynamo" not in run.stdout.split()


@pytest.mark.parametrize("content", ["", "- seed=1\n- [", "{seed: 1}"])
def test_a_damaged_record_is_not_taken_for_an_empty_one(content: str) -> None:
    record(".hydra", "seed=1")
    Path("mine/.hydra/overrides.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"mine/.hydra/overrides.yaml is empty or damaged: give ckpt_path=PATH"):
        with_saved_overrides(LAST)


def test_a_job_that_the_system_killed_is_one_line() -> None:
    error = type("TerminatedWorkerError", (Exception,), {})("A worker process ...")
    assert (mistake(error) or "").startswith("a job was killed, most likely because memory ran out")


def test_names_are_completed() -> None:
    line = "revnet-train model=revnet3"
    command = [sys.executable, "-m", "revnet.train", "-sc", "query=bash"]
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["model=revnet34", "model=revnet38"]
