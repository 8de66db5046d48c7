"""Does it pay to reconstruct the next activations on one CUDA stream while another computes gradients?

The reversal of a stack of units written by hand, on one stream and on two, beside store and reconstruct of the engine,
each eager and captured as a CUDA graph. With two streams a branch is evaluated and undone as soon as the one before it
has been undone, and its gradients follow when those of the one before are there; so activations of two branches are
alive at once, and each half needs a second buffer. PaReprop (Zhu and Mangalam 2023) reports up to 20 % from it.

    python experiments/two_streams.py --device cuda [--dtype bfloat16] [--cells 32x16x128x32 256x8x64x14]

A cell is WIDTHxUNITSxBATCHxSIZE, width in channels of a half. On a CPU both run in turn, which shows that their
gradients are right. Writes a table as JSON and a picture to experiments/results/two_streams_DTYPE_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import matplotlib
import torch
from contest import GRAPH, capture, take_turns
from peers_contestants import FORWARD, REVERSAL, HandWritten, Reversal, ours
from recording import allocator_keeps_memory, hardware, record, resumed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from revnet import ReversibleBlock
from revnet.models.branches import BasicBranch
from revnet.reversible import split_halves

matplotlib.use("agg")
import matplotlib.pyplot as plt

OVERLAPPED = f"{REVERSAL}, two streams"


class OverlappedReversal(HandWritten):
    """Its backward pass on two streams, which take turns."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        other, moved = split_halves(ctx.saved_tensors[0])
        grad_other, grad_moved = (half.clone() for half in split_halves(grad))
        spare_other, spare_moved = torch.empty_like(other), torch.empty_like(moved)
        main = torch.cuda.current_stream() if ctx.kind == "cuda" else None
        streams = (main, _side_stream() if main else None)
        undone = given = _mark(main)
        sums: dict[Tensor, Tensor] = {}
        for number, branch in enumerate(reversed(ctx.branches)):
            stream = streams[number % 2]
            with torch.cuda.stream(stream):
                _wait(stream, undone)
                leaf, own = other.detach().requires_grad_(), list(branch.parameters())
                with torch.enable_grad(), torch.autocast(ctx.kind, torch.bfloat16, ctx.autocast, cache_enabled=False):
                    h = branch(leaf)
                # Not in place: the gradients of the branch before, which may still run, read what was undone there.
                before = torch.sub(moved, h.detach(), out=spare_moved)
                undone = _mark(stream)
                _wait(stream, given)
                edge, cotangent = get_gradient_edge(h), grad_moved.to(h.dtype)
                del h
                found, *of_parameters = torch.autograd.grad(edge, [leaf, *own], cotangent)
                grad_other.add_(found)
                given = _mark(stream)
            if main is not None and stream is not main:
                for gradient in of_parameters:
                    gradient.record_stream(main)  # which reads it, and frees it
            sums.update(zip(own, of_parameters, strict=True))
            moved, other, spare_moved, spare_other = other, before, spare_other, moved
            grad_moved, grad_other = grad_other, grad_moved
        _wait(main, undone)
        _wait(main, given)
        return None, torch.cat((grad_other, grad_moved), 1), *map(sums.get, ctx.parameters)


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _mark(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    return None if stream is None else stream.record_event()


def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
    if stream is not None and event is not None:
        stream.wait_event(event)


def measure(cell: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant."""
    width, units, batch, size = map(int, cell.split("x"))
    torch.manual_seed(0)
    blocks = [ReversibleBlock(BasicBranch(width, width), BasicBranch(width, width)) for _ in range(units)]
    for block in blocks:
        block.to(options.device).to(memory_format=torch.channels_last)
    x, cotangent = (
        t.to(options.device).contiguous(memory_format=torch.channels_last)
        for t in torch.randn(2, batch, 2 * width, size, size)
    )
    x.requires_grad_()
    modules: dict[str, nn.Module] = {
        "store": ours(blocks, "store"),
        "reconstruct": ours(blocks, "reconstruct"),
        REVERSAL: Reversal(blocks),
        OVERLAPPED: Reversal(blocks, OverlappedReversal),
        FORWARD: ours(blocks, "store"),
    }
    graphs: dict[str, tuple[Callable[[], None], int]] = {}
    names = [name + kind for kind in ("", GRAPH)[: 1 + (options.device == "cuda")] for name in modules]

    def run(name: str) -> None:
        with (
            torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"),
            torch.set_grad_enabled(name != FORWARD),
        ):
            y = modules[name](x)
        if name != FORWARD:
            y.backward(cotangent.to(y.dtype))

    def gradients(name: str) -> Tensor:
        clear()
        run(name)
        return torch.cat([t.grad.flatten() for t in (x, *modules[name].parameters()) if t.grad is not None])

    def clear() -> None:
        x.grad = None
        modules["store"].zero_grad()

    def step(name: str) -> Callable[[], None]:
        clear()
        eager = partial(run, name.removesuffix(GRAPH))
        if not name.endswith(GRAPH):
            return eager
        if name not in graphs:
            graphs[name] = capture(eager, [x, *modules["store"].parameters()])
        return graphs[name][0]

    right = gradients("store")
    errors = {n: float((gradients(n) - right).norm() / right.norm()) for n in modules if n != FORWARD}
    figures = take_turns(names, step, range(options.repeats + 2), warmup=2, device=options.device)
    return [
        {
            "cell": cell,
            "contestant": name,
            **figures[name],
            "gradient_error": errors.get(name.removesuffix(GRAPH)),
            "peak_bytes": graphs[name][1] if name in graphs else None,
        }
        for name in names
    ]


def show(rows: list[dict[str, Any]], device: str) -> None:
    table = Table("", "", "ms per step", "over store", "gradient error", "peak MB (of the capture)", title=device)
    for row in rows:
        error, peak = row["gradient_error"], row["peak_bytes"]
        table.add_row(
            row["cell"],
            row["contestant"],
            f"{1e3 * row['seconds']:.1f}",
            f"{row['over_store']:.3f}",
            "" if error is None else f"{error:.0e}",
            "" if peak is None else f"{peak / 1e6:.0f}",
        )
    Console().print(table)


def draw(rows: list[dict[str, Any]], title: str, path: Any) -> None:
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure, axes = plt.subplots(1, len(cells), figsize=(3.2 * len(cells) + 3, 4), sharey=True, layout="constrained")
    for axis, cell in zip([axes] if len(cells) == 1 else axes, cells, strict=True):
        milliseconds = {row["contestant"]: 1e3 * row["seconds"] for row in rows if row["cell"] == cell}
        colors = ["C1" if name.endswith(GRAPH) else "C0" for name in names]
        axis.bar_label(axis.barh(names, [milliseconds[n] for n in names], color=colors), fmt="%.1f", padding=3)
        axis.set(title=cell, xlabel="ms per step")
        axis.margins(x=0.2)
        axis.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["32x16x128x32", "128x8x128x32", "256x8x64x14"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    allocator_keeps_memory()
    settings = {"dtype": options.dtype, "repeats": options.repeats}
    path, rows = resumed(f"two_streams_{options.dtype}", settings, options.device)
    for cell in track(options.cells, "cells"):
        if cell not in [row["cell"] for row in rows]:
            rows += measure(cell, options)
            record(path, settings, rows, options.device)
    device = hardware(options.device)["device"]
    show(rows, device)
    draw(rows, f"{options.dtype}, {device}", path)
    Console().print(f"Written to {path}.json and {path}.png", soft_wrap=True)


if __name__ == "__main__":
    main()
