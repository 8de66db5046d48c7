"""What does a byte cost: time of a training step against its memory, on one network with the same weights and images?

RevNet-110, batch 128, 32x32, channels_last, fp32. All contestants take turns in one interleaved run:

- store, recompute and reconstruct, in floating point and exact;
- plans (`revnet.profiling.plan`, floating point) for 75, 50 and 25 % of the memory of a whole step under store;
- the blocks of each stage in the wrappers of MemCNN and of RevTorch, the rest by ordinary autograd;
- on CUDA, store with what is saved moved to the CPU (`torch.autograd.graph.save_on_cpu`);
- with --compile a plain loop over the units under torch.compile, that may keep 50 and 20 % of the activations
  (`torch._functorch.config.activation_memory_budget`), which also fuses operators.

The peak is that of activations and temporaries. On a CPU it is not seen inside compiled code; there the rise of the
resident set in a process of its own takes its place, less the gradients, and holds workspaces too.

    python experiments/pareto.py [--model revnet110] [--batch 128] [--size 32] [--repeats 9] [--compile] [--device cpu]

Needs `pip install -e '.[bench]'`. Peaks are written as they come, times at the end, to
experiments/results/pareto_HARDWARE_DATE.json (or --resume PATH); what is there already is not repeated. The target: a
plan at 50 % takes at most 1.12 times as long as store.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from contest import take_turns
from matplotlib.ticker import LogLocator
from peers_contestants import contestants
from plain_loop import PlainLoop
from recording import allocator_keeps_memory, hardware, record, resumed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_peak import peak_of
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

from revnet import ReversibleBlock, ReversibleSequence, set_activations
from revnet.models import RevNet, get_model
from revnet.profiling import estimate, measure_resident, plan
from revnet.reversible import ACTIVATIONS, ReconstructionWarning

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLOURS = {"activations": "C0", "plan": "C2", "library": "C1", "compiled": "C3", "offloaded": "C4"}
BUDGETS = (0.5, 0.2)  # of the activations, in compiled code
TARGET, LIMIT = "plan at 50 %", 1.12


@dataclass(frozen=True)
class Way:
    """One way to run the network: what is called, and the values that are set in the network before."""

    kind: str
    module: nn.Module
    activations: str | Sequence[str] = "store"
    exact: bool = False


class WrappedLoop(PlainLoop):
    """The network with the blocks of each stage in the wrappers of another library."""

    def __init__(self, network: RevNet, library: str) -> None:
        super().__init__(network, checkpointed=False)
        self.stages = nn.ModuleDict()
        for name in network.stage_names:
            blocks = [layer for layer in network.get_submodule(name).children() if isinstance(layer, ReversibleBlock)]
            self.stages[name] = contestants(blocks, bf16=False)[library].module

    def run_blocks(self, stage: str, blocks: Sequence[nn.Module], state: tuple[Tensor, ...]) -> Tensor:
        return self.stages[stage](torch.cat(state, 1))


class Offloaded(nn.Module):
    """The network, what it saves for the backward pass moved to the CPU meanwhile."""

    def __init__(self, network: RevNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return self.network(x)


def compiled(network: RevNet, budget: float) -> Any:
    """The plain loop, compiled to keep this part of the activations."""

    def backend(graph: Any, inputs: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    # A backend of its own keeps torch from taking the code that was compiled for another budget.
    return torch.compile(PlainLoop(network, checkpointed=False), backend=backend, dynamic=False, fullgraph=True)


def build(model: str, device: str) -> RevNet:
    torch.manual_seed(0)
    network = get_model(model).to(device).to(memory_format=torch.channels_last)
    assert isinstance(network, RevNet)
    return network


def warm(model: str, budget: float, images: Tensor) -> nn.Module:
    """A compiled network, the code for these images made already: the measured step is not to compile."""
    module = compiled(build(model, "cpu"), budget)
    module(images).sum().backward()
    module.zero_grad()
    return module


def ways(
    network: RevNet, images: Tensor, loss: Callable[[Tensor], Tensor], options: argparse.Namespace
) -> dict[str, Way]:
    """All that take part, by name."""
    found = {
        f"{value}, exact" if exact else value: Way("activations", network, value, exact)
        for exact in (False, True)
        for value in ACTIVATIONS
    }
    use(network, found["store"])
    total = estimate(network, images.shape, loss=loss).total
    for share in options.plans:
        planned = plan(network, images.shape, share * total // 100, loss=loss)
        found[f"plan at {share} %"] = Way("plan", network, planned)
    found |= {library: Way("library", WrappedLoop(network, library)) for library in ("MemCNN", "RevTorch")}
    if options.compile:
        found |= {f"compiled, budget {budget}": Way("compiled", compiled(network, budget)) for budget in BUDGETS}
    if options.device != "cpu":
        found["save_on_cpu"] = Way("offloaded", Offloaded(network))
    return found


def use(network: RevNet, way: Way) -> None:
    set_activations(network, way.activations)
    for sequence in (m for m in network.modules() if isinstance(m, ReversibleSequence)):
        sequence.exact = way.exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="revnet110")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--plans", type=int, nargs="+", default=[75, 50, 25], help="percent of the memory under store")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also torch.compile with a budget, which takes minutes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="the result to go on with, made if it is not there")
    options = parser.parse_args()
    allocator_keeps_memory()
    warnings.simplefilter("ignore", ReconstructionWarning)  # of the floating-point contestants
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # MemCNN's
    network = build(options.model, options.device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, network.fc.out_features, (options.batch,), device=options.device)
    loss = partial(F.cross_entropy, target=labels)
    found = ways(network, images, loss, options)

    def prepare(name: str) -> Callable[[], None]:
        use(network, found[name])
        network.zero_grad()
        return lambda: loss(found[name].module(images)).backward()

    def peak(name: str) -> int:
        if found[name].kind == "compiled" and options.device == "cpu":
            budget = float(name.rpartition(" ")[2])
            rise = measure_resident(partial(warm, options.model, budget, images), images)
            return rise - sum(p.nbytes for p in network.parameters())
        prepare(name)()  # workspaces that libraries keep are there from now on
        return peak_of(prepare(name), images, found[name].module)

    settings = {name: value for name, value in vars(options).items() if name != "resume"}
    path, known = resumed("pareto", settings, options.device, options.resume)
    rows = {row["contestant"]: row for row in known}
    for name in track([name for name in found if name not in rows], "peaks"):
        rows[name] = {"contestant": name, "kind": found[name].kind, "peak_bytes": peak(name)}
        if found[name].kind == "plan":
            rows[name] |= {"plan": str(found[name].activations)}
        record(path, settings, list(rows.values()), options.device)
    if not all("seconds" in row for row in rows.values()):
        # The first two rounds warm up caches and the allocator.
        rounds = track(range(options.repeats + 2), "rounds")
        for name, figures in take_turns(list(found), prepare, rounds, warmup=2, device=options.device).items():
            rows[name] |= figures
        record(path, settings, list(rows.values()), options.device)
    device = hardware(options.device)["device"]
    show(list(rows.values()), device)
    title = f"{options.model}, batch {options.batch}, {options.size}x{options.size}, fp32, {device}"
    draw(list(rows.values()), title, path)
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)
    if TARGET in rows:
        ratio = rows[TARGET]["over_store"]
        Console().print(f"The {TARGET} takes {ratio:.3f} times as long as store; the target is {LIMIT}: {mark(ratio)}")


def mark(ratio: float) -> str:
    return "[green]met[/]" if ratio <= LIMIT else "[red]missed[/]"


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other one beats in both time and memory, by growing memory."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["peak_bytes"], row["over_store"])):
        if not best or row["over_store"] < best[-1]["over_store"]:
            best.append(row)
    return best


def show(rows: list[dict[str, Any]], device: str) -> None:
    table = Table(
        "", "peak MB", "/ store", "s per step", "/ store", "on the front", title=f"A training step on {device}"
    )
    stored = next(row["peak_bytes"] for row in rows if row["contestant"] == "store")
    best = front(rows)
    for row in rows:
        table.add_row(
            row["contestant"],
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / stored:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['over_store']:.3f}",
            "yes" if row in best else "",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    best = front(rows)
    line = [(row["peak_bytes"] / 1e6, row["over_store"]) for row in best]
    axes.plot(*zip(*line, strict=True), drawstyle="steps-post", color="gray", alpha=0.6, zorder=1, label="Pareto front")
    for kind, colour in COLOURS.items():
        shown = [(r["peak_bytes"] / 1e6, r["over_store"]) for r in rows if r["kind"] == kind]
        if shown:
            axes.scatter(*zip(*shown, strict=True), color=colour, zorder=2)
    for row in rows:
        place, colour = (row["peak_bytes"] / 1e6, row["over_store"]), COLOURS[row["kind"]]
        left, above = row in best, row not in best or row["kind"] == "plan"
        axes.annotate(
            row["contestant"],
            place,
            (-6 if left else 6, 4 if above else -11),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
            color=colour,
        )
    axes.set(xscale="log", xlabel="peak of activations and temporaries, MB", ylabel="time of a step / store")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.margins(x=0.18, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title)
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
