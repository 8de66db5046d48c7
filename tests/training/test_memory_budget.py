"""A memory budget for a training."""

import logging
from functools import partial

import pytest
import torch

from revnet.models import revnet38
from revnet.profiling import estimate, measure_memory
from revnet.reversible import slots
from revnet.training import spend_memory

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SHAPE = (8, 3, 16, 16)


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_step_fits_and_the_plan_is_logged(accumulates, caplog):
    network = revnet38()
    least, most = (estimate(revnet38(activations=v), SHAPE, optimizer=SGD) for v in ("reconstruct", "store"))
    budget = (least.total + most.total) // 2 + accumulates * most.gradients
    with caplog.at_level(logging.INFO):
        spend_memory(network, budget, SHAPE, "32-true", SGD, accumulates)
    memory = measure_memory(network, torch.randn(SHAPE), optimizer=SGD)
    assert memory.total + accumulates * memory.gradients <= budget
    assert {"store", "reconstruct"} <= {slot.value() for slot in slots(network)}
    assert caplog.messages[0].startswith(f"memory_budget={budget}: ")


def test_a_precision_that_cannot_be_planned_for_is_refused():
    with pytest.raises(ValueError, match=r"memory_budget=1GB is planned for trainer.precision .*, got 64-true"):
        spend_memory(revnet38(), "1GB", SHAPE, "64-true", SGD)
