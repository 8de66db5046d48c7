"""A flow of ours beside the same flow in normflows: time of a step, memory, and bits/dim after the same steps.

Eight affine couplings between halves of the channels, with residual networks of 64 maps, on 32x32 photographs (crops
of scikit-learn's two), dequantised, taken to the logit and squeezed to 12x16x16. normflows gets copies of the same
coupling networks, and its log-likelihood is compared with ours before the first step. The contestants take turns, step
by step, on the same batches:

- store, reconstruct: ours under plain autograd and the reversible backward pass;
- normflows: its NormalizingFlow of AffineCouplingBlocks.

    python experiments/flow_peers.py [--steps 30] [--batch 16]        (needs pip install -e '.[bench]')

Result and picture: experiments/results/flow_peers_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import matplotlib
import torch
from contest import take_turns
from peers_contestants import library
from recording import allocator_keeps_memory, hardware, record, result_path
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from revnet import AffineCoupling, ReversibleSequence, set_activations
from revnet.flows import Dequantise, Flow, Logit, Merge, ResidualNetwork, ScaleAndShift, Split, Squeeze, bits_per_dim
from revnet.profiling import measure_memory
from revnet.reversible import invert

matplotlib.use("agg")
import matplotlib.pyplot as plt

NAMES = ("store", "reconstruct", "normflows")
COUPLINGS, WIDTH, BLOCKS = 8, 64, 2
SHAPE, DIMS = (12, 16, 16), 3072
WARMUP = 3


class Interleaved(nn.Module):
    """A coupling's network with its output in the order that normflows takes: shift, log-scale, shift, ..."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        log_scale, shift = self.network(x)
        return torch.stack((shift, log_scale), 2).flatten(1, 2)


class LogProb(nn.Module):
    """A flow as a module from data to their log-densities."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)  # type: ignore[operator]


def contestants() -> dict[str, LogProb]:
    """The same flow three times. To data, normflows' couplings do z2 -> (z2 - shift) * exp(-log_scale), and so ours."""
    branches = [ScaleAndShift(ResidualNetwork(6, 12, BLOCKS, WIDTH), 6) for _ in range(COUPLINGS)]
    for branch in branches:
        nn.init.normal_(branch.network.last.weight, std=0.01)  # type: ignore[union-attr, arg-type]
    found: dict[str, LogProb] = {}
    for name in ("store", "reconstruct"):
        couplings = [invert(AffineCoupling(copy.deepcopy(b), swap=i % 2 == 0)) for i, b in enumerate(branches)]
        flow = Flow([ReversibleSequence([Split(), *couplings, Merge()])], event_shape=SHAPE)
        set_activations(flow, name)
        found[name] = LogProb(flow)
    normflows = library("normflows")
    blocks = [
        normflows.flows.AffineCouplingBlock(
            Interleaved(copy.deepcopy(branch)), scale_map="exp", split_mode="channel_inv" if i % 2 else "channel"
        )
        for i, branch in enumerate(branches)
    ]
    prior = normflows.distributions.DiagGaussian(SHAPE, trainable=False)
    found["normflows"] = LogProb(normflows.NormalizingFlow(prior, blocks[::-1]))
    return found


def photographs(count: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, ready for the flows, and the log-determinants of what has been done to them."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    dequantise, logit, squeeze = Dequantise(), Logit(), Squeeze()
    for _ in range(count):
        crops = []
        for _ in range(batch):
            image = images[int(torch.randint(2, (), generator=generator))]
            top, left = (int(torch.randint(size - 31, (), generator=generator)) for size in image.shape[1:])
            crops.append(image[:, top : top + 32, left : left + 32])
        y, log_det = logit.forward_and_log_det(dequantise(torch.stack(crops) / 255))
        yield squeeze(y), log_det


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    allocator_keeps_memory()
    torch.manual_seed(0)
    flows = contestants()
    batches = list(photographs(options.steps, options.batch, seed=0))
    held_out = list(photographs(8, 32, seed=1))
    with torch.no_grad():
        start = {name: flow(batches[0][0]) for name, flow in flows.items()}
    differ = max(float((value / start["store"] - 1).abs().max()) for value in start.values())
    peaks = {name: measure_memory(flow, batches[0][0], torch.mean).peak for name, flow in flows.items()}
    optimizers = {name: torch.optim.Adam(flow.parameters(), lr=1e-3) for name, flow in flows.items()}
    taken = dict.fromkeys(NAMES, 0)

    def prepare(name: str) -> Callable[[], None]:
        x, _ = batches[taken[name]]
        taken[name] += 1

        def step() -> None:
            loss = -flows[name](x).mean() / DIMS
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()

        return step

    figures = take_turns(NAMES, prepare, track(range(options.steps), "steps"), WARMUP, "cpu")
    rows: list[dict[str, Any]] = []
    for name, flow in flows.items():
        with torch.no_grad():
            bits = torch.cat([bits_per_dim(flow(x) + log_det, DIMS) for x, log_det in held_out]).mean().item()
        row = {"flow": name, "peak_bytes": peaks[name], "bits_per_dim": bits, **figures[name]}
        if isinstance(flow.flow, Flow):
            with torch.no_grad():
                x = held_out[0][0]
                row["inversion_error"] = float((flow.flow.decode(flow.flow.encode(x)) - x).abs().max())
        rows.append(row)
    path = result_path("flow_peers")
    settings = {
        "couplings": COUPLINGS,
        "width": WIDTH,
        "blocks": BLOCKS,
        "batch": options.batch,
        "steps": options.steps,
        "normflows": version("normflows"),
        "largest_relative_difference_at_start": differ,
    }
    record(path, settings, rows)
    table = Table("", "step, ms", "over store", "peak, MB", f"bits/dim after {options.steps} steps")
    for row in rows:
        figures_of_row = f"{1e3 * row['seconds']:.0f}", f"{row['over_store']:.3f}", f"{row['peak_bytes'] / 1e6:.1f}"
        table.add_row(row["flow"], *figures_of_row, f"{row['bits_per_dim']:.4f}")
    Console().print(table, f"largest relative difference of log p before the first step: {differ:.1e}")
    Console().print(
        f"largest error of our inverse after training: {max(r.get('inversion_error', 0) for r in rows):.1e}"
    )
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    values = {"step, ms": ("seconds", 1e3), "peak, MB": ("peak_bytes", 1e-6), "bits/dim": ("bits_per_dim", 1.0)}
    for axes, (label, (key, scale)) in zip(panels, values.items(), strict=True):
        bars = axes.bar(NAMES, [scale * row[key] for row in rows], color=["C1", "C0", "C7"])
        axes.bar_label(bars, fmt="{:.2f}" if scale == 1 else "{:.0f}")
        axes.margins(y=0.1)
        axes.set_title(label)
    figure.suptitle(
        f"{COUPLINGS} couplings of width {WIDTH}, batch {options.batch}, {hardware()['device']}", fontsize=10
    )
    figure.savefig(path.with_suffix(".png"), dpi=150)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


if __name__ == "__main__":
    main()
