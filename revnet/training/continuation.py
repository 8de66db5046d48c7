"""What a checkpoint must hold, beyond weights and optimizer, so that a training goes on as if never interrupted."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_warn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

__all__ = ["Continuation", "in_mid_epoch"]

KEY = "continuation"


class Continuation(Callback):
    """Keep in every checkpoint the random numbers, metrics, gradients and log of the moment, and go on from there.

    On a CPU a training that is resumed then gives the same bits as one that was never interrupted, from the middle of
    an epoch too (on a GPU as far as its kernels are deterministic, see `trainer.deterministic`), provided that the
    training's loader is seeded by the epoch and keeps its place, as those of `revnet.data` do, and that random changes
    of images are not drawn in a loader's processes.

    - Random numbers of torch (the CPU and the current device), Python and NumPy.
    - In the middle of an epoch the sums of every metric (`torchmetrics.Metric`) of the module, and the gradients if
      the optimizer step that they belong to is still to come.
    - Each of these for every process of the training: no two of them draw the same numbers, either, which would shift,
      mirror and mix the n-th image of each in the same way. (Weights are those of process 0.)
    - The lines of the log: each resumed training has a version of its own, and `metrics.csv` there begins with the
      lines up to the checkpoint. The newest version is thus the record of the whole training, nothing twice and
      nothing of what came after the checkpoint. (Other loggers show each version by itself.)
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the state of the moment into a checkpoint."""
        logs = {}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
                if isinstance(logger, CSVLogger):
                    logs[str(logger.name)] = [Path(logger.log_dir).name, len(_lines(_file(logger)))]
        unfinished = in_mid_epoch(trainer)
        own = {
            "random": _random_state(pl_module.device),
            "sums": _sums(trainer, pl_module) if unfinished else {},
            "gradients": _gradients(trainer, pl_module),
        }
        checkpoint[KEY] = {
            "processes": _of_all_processes(trainer, own),
            "unfinished": unfinished,
            "metrics": {name: _copy(value) for name, value in trainer.callback_metrics.items()},
            "logs": logs,
            "unlogged": _unlogged(trainer),
        }
        if not unfinished:
            _leave_epoch(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the state out of a checkpoint."""
        self._loaded = checkpoint.get(KEY, {})
        for early in trainer.early_stopping_callbacks:  # Lightning would take the patience of before for this one
            if early.state_key in checkpoint["callbacks"]:
                checkpoint["callbacks"][early.state_key]["patience"] = early.patience
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                _follow(checkpoint["callbacks"].get(callback.state_key), Path(callback.dirpath))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the log."""
        self._go_on_with_log(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the rest, after everything that draws random numbers before the first step."""
        if not self._loaded:
            if trainer.global_rank > 0:
                torch.manual_seed(torch.initial_seed() + trainer.global_rank)
            return
        self._go_on_with_log(trainer)  # of a strategy that reads the checkpoint behind on_fit_start
        trainer.callback_metrics.update(self._loaded["metrics"])  # forgotten over Lightning's check of the validation
        none = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)
        if none or not trainer.enable_validation:  # the best weights would be chosen by what was found before
            for name in [name for name in trainer.callback_metrics if name.startswith("val/")]:
                del trainer.callback_metrics[name]
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and str(callback.monitor).startswith("val/"):
                    callback.best_model_path = ""
        metrics = trainer.callback_metrics
        trainer.should_stop |= any(_has_stopped(c, metrics.get(c.monitor)) for c in trainer.early_stopping_callbacks)
        loaded, self._loaded = self._loaded, {}
        own = _own(loaded["processes"], trainer)
        _reopen_loader(trainer.fit_loop)
        if not loaded["unfinished"]:  # Lightning takes the epoch for interrupted wherever it is given max_steps
            trainer.fit_loop.epoch_loop.restarting = False
        for name, sums in own["sums"].items():
            metric = pl_module.get_submodule(name)
            for key, value in sums.items():
                setattr(metric, key, value.to(pl_module.device))
        for name, gradient in own["gradients"].items():
            parameter = pl_module.get_parameter(name)
            parameter.grad = _sharded_as(parameter, gradient.to(parameter.device))
        _set_random_state(own["random"], pl_module.device)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the metrics of a training that had ended when it was resumed, of which no step is taken."""
        trainer.callback_metrics.update(self._loaded.get("metrics", {}))

    def _go_on_with_log(self, trainer: pl.Trainer) -> None:
        """Bring back the log, once."""
        logs = self._loaded.pop("logs", None)
        if logs is None:
            return
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, CSVLogger) and str(logger.name) in logs:
                version, count = logs[str(logger.name)]
                file = _file(logger).parents[1] / version / logger.experiment.NAME_METRICS_FILE
                if not file.is_file() and trainer.ckpt_path is not None:  # the training goes on in another directory
                    file = Path(trainer.ckpt_path).resolve().parents[1] / str(logger.name) / version / file.name
                lines = [line for line in _lines(file)[:count] if line["step"]]  # the last one may be cut short
                if len(lines) < count:
                    rank_zero_warn(f"{file} has {len(lines)} lines of the {count} that it had at the checkpoint")
                for line in lines:
                    step = int(line.pop("step"))
                    logger.log_metrics({key: text for key, text in line.items() if text}, step)  # type: ignore[misc]
            if self._loaded["unlogged"]:
                step, metrics = self._loaded["unlogged"]
                logger.log_metrics(dict(metrics), step)
            logger.save()


def in_mid_epoch(trainer: pl.Trainer) -> bool:
    """Whether the epoch at hand has steps, or its last validation, still to come."""
    epoch = trainer.fit_loop.epoch_progress.current
    return bool(epoch.processed < epoch.ready)  # type: ignore[attr-defined]


def _has_stopped(callback: EarlyStopping, metric: torch.Tensor | None) -> bool:
    """Whether it had ended the training when the checkpoint was written, and would still, with the settings of now.

    Lightning keeps why, and takes another epoch all the same.
    """
    stop, diverged = callback.stopping_threshold, callback.divergence_threshold
    match callback.stopping_reason:
        case EarlyStoppingReason.NOT_STOPPED:
            return False
        case EarlyStoppingReason.PATIENCE_EXHAUSTED:
            return callback.wait_count >= callback.patience
        case EarlyStoppingReason.STOPPING_THRESHOLD if metric is not None:
            return stop is not None and bool(callback.monitor_op(metric, torch.tensor(stop)))
        case EarlyStoppingReason.DIVERGENCE_THRESHOLD if metric is not None:
            return diverged is not None and bool(callback.monitor_op(-metric, torch.tensor(-diverged)))
    return True


def _follow(state: dict[str, Any] | None, directory: Path) -> None:
    """Give the best checkpoints their new paths where the run was moved: Lightning would forget which was best."""
    if not state or not state.get("best_model_path") or Path(state["dirpath"]) == directory:
        return
    moved = {path: str(directory / Path(path).name) for path in state["best_k_models"] if path}
    kept = {path: score for path, score in state["best_k_models"].items() if Path(moved.get(path, "")).is_file()}
    if state["best_model_path"] not in kept:
        rank_zero_warn(
            f"the best checkpoint of before, {state['best_model_path']}, is not in {directory}: the choice of the best "
            f"begins anew; copy it there to go on with it"
        )
        return
    state |= {"dirpath": str(directory), "best_model_path": moved[state["best_model_path"]]}
    state["best_k_models"] = {moved[path]: score for path, score in kept.items()}
    state["kth_best_model_path"] = moved.get(state["kth_best_model_path"], state["best_model_path"])


def _of_all_processes(trainer: pl.Trainer, own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process has, in the order of their ranks."""
    if trainer.world_size == 1:
        return [own]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, own)
    return states


def _own(states: list[dict[str, Any]], trainer: pl.Trainer) -> dict[str, Any]:
    """This process's part; a process that was not there before has nothing to go on with but its random numbers."""
    if len(states) != trainer.world_size:
        rank_zero_warn(
            f"the checkpoint is of {len(states)} processes, and this training has {trainer.world_size}: it goes on, "
            f"with other random numbers; of an epoch at hand some images come twice or not at all, and its metrics "
            f"count those of {min(len(states), trainer.world_size)} processes alone before the checkpoint"
        )
    if trainer.global_rank < len(states):
        return states[trainer.global_rank]
    torch.manual_seed(torch.initial_seed() + trainer.global_rank)
    return {"random": _random_state(trainer.strategy.root_device), "sums": {}, "gradients": {}}


def _random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],  # plain values, which are safe to load
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _copy(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().cpu().clone()


def _sums(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, dict[str, torch.Tensor]]:
    """The state of every metric that goes on counting.

    In the last hooks of a validation its own have not been reset yet; and behind an epoch's last batch, where they may
    come, too, nothing of the epoch is still to be counted.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop.batch_progress.is_last_batch:
        return {}
    validated = {id(result.value) for result in (loop.val_loop._results or {}).values()}
    metrics = {name: module for name, module in pl_module.named_modules() if isinstance(module, Metric)}
    return {
        name: {key: _copy(value) for key, value in metric.metric_state.items() if isinstance(value, torch.Tensor)}
        for name, metric in metrics.items()
        if metric.update_called and id(metric) not in validated
    }


def _gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
    if not trainer.fit_loop._should_accumulate():
        return {}
    gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
    return {name: _copy(g.to_local() if isinstance(g, DTensor) else g) for name, g in gradients.items()}


def _sharded_as(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter from this process's part of it."""
    if not isinstance(parameter, DTensor):
        return gradient
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        gradient, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _unlogged(trainer: pl.Trainer) -> list[Any]:
    """The step and the metrics that Lightning logs right after the hook in which a checkpoint is made, if it does."""
    fit_loop, epoch_loop, connector = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer._logger_connector
    epoch, batch = fit_loop.epoch_progress.current, epoch_loop.batch_progress.current
    step = epoch_loop._batches_that_stepped
    if epoch.processed > epoch.completed:  # type: ignore[attr-defined]
        step -= 1
    elif not (
        batch.processed > batch.completed  # type: ignore[attr-defined]
        and connector.should_update_logs
        and not epoch_loop._should_accumulate()
    ):
        return []
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    return [step, {**metrics, "epoch": trainer.current_epoch}] if metrics else []


def _leave_epoch(fit_loop: dict[str, Any]) -> None:
    """Count an epoch as completed whose last hooks are running, so that to resume is to begin the next one."""
    for counts in fit_loop["epoch_progress"].values():
        counts["completed"] = counts["processed"]
    fit_loop["state_dict"].pop("combined_loader", None)


def _reopen_loader(fit_loop: Any) -> None:
    """Make the training's loader again, at its place.

    To tell a schedule its length, Lightning made it before it knew the place; without a schedule it has told it by now.
    """
    states = fit_loop._combined_loader_states_to_load or fit_loop._combined_loader._state_dicts()
    fit_loop._data_fetcher.teardown()
    fit_loop._combined_loader = None
    fit_loop._combined_loader_states_to_load = states
    fit_loop.setup_data()


def _file(logger: CSVLogger) -> Path:
    return Path(logger.log_dir) / logger.experiment.NAME_METRICS_FILE


def _lines(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))
