"""What trains and tests a network that somebody else has built: Lightning modules, callbacks and schedules."""

from __future__ import annotations

from revnet.training.checkpoints import load_weights, read_checkpoint
from revnet.training.classifier import Classifier
from revnet.training.drift_guard import DriftGuard
from revnet.training.environment import environment
from revnet.training.memory_budget import spend_memory
from revnet.training.monitor import TrainingMonitor
from revnet.training.parameter_groups import parameter_groups
from revnet.training.schedules import constant_rate, one_cycle, step_decay, warmup_cosine
from revnet.training.summary import print_summary

__all__ = [
    "Classifier",
    "parameter_groups",
    "step_decay",
    "one_cycle",
    "warmup_cosine",
    "constant_rate",
    "TrainingMonitor",
    "DriftGuard",
    "spend_memory",
    "read_checkpoint",
    "load_weights",
    "print_summary",
    "environment",
]
