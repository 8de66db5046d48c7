"""The command `revnet-train`: train a network, test it, print a summary."""

from __future__ import annotations

import errno
import logging
import math
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from revnet.build import build, refuse_contradictions, refuse_odd_callbacks
from revnet.cli import command
from revnet.mistakes import is_out_of_memory, leave
from revnet.processes import rank, started
from revnet.reversible import compile_branches, set_chunk_size
from revnet.run_directory import checkpoints_of
from revnet.saved_overrides import with_saved_overrides

if TYPE_CHECKING:  # Lightning takes seconds to import, and a mistyped name or --help need not wait for them
    from pytorch_lightning import Callback, LightningDataModule, Trainer

    from revnet.training import Task

__all__ = ["train", "main"]

log = logging.getLogger(__name__)

THREADS = torch.get_num_threads()


def _held(network: torch.nn.Module, cfg: DictConfig, image_shape: tuple[int, ...], trainer: Trainer) -> int:
    """Bytes that a training holds beside its steps."""
    from pytorch_lightning.strategies import DDPStrategy

    laid_out_again = 4 * cfg.data.batch_size * math.prod(image_shape) if cfg.task.get("channels_last") else 0
    gradients = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    weights = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    accumulates = cfg.trainer.accumulate_grad_batches > 1
    averages = "_target_" in (cfg.callbacks.get("ema") or ())
    in_buckets = isinstance(trainer.strategy, DDPStrategy)
    return gradients * (accumulates + in_buckets) + weights * averages + laid_out_again


def train(cfg: DictConfig) -> dict[str, float]:
    """Train, test and print a summary.

    The test uses the weights that were best on the validation split, the last ones where there is none.

    Args:
        cfg: the configuration `train`, from the command line or `revnet.cli.compose`; files go to `cfg.run_dir`.

    Returns:
        Every metric of the last epoch and of the test, and the figures of the `TrainingMonitor`, by name.

    Raises:
        ValueError: if the parts of the configuration do not go together, or `cfg.ckpt_path` is of other parts; if a
            step takes more memory than there is, or the training diverges.
        OSError: if something cannot be written.
        SystemExit: at SIGTERM (status 143) and Ctrl-C (130), with one line that says how to go on.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelSummary, ProgressBar
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    from revnet.training import (
        AtomicCheckpoints,
        EnvironmentRecord,
        TrainingMonitor,
        print_summary,
        spend_memory,
    )

    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed={cfg.seed}: give an integer from 0 to 2**32 - 1")
    if cfg.threads is not None and (not isinstance(cfg.threads, int) or cfg.threads < 1):
        raise ValueError(f"threads={cfg.threads}: give a number of threads, at least 1, or null")
    refuse_contradictions(cfg.trainer)
    refuse_odd_callbacks(cfg)
    pl.seed_everything(cfg.seed, workers=True)
    torch.set_num_threads(cfg.threads or THREADS)  # an earlier job of a sweep may have set others
    data, task = build(cfg)
    if cfg.memory_budget is not None and hasattr(task.network, "log_prob"):
        raise ValueError(f"memory_budget={cfg.memory_budget} is for classifiers: set model.activations for a flow")
    if cfg.chunk_size is not None:
        set_chunk_size(task.network, cfg.chunk_size)
    ckpt_path, trained = _resume(cfg, task)
    callbacks = [EnvironmentRecord(cfg.run_dir), *_callbacks(cfg)]
    kinds = {"enable_progress_bar": ProgressBar, "enable_model_summary": ModelSummary}
    chosen = {key for key, kind in kinds.items() if any(isinstance(callback, kind) for callback in callbacks)}
    trainer = instantiate(
        cfg.trainer,
        _convert_="all",
        **dict.fromkeys(kinds.keys() - chosen - cfg.trainer.keys(), False),  # or Lightning would bring its own
        callbacks=callbacks,
        logger=[instantiate(node) for node in cfg.logger.values() if node is not None],
        plugins=[AtomicCheckpoints(), *(instantiate(cfg.trainer.get("plugins"), _convert_="all") or [])],
        default_root_dir=cfg.run_dir,
    )
    cluster = trainer._accelerator_connector.cluster_environment
    if isinstance(cluster, SLURMEnvironment) and not cfg.trainer.get("plugins"):
        # Its own checkpoints would be tested, and gone on from, in the place of ours.
        cluster.auto_requeue = False
    _refuse_processes(trainer, cfg)
    if cfg.memory_budget is not None:
        spend_memory(
            task.network.to(trainer.strategy.root_device),  # whose kernels and optimizer are planned for
            cfg.memory_budget,
            (cfg.data.batch_size, *data.image_shape),  # type: ignore[attr-defined]
            cfg.trainer.precision,
            instantiate(cfg.optimizer, _convert_="all"),
            _held(task.network, cfg, data.image_shape, trainer),  # type: ignore[attr-defined]
        )
    if cfg.compile:
        if cfg.memory_budget is not None:
            log.warning("memory_budget=%s is planned for branches that are not compiled", cfg.memory_budget)
        compile_branches(task.network)
    if trainer.world_size == 1:
        task.try_settings()
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1 and cfg.get("scheduler") is not None:
        raise ValueError(
            f"trainer.max_epochs={cfg.trainer.max_epochs or 'null'}: the schedule needs to know when training ends; "
            f"set trainer.max_epochs or trainer.max_steps"
        )
    for logger in trainer.loggers:
        if not isinstance(logger, (CSVLogger, TensorBoardLogger)):  # beside their files lies .hydra/config.yaml
            logger.log_hyperparams(task.config)

    with _leaving_when_told(trainer, cfg.run_dir):
        _fit(trainer, task, data, ckpt_path, cfg)
        if rank() == 0 and 0 < trained == trainer.global_step:
            limit = "" if cfg.trainer.get("max_time") is None else " (trainer.max_time counts the runs before, too)"
            log.warning("nothing was left to train: the checkpoint has its %d steps already%s", trained, limit)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        epochs = trainer.current_epoch
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        trainer.test(task, datamodule=data, ckpt_path=best or None, weights_only=True, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    monitor = next((callback for callback in callbacks if isinstance(callback, TrainingMonitor)), None)
    if monitor is not None:
        metrics |= monitor.figures()
    if trainer.is_global_zero:
        files = {"tested weights": best or "the last ones", "run directory": cfg.run_dir}
        print_summary(cfg.name, task, metrics, epochs, monitor, files)
    return metrics


def _resume(cfg: DictConfig, task: Task) -> tuple[str | None, int]:
    """The checkpoint to go on from, whose weights are loaded, and its steps; or that there is none."""
    from revnet.training import load_checkpoint, newest_checkpoint, read_checkpoint

    ckpt_path = cfg.ckpt_path
    if ckpt_path == "last":
        checkpoints = checkpoints_of(cfg, cfg.run_dir)
        found = newest_checkpoint(checkpoints)
        if found is None and any(checkpoints.glob("*.ckpt")):
            raise ValueError(
                f"ckpt_path=last: no checkpoint in {checkpoints} can be read and gone on from; remove them to "
                f"begin again, or give another run_dir"
            )
        ckpt_path = None if found is None else str(found)
        log.info("going on from %s", ckpt_path or "the beginning: there is no checkpoint yet")
    if cfg.ckpt_path != "last":  # or its own may be there
        _refuse_checkpoints_of_others(cfg)
    if ckpt_path is None:
        return None, 0
    checkpoint = read_checkpoint(ckpt_path)
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            f"ckpt_path={ckpt_path} holds weights alone, and a training cannot go on from it: give one that holds "
            f"all, such as last.ckpt of a run"
        )
    load_checkpoint(task, checkpoint, ckpt_path)
    if "config" in checkpoint and task.config is not None:
        _say_what_changed(checkpoint["config"], task.config)
        seed = checkpoint["config"].get("seed", cfg.seed)
        if seed != cfg.seed and checkpoint.get("continuation", {}).get("unfinished"):
            raise ValueError(
                f"seed={cfg.seed}: the checkpoint is of the middle of an epoch, whose images seed={seed} has put "
                f"in order; go on with that, or from a checkpoint of an epoch's end"
            )
    return ckpt_path, checkpoint["global_step"]


def _callbacks(cfg: DictConfig) -> list[Callback]:
    """Those that were chosen."""
    chosen = {name: node for name, node in cfg.callbacks.items() if node is not None}
    for name in [name for name, node in chosen.items() if "_target_" not in node]:  # callbacks=none and an experiment
        log.warning("callbacks.%s: these settings are of no callback that was chosen", name)
        del chosen[name]
    return [instantiate(node) for node in chosen.values()]


def _refuse_checkpoints_of_others(cfg: DictConfig) -> None:
    """ValueError where a training would write over the checkpoints of another, but for that which it goes on with."""
    places = {checkpoints_of(cfg, cfg.run_dir): "*.ckpt"}
    best = OmegaConf.select(cfg, "callbacks.best")
    if best is not None and best.get("dirpath"):
        places.setdefault(Path(best.dirpath), re.sub(r"{.*?}", "*", best.get("filename") or "*") + ".ckpt")
    if cfg.ckpt_path is not None and Path(cfg.ckpt_path).resolve().parent in [place.resolve() for place in places]:
        return
    there = next((file for place, names in places.items() for file in sorted(place.glob(names))), None)
    if there is not None:
        raise ValueError(
            f"{there} is of another training, and nothing is written over: choose another run_dir (in a sweep, "
            f"hydra.sweep.dir and hydra.sweep.subdir), or go on from it: ckpt_path={there}"
        )


def _refuse_processes(trainer: Trainer, cfg: DictConfig) -> None:
    """ValueError where the processes that there are, or would be started, do not go with the trainer."""
    from pytorch_lightning.strategies import DDPStrategy
    from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

    from revnet.training import Continuation

    if trainer.world_size > 1 and not any(isinstance(c, Continuation) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "callbacks.continuation is left out: without it all processes of a training draw the same random numbers, "
            "and shift, mirror and mix their images alike; keep it, as callbacks=default does"
        )
    if trainer.world_size == 1 < started():
        raise ValueError(
            f"{started()} processes were started, each of which would train by itself: choose trainer=ddp, "
            f"trainer=fsdp or trainer=slurm"
        )
    sweeps = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    cluster = trainer._accelerator_connector.cluster_environment
    starts_others = trainer.world_size > 1 and not cluster.creates_processes_externally
    if sweeps and starts_others and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices}: the runs of a sweep (-m) start no further processes; start them "
            f"one by one, or with hydra/launcher=slurm trainer=slurm"
        )
    if trainer.world_size == 1 and isinstance(trainer.strategy, DDPStrategy):
        raise ValueError(
            "trainer.strategy=ddp is for several processes, but trainer.devices and trainer.num_nodes make one: "
            "choose trainer=gpu or trainer=cpu, or more devices"
        )


def _say_what_changed(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn where a training goes on with other parts or settings than it had."""
    changed = [] if then.get("seed") == now.get("seed") else [f"seed={now.get('seed')} (was {then.get('seed')})"]
    for part in ("model", "task", "data", "optimizer", "scheduler", "trainer"):
        before, after = then.get(part) or {}, now.get(part) or {}
        changed += [
            f"{part}.{key}={after.get(key)} (was {before.get(key)})"
            for key in {**before, **after}
            if before.get(key) != after.get(key)
        ]
    if changed and rank() == 0:
        log.warning("changed since the checkpoint: %s", ", ".join(changed[:8]))


@contextmanager
def _leaving_when_told(trainer: Trainer, run_dir: str) -> Iterator[None]:
    """Leave with one line where SIGTERM or Ctrl-C has ended the training or the test."""
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    from revnet.training import LastCheckpoint

    try:
        yield
    except SIGTERMException:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        last = next((callback for callback in callbacks if isinstance(callback, LastCheckpoint)), None)
        what = "Ctrl-C" if last is not None and last.interrupted else "SIGTERM"
        plain = re.fullmatch(r"[\w./-]+", run_dir, re.ASCII)
        given = f"run_dir={run_dir}" if plain else shlex.quote(f"run_dir='{run_dir}'")  # for Hydra, and for the shell
        how = f"go on with revnet-train {given} ckpt_path=last"
        line = f"stopped by {what} after step {trainer.global_step}: {how if last else 'nothing was saved'}"
        leave("train", line, 130 if what == "Ctrl-C" else 143)


def _fit(trainer: Trainer, task: Task, data: LightningDataModule, ckpt_path: str | None, cfg: DictConfig) -> None:
    """Train, and say in one line what was too much for disk or memory."""
    from revnet.training import memory_of, out_of_memory

    try:
        trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except (OSError, RuntimeError, MemoryError) as error:
        if getattr(error, "filename", None) is None and getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, cfg.run_dir) from error  # type: ignore[union-attr]
        if not is_out_of_memory(error):
            raise
        shape = (cfg.data.batch_size, *data.image_shape)  # type: ignore[attr-defined]
        optimizer = instantiate(cfg.optimizer, _convert_="all")
        memory = memory_of(trainer.strategy.root_device)
        held = _held(task.network, cfg, shape[1:], trainer)
        network = task.network.to(trainer.strategy.root_device)  # Lightning has taken it off
        raise ValueError(out_of_memory(network, shape, cfg.trainer.precision, optimizer, memory, held)) from error


def _was_begun(cfg: DictConfig) -> bool:
    """Whether a job of a sweep has been here before, as one that a cluster starts again."""
    from revnet.training import newest_checkpoint, read_checkpoint

    found = newest_checkpoint(checkpoints_of(cfg, cfg.run_dir))
    config = {} if found is None else read_checkpoint(found).get("config") or {}
    return bool(config) and _agree(config, OmegaConf.to_container(cfg, resolve=True))


def _agree(filled: Any, asked: Any) -> bool:
    """Whether a configuration is what was asked for, and filled in where nothing was."""
    if isinstance(filled, dict) and isinstance(asked, dict):
        return all(_agree(filled.get(key), asked.get(key)) for key in {**filled, **asked} if key != "ckpt_path")
    return asked is None or filled == asked


@command("train", prepare=lambda: sys.argv.__setitem__(slice(1, None), with_saved_overrides(sys.argv[1:])))
def main(cfg: DictConfig) -> float | None:
    """Train as the command line says, and give a sweeper its metric."""
    cfg.run_dir = HydraConfig.get().runtime.output_dir
    if HydraConfig.get().mode == RunMode.MULTIRUN and _was_begun(cfg):
        cfg.ckpt_path = "last"
    failed = 1
    try:
        metrics = train(cfg)
        failed = 0
    finally:
        if "wandb" in sys.modules:  # or the next job of a sweep would write into the run of this one
            sys.modules["wandb"].finish(exit_code=failed)
    if cfg.optimized_metric is None:
        return None
    if cfg.optimized_metric not in metrics:
        raise ValueError(f"optimized_metric={cfg.optimized_metric}: there are {', '.join(sorted(metrics))}")
    return metrics[cfg.optimized_metric]


if __name__ == "__main__":
    main()
