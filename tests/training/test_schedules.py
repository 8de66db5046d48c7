from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from revnet.training import constant_rate, one_cycle, step_decay, warmup_cosine


def rates(schedule: Callable[..., LRScheduler], total_steps: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = schedule(optimizer, total_steps=total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_step_decay_changes_at_the_milestones_exactly() -> None:
    rate = rates(step_decay, 80)
    assert rate[:40] == [0.1] * 40
    assert rate[40:60] == pytest.approx([0.01] * 20)
    assert rate[60:] == pytest.approx([0.001] * 20)


@pytest.mark.parametrize(
    ("milestones", "total_steps", "boundaries"),
    [
        ([0.5, 0.75], 80_000, [40_000, 60_000]),
        ([0.26666667, 0.53333333, 0.8], 600_000, [160_000, 320_000, 480_000]),
    ],
)
def test_step_decay_has_the_paper_s_boundaries(
    milestones: list[float], total_steps: int, boundaries: list[int]
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    factor = step_decay(optimizer, total_steps, milestones).lr_lambdas[0]
    for count, step in enumerate(boundaries):
        assert factor(step - 1) == pytest.approx(0.1**count)
        assert factor(step) == pytest.approx(0.1 ** (count + 1))
    assert factor(total_steps - 1) == pytest.approx(0.1 ** len(boundaries))


def test_one_cycle_rises_and_falls_in_straight_lines() -> None:
    rate = rates(partial(one_cycle, rise=0.25, start=0.1, end=0.01), 101)
    assert (rate[0], rate[25], rate[100]) == pytest.approx((0.01, 0.1, 0.001))
    assert rate[:26] == pytest.approx(torch.linspace(0.01, 0.1, 26).tolist())
    assert rate[25:] == pytest.approx(torch.linspace(0.1, 0.001, 76).tolist())


def test_warmup_cosine() -> None:
    rate = rates(partial(warmup_cosine, warmup=0.1), 100)
    assert rate[:11] == pytest.approx([0.1 * (step + 1) / 11 for step in range(11)])
    assert rate[55] == pytest.approx(0.05)
    assert rate[10:] == sorted(rate[10:], reverse=True)
    assert 0 < rate[-1] < 1e-4


def test_constant_rate() -> None:
    assert rates(constant_rate, 5) == [0.1] * 5


@pytest.mark.parametrize("schedule", [step_decay, one_cycle, warmup_cosine, constant_rate])
@pytest.mark.parametrize("total_steps", [1, 2])
def test_every_schedule_survives_a_training_of_few_steps(
    schedule: Callable[..., LRScheduler], total_steps: int
) -> None:
    assert all(0 < rate <= 0.1 for rate in rates(schedule, total_steps))


@pytest.mark.parametrize("schedule", [step_decay, one_cycle, warmup_cosine])
def test_a_resumed_training_follows_the_schedule_of_its_new_length(schedule: Callable[..., LRScheduler]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    short = schedule(optimizer, total_steps=10)
    for _ in range(10):
        optimizer.step()
        short.step()
    resumed = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    longer = schedule(resumed, total_steps=40)
    longer.load_state_dict(short.state_dict())
    resumed.step()
    longer.step()
    assert longer.get_last_lr()[0] == pytest.approx(rates(schedule, 40)[11])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (partial(step_decay, milestones=[0.75, 0.5]), r"milestones .* got \[0.75, 0.5\]"),
        (partial(step_decay, milestones=[100]), r"milestones .* got \[100\]"),
        (partial(one_cycle, rise=1.0), "rise .* got 1.0"),
        (partial(warmup_cosine, warmup=-0.1), "warmup .* got -0.1"),
    ],
)
def test_bad_values_are_named(schedule: Callable[..., LRScheduler], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(schedule, 10)
