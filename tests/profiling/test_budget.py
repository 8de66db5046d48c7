"""Sizes in words, and the largest batch for a budget."""

from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from revnet.models import get_model
from revnet.profiling import estimate, max_batch, parse_bytes


@pytest.mark.parametrize(
    ("size", "number"),
    [("16GiB", 16 * 2**30), ("16 GB", 16 * 10**9), ("500MB", 5 * 10**8), (7, 7), ("1.5kib", 1536), (" 8 b ", 8)],
)
def test_sizes(size, number):
    assert parse_bytes(size) == number


@pytest.mark.parametrize("size", ["16", "16 Gb/s", "16GX", "GB", "-1GB", 0, -5, 1.5, True, None, "0 GB", ""])
def test_no_sizes(size):
    with pytest.raises(ValueError, match="with one of the units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"):
        parse_bytes(size)


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.AdamW, foreach=True)])
@pytest.mark.parametrize("budget", [100_000, "1MB", "12 MB"])
def test_the_largest_batch_fits_and_one_more_does_not(optimizer, budget):
    # Wide enough that for small batches the optimizer's step is what takes most.
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    batch = max_batch(network, (64,), budget, optimizer=optimizer)
    totals = [estimate(network, (size, 64), optimizer=optimizer).total for size in (batch, batch + 1)]
    assert totals[0] <= parse_bytes(budget) < totals[1]


def test_it_takes_few_estimates(monkeypatch):
    tried = []

    def counted(model, shape, **options):
        tried.append(shape[0])
        return estimate(model, shape, **options)

    monkeypatch.setattr("revnet.profiling.budget.estimate", counted)
    reconstructed = max_batch(get_model("revnet38"), (3, 32, 32), "300MB")
    assert len(tried) <= 8
    assert reconstructed > 3 * max_batch(get_model("revnet38", activations="store"), (3, 32, 32), "300MB")


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), (8,)),
        (torchvision.models.resnet18(num_classes=10), (3, 32, 32)),  # its last normalisation sees 1x1 maps
    ],
    ids=["mlp", "resnet18"],
)
def test_the_search_begins_at_two_where_the_network_refuses_one(network, shape):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        estimate(network, (1, *shape))
    two, four = (estimate(network, (batch, *shape)).total for batch in (2, 4))
    assert [max_batch(network, shape, budget) for budget in (two, four - 1, four)] == [2, 3, 4]
    with pytest.raises(ValueError, match=f"is too small: a batch of 2 takes {two:,} bytes"):
        max_batch(network, shape, two - 1)


def test_the_least_budget_is_told():
    network = nn.Linear(100, 100)
    least = estimate(network, (1, 100)).total
    with pytest.raises(ValueError, match=f"budget='1kB' is too small: a batch of 1 takes {least:,} bytes"):
        max_batch(network, (100,), "1kB")
    assert max_batch(network, (100,), least) == 1
    with pytest.raises(ValueError, match=r"input_shape=\(1, 99\): Linear does not take it"):
        max_batch(network, (99,), "1GB")
