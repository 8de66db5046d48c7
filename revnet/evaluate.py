"""The command `revnet-eval`: test the network of a checkpoint, or of a file of weights."""

from __future__ import annotations

import logging
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig

from revnet import models
from revnet.build import build
from revnet.cli import command
from revnet.processes import rank

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

__all__ = ["evaluate", "offer_checkpoint", "main"]

log = logging.getLogger(__name__)

CHECKPOINT = "ckpt_path=runs/NAME/DATE/checkpoints/best.ckpt"


def offer_checkpoint(overrides: list[str]) -> None:
    """Give Hydra the configuration in a checkpoint, as the options `model=checkpoint`, `data=checkpoint` and the rest.

    They are the defaults of `revnet-eval`: its other overrides then change single values of them or choose other
    options, as they do in any configuration. A file of weights gives the network alone.

    Args:
        overrides: the command line, with `ckpt_path=PATH` or `weights=PATH` in it. Only with a flag such as `--help`
            may both be missing.

    Raises:
        ValueError: if there is not one file, or it does not say how its network and data were made.
    """
    given = {}
    for text in overrides:
        key = text.partition("=")[0]
        if key in ("ckpt_path", "weights"):
            override = OverridesParser.create().parse_override(text)
            if override.is_sweep_override():
                raise ValueError(f"{text}: revnet-eval takes one file at a time")
            given[key] = str(override.value())
    config: dict[str, Any] = {"model": {}, "data": {}, "task": {}}
    if len(given) == 2:
        raise ValueError(f"{' '.join(f'{key}={path}' for key, path in given.items())}: give one of the two")
    if "ckpt_path" in given:
        config = _of_checkpoint(given["ckpt_path"])
    elif "weights" in given:
        config = _of_weights(given["weights"])
        if not any(text.startswith("data=") for text in overrides):
            raise ValueError(
                f"weights={given['weights']} says nothing of data: add data=digits, or what is to be tested"
            )
    elif not any(text.startswith("-") for text in overrides):
        raise ValueError(f"ckpt_path and weights are missing: revnet-eval {CHECKPOINT}, or weights=PATH data=digits")
    rest: dict[str, Any] = {"name": config["name"]} if "name" in config else {}
    chosen = next((text.partition("=")[2] for text in overrides if text.startswith("data=")), None)
    ours = chosen is None or (resources.files("revnet.conf") / "data" / f"{chosen}.yaml").is_file()
    if ours and "normalization" in config["data"]:
        rest["data"] = {"normalization": config["data"]["normalization"]}
    if "trainer" in config:
        rest["trainer"] = {"precision": config["trainer"]["precision"]}
    store = ConfigStore.instance()
    store.store(name="checkpoint", group="model", node=config["model"])
    store.store(name="checkpoint", group="data", node=config["data"])
    store.store(name="checkpoint", group="task", node=config["task"])
    store.store(name="checkpoint", node=rest)


def _of_checkpoint(path: str) -> dict[str, Any]:
    from revnet.training import checkpoint_config, read_checkpoint

    return checkpoint_config(read_checkpoint(path), path)


def _of_weights(path: str) -> dict[str, Any]:
    architecture = models.architecture_of(path)
    # By `get_model`, which makes networks only: the file may come from anywhere.
    network = {"_target_": "revnet.models.get_model", "name": architecture["model"]}
    return {
        "name": f"{architecture['model']}_${{hydra:runtime.choices.data}}",
        "model": {"activations": None, "exact": None} | architecture["arguments"] | network,
        "data": {},
        "task": {"_target_": "revnet.training.Classifier"},
    }


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Test and print a summary.

    Args:
        cfg: the configuration `eval`.

    Returns:
        The metrics of the test, by name.

    Raises:
        ValueError: if the weights do not fit the network that the configuration asks for, or `cfg.save_weights` is
            there already.
    """
    from pytorch_lightning.callbacks import RichProgressBar

    from revnet.training import load_checkpoint, print_summary, read_checkpoint

    data, task = build(cfg)
    if cfg.weights is not None:
        models.load_weights(task.network, cfg.weights)
    else:
        checkpoint = read_checkpoint(cfg.ckpt_path)
        load_checkpoint(task, checkpoint, cfg.ckpt_path)
        _prepare_as_for_training(data, cfg.data, checkpoint)
    files = {"tested weights": cfg.weights or cfg.ckpt_path}
    if cfg.save_weights is not None:
        files["written weights"] = cfg.save_weights
        if rank() == 0:
            if Path(cfg.save_weights).exists():
                raise ValueError(f"save_weights={cfg.save_weights} exists already: remove it, or give another path")
            models.save_weights(task.network, cfg.save_weights)
    trainer = instantiate(
        cfg.trainer,
        _convert_="all",
        callbacks=[RichProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.test(task, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        print_summary(cfg.name, task, metrics, files=files)
    return metrics


def _prepare_as_for_training(data: LightningDataModule, cfg: DictConfig, checkpoint: dict[str, Any]) -> None:
    """Normalise the images by what the network was trained with, and say what else is done to them in another way."""
    from revnet.training import checkpoint_data_state

    trained = checkpoint["config"]["data"]
    state = checkpoint_data_state(checkpoint)
    if state is not None:
        data.load_state_dict(state)
    elif cfg != trained and str(cfg.get("normalization")).startswith("mean"):
        log.warning(
            "data.normalization=%s is measured on these data: the checkpoint does not hold it", cfg.normalization
        )
    for key in ("normalization", "image_size", "crop_ratio"):
        if key in cfg and key in trained and cfg[key] != trained[key]:
            log.warning("data.%s=%s, but the network was trained with %s", key, cfg[key], trained[key])


@command("eval", prepare=lambda: offer_checkpoint(sys.argv[1:]))
def main(cfg: DictConfig) -> None:
    """Test as the command line says."""
    evaluate(cfg)


if __name__ == "__main__":
    main()
