"""Gradients of several small batches make the step of one large batch, with clipping and an average of the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from revnet import train
from tests.commands import invoke
from tests.test_distributed_training import OPTIONS

TOGETHER = (
    "trainer=cpu",
    "callbacks=ema",
    "callbacks.ema.update_every_n_steps=1",
    "callbacks.ema.decay=0.5",
    "trainer.gradient_clip_val=0.05",
)


def checkpoint(directory: Path, *overrides: str) -> dict[str, Any]:
    assert invoke(train.main, *OPTIONS, *TOGETHER, *overrides, f"run_dir={directory}") == 0
    return torch.load(directory / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("activations", ["reconstruct", "recompute"])
def test_accumulation_equals_the_large_batch_with_clipping_and_an_average(activations: str, tmp_path: Path) -> None:
    model = f"model.activations={activations}"
    large = checkpoint(tmp_path / "large", model, "data.batch_size=32")
    small = checkpoint(tmp_path / "small", model, "data.batch_size=8", "trainer.accumulate_grad_batches=4")
    assert small["global_step"] == large["global_step"] == 5
    for weights in ("state_dict", "current_model_state"):
        torch.testing.assert_close(small[weights], large[weights], rtol=1.3e-6, atol=1e-6)
    average, last = small["state_dict"], small["current_model_state"]
    assert not any(torch.equal(average[name], last[name]) for name in last if name.endswith("weight"))
    unclipped = checkpoint(tmp_path / "unclipped", model, "data.batch_size=32", "trainer.gradient_clip_val=null")
    assert (unclipped["state_dict"]["network.0.weight"] - average["network.0.weight"]).abs().max() > 1e-3
