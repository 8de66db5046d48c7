"""A trained network in Python: from the bytes of images to logits."""

from __future__ import annotations

from os import PathLike

from hydra.utils import instantiate
from torch import Tensor, nn

from revnet.data import Normalize
from revnet.training import checkpoint_config, checkpoint_data_state, load_checkpoint, read_checkpoint

__all__ = ["Predictor"]


class Predictor(nn.Module):
    """The network of a checkpoint behind the normalisation that it was trained with: bytes in, logits out.

    It makes the network that the checkpoint's configuration names, whatever that is: for checkpoints that you trust.
    Not for flows, which `revnet-sample` draws from.

    Args:
        ckpt_path: a checkpoint of `revnet-train`, such as `runs/NAME/DATE/checkpoints/best.ckpt`.

    Input (B, channels, H, W), bytes, of the size that the network was trained on; output (B, classes).

    Attributes:
        class_names: what the logits mean, in their order, where the data said so; else None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of `revnet-train`, or that of a flow.

    `task.test_time_flip` is not applied: for it, average the logits of the images and of their mirror images. How an
    image file becomes such bytes is shown in `docs/commands.md`.
    """

    def __init__(self, ckpt_path: str | PathLike[str]) -> None:
        super().__init__()
        checkpoint = read_checkpoint(ckpt_path)
        config, state = checkpoint_config(checkpoint, ckpt_path), checkpoint_data_state(checkpoint)
        if state is None:
            raise ValueError(f"ckpt_path={ckpt_path} does not say how its images were normalised: train it anew")
        network = instantiate(config["model"], _convert_="all")
        if hasattr(network, "log_prob"):
            raise ValueError(f"ckpt_path={ckpt_path} is of a flow, which has no logits: see revnet-sample")
        load_checkpoint(instantiate(config["task"], network=network), checkpoint, ckpt_path)
        self.normalize = Normalize(state["shift"], state["scale"])
        self.network = network
        self.class_names: list[str] | None = state.get("class_names")
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return self.network(self.normalize(images))
