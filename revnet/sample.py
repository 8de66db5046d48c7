"""The command `revnet-sample`: draw samples from the flow of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from revnet.cli import command

__all__ = ["sample", "main"]


def sample(cfg: DictConfig) -> Tensor:
    """Draw samples and write them as a grid.

    Args:
        cfg: the configuration `sample`.

    Returns:
        The samples, (n, channels, height, width).

    Raises:
        ValueError: the checkpoint is of no flow or of another one, `cfg.out` is there already, or a value is out of its
            range.
    """
    from torchvision.utils import save_image

    from revnet.training import DensityEstimator, checkpoint_config, load_checkpoint, read_checkpoint

    if OmegaConf.is_missing(cfg, "ckpt_path"):
        raise ValueError("ckpt_path is missing: revnet-sample ckpt_path=runs/NAME/DATE/checkpoints/best.ckpt")
    for name, least in {"n": 1, "seed": 0, "columns": 1}.items():
        value = cfg[name]
        if not ((isinstance(value, int) and value >= least) or (name == "columns" and value is None)):
            raise ValueError(f"{name}={value}: give a whole number, at least {least}")
    if not isinstance(cfg.temperature, int | float) or not 0 <= cfg.temperature < math.inf:
        raise ValueError(f"temperature={cfg.temperature}: give a factor of the latents' spread, at least 0")
    if not isinstance(cfg.out, str) or Path(cfg.out).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"out={cfg.out}: give a picture's name, such as samples.png")
    if Path(cfg.out).exists():
        raise ValueError(f"out={cfg.out} exists already: remove it, or give another path")
    checkpoint = read_checkpoint(cfg.ckpt_path)
    model = checkpoint_config(checkpoint, cfg.ckpt_path)["model"]
    flow: Any = instantiate(model, _convert_="all")
    if not hasattr(flow, "sample"):
        name = model["_target_"].rpartition(".")[2]
        raise ValueError(f"ckpt_path={cfg.ckpt_path} is of {name}, which has no density to sample from: give a flow's")
    load_checkpoint(DensityEstimator(flow), checkpoint, cfg.ckpt_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flow.to(device).eval()
    classes = model.get("classes")
    columns = cfg.columns or (classes if classes and cfg["class"] is None else math.ceil(math.sqrt(cfg.n)))
    torch.manual_seed(cfg.seed)
    images = flow.sample(cfg.n, cfg.temperature, _labels(cfg["class"], classes, cfg.n, device))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    save_image(images.float().clamp(0, 1), cfg.out, nrow=columns)
    print(f"{cfg.n} samples at temperature {cfg.temperature:g}: {cfg.out}")
    return images.cpu()


def _labels(chosen: int | None, classes: int | None, n: int, device: str) -> Tensor | None:
    """The class of every sample; None for a flow without classes."""
    if classes is None:
        if chosen is not None:
            raise ValueError(f"class={chosen}: this flow was trained without classes; leave class out")
        return None
    if chosen is None:
        return torch.arange(n, device=device) % classes
    if not isinstance(chosen, int) or not 0 <= chosen < classes:
        raise ValueError(f"class={chosen}: give a class from 0 to {classes - 1}")
    return torch.full((n,), chosen, device=device)


@command("sample")
def main(cfg: DictConfig) -> None:
    """Sample as the command line says."""
    sample(cfg)


if __name__ == "__main__":
    main()
