"""Profiles one configuration: `python -m revnet.profile_cell` reads it from stdin and writes the figures to stdout."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from dataclasses import asdict
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from revnet.mistakes import is_out_of_memory, mistake
from revnet.profiling import Memory, estimate, max_batch, measure, plan
from revnet.reversible import ReversibleSequence, compile_branches, set_activations

__all__ = ["profile_cell", "main"]

MODES = ("measure", "estimate", "max_batch", "plan")
DTYPES = ("float32", "bfloat16", "float16")


def profile_cell(cfg: DictConfig) -> dict[str, Any]:
    """Measure or predict a training step.

    Args:
        cfg: the configuration `profile`, every reference resolved.

    Returns:
        By `cfg.mode`:
        "measure": what is in a `Measurement`, such as `memory` (bytes) and `time` (seconds).
        "estimate": `memory`.
        "max_batch": `max_batch`, the most images whose step fits into the budget, and the `memory` of that step.
        "plan": `plan` (to be read), `memory`, `seconds_over_store`.

    Raises:
        ValueError: if a value of the configuration is not among those it may have, or does not go with another.
    """
    _check(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = _device(cfg.device)
    shape, num_classes = _images(cfg)
    model = _network(cfg, num_classes).to(device)
    shape = shape or _usual_images(cfg, model)
    dtype = None if cfg.dtype == "float32" else getattr(torch, cfg.dtype)
    options: dict[str, Any] = {"dtype": dtype, "optimizer": instantiate(cfg.get("optimizer"), _convert_="all")}
    if cfg.mode == "estimate":
        return {"memory": _bytes(estimate(model, (cfg.batch_size, *shape), **options))}
    if cfg.mode == "max_batch":
        most = max_batch(model, shape, cfg.budget, **options)
        return {"max_batch": most, "memory": _bytes(estimate(model, (most, *shape), **options))}
    if cfg.mode == "plan":
        found = plan(model, (cfg.batch_size, *shape), cfg.budget, **options)
        return {"plan": str(found), "memory": _bytes(found.memory), "seconds_over_store": found.seconds_over_store}
    if cfg.compile:
        compile_branches(model)
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    images = torch.randn(cfg.batch_size, *shape, device=device).contiguous(memory_format=layout)
    measured = measure(model, images, repeats=cfg.repeats, **options)
    return asdict(measured) | {"memory": _bytes(measured.memory)}


def _bytes(memory: Memory) -> dict[str, int]:
    return asdict(memory) | {"peak": memory.peak}


def _check(cfg: DictConfig) -> None:
    for key, valid in (("mode", MODES), ("dtype", DTYPES)):
        if cfg[key] not in valid:
            raise ValueError(f"{key}={cfg[key]}: valid: {', '.join(valid)}")
    for key in ("batch_size", "image_size", "repeats", "threads"):
        optional = key in ("image_size", "threads")
        if not (cfg[key] is None and optional) and (not isinstance(cfg[key], int) or cfg[key] < 1):
            raise ValueError(f"{key}={cfg[key]}: give a whole number, at least 1{', or null' if optional else ''}")
    if cfg.mode in ("max_batch", "plan") and cfg.budget is None:
        raise ValueError(f"mode={cfg.mode} fits a step into a budget: give it, such as budget=16GiB")
    if cfg.mode in ("measure", "estimate") and cfg.budget is not None:
        raise ValueError(
            f"budget={cfg.budget}, mode={cfg.mode}: say what it is for by mode=max_batch or mode=plan, or leave it out"
        )
    if cfg.mode == "plan" and cfg.activations is not None:
        raise ValueError(f"activations={cfg.activations}: mode=plan chooses them; leave activations out")
    if cfg.compile and cfg.mode != "measure":
        raise ValueError(f"compile=true, mode={cfg.mode}: compiled code is only measured; leave compile out")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: give auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: there is no CUDA device here; give device=cpu")
    return device


def _images(cfg: DictConfig) -> tuple[tuple[int, int, int] | None, int | None]:
    """(channels, height, width) and the number of classes; None where no data says so."""
    if cfg.get("data") is None:
        return None, None
    if "image_size" in cfg.data:  # a folder of images, which need not be there
        shape, num_classes = (3, cfg.data.image_size, cfg.data.image_size), cfg.data.num_classes
    else:
        data = instantiate(cfg.data, _convert_="all")
        shape, num_classes = data.image_shape, data.num_classes
    return shape if cfg.image_size is None else (shape[0], cfg.image_size, cfg.image_size), num_classes


def _usual_images(cfg: DictConfig, model: nn.Module) -> tuple[int, int, int]:
    """What a network is usually given: 32x32 if it takes images smaller than that, else 224x224."""
    size = cfg.image_size or (32 if getattr(model, "total_stride", 32) < 32 else 224)
    return 3, size, size


def _network(cfg: DictConfig, num_classes: int | None) -> nn.Module:
    chosen = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(chosen, dict)
    if chosen.get("num_classes") is None:
        chosen.pop("num_classes", None)  # a network has a number of its own
        if num_classes is not None:
            chosen["num_classes"] = num_classes
    model = instantiate(chosen, _convert_="all").train()
    # A network without a sequence stores, and may be asked to.
    if cfg.activations is not None and not (cfg.activations == "store" and not _has_sequence(model)):
        set_activations(model, cfg.activations)
    return model.to(memory_format=torch.channels_last) if cfg.channels_last else model


def _has_sequence(model: nn.Module) -> bool:
    return any(isinstance(module, ReversibleSequence) for module in model.modules())


def _reason(error: Exception) -> str:
    first = " ".join(str(error).strip().splitlines()[:1])
    if is_out_of_memory(error):
        return f"out of memory; a smaller batch_size, or mode=estimate, which allocates nothing ({first})"
    return mistake(error) or f"{type(error).__name__}: {first}"


def _end_with(starter: int) -> None:
    os.read(starter, 1)  # nothing is ever written: it returns when the other end has closed
    os._exit(1)


def main(starter: int | None = None) -> None:
    """Profile what stdin says; a failure is a result, too, and its traceback goes to stderr.

    Args:
        starter: reading end of a pipe whose other end the process that started this one holds: this one ends with it.
    """
    if starter is not None:
        threading.Thread(target=_end_with, args=[starter], daemon=True).start()
    cfg = OmegaConf.create(json.load(sys.stdin))
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what Python and libraries print goes to stderr
        try:
            result = {"status": "ok", **profile_cell(cfg)}
        except Exception as error:
            traceback.print_exc()
            result = {"status": "failed", "reason": _reason(error)}
        json.dump(result, answer)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
