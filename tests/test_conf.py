"""Every option of every group, and every experiment, makes what it says."""

import re
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from revnet.build import build
from revnet.cli import command, compose
from revnet.mistakes import mistake
from revnet.models import list_models
from revnet.training import Classifier, DensityEstimator, DriftGuard, FullyShard, TrainingMonitor
from tests.commands import invoke

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("task", "model", "data", "optimizer", "scheduler", "trainer", "callbacks", "logger", "experiment", "debug")
PROFILED = ("memory_vs_speed", "resolution")  # for revnet-profile; the others are recipes for revnet-train
FLOWS = {"nice": "event_shape", "realnvp": "image_shape"}  # which choose their task, and are told the images' shape
ABSENT = ("trainer.accelerator=cpu", "trainer.devices=1")  # the devices that a trainer asks for may not be there
make = partial(instantiate, _convert_="all")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Where the data modules that look at their directory at once find two classes."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").touch()
    (tmp_path / "index.json").write_text('{"classes": ["cat", "dog"], "splits": {}}')
    return tmp_path


def test_the_groups_are_there() -> None:
    found = {path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert found == {*GROUPS, "hydra"}
    assert all(options(group) for group in GROUPS)


def test_every_network_of_the_package_is_a_model() -> None:
    torchvision = {f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
    assert set(options("model")) == set(list_models()) | torchvision | set(FLOWS)


@pytest.mark.parametrize("option", sorted(set(options("model")) - set(FLOWS)))
def test_model(option: str) -> None:
    with torch.device("meta"):
        network = make(compose("train", f"model={option}").model, num_classes=7)
    assert isinstance(network, nn.Module)
    assert [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1].out_features == 7


@pytest.mark.parametrize(("option", "shape"), FLOWS.items())
def test_flow(option: str, shape: str) -> None:
    cfg = compose("train", f"model={option}", "data.channels=1", "data.normalization=unit", "model.classes=10")
    with torch.device("meta"):
        data, task = build(cfg)
    assert isinstance(task, DensityEstimator)
    assert (cfg.best.monitor, cfg.callbacks.best.monitor, cfg.best.mode) == (*["val/bits_per_dim"] * 2, "min")
    assert task.network.event_shape == data.image_shape == (1, 8, 8)
    assert cfg.model[shape] == [1, 8, 8]
    assert task.network.embedding.num_embeddings == 10


def test_the_paper_s_recipe_for_nice() -> None:
    cfg = compose("train", "experiment=nice_mnist")
    assert (cfg.data.batch_size, round(60_000 * cfg.data.val_fraction)) == (200, 10_000)
    assert (cfg.model.couplings, cfg.model.hidden, cfg.model.layers, cfg.model.prior) == (4, 1000, 5, "logistic")
    adam = cfg.optimizer
    assert (adam.lr, adam.betas, adam.weight_decay) == (1e-3, [0.9, 0.99], 0)
    assert adam.eps * 784 == pytest.approx(1e-4, rel=0.01)  # the loss is per dimension, the paper's per image
    assert cfg.trainer.max_epochs == 1500


@pytest.mark.parametrize("activations", ["store", "recompute", "reconstruct"])
def test_activations_are_chosen_by_one_value(activations: str) -> None:
    assert compose("train", f"model.activations={activations}").model.activations == activations


@pytest.mark.parametrize("option", options("data"))
def test_data(option: str, image_folder: Path) -> None:
    cfg = compose("train", f"data={option}").data
    if "root" in cfg:
        cfg.root = str(image_folder)
    data = make(cfg)
    assert isinstance(data, pl.LightningDataModule)
    assert data.num_classes > 1
    assert len(data.image_shape) == 3


@pytest.mark.parametrize("option", options("optimizer"))
@pytest.mark.parametrize("scheduler", options("scheduler"))
def test_optimizer_and_scheduler(option: str, scheduler: str) -> None:
    cfg = compose("train", f"optimizer={option}", f"scheduler={scheduler}", "optimizer.lr=0.25")
    optimizer = make(cfg.optimizer)(nn.Linear(2, 2).parameters())
    schedule = make(cfg.scheduler)(optimizer, total_steps=100)
    rates = []
    for _ in range(100):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert max(rates) == pytest.approx(0.25, rel=0.03)
    assert optimizer.defaults["weight_decay"] > 0


@pytest.mark.parametrize("option", options("trainer"))
def test_trainer(option: str, tmp_path: Path) -> None:
    cfg = compose("train", f"trainer={option}", *ABSENT)
    trainer = make(cfg.trainer, logger=False, default_root_dir=str(tmp_path))
    assert isinstance(trainer, pl.Trainer)
    assert trainer.max_epochs == cfg.trainer.max_epochs


def test_trainers_ask_for_their_devices() -> None:
    assert compose("train", "trainer=cpu").trainer.accelerator == "cpu"
    assert compose("train", "trainer=gpu").trainer.accelerator == "gpu"
    ddp = compose("train", "trainer=ddp").trainer
    assert (ddp.accelerator, ddp.devices, ddp.num_nodes) == ("gpu", "auto", 1)
    for option, strategy in (("ddp", DDPStrategy), ("fsdp", FullyShard), ("slurm", DDPStrategy)):
        made = make(compose("train", f"trainer={option}", "trainer.strategy.timeout.minutes=3").trainer.strategy)
        assert isinstance(made, strategy)
        assert made._timeout == timedelta(minutes=3)


@pytest.mark.parametrize("experiment", ["digits_quickstart", "nice_digits"])
def test_the_device_of_an_experiment_can_be_chosen(experiment: str) -> None:
    assert compose("train", f"experiment={experiment}").trainer.accelerator == "cpu"
    assert compose("train", f"experiment={experiment}", "trainer=gpu").trainer.accelerator == "gpu"


@pytest.mark.parametrize("option", options("debug"))
def test_debug(option: str) -> None:
    cfg = compose("train", "experiment=cifar10_revnet38_paper", f"debug={option}")
    assert cfg.run_dir.startswith("runs/debug/")
    assert (cfg.trainer.max_steps, cfg.optimizer.nesterov) == (-1, False)
    trainer = make(cfg.trainer, logger=False, accelerator="cpu")
    batches = {"overfit": (1, 1), "fast": (2, 2)}[option]
    assert (trainer.limit_train_batches, trainer.limit_val_batches) == batches


@pytest.mark.parametrize("package", ["wandb", pytest.param("mlflow", marks=pytest.mark.slow)])
def test_a_logger_whose_package_is_missing_names_what_to_install(package: str, tmp_path: Path) -> None:
    """In a process of its own: Lightning looks for packages once."""
    code = f"""
import importlib.metadata, sys
from hydra.utils import instantiate
from revnet.cli import compose
from revnet.mistakes import mistake
own = importlib.metadata.distribution
def distribution(name):
    if name.startswith({package!r}):
        raise importlib.metadata.PackageNotFoundError(name)
    return own(name)
importlib.metadata.distribution = distribution
sys.modules[{package!r}] = None
try:
    instantiate(next(iter(compose("train", "logger={package}", "run_dir={tmp_path}").logger.values())))
except Exception as error:
    print(mistake(error))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.endswith(f"{package} is not installed: pip install 'revnet[loggers]'\n"), run


def test_an_optimizer_whose_package_is_missing_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InstantiationException) as info:
        make(compose("train", "optimizer=muon").optimizer)
    assert str(mistake(info.value)).endswith("timm is not installed: pip install 'revnet[timm]'")


@pytest.mark.parametrize("callbacks", options("callbacks"))
@pytest.mark.parametrize("logger", sorted(set(options("logger")) - {"mlflow", "wandb"}))
def test_callbacks_and_loggers(callbacks: str, logger: str, tmp_path: Path) -> None:
    cfg = compose("train", f"callbacks={callbacks}", f"logger={logger}", f"run_dir={tmp_path}", *ABSENT)
    made = [make(node) for node in cfg.callbacks.values() if node is not None]
    loggers = [make(node) for node in cfg.logger.values()]
    trainer = make(cfg.trainer, callbacks=made, logger=loggers)
    assert all(isinstance(callback, pl.Callback) for callback in made)
    assert {type(logger).__name__ for logger in trainer.loggers} == {
        "csv": {"CSVLogger"},
        "tensorboard": {"TensorBoardLogger"},
        "default": {"CSVLogger", "TensorBoardLogger"},
        "none": set(),
    }[logger]
    for kind in (TrainingMonitor, DriftGuard):
        assert any(isinstance(callback, kind) for callback in trainer.callbacks) == (callbacks != "none")
    assert bool(trainer.checkpoint_callbacks) == (callbacks != "none")


def test_the_engine_s_thresholds_of_drift_hold_unless_others_are_given() -> None:
    guard = make(compose("train").callbacks.drift)
    assert (guard.warn_above, guard.raise_above, guard.fall_back_above) == (None, None, None)
    assert make(compose("train", "callbacks.drift.fall_back_above=1e-9").callbacks.drift).fall_back_above == 1e-9


@pytest.mark.parametrize("option", sorted(set(options("experiment")) - set(PROFILED)))
def test_recipe(option: str, image_folder: Path) -> None:
    cfg = compose("train", f"experiment={option}", *ABSENT)
    if "root" in cfg.data:
        cfg.data.root = str(image_folder)
    with torch.device("meta"):
        data, classifier = build(cfg)
    trainer = make(cfg.trainer, logger=False)
    optimizer = make(cfg.optimizer)(classifier.network.parameters())
    schedule = make(cfg.scheduler)(optimizer, total_steps=trainer.max_steps if trainer.max_steps > 0 else 1000)
    assert isinstance(classifier, DensityEstimator if option.startswith(("nice", "realnvp")) else Classifier)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert cfg.name
    assert cfg.run_dir.startswith(f"runs/{cfg.name}/")
    assert classifier.config == OmegaConf.to_container(cfg)
    assert classifier.config["model"].get("num_classes", data.num_classes) == data.num_classes


@pytest.mark.parametrize("option", PROFILED)
def test_profiled_experiment(option: str) -> None:
    known = compose("profile", "data=cifar10").keys()
    cfg = compose("profile", f"experiment={option}")
    hydra = HydraConfig.get()
    assert cfg.keys() == known
    assert hydra.mode == RunMode.MULTIRUN
    assert hydra.runtime.choices.experiment == option
    for key, values in hydra.sweeper.params.items():
        assert "," in values
        for value in values.split(","):
            cell = compose("profile", f"experiment={option}", f"{key}={value}")
            if key == "model":
                with torch.device("meta"):
                    assert isinstance(make(cell.model, num_classes=7), nn.Module)
            else:
                assert str(cell[key]) == value


@pytest.mark.parametrize("option", PROFILED)
def test_a_profiled_experiment_is_no_recipe(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    assert invoke(command("train")(lambda cfg: seen.append(cfg)), f"experiment={option}") == 2
    assert seen == []
    assert re.fullmatch(r"revnet-train: unknown key '\w+'; .+\n", capsys.readouterr().err)


NETWORKS = ("resnet32", "revnet38", "resnet110", "revnet110", "resnet164", "revnet164")


@pytest.mark.parametrize("network", NETWORKS)
def test_the_paper_s_recipe_for_cifar(network: str) -> None:
    cfg = compose("train", f"experiment=cifar10_{network}_paper")
    assert cfg.name == f"cifar10_{network}_paper"
    assert cfg.model._target_ == f"revnet.models.{network}"
    wanted: dict[str, dict[str, Any]] = {
        "data": {
            "batch_size": 100,
            "val_fraction": 0.0,
            "normalization": "mean_image",
            "padding": 2,
            "flip": True,
            "cutout": 0,
        },
        "optimizer": {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 2e-4},
        "scheduler": {"milestones": [0.5, 0.75], "gamma": 0.1},
        "trainer": {"max_steps": 80_000, "max_epochs": -1},
    }
    for group, values in wanted.items():
        assert {key: cfg[group][key] for key in values} == values
    assert cfg.task.loss.label_smoothing == 0
    assert cfg.task.norm_momentum is None


def test_the_paper_s_recipe_for_imagenet() -> None:
    cfg = compose("train", "experiment=imagenet_revnet104_paper")
    assert cfg.model._target_ == "revnet.models.revnet104"
    assert (cfg.data.batch_size, cfg.trainer.max_steps) == (256, 600_000)
    assert (cfg.data.crop_area, cfg.data.normalization) == ([0.05, 1.0], "symmetric")
    assert cfg.task.norm_momentum is None
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.1, 0.9, 1e-4)


def test_a_user_s_own_experiment_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/model").mkdir()
    (tmp_path / "mine/model/flat.yaml").write_text("_target_: torch.nn.Flatten\n")
    (tmp_path / "mine/experiment/my_run.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: flat\nname: my_run\nseed: 17\n"
    )
    monkeypatch.chdir(tmp_path)
    seen = []
    main = command("train")(lambda cfg: seen.append((cfg.name, cfg.seed, cfg.model._target_)))
    assert invoke(main, "--config-dir", "mine", "experiment=my_run") == 0
    assert seen == [("my_run", 17, "torch.nn.Flatten")]
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs/my_run"]
