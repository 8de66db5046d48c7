"""How wrong do gradients become with depth, under floating-point reconstruction and in exact mode?

Stacks of 8 to 1024 reversible units (basic branches, 16 channels, 8x8, batch 8, at initialisation) take one training
step under store and under reconstruct, in fp32 and under bf16 autocast. The error is the relative error of the whole
gradient vector against store with the same flags; where it is 0 to the bit, the picture shows it at the bottom.

    python experiments/gradient_error.py [--device cpu] [--depths 8 16 ... 1024]

Writes a table as JSON and a picture to experiments/results/gradient_error_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import torch
from recording import record, result_path
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from revnet import ReversibleBlock, ReversibleSequence
from revnet.models.branches import BasicBranch
from revnet.reversible import Merge, ReconstructionWarning, Split

matplotlib.use("agg")
import matplotlib.pyplot as plt

CHANNELS = 16


def gradients(depth: int, activations: str, exact: bool, bf16: bool, device: str) -> tuple[Tensor, float | None]:
    """All gradients of one step as one vector, and the reconstruction error that the sequence reports."""
    torch.manual_seed(0)
    half = CHANNELS // 2
    blocks = [ReversibleBlock(BasicBranch(half, half), BasicBranch(half, half)) for _ in range(depth)]
    sequence = ReversibleSequence([Split(), *blocks, Merge()], activations, exact=exact).to(device)
    sequence.watch.raise_above = math.inf  # the point is to see how far it goes
    x = torch.randn(8, CHANNELS, 8, 8, device=device, requires_grad=True)
    target = torch.randn(8, CHANNELS, 8, 8, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        y = sequence(x)
    (y.float() - target).square().mean().backward()
    vector = torch.cat([t.grad.flatten() for t in (x, *sequence.parameters()) if t.grad is not None])
    error = sequence.reconstruction_error
    return vector, None if error is None else float(error)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    floor = 1e-8
    for number, bf16 in enumerate((False, True)):
        for exact in (False, True):
            cells = [row for row in rows if row["bf16"] == bf16 and row["exact"] == exact]
            name = f"{'bf16 autocast' if bf16 else 'fp32'}, {'exact (0)' if exact else 'floating point'}"
            errors = [max(row["relative_error"], floor) for row in cells]
            style = "s--" if exact else "o-"
            axis.plot([row["depth"] for row in cells], errors, style, color=f"C{number}", label=name)
    axis.set(
        xscale="log",
        yscale="log",
        title="Reconstructed activations: error of the gradients",
        xlabel="reversible units in one stretch",
        ylabel="relative error against store",
        ylim=(floor / 2, 3),
    )
    axis.set_xticks([row["depth"] for row in rows if not row["bf16"] and row["exact"]], minor=False)
    axis.get_xaxis().set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(loc="center right", bbox_to_anchor=(1, 0.3))
    figure.savefig(path.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    options = parser.parse_args()
    warnings.simplefilter("ignore", ReconstructionWarning)
    cells = [(d, b, e) for d in options.depths for b in (False, True) for e in (False, True)]
    rows: list[dict[str, Any]] = []
    table = Table("units", "branches", "mode", "relative error", "cosine", "bit-equal", "reported drift")
    path = result_path("gradient_error", options.device)
    for depth, bf16, exact in track(cells, "steps"):
        truth, _ = gradients(depth, "store", exact, bf16, options.device)
        found, drift = gradients(depth, "reconstruct", exact, bf16, options.device)
        row = {
            "depth": depth,
            "bf16": bf16,
            "exact": exact,
            "relative_error": float((found - truth).norm() / truth.norm()),
            "cosine": float(torch.cosine_similarity(found, truth, dim=0)),
            "bit_equal": torch.equal(found, truth),
            "reconstruction_error": drift,
        }
        rows.append(row)
        record(path, {"channels": CHANNELS, "size": 8, "batch": 8}, rows, options.device)
        table.add_row(
            str(depth),
            "bf16" if bf16 else "fp32",
            "exact" if exact else "floating point",
            f"{row['relative_error']:.1e}",
            f"{row['cosine']:.4f}",
            "yes" if row["bit_equal"] else "no",
            f"{drift:.1e}",
        )
    draw(rows, path)
    Console().print(table)
    Console().print(f"Written to {path}.json and {path}.png", soft_wrap=True)


if __name__ == "__main__":
    main()
