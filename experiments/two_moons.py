"""What does a flow do to two moons, and why does its likelihood need the determinant?

Trains a stack of affine couplings on scikit-learn's two moons, in half a minute on a CPU, and shows

- data and samples, the latent space, and a grid of the latent space drawn in the data's;
- the triangular Jacobian of every coupling at one point, and the product of their determinants against the determinant
  of the whole map by autograd;
- a second flow that is trained without the determinant: what it maximises, the prior's density at f(x), is greatest
  where all data lie on the prior's peak. So f collapses: the true log-likelihood falls the further, the better it does.

    python experiments/two_moons.py [--steps 1500]

Result and picture: experiments/results/two_moons_HARDWARE_DATE.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from recording import record, result_path
from rich.console import Console
from sklearn.datasets import make_moons
from torch import Tensor

from revnet import AffineCoupling, ReversibleSequence
from revnet.flows import MLP, Flow, Merge, ScaleAndShift, Split

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
COUPLINGS = 6
POINT = (0.5, 0.25)


def moons(n: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Points, and which of the moons each is on."""
    points, moon = make_moons(n, noise=0.06, random_state=seed)
    return torch.tensor(points, dtype=torch.float32), moon


def flow_of_moons() -> Flow:
    branches = [ScaleAndShift(MLP(1, 2, hidden=64, layers=2), channels=1) for _ in range(COUPLINGS)]
    couplings = [AffineCoupling(branch, swap=bool(i % 2)) for i, branch in enumerate(branches)]
    return Flow([ReversibleSequence([Split(), *couplings, Merge()])], event_shape=(2,))


def train(flow: Flow, steps: int, with_determinant: bool) -> list[Row]:
    """Steps, what was maximised, and the true log-likelihood of held-out points."""
    held_out, _ = moons(2000, seed=1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows: list[Row] = []
    for step in range(steps + 1):
        x, _ = moons(256, seed=2 + step)
        z, log_det = flow.encode_and_log_det(x)
        maximised = (flow.prior.log_prob(z) + (log_det if with_determinant else 0)).mean()
        if step % 25 == 0:
            with torch.no_grad():
                true = flow.log_prob(held_out).mean()
            rows.append(
                {"determinant": with_determinant, "step": step, "maximised": maximised.item(), "true": true.item()}
            )
        optimizer.zero_grad()
        (-maximised).backward()
        optimizer.step()
        schedule.step()
    return rows


def jacobians(flow: Flow) -> dict[str, Any]:
    """Of every coupling at one point, in float64, and of the whole map."""
    flow = flow.double()
    point = torch.tensor([POINT], dtype=torch.float64)
    state: Any = point.split(1, 1)
    matrices, product = [], 1.0
    for layer in flow.stages[0].children():
        if isinstance(layer, AffineCoupling):
            parts = torch.autograd.functional.jacobian(lambda a, b, f=layer: f(a, b), state)
            matrix = torch.tensor([[parts[i][j].item() for j in range(2)] for i in range(2)], dtype=torch.float64)
            matrices.append(matrix.tolist())
            product *= matrix.det().item()
            with torch.no_grad():
                state = layer(*state)
    whole = torch.autograd.functional.jacobian(flow.encode, point).view(2, 2).det().item()
    with torch.no_grad():
        log_det = flow.encode_and_log_det(point)[1].item()
    flow.float()
    return {"couplings": matrices, "product": product, "whole_map": whole, "exp_log_det": math.exp(log_det)}


def report(found: dict[str, Any]) -> None:
    console = Console()
    for i, matrix in enumerate(found["couplings"]):
        first, second = (f"[{row[0]:8.4f} {row[1]:8.4f}]" for row in matrix)
        moved = "second" if i % 2 else "first"
        label = f"coupling {i} moves the {moved} half:  "
        console.print(f"{label}{first}\n{'':{len(label)}}{second}", markup=False)
    console.print(
        f"determinant at {POINT}: product over couplings {found['product']:.12g}, whole map by autograd "
        f"{found['whole_map']:.12g}, exp of the flow's log-determinant {found['exp_log_det']:.12g}"
    )


def grid_lines(extent: float = 3.0, lines: int = 13, points: int = 200) -> list[Tensor]:
    places, along = torch.linspace(-extent, extent, lines), torch.linspace(-extent, extent, points)
    across = [torch.stack((along, place.expand(points)), 1) for place in places]
    return across + [line.flip(1) for line in across]


def draw(flow: Flow, rows: list[Row], path: Path) -> None:
    x, moon = moons(2000, seed=1)
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.3), layout="constrained")
    data, latent, samples, curves = panels
    with torch.no_grad():
        z = flow.encode(x)
        for line in grid_lines():
            latent.plot(*line.T, color="grey", linewidth=0.5, alpha=0.6)
            data.plot(*flow.decode(line).T, color="grey", linewidth=0.5, alpha=0.6)
        torch.manual_seed(0)
        samples.scatter(*flow.sample(2000).T, s=2, color="C2")
    colours = np.where(moon == 1, "C1", "C0")
    data.scatter(*x.T, s=2, c=colours)
    latent.scatter(*z.T, s=2, c=colours)
    data.set(title="data, and the latent grid", xlim=(-1.7, 2.7), ylim=(-1.2, 1.7))
    latent.set(title="latent space", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5))
    samples.set(title="samples", xlim=(-1.7, 2.7), ylim=(-1.2, 1.7))
    for determinant, colour in ((True, "C0"), (False, "C3")):
        mine = [row for row in rows if row["determinant"] is determinant]
        label = "with" if determinant else "without"
        steps = [row["step"] for row in mine]
        curves.plot(steps, [row["true"] for row in mine], color=colour, label=f"{label} determinant: log-likelihood")
        if not determinant:
            curves.plot(steps, [row["maximised"] for row in mine], "--", color=colour, label="what it maximises")
    curves.axhline(-math.log(2 * math.pi), color="grey", linestyle=":", label="the prior's peak")
    curves.set(title="training", xlabel="step", ylabel="nats")
    curves.legend(fontsize=7, loc="center right")
    figure.savefig(path.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    rows: list[Row] = []
    flows = {}
    for determinant in (True, False):
        torch.manual_seed(0)
        flows[determinant] = flow_of_moons()
        rows += train(flows[determinant], options.steps, determinant)
    found = jacobians(flows[True])
    report(found)
    path = result_path("two_moons")
    record(path, {"couplings": COUPLINGS, "steps": options.steps}, [*rows, {"shown": "jacobians", **found}])
    draw(flows[True], rows, path)
    ends = {row["determinant"]: row for row in rows}
    for determinant, row in ends.items():
        label = "with" if determinant else "without"
        print(f"{label} determinant: maximised {row['maximised']:.3f}, true {row['true']:.3f}")
    Console().print(f"Written to {path.with_suffix('.json')} and {path.with_suffix('.png')}", soft_wrap=True)


if __name__ == "__main__":
    main()
