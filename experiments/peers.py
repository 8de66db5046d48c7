"""How do the three values of `activations` compare with a hand-written loop and with other reversible libraries?

A cell is a stack of reversible units (pre-activation basic branches; width: channels of a half) on a batch of 16 at
32x32, in one memory format and dtype. In every cell all contestants take turns over the same branch modules:

- a plain loop, y1 = x1 + f(x2); y2 = x2 + g(y1), and the same with `torch.utils.checkpoint` around each unit;
- store, recompute, reconstruct, and reconstruct exact;
- a hand-written reversal, the least that reconstruct can take: it replays no random numbers, counts statistics twice,
  checks nothing and does not look for drift;
- MemCNN 1.5 (`InvertibleModuleWrapper` over `AdditiveCoupling`, inputs freed) and RevTorch 0.2 (`ReversibleSequence`,
  eager discarding), the leanest settings of each. Neither replays autocast, so in bf16 each of their branches enters it
  by itself, in both passes;
- a forward pass without gradients.

Everyone takes a whole tensor, an intermediate one as inside a network, and returns a whole one. Under bf16 autocast the
residual stream is fp32 for all; three more contestants have one of bf16 (`bf16 stream`), which is what MemCNN and
RevTorch make of a bf16 input. On the side each gradient is compared with that of store (exact: with exact store).

The peak is that of activations and temporaries; parameters, their gradients and the input do not count. On CUDA it is
`max_memory_allocated` less what was allocated before and the gradients.

    python experiments/peers.py [--widths 32 64] [--units 4] [--formats channels_last] [--dtypes float32] [--repeats 5]
    python experiments/peers.py --draw PATH.json      # table and picture of what has been measured

Needs `pip install -e '.[bench]'`. Every cell is written as it ends to experiments/results/peers_HARDWARE_DATE.json (or
--resume PATH); a cell that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contest import take_turns
from peers_contestants import EXACT, FORWARD, Contestant, contestants, library, ours
from peers_report import CELL, by_cell, report
from recording import allocator_keeps_memory, record, resumed
from rich.progress import Progress
from step_peak import peak_of
from torch import Tensor

from revnet import ReversibleBlock
from revnet.models.branches import BasicBranch
from revnet.reversible import ReconstructionWarning

UNITS = {32: (4, 16, 64), 64: (4, 16, 64), 128: (4, 16), 256: (4, 8)}  # by width
FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


def peak_and_gradients(contestant: Contestant, x: Tensor, cotangent: Tensor) -> tuple[int, Tensor]:
    """Peak of a step in bytes, and all its gradients as one vector."""
    contestant.clear(x)
    peak = peak_of(partial(contestant.step, x, cotangent), x, contestant.module)
    return peak, torch.cat([t.grad.flatten() for t in (x, *contestant.parameters()) if t.grad is not None])


def measure_cell(cell: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each contestant."""
    torch.manual_seed(0)
    width, memory_format, bf16 = cell["width"], FORMATS[cell["format"]], cell["dtype"] == "bfloat16"
    blocks = [ReversibleBlock(BasicBranch(width, width), BasicBranch(width, width)) for _ in range(cell["units"])]
    for block in blocks:
        block.to(options.device).to(memory_format=memory_format)
    shape = (options.batch, 2 * width, options.size, options.size)
    x, cotangent = (t.to(options.device).contiguous(memory_format=memory_format) for t in torch.randn(2, *shape))
    x.requires_grad_()
    found = contestants(blocks, bf16)

    truth = {False: peak_and_gradients(found["store"], x, cotangent)[1]}
    truth[True] = peak_and_gradients(Contestant(ours(blocks, "store", exact=True), blocks, bf16), x, cotangent)[1]
    checks: dict[str, dict[str, Any]] = {FORWARD: {}}
    for name, contestant in found.items():
        if name != FORWARD:
            peak, gradients = peak_and_gradients(contestant, x, cotangent)
            right = truth[name == EXACT]
            drift = getattr(contestant.module, "reconstruction_error", None)
            checks[name] = {
                "peak_bytes": peak,
                "stream": str(contestant.output).removeprefix("torch."),
                "gradient_error": float((gradients - right).norm() / right.norm()),
                "reconstruction_error": None if drift is None else float(drift),
            }
            del gradients
    del truth, right

    def prepare(name: str) -> Callable[[], Any]:
        found[name].clear(x)
        if name == FORWARD:
            return torch.no_grad()(partial(found[name].forward, x))
        return partial(found[name].step, x, cotangent)

    figures = take_turns(list(found), prepare, range(options.warmup + options.repeats), options.warmup, options.device)
    return [{**cell, "contestant": name, **figures[name], **checks[name]} for name in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=list(UNITS), help="channels of a half")
    parser.add_argument("--units", type=int, nargs="+", help="by default those of the grid, which depend on the width")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds, after the step that measures memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="the result to go on with, made if it is not there")
    parser.add_argument("--draw", type=Path, metavar="PATH", help="tables and picture of a result; nothing is measured")
    options = parser.parse_args()
    allocator_keeps_memory()
    if options.draw:
        report(options.draw)
        return
    warnings.simplefilter("ignore", ReconstructionWarning)  # the error is recorded
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # MemCNN's
    settings = {name: getattr(options, name) for name in ("batch", "size", "repeats", "warmup", "device")}
    for name in ("memcnn", "revtorch"):
        library(name)
        settings[name] = version(name)
    path, rows = resumed("peers", settings, options.device, options.resume)
    grid = [
        (width, units, dtype, memory_format)
        for width in options.widths
        for units in options.units or UNITS.get(width, (4,))
        for dtype in options.dtypes
        for memory_format in options.formats
    ]
    with Progress() as progress:
        task = progress.add_task("", total=len(grid))
        for values in grid:
            cell = dict(zip(CELL, values, strict=True))
            progress.update(task, description=", ".join(map(str, values)))
            if values not in by_cell(rows):
                rows += measure_cell(cell, options)
                record(path, settings, rows, options.device)
            progress.advance(task)
    report(path)


if __name__ == "__main__":
    main()
