"""The resident set of a process of its own."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from revnet.profiling import measure_memory, measure_resident

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rise_of_the_resident_set_is_what_was_counted():
    network = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.Sigmoid())])
    x = torch.randn(16384, 512)
    memory = measure_memory(network, x, optimizer=SGD)
    counted = memory.total - memory.parameters - memory.optimizer - memory.input
    assert counted > 200e6
    assert measure_resident(network, x, optimizer=SGD) == pytest.approx(counted, rel=0.1)


def test_mistakes_are_told():
    with pytest.raises(TypeError, match="must be picklable for measure_resident"):
        measure_resident(nn.Linear(2, 2), torch.randn(2, 2), loss=lambda y: y.sum())
    with pytest.raises(ValueError, match="input is on meta"):
        measure_resident(nn.Linear(2, 2), torch.empty(2, 2, device="meta"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loss_may_hold_the_labels_of_its_batch():
    labels = partial(nn.functional.cross_entropy, target=torch.zeros(4096, dtype=torch.long))
    assert measure_resident(nn.Linear(512, 2048), torch.randn(4096, 512), loss=labels) > 4096 * 2048 * 4
