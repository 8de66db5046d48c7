"""What one Function for each sequence does to DistributedDataParallel: overlap, and the gradients that wait.

A sequence that reconstructs is one node of the graph: its gradients come out together, when its whole backward pass is
done, and only then are they averaged over the processes. Under "store" they come layer by layer; with a `chunk_size`
every so many layers. Measured in two processes over gloo:

- when, within the backward pass, each bucket of gradients is handed to the averaging;
- seconds of a step, with the averaging and without it, and of the averaging alone;
- the largest sum of activations, temporaries and gradients outside of the buckets.

    python experiments/ddp_overlap.py [--network revnet101] [--batch 4] [--size 96] [--rounds 7]

Result: experiments/results/ddp_overlap_HARDWARE_DATE.json and .png.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from recording import allocator_keeps_memory, record, result_path
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revnet import set_activations
from revnet.models import get_model
from revnet.profiling import MemoryTimeline
from revnet.reversible import set_chunk_size

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
WORLD = 2
# Name: `activations` and `chunk_size`.
VARIANTS: dict[str, tuple[str, int | None]] = {
    "store": ("store", None),
    "reconstruct": ("reconstruct", None),
    "reconstruct, chunks of 8": ("reconstruct", 8),
    "reconstruct, chunks of 4": ("reconstruct", 4),
    "reconstruct, chunks of 2": ("reconstruct", 2),
}


def build(network: str, activations: str, chunk: int | None) -> nn.Module:
    torch.manual_seed(0)
    module = get_model(network)
    set_activations(module, activations)
    set_chunk_size(module, chunk)
    return module.to(memory_format=torch.channels_last)


class Contestant:
    """A network under DistributedDataParallel whose buckets say when they are handed over."""

    def __init__(self, network: str, activations: str, chunk: int | None, images: Tensor) -> None:
        self.images = images
        self.module = DistributedDataParallel(
            build(network, activations, chunk), gradient_as_bucket_view=True, bucket_cap_mb=25
        )
        self.handed_over: list[tuple[float, int]] = []
        self.buffers: list[Tensor] = []
        self.module.register_comm_hook(None, self._average)

    # The annotations are checked by torch, as types: this module cannot have them as strings.
    def _average(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        self.handed_over.append((time.perf_counter(), buffer.nbytes))
        self.buffers.append(buffer)
        work = dist.all_reduce(buffer.div_(WORLD), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def step(self) -> Row:
        """Seconds of a forward and a backward pass, and the buckets as (share of the backward pass, bytes)."""
        self.module.zero_grad()
        self.handed_over.clear()
        self.buffers.clear()
        dist.barrier()
        start = time.perf_counter()
        loss = loss_of(self.module(self.images))
        between = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        buckets = [((moment - between) / (end - between), size) for moment, size in self.handed_over]
        return {"seconds": end - start, "buckets": buckets}

    def seconds_without_averaging(self) -> float:
        with self.module.no_sync():
            return float(self.step()["seconds"])

    def bytes_beyond_buckets(self) -> int:
        """Most bytes at once of activations, temporaries and gradients that are not in the buckets yet."""
        self.step()
        self.module.zero_grad()
        known = [*self.module.parameters(), *self.module.buffers(), self.images, *self.buffers]
        with MemoryTimeline(known) as timeline:
            loss_of(self.module(self.images)).backward()
        return timeline.peak()


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def seconds_of_averaging(module: nn.Module) -> float:
    buffers = [torch.zeros(25 * 2**18) for _ in range(round(parameter_bytes(module) / (25 * 2**20)))]
    dist.barrier()
    start = time.perf_counter()
    for work in [dist.all_reduce(buffer, async_op=True) for buffer in buffers]:
        work.wait()
    return time.perf_counter() - start


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def measure(rank: int, store: str, path: Path, options: argparse.Namespace) -> None:
    """Runs in each of the processes; the first writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    images = torch.randn(options.batch, 3, options.size, options.size).contiguous(memory_format=torch.channels_last)
    # One after the other in every round: what disturbs the machine disturbs all of them.
    contestants = {name: Contestant(options.network, *variant, images) for name, variant in VARIANTS.items()}
    steps: dict[str, list[Row]] = {name: [] for name in contestants}
    alone: dict[str, list[float]] = {name: [] for name in contestants}
    averaging = []
    for number in range(-2, options.rounds):  # the first two warm up; the buckets are made anew in the second
        for name, contestant in contestants.items():
            step, seconds = contestant.step(), contestant.seconds_without_averaging()
            if number >= 0:
                steps[name].append(step)
                alone[name].append(seconds)
        averaging.append(seconds_of_averaging(contestant.module))
        if rank == 0:
            print(f"round {number + 3} of {options.rounds + 2}", flush=True)
    rows = []
    for name, contestant in contestants.items():
        step = sorted(steps[name], key=lambda step: step["seconds"])[options.rounds // 2]
        rows.append(
            {
                "variant": name,
                "seconds": median(step["seconds"] for step in steps[name]),
                "seconds_without_averaging": median(alone[name]),
                "averaging_beyond_the_step": median(
                    step["seconds"] - bare for step, bare in zip(steps[name], alone[name], strict=True)
                ),
                "seconds_of_averaging_alone": median(averaging),
                "mean_moment_of_a_byte": sum(moment * size for moment, size in step["buckets"])
                / sum(size for _, size in step["buckets"]),
                "buckets": step["buckets"],
                "bytes_beyond_buckets": contestant.bytes_beyond_buckets(),
                "bytes_of_gradients": parameter_bytes(contestant.module),
            }
        )
    if rank == 0:
        settings = {key: getattr(options, key) for key in ("network", "batch", "size", "rounds")}
        record(path, settings | {"processes": WORLD, "threads_of_each": 1}, rows)
        draw(rows, path, f"{options.network}, {WORLD} processes over gloo, batch {options.batch} each")
        show(rows)
    dist.destroy_process_group()


def draw(rows: list[Row], path: Path, title: str) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in rows:
        moments, megabytes = [0.0], [0.0]
        for moment, size in row["buckets"]:
            moments.append(100 * moment)
            megabytes.append(megabytes[-1] + size / 1e6)
        axis.step([*moments, 100], [*megabytes, megabytes[-1]], where="post", label=row["variant"])
    axis.set(title=title, xlabel="of the backward pass, %", ylabel="gradients handed to the averaging, MB")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def show(rows: list[Row]) -> None:
    table = Table(
        "", "s", "s without averaging", "averaging adds, s", "mean moment, %", "MB beyond buckets", title="A step"
    )
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['seconds']:.3f}",
            f"{row['seconds_without_averaging']:.3f}",
            f"{row['averaging_beyond_the_step']:.3f}",
            f"{100 * row['mean_moment_of_a_byte']:.0f}",
            f"{row['bytes_beyond_buckets'] / 1e6:.1f}",
        )
    Console().print(table)
    Console().print(f"The averaging alone takes {rows[0]['seconds_of_averaging_alone']:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="revnet101")
    parser.add_argument("--batch", type=int, default=4, help="of each process")
    parser.add_argument("--size", type=int, default=96, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    allocator_keeps_memory()
    path = result_path("ddp_overlap")
    with TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(measure, (f"{directory}/store", path, options), nprocs=WORLD)


if __name__ == "__main__":
    main()
