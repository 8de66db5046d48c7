"""How does the peak of a training step grow with the depth of a flow, in both directions?

Stacks of RealNVP's affine couplings, whose networks have 64 maps, on 32x32 images, batch 32, fp32: between halves of
the channels after a squeeze (12 channels at 16x16), with no or with one residual block, and on a checkerboard (at
32x32). The peak is that of activations and temporaries, estimated on tensors without data; of the shallowest stacks it
is also measured.

- reconstruct: the engine's, for log_prob (likelihood of data) and through decode (likelihood of samples);
- checkpoint: torch's checkpoint around every coupling's network, which keeps the state between couplings;
- store: plain autograd.

Targets: reconstruct within 1 % over depth in both directions; at 32 couplings at most 1/4 of store and 1/2 of
checkpoint.

    python experiments/flow_memory.py [--depths 8 16 32 64] [--width 64] [--batch 32]

Result and picture: experiments/results/flow_memory_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from recording import hardware, record, resumed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revnet import AffineCoupling, ReversibleSequence, set_activations
from revnet.flows import (
    CheckerboardBranch,
    CheckerboardSplit,
    Flow,
    Merge,
    ResidualNetwork,
    ScaleAndShift,
    Split,
    Squeeze,
)
from revnet.profiling import estimate, measure_memory
from revnet.reversible import invert

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
SHAPE = (3, 32, 32)
STACKS = {
    "channels, no residual block": ("channels", 0),
    "channels, one residual block": ("channels", 1),
    "checkerboard, one residual block": ("checkerboard", 1),
}
WAYS = ("store", "checkpoint", "reconstruct")
DIRECTIONS = ("log_prob", "decode")


class Checkpointed(nn.Module):
    """A coupling's network under torch's activation checkpointing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(self.network, x, use_reentrant=False)


class Step(nn.Module):
    """What a loss is taken of: the log-density of images, or samples and their log-determinant."""

    def __init__(self, flow: Flow, direction: str) -> None:
        super().__init__()
        self.flow = flow
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "log_prob":
            return self.flow.log_prob(x)
        images, log_det = self.flow.decode_and_log_det(x.flatten(1))
        return images.square().flatten(1).sum(1) + log_det


def flow_of(stack: str, depth: int, width: int, way: str) -> Flow:
    """`depth` couplings that take turns in moving either half."""
    split, blocks = STACKS[stack]

    def coupling(swap: bool) -> AffineCoupling:
        channels = 3 if split == "checkerboard" else 6
        branch: nn.Module = ScaleAndShift(ResidualNetwork(channels, 2 * channels, blocks, width), channels)
        if split == "checkerboard":
            branch = CheckerboardBranch(branch, swap)
        return AffineCoupling(Checkpointed(branch) if way == "checkpoint" else branch, swap)

    couplings = [coupling(bool(i % 2)) for i in range(depth)]
    if split == "checkerboard":
        layers = [CheckerboardSplit(), *couplings, invert(CheckerboardSplit())]
    else:
        layers = [Squeeze(), Split(), *couplings, Merge(), invert(Squeeze())]
    flow = Flow([ReversibleSequence(layers)], event_shape=SHAPE)
    set_activations(flow, "reconstruct" if way == "reconstruct" else "store")
    return flow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    settings = {"width": options.width, "batch": options.batch}
    path, known = resumed("flow_memory", settings)
    rows = [
        {"stack": stack, "direction": direction, "activations": way, "couplings": depth}
        for stack in STACKS
        for direction in DIRECTIONS
        for way in WAYS
        for depth in options.depths
    ]
    rows = [next((row for row in known if wanted.items() <= row.items()), wanted) for wanted in rows]
    for row in track([row for row in rows if "estimated_bytes" not in row], "peaks"):
        torch.manual_seed(0)
        flow = flow_of(row["stack"], row["couplings"], options.width, row["activations"])
        step = Step(flow, row["direction"])
        shape = (options.batch, *SHAPE)
        row["estimated_bytes"] = estimate(step, shape, loss=torch.mean).peak
        if row["couplings"] == min(options.depths):
            row["measured_bytes"] = measure_memory(step, torch.rand(shape), torch.mean).peak
        others = [row for row in known if row not in rows]
        record(path, settings, others + [row for row in rows if "estimated_bytes" in row])
    show(rows)
    draw(rows, settings, path)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


def curve(rows: list[Row], stack: str, direction: str, way: str) -> dict[int, float]:
    """Peak in MB against couplings."""
    key = {"stack": stack, "direction": direction, "activations": way}
    return {row["couplings"]: row["estimated_bytes"] / 1e6 for row in rows if key.items() <= row.items()}


def show(rows: list[Row]) -> None:
    depths = sorted({row["couplings"] for row in rows})
    table = Table("stack", "direction", "activations", *map(str, depths), "last / first", "measured / estimated")
    for stack in STACKS:
        for direction in DIRECTIONS:
            for way in WAYS:
                line = curve(rows, stack, direction, way)
                measured = [
                    row["measured_bytes"] / row["estimated_bytes"]
                    for row in rows
                    if (row["stack"], row["direction"], row["activations"]) == (stack, direction, way)
                    and "measured_bytes" in row
                ]
                table.add_row(
                    stack,
                    direction,
                    way,
                    *(f"{line[depth]:.1f}" for depth in depths),
                    f"{line[depths[-1]] / line[depths[0]]:.3f}",
                    ", ".join(f"{ratio:.3f}" for ratio in measured),
                )
    console = Console()
    console.print("Peak of activations and temporaries in MB, against the number of couplings", table)
    for stack in STACKS:
        ours, stored, checked = (curve(rows, stack, "log_prob", way) for way in ("reconstruct", "store", "checkpoint"))
        shares = [f"{d}: {ours[d] / stored[d]:.3f} of store, {ours[d] / checked[d]:.3f} of checkpoint" for d in depths]
        console.print(f"{stack}, log_prob, reconstruct at couplings {'; '.join(shares)}")


def draw(rows: list[Row], settings: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained", sharey=True)
    for axes, stack in zip(panels, STACKS, strict=True):
        for colour, way in zip(("C1", "C2", "C0"), WAYS, strict=True):
            for direction, style in zip(DIRECTIONS, ("o-", "x--"), strict=True):
                line = curve(rows, stack, direction, way)
                axes.plot(line.keys(), line.values(), style, color=colour, label=f"{way}, {direction}")
        axes.set(xscale="log", yscale="log", xlabel="couplings", title=stack)
        axes.set_xticks(sorted({row["couplings"] for row in rows}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("peak of activations and temporaries, MB")
    panels[0].legend(fontsize=8)
    figure.suptitle(
        f"Affine couplings of width {settings['width']} on 32x32 images, batch {settings['batch']}, "
        f"{hardware()['device']}",
        fontsize=10,
    )
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
