"""From a configuration to the data, the network and its task, or to what does not go together in it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from revnet.processes import rank

if TYPE_CHECKING:  # Lightning takes seconds to import, and --help need not wait for it
    from pytorch_lightning import LightningDataModule

    from revnet.training import Task

__all__ = ["build", "refuse_contradictions", "refuse_odd_callbacks"]

log = logging.getLogger(__name__)

BETTER = {"accuracy": "max", "nats": "max", "loss": "min", "bits_per_dim": "min"}


def build(cfg: DictConfig) -> tuple[LightningDataModule, Task]:
    """Make the data module and the Lightning module of a configuration.

    Args:
        cfg: with the nodes `model`, `data`, `task`, and, to be trained, `optimizer` and `scheduler`. What the network
            must know of the data is filled in where it is null or missing: `model.num_classes`, or the shape of the
            images for a flow.

    Raises:
        ValueError: if the network contradicts the data.
    """
    data = instantiate(cfg.data, _convert_="all")
    _fill_in(cfg.model, data)
    network = instantiate(cfg.model, _convert_="all")
    first = next((module for module in network.modules() if isinstance(module, torch.nn.Conv2d)), None)
    if first is not None and first.in_channels != data.image_shape[0]:
        raise ValueError(
            f"the data has images of {data.image_shape[0]} channels, but the network takes {first.in_channels}: "
            "set model.in_channels (+model.in_channels=... for revnet's networks), or choose other data"
        )
    if not hasattr(network, "log_prob") and data.num_classes < 2:
        raise ValueError(
            f"the data has one class, {', '.join(data.class_names or ['0'])}, and a classifier needs two: is data.root "
            f"the directory above train/CLASS/, and has each class a folder of its own there?"
        )
    side = data.image_shape[-1]
    if rank() == 0 and getattr(network, "total_stride", 0) >= side:
        log.warning(
            "of images of %d pixels the last stage sees a single one: take larger images (data.image_size=224), or a "
            "network for small ones (+model.small_images=true)",
            side,
        )
    if getattr(network, "dequantise", None) is not None and data.normalization != "unit":
        raise ValueError(
            f"data.normalization={data.normalization}, but the flow takes images in [0, 1]: set "
            f"data.normalization=unit, and data.padding=0 for it not to learn black edges"
        )
    if hasattr(network, "log_prob"):
        for name in ("mixup", "cutmix", "cutout"):
            if cfg.data.get(name):
                raise ValueError(f"data.{name}={cfg.data[name]}: this is for classifiers; set it to 0 for a flow")
        if cfg.data.get("channels") == 3:  # two thirds of the components would be known from the others
            raise ValueError(
                "data.channels=3 repeats the grey images, whose density means nothing: set data.channels=1"
            )
    if getattr(network, "dequantise", None) is not None and cfg.trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision}, but the flow adds noise to images, for which half precision "
            f"has no room: choose {str(cfg.trainer.precision).replace('true', 'mixed')} or 32-true"
        )
    task = instantiate(
        cfg.task,
        network=network,
        optimizer=instantiate(cfg.get("optimizer"), _convert_="all"),
        scheduler=instantiate(cfg.get("scheduler"), _convert_="all"),
    )
    task.config = OmegaConf.to_container(cfg, resolve=True)
    return data, task


def _fill_in(model: DictConfig, data: LightningDataModule) -> None:
    """Tell the network what the data is like, or refuse what it is told already."""
    shape = next((key for key in ("event_shape", "image_shape") if key in model), None)  # of a flow
    key = "num_classes" if shape is None else "classes"
    classes = data.num_classes  # type: ignore[attr-defined]
    with open_dict(model):
        if shape is not None and model[shape] is None:
            model[shape] = list(data.image_shape)  # type: ignore[attr-defined]
        if shape is None and model.get(key) is None:
            model[key] = classes
    if model.get(key) not in (None, classes):
        raise ValueError(
            f"model.{key}={model[key]}, but the data has {classes} classes: leave model.{key} out, or choose other data"
        )


def refuse_contradictions(trainer: DictConfig) -> None:
    """Look at the trainer's settings before any data is read.

    Raises:
        ValueError: a count that Lightning would divide by, a precision that the device does not have, an operation
            that needs other devices, or what is given elsewhere and would not be looked at.
    """
    given_otherwise = {
        "callbacks": "+callbacks.NAME._target_=...",
        "logger": "logger=...",
        "default_root_dir": "run_dir",
    }
    for name, how in given_otherwise.items():
        if name in trainer:
            raise ValueError(f"trainer.{name} would not be looked at: it is given by {how}")
    for name, remedy in {
        "accumulate_grad_batches": "1 for a step after every batch",
        "check_val_every_n_epoch": "limit_val_batches=0 trains without validation",
        "val_check_interval": "limit_val_batches=0 trains without validation",
    }.items():
        value = trainer.get(name)
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"trainer.{name}={value}: give a positive number; {remedy}")
    for name in ("max_epochs", "max_steps", "accumulate_grad_batches", "check_val_every_n_epoch"):
        if isinstance(trainer.get(name), float):
            raise ValueError(f"trainer.{name}={trainer[name]}: give a whole number")
    if trainer.get("accumulate_grad_batches") is None:
        raise ValueError("trainer.accumulate_grad_batches=null: give a positive number; 1 for a step after every batch")
    interval = trainer.get("val_check_interval")
    if not isinstance(interval, int | float | None):
        raise ValueError(
            f"trainer.val_check_interval={interval}: give a number of batches, or a share of an epoch such as 0.25"
        )
    if (trainer.gradient_clip_val or 0) < 0:
        raise ValueError(f"trainer.gradient_clip_val={trainer.gradient_clip_val}: give a norm, or null to clip nothing")
    cuda = trainer.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.accelerator.is_available())
    precision = str(trainer.precision)
    if cpu and precision.startswith("16"):
        raise ValueError(f"trainer.precision={precision} needs a GPU: on a CPU choose bf16-mixed or 32-true")
    if cpu and trainer.sync_batchnorm:
        raise ValueError("trainer.sync_batchnorm=true needs GPUs: on CPUs leave it out")
    if cuda and precision.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"trainer.precision={precision} is not for {torch.cuda.get_device_name()}: choose 16-mixed or 32-true"
        )


def refuse_odd_callbacks(cfg: DictConfig) -> None:
    """Look at callbacks and loggers, and at how the best checkpoint and the end of a training are to be chosen.

    Raises:
        ValueError: one of them is no mapping; the best checkpoint would be the worst one, another than was validated,
            or the last of several under one name.
    """
    callbacks = cfg.callbacks
    for group in ("callbacks", "logger"):
        for key, node in cfg[group].items():
            if not isinstance(node, DictConfig | None):
                raise ValueError(f"{group}.{key}={node}: null leaves it out; {group}=OPTION chooses another")
    for key, node in ((str(key), node) for key, node in callbacks.items()):
        kind = str((node or {}).get("_target_")).rpartition(".")[2]
        if kind not in ("EarlyStopping", "ModelCheckpoint") or not node.get("monitor"):
            continue
        mode = BETTER.get(str(node.monitor).rpartition("/")[2], node.get("mode", "min"))
        if node.get("mode", "min") != mode:
            where = "best" if key == "best" else f"callbacks.{key}"
            raise ValueError(
                f"{where}.monitor={node.monitor} with {where}.mode={node.get('mode', 'min')} takes the worst for the "
                f"best: set {where}.mode={mode}"
            )
    best = callbacks.get("best")
    if best is None:
        return
    unique = "{step" in best.filename or ("{epoch" in best.filename and not cfg.trainer.get("val_check_interval"))
    if best.get("save_top_k", 1) not in (0, 1) and not unique:
        raise ValueError(
            f"callbacks.best.save_top_k={best.save_top_k}: several checkpoints need several names, such as "
            "callbacks.best.filename='best-{step}'"
        )
    if best.get("save_weights_only") and "_target_" in (callbacks.get("ema") or ()):
        raise ValueError("callbacks.best.save_weights_only=true leaves averaged weights out: set it to false with ema")
