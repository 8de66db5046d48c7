"""A memory budget for a training."""

import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from revnet.models import revnet38
from revnet.profiling import estimate, measure_memory
from revnet.reversible import slots
from revnet.training import memory_budget, memory_of, out_of_memory, spend_memory

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SHAPE = (8, 3, 16, 16)


@pytest.mark.parametrize("accumulates", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_step_fits_and_the_plan_is_logged(accumulates, caplog):
    network = revnet38()
    least, most = (estimate(revnet38(activations=v), SHAPE, optimizer=SGD) for v in ("reconstruct", "store"))
    held = accumulates * most.gradients
    budget = (least.total + most.total) // 2 + held
    with caplog.at_level(logging.INFO):
        spend_memory(network, budget, SHAPE, "32-true", SGD, held)
    memory = measure_memory(network, torch.randn(SHAPE), optimizer=SGD)
    assert memory.total + accumulates * memory.gradients <= budget
    assert {"store", "recompute"} <= {slot.value() for slot in slots(network)}
    assert caplog.messages[0].startswith(f"memory_budget={budget}: ")


def test_a_precision_that_cannot_be_planned_for_is_refused():
    with pytest.raises(ValueError, match=r"memory_budget=1GB is planned for trainer.precision .*, got 64-true"):
        spend_memory(revnet38(), "1GB", SHAPE, "64-true", SGD)


def test_a_budget_that_what_is_held_leaves_too_little_of_is_refused():
    with pytest.raises(ValueError, match=r"memory_budget=1MB: accumulated gradients, .* take 1,859,560 bytes already"):
        spend_memory(revnet38(), "1MB", SHAPE, "32-true", SGD, held=1_859_560)
    with pytest.raises(ValueError, match=r"memory_budget=3MB: .* take 1,859,560 bytes, and of what is left budget="):
        spend_memory(revnet38(), "3MB", SHAPE, "32-true", SGD, held=1_859_560)
    with pytest.raises(ValueError, match=r"memory_budget must be a positive integer .* got 'much'"):
        spend_memory(revnet38(), "much", SHAPE, "32-true", SGD)


def test_what_did_not_fit_is_told_with_what_would() -> None:
    network = revnet38(activations="store")
    line = out_of_memory(network, (32, 3, 8, 8), "32-true", SGD, 12_000_000)
    assert re.match(r"out of memory at a batch of 32 images of shape \(3, 8, 8\): there are 12 MB in all, and ", line)
    found = re.search(
        r"training takes (\d+) MB: data.batch_size=(\d+) or less fits, and memory_budget=10MB keeps", line
    )
    assert found is not None, line
    assert int(found[1]) > 10
    batch = int(found[2])
    least, more = (estimate(network, (b, 3, 8, 8), optimizer=SGD).total for b in (batch, batch + 1))
    assert least <= 10_800_000 < more
    beside = out_of_memory(network, (32, 3, 8, 8), "32-true", SGD, 14_222_223, held=2_000_000)
    assert f"training takes {int(found[1]) + 2} MB: data.batch_size={batch} or less" in beside
    assert "memory_budget=12MB keeps" in beside
    assert "something else holds the rest" in out_of_memory(network, (32, 3, 8, 8), "32-true", SGD, 10**9)
    assert "a batch of 1 takes" in out_of_memory(network, (32, 3, 8, 8), "32-true", SGD, 1000)


@pytest.mark.parametrize(
    ("own_groups", "limits", "least"),
    [
        ("0::/\n", {"memory.max": "123000000\n"}, 123_000_000),  # a container that sees its own group as the root
        ("0::/job/step\n", {"job/memory.max": "123000000\n", "job/step/memory.max": "max\n"}, 123_000_000),
        ("0::/job\n", {"job/memory.max": "max\n"}, None),
        ("9:cpu:/\n4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "123000000\n"}, 123_000_000),
        ("4:memory:/seen/outside\n", {"memory/memory.limit_in_bytes": "123000000\n"}, 123_000_000),
        ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_the_limit_of_a_control_group_counts(
    own_groups: str, limits: dict[str, str], least: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "OWN_GROUPS", tmp_path / "absent")
    machine = memory_of(torch.device("cpu"))
    (tmp_path / "own").write_text(own_groups)
    for name, text in limits.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    monkeypatch.setattr(memory_budget, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory_budget, "CONTROL_GROUPS", tmp_path / "groups")
    assert memory_of(torch.device("cpu")) == (machine if least is None else least)
