"""How does the peak of a training step grow with depth, batch and resolution: ResNets against RevNets?

The peak is that of activations and temporaries; all networks are in channels_last, the RevNets under reconstruct.

- Targets, in fp32 and under bf16 autocast: ResNet-110 and RevNet-110 (batch 128, 32x32), torchvision's ResNet-101 and
  RevNet-104 (batch 32, 224x224). Their peaks are estimated and measured, which must agree.
- Growth, estimated in fp32 on tensors without data: with depth (38 to 1202 layers, batch 128, 32x32), with the batch (8
  to 512, 224x224) and with the resolution (32 to 512 pixels, batch 32), the latter two of torchvision's ResNet-50 and
  RevNet-56.

    python experiments/memory_scaling.py [--no-measure] [--depths 38 110] [--batches 8 512] [--sizes 32 512]

Every peak is written as it is known to experiments/results/memory_scaling_HARDWARE_DATE.json (or --resume PATH); what
is there already is not repeated. The picture stands beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from recording import hardware, record, resumed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torchvision.models import resnet50, resnet101

from revnet.models import PreActResNet, RevNet, resnet110, revnet56, revnet104, revnet110
from revnet.models.branches import BasicBranch
from revnet.models.paper import table_1
from revnet.profiling import estimate, measure_memory

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
COLOURS = {"ResNet": "C1", "RevNet": "C0"}
TARGETS = (
    {"ResNet": "ResNet-110", "RevNet": "RevNet-110", "batch": 128, "size": 32},
    {"ResNet": "torchvision ResNet-101", "RevNet": "RevNet-104", "batch": 32, "size": 224},
)
LARGE = {"ResNet": "torchvision ResNet-50", "RevNet": "RevNet-56"}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-110": resnet110,
    "RevNet-110": revnet110,
    "torchvision ResNet-50": resnet50,
    "torchvision ResNet-101": resnet101,
    "RevNet-56": revnet56,
    "RevNet-104": revnet104,
}
AGREES = 0.02  # by which estimate and measurement may differ on a CPU; a GPU's has the allocator's rounding too


def rows_wanted(options: argparse.Namespace) -> list[Row]:
    """The rows without their figures: what is shown where, of which network, on which batch."""
    rows: list[Row] = []
    for family in COLOURS:
        named = [
            {"network": target[family], "batch": target["batch"], "size": target["size"], "dtype": dtype}
            for target in TARGETS
            for dtype in ("float32", "bfloat16")
        ]
        deep = [{"network": f"{family}-{n}", "layers": n, "batch": 128, "size": 32} for n in options.depths]
        wide = [{"network": LARGE[family], "batch": n, "size": 224} for n in options.batches]
        fine = [{"network": LARGE[family], "batch": 32, "size": n} for n in options.sizes]
        for shown, found in (("targets", named), ("layers", deep), ("batch", wide), ("size", fine)):
            rows += [{"shown": shown, "family": family, "dtype": "float32", **row} for row in found]
    return rows


def of_depth(family: str, layers: int) -> nn.Module:
    """Three stages of units of 2 layers (ResNet) or 4 (RevNet)."""
    if family == "ResNet":
        return PreActResNet(
            *table_1(BasicBranch, ((layers - 2) // 6,) * 3, (16, 16, 32, 64)), small_images=True, num_classes=10
        )
    return RevNet(
        *table_1(BasicBranch, ((layers - 2) // 12,) * 3, (32, 32, 64, 128)), small_images=True, num_classes=10
    )


def peak(row: Row, measured: bool, device: str) -> int:
    """Bytes, measured or estimated."""
    torch.manual_seed(0)
    network = of_depth(row["family"], row["layers"]) if "layers" in row else BUILDERS[row["network"]]()
    network = network.to(device).to(memory_format=torch.channels_last)
    shape = (row["batch"], 3, row["size"], row["size"])
    dtype = None if row["dtype"] == "float32" else torch.bfloat16
    if not measured:
        return estimate(network, shape, dtype=dtype).peak
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    return measure_memory(network, images, dtype=dtype).peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[38, 110, 302, 602, 1202], help="12 n + 2 layers")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 224, 384, 512], help="pixels of a side")
    parser.add_argument("--no-measure", action="store_true", help="estimate alone: seconds a row, and no memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="the result to go on with, made if it is not there")
    options = parser.parse_args()
    for layers in options.depths:
        if layers < 14 or (layers - 2) % 12:
            parser.error(f"--depths {layers}: give 12 n + 2 layers, such as {max(14, layers // 12 * 12 + 2)}")
    settings = {"device": options.device}
    path, known = resumed("memory_scaling", settings, options.device, options.resume)
    rows = [next((row for row in known if wanted.items() <= row.items()), wanted) for wanted in rows_wanted(options)]
    rows += [row for row in known if row not in rows]  # of other options
    todo = [(row, "estimated_bytes", False) for row in rows]
    if not options.no_measure:
        todo += [(row, "measured_bytes", True) for row in rows if row["shown"] == "targets"]
    for row, key, measured in track([job for job in todo if job[1] not in job[0]], "peaks"):
        row[key] = peak(row, measured, options.device)
        record(path, settings, [row for row in rows if "estimated_bytes" in row], options.device)
    show(rows)
    draw(rows, f"Peak of activations and temporaries in a training step, {hardware(options.device)['device']}", path)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


def show(rows: list[Row]) -> None:
    title = "Peak of activations and temporaries in MB"
    table = Table(
        "", "dtype", "batch", "size", "ResNet", "RevNet", "ResNet / RevNet", "measured / estimated", title=title
    )
    ours = [row for row in rows if row["family"] == "RevNet"]
    for before, row in zip([None, *ours], ours, strict=False):
        other = counterpart(row, rows)
        if other is None:
            continue
        if before is not None and before["shown"] != row["shown"]:
            table.add_section()
        table.add_row(
            f"{other['network']}, {row['network']}",
            {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]],
            str(row["batch"]),
            str(row["size"]),
            *(f"{r['estimated_bytes'] / 1e6:,.1f}" for r in (other, row)),
            f"{other['estimated_bytes'] / row['estimated_bytes']:.1f}",
            ", ".join(agreement(r) for r in (other, row) if "measured_bytes" in r),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def counterpart(row: Row, rows: list[Row]) -> Row | None:
    """The ResNet's row beside a RevNet's."""
    same = ("shown", "layers", "batch", "size", "dtype")
    others = [r for r in rows if r["family"] == "ResNet" and all(r.get(key) == row.get(key) for key in same)]
    return others[0] if others else None


def agreement(row: Row) -> str:
    ratio = row["measured_bytes"] / row["estimated_bytes"]
    return f"[green]{ratio:.3f}[/]" if abs(ratio - 1) <= AGREES else f"[red]{ratio:.3f} ![/]"


def draw(rows: list[Row], title: str, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    large = " and ".join(LARGE.values())
    subjects = (
        ("layers", "convolution layers\nbatch 128, 32x32"),
        ("batch", f"images\n{large}, 224x224"),
        ("size", f"pixels of a side\n{large}, batch 32"),
    )
    for axes, (subject, label) in zip(panels, subjects, strict=True):
        for family, colour in COLOURS.items():
            line = sorted(
                (r for r in rows if r["shown"] == subject and r["family"] == family), key=lambda r: r[subject]
            )
            places = [(r[subject], r["estimated_bytes"] / 1e6) for r in line]
            axes.plot(*zip(*places, strict=True), "o-", color=colour, label=family)
            for place in (places[0], places[-1]):
                axes.annotate(f"{place[1]:,.0f}", place, (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_xticks(sorted({r[subject] for r in rows if r["shown"] == subject}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("peak, MB")
    panels[0].legend()
    figure.suptitle(title)
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
