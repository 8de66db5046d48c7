from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from tests.training.tiny import tiny_batches


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Train two epochs of four batches, validated on two, unless told otherwise."""

    def fit(module: pl.LightningModule, validate: bool = True, ckpt: Path | None = None, **settings: Any) -> pl.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        settings = {**quiet, "enable_model_summary": False, "max_epochs": 2, "log_every_n_steps": 1, **settings}
        trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **settings)
        trainer.fit(module, tiny_batches(4), tiny_batches(2) if validate else None, ckpt_path=ckpt)
        return trainer

    return fit
