"""What trains and tests a network that somebody else has built: Lightning modules, callbacks and schedules."""

from __future__ import annotations

from revnet.training.checkpoints import (
    AtomicCheckpoints,
    checkpoint_config,
    checkpoint_data_state,
    load_checkpoint,
    newest_checkpoint,
    read_checkpoint,
)
from revnet.training.classifier import Classifier
from revnet.training.continuation import Continuation
from revnet.training.density import DensityEstimator
from revnet.training.drift_guard import DriftGuard
from revnet.training.environment_record import EnvironmentRecord
from revnet.training.fully_shard import FullyShard
from revnet.training.last_checkpoint import LastCheckpoint
from revnet.training.loss_guard import LossGuard
from revnet.training.memory_budget import memory_of, out_of_memory, spend_memory
from revnet.training.monitor import TrainingMonitor
from revnet.training.parameter_groups import parameter_groups
from revnet.training.sample_grids import SampleGrids
from revnet.training.schedules import constant_rate, one_cycle, step_decay, warmup_cosine
from revnet.training.summary import print_summary
from revnet.training.task import Task
from revnet.training.weight_average import WeightAverage

__all__ = [
    "Task",
    "Classifier",
    "DensityEstimator",
    "parameter_groups",
    "step_decay",
    "one_cycle",
    "warmup_cosine",
    "checkpoint_config",
    "constant_rate",
    "checkpoint_data_state",
    "TrainingMonitor",
    "SampleGrids",
    "DriftGuard",
    "LossGuard",
    "LastCheckpoint",
    "Continuation",
    "AtomicCheckpoints",
    "FullyShard",
    "spend_memory",
    "out_of_memory",
    "memory_of",
    "newest_checkpoint",
    "read_checkpoint",
    "load_checkpoint",
    "print_summary",
    "EnvironmentRecord",
    "WeightAverage",
]
