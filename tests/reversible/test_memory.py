"""Memory does not grow with depth, and what is kept is what the table of the three values says."""

import pytest
import torch
from torch import nn

from revnet import ReversibleSequence
from revnet.profiling import MemoryTimeline, measure_memory
from revnet.reversible import Merge, Split
from revnet.reversible.coupling import ADDITION, EXACT_ADDITION
from revnet.reversible.evaluation import Evaluation
from tests.reversible.networks import BRANCHES, EXACT, Transition, basic, blocks, sequence

DEPTHS = (4, 8, 16, 64)
SILENT = pytest.mark.parametrize("branch", ["basic", "bottleneck", "groupnorm"])
DRAWING = pytest.mark.parametrize("branch", ["dropout", "droppath"])


def memory(activations, depth, exact, branch=basic, channels=8, size=16):
    net = sequence(activations, depth, channels, branch, torch.float32, exact=exact)
    return measure_memory(net, torch.randn(4, 2 * channels, size, size))


@EXACT
@SILENT
def test_kept_bytes_are_equal_to_the_byte_at_every_depth(exact, branch):
    kept = {memory("reconstruct", depth, exact, BRANCHES[branch], 4, 8).kept for depth in DEPTHS}
    assert len(kept) == 1
    assert min(kept) > 0


@EXACT
def test_peak_is_equal_within_a_hundredth_at_every_depth(exact):
    peaks = [memory("reconstruct", depth, exact).peak for depth in DEPTHS]
    assert 0 < max(peaks) <= 1.01 * min(peaks)


@EXACT
def test_store_and_recompute_grow_with_depth_as_the_table_says(exact):
    state = 4 * 16 * 16 * 16 * 4
    grown = memory("recompute", 16, exact).kept - memory("recompute", 8, exact).kept
    assert grown == 8 * state
    assert memory("store", 16, exact).kept - memory("store", 8, exact).kept > 3 * grown


@EXACT
@DRAWING
@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_a_branch_that_draws_keeps_at_most_six_kilobytes(activations, exact, branch, monkeypatch):
    net = sequence(activations, 8, 4, BRANCHES[branch], torch.float32, exact=exact)
    # States of random generators are no outputs of operators, so the timeline does not see them.
    evaluations, made = [], Evaluation.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        evaluations.append(self)

    monkeypatch.setattr(Evaluation, "__init__", init)
    net(torch.randn(2, 8, 4, 4))
    states = {id(e.random): e.random for e in evaluations}
    assert len(states) == (8 if activations == "recompute" else 2 * 8)  # blocks; branches
    assert all(0 < sum(s.untyped_storage().nbytes() for s in kept) <= 6 * 1024 for kept in states.values())


@EXACT
@DRAWING
def test_a_branch_that_draws_keeps_nothing_else(exact, branch):
    assert len({memory("reconstruct", depth, exact, BRANCHES[branch], 4, 8).kept for depth in DEPTHS}) == 1


@EXACT
@pytest.mark.parametrize(
    ("plan", "states"),
    [
        # The output is alive in any case, and reconstruction starts from it; a recomputed block keeps its input, a
        # Split or Merge, whose backward pass needs no activations, nothing.
        (["reconstruct"] * 10, 1),
        (["recompute"] * 10, 1 + 8),
        (["reconstruct"] * 5 + ["recompute"] * 5, 1 + 4),
        (["recompute"] * 5 + ["reconstruct"] * 5, 1 + 4),
        (["reconstruct", "recompute"] * 5, 1 + 4 + 1),  # the last block's output besides the Merge's
    ],
    ids=["reconstruct", "recompute", "recompute last", "recompute first", "alternating"],
)
def test_bytes_kept_by_each_kind_of_block(exact, plan, states):
    x = torch.randn(4, 8, 8, 8, requires_grad=True)
    net = sequence(plan, 8, 4, dtype=torch.float32, exact=exact)
    with MemoryTimeline([*net.parameters(), *net.buffers()]) as timeline:
        y = net(x * 1)
        samples = timeline.live() - states * y.numel() * 4
    # Each stretch of reconstructed layers keeps a sample of its input.
    assert 0 <= samples <= 5 * 1024


@EXACT
def test_a_layer_without_inverse_keeps_its_input_and_nothing_else(exact):
    body = [*blocks(2, 4, dtype=torch.float32), Transition(4), *blocks(2, 4, dtype=torch.float32)]
    net = ReversibleSequence([Split(), *body, Merge()], exact=exact)
    x = torch.randn(4, 8, 8, 8)
    with MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
        y = net(x)
        kept = timeline.live()
    boundary, output = x.numel() * 4, y.numel() * 4
    assert 0 <= kept - boundary - output <= 4 * 1024


class BuildsGraph(nn.Module):
    """Turns gradients on for itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh(), nn.Conv2d(8, 8, 1))

    @torch.enable_grad()
    def forward(self, x):
        return self.inner(x)


@EXACT
def test_of_a_graph_that_a_recomputed_layer_builds_on_its_own_nothing_is_kept(exact):
    x = torch.randn(4, 8, 8, 8)
    net = ReversibleSequence(
        [*[BuildsGraph() for _ in range(4)], Split(), *blocks(1, 4, dtype=torch.float32), Merge()], exact=exact
    )
    with MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
        y = net(x)
        kept = timeline.live()
    # The inputs of three recomputed layers (that of the first was there before) and the output.
    assert 0 <= kept - 4 * y.numel() * 4 <= 4 * 1024


@EXACT
def test_reconstruction_overwrites_its_own_halves(exact, monkeypatch):
    overwritten = []
    rule = type(EXACT_ADDITION if exact else ADDITION)
    undo = rule.undo

    def noting(self, y, h, out=None):
        overwritten.append(out is y)
        return undo(self, y, h, out)

    monkeypatch.setattr(rule, "undo", noting)
    sequence("reconstruct", 4, 4, basic, torch.float32, exact=exact)(torch.randn(2, 8, 4, 4)).sum().backward()
    assert overwritten == [True] * 8  # behind the blocks stands a Merge, whose halves are copies
    overwritten.clear()
    y1, y2 = ReversibleSequence(blocks(4, 4, basic), exact=exact).float()(*torch.randn(2, 2, 4, 4, 4))
    (y1.sum() + y2.sum()).backward()
    assert overwritten == [False] * 2 + [True] * 6  # the first two are the caller's


@EXACT
def test_reconstruction_overwrites_nothing_that_somebody_else_holds(exact):
    net = sequence("reconstruct", 4, 4, basic, torch.float32, exact=exact)
    taken = []

    def take(module, inputs, output):
        taken.extend((t, t.clone()) for t in (inputs[0], inputs[0].detach(), output, output.detach()))

    for layer in net:
        for branch in layer.children():
            branch.register_forward_hook(take)
    x = torch.randn(4, 8, 8, 8, requires_grad=True)
    y = net(x)
    taken.extend((t, t.detach().clone()) for t in (x, y))
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert len(taken) == 3 * 4 * 2 * 4 + 2
    assert all(torch.equal(now, before) for now, before in taken)
