"""Memory does not grow with depth, and is released when it is dead."""

import pytest
import torch
from torch import nn

from revnet import ReversibleSequence
from revnet.profiling import MemoryTimeline, measure_memory
from revnet.reversible import Merge, Split
from tests.reversible.networks import basic, blocks, sequence

DEPTHS = (4, 8, 16, 64)


def memory(activations, depth, branch=basic, channels=8, size=16):
    net = sequence(activations, depth, channels, branch, torch.float32)
    return measure_memory(net, torch.randn(4, 2 * channels, size, size))


def test_kept_bytes_are_equal_to_the_byte_at_every_depth():
    assert len({memory("reconstruct", depth).kept for depth in DEPTHS}) == 1


def test_peak_is_equal_within_a_hundredth_at_every_depth():
    parameter_gradients = memory("reconstruct", 4).gradients
    assert parameter_gradients > 0
    peaks = [memory("reconstruct", depth).peak for depth in DEPTHS]
    assert max(peaks) <= 1.01 * min(peaks)


def test_store_and_recompute_grow_with_depth_as_the_table_says():
    state = 4 * 16 * 16 * 16 * 4
    grown = memory("recompute", 16).kept - memory("recompute", 8).kept
    assert grown == 8 * state
    assert memory("store", 16).kept - memory("store", 8).kept > 3 * grown


def test_a_branch_that_draws_keeps_at_most_six_kilobytes():
    net = sequence("reconstruct", 8, 4, lambda c: nn.Sequential(basic(c), nn.Dropout(0.5)), torch.float32)
    y = net(torch.randn(2, 8, 4, 4))
    # States of random generators are no outputs of operators, so the timeline does not see them.
    states = [e.random for trace in y.grad_fn.traces for e in trace.evaluations if e.random is not None]
    assert len(states) == 16
    assert all(sum(s.numel() * s.element_size() for s in kept) <= 6 * 1024 for kept in states)


class Transition(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x1, x2):
        return self.conv(x1).relu(), self.conv(x2).relu()


@pytest.mark.parametrize(
    ("plan", "states"),
    [
        # The output is alive in any case, and reconstruction starts from it; a recomputed layer keeps its input.
        (["reconstruct"] * 10, 1),
        (["recompute"] * 10, 1 + 10),
        (["reconstruct"] * 5 + ["recompute"] * 5, 1 + 5),
        (["recompute"] * 5 + ["reconstruct"] * 5, 1 + 5),
        (["reconstruct", "recompute"] * 5, 1 + 5),
    ],
)
def test_bytes_kept_by_each_kind_of_block(plan, states):
    x = torch.randn(4, 8, 8, 8, requires_grad=True)
    net = sequence(plan, 8, 4, dtype=torch.float32)
    with MemoryTimeline([*net.parameters(), *net.buffers()]) as timeline:
        y = net(x * 1)
        samples = timeline.live() - states * y.numel() * 4
    # Each stretch of reconstructed layers keeps a sample of its input.
    assert 0 <= samples <= 5 * 1024


def test_inputs_are_not_freed_and_outputs_are_released_with_their_graph():
    net = sequence("reconstruct", dtype=torch.float32)
    x = torch.randn(4, 8, 8, 8)
    with MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
        y = net(x)
        assert timeline.live() > 0
        del y
        net._errors.clear()
        assert timeline.live() == 0
    assert x.abs().sum() > 0


def test_live_storages_are_constant_over_50_steps():
    net = sequence("reconstruct", 2, 2, dtype=torch.float32)
    x = torch.randn(2, 4, 4, 4)
    with MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
        live = []
        for _ in range(50):
            net.zero_grad()
            net(x).sum().backward()
            live.append(timeline.live())
    assert len(set(live[1:])) == 1


def test_a_layer_without_inverse_keeps_its_input_and_nothing_else():
    net = ReversibleSequence(
        [
            Split(),
            *blocks(2, 4, dtype=torch.float32),
            Transition(4),
            *blocks(2, 4, dtype=torch.float32),
            Merge(),
        ]
    )
    x = torch.randn(4, 8, 8, 8)
    with MemoryTimeline([x, *net.parameters(), *net.buffers()]) as timeline:
        y = net(x)
        kept = timeline.live()
    boundary, output = x.numel() * 4, y.numel() * 4
    assert 0 <= kept - boundary - output <= 4 * 1024
