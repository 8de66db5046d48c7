"""The command `revnet-eval`: test the network of a checkpoint."""

from __future__ import annotations

import sys

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig

from revnet.cli import command
from revnet.train import build

__all__ = ["evaluate", "offer_checkpoint", "main"]


def offer_checkpoint(overrides: list[str]) -> None:
    """Give Hydra the configuration in a checkpoint, as the options `model=checkpoint`, `data=checkpoint` and the rest.

    They are the defaults of `revnet-eval`: its other overrides then change single values of them or choose other
    options, as they do in any configuration.

    Args:
        overrides: the command line, with `ckpt_path=PATH` in it. Only with a flag such as `--help` may it be missing.

    Raises:
        ValueError: if there is no checkpoint, or it does not say how its network and data were made.
    """
    from revnet.training import read_checkpoint

    config: dict = {"model": {}, "data": {}}
    given = [override for override in overrides if override.startswith("ckpt_path=")]
    if given:
        override = OverridesParser.create().parse_override(given[-1])
        if override.is_sweep_override():
            raise ValueError(f"{given[-1]}: revnet-eval takes one checkpoint at a time")
        checkpoint = read_checkpoint(str(override.value()))
        if "config" not in checkpoint:
            raise ValueError(f"{given[-1]} does not say how its network and data were made: it has no 'config'")
        config = checkpoint["config"]
    elif not any(override.startswith("-") for override in overrides):
        raise ValueError("ckpt_path is missing: revnet-eval ckpt_path=runs/NAME/DATE/checkpoints/best.ckpt")
    rest = {key: config[key] for key in ("name", "classifier") if key in config}
    if "trainer" in config:
        rest["trainer"] = {"precision": config["trainer"]["precision"]}
    store = ConfigStore.instance()
    store.store(name="checkpoint", group="model", node=config["model"])
    store.store(name="checkpoint", group="data", node=config["data"])
    store.store(name="checkpoint", node=rest)


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Test and print a summary.

    Args:
        cfg: the configuration `eval`.

    Returns:
        The metrics of the test, by name.

    Raises:
        ValueError: if the checkpoint does not fit the network that the configuration asks for.
    """
    from pytorch_lightning.callbacks import RichProgressBar

    from revnet.training import load_weights, print_summary, read_checkpoint

    data, classifier = build(cfg)
    load_weights(classifier, read_checkpoint(cfg.ckpt_path), cfg.ckpt_path)
    trainer = instantiate(
        cfg.trainer,
        _convert_="all",
        callbacks=[RichProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.test(classifier, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        print_summary(cfg.name, classifier, metrics, files={"tested weights": cfg.ckpt_path})
    return metrics


@command("eval", prepare=lambda: offer_checkpoint(sys.argv[1:]))
def main(cfg: DictConfig) -> None:
    """Test as the command line says."""
    evaluate(cfg)


if __name__ == "__main__":
    main()
