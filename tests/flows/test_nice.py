import pytest
import torch

from revnet.flows import Logistic, Scaling, nice
from revnet.reversible import AdditiveCoupling


def test_it_is_the_network_of_the_paper():
    with torch.device("meta"):
        flow = nice((1, 28, 28))
    moves = [layer for layer in flow.stages[0] if isinstance(layer, AdditiveCoupling)]
    assert [layer.swap for layer in moves] == [False, True, False, True]
    widths = [tuple(p.shape) for p in moves[0].parameters() if p.ndim == 2]
    assert widths == [(1000, 392), *[(1000, 1000)] * 4, (392, 1000)]
    assert isinstance(flow.stages[-1][-1], Scaling)
    assert isinstance(flow.prior.base_dist, Logistic)
    assert flow.dims == 784


def test_the_log_determinant_is_that_of_the_scaling():
    flow = nice((1, 4, 4), hidden=8, layers=2).double()
    with torch.no_grad():
        flow.stages[1][0].log_scale.normal_()
    log_det = flow.encode_and_log_det(torch.rand(3, 1, 4, 4).double())[1]
    assert torch.equal(log_det, flow.stages[1][0].log_scale.sum().expand(3))


def test_exact_gives_back_every_bit_that_lies_on_the_grid():
    flow, x = (
        nice((1, 4, 4), hidden=8, layers=2, dequantise=False, exact=True),
        torch.randint(2**16, (3, 1, 4, 4)) / 2**16,
    )
    assert torch.equal(flow.decode(flow.encode(x)), x)


def test_it_learns_which_pixels_vary():
    flow = nice((8,), hidden=16, layers=1, dequantise=False)
    spread = torch.logspace(-1, 1, 8)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-2)
    for _ in range(150):
        loss = -flow.log_prob(spread * Logistic(torch.zeros(8)).sample((64,))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Entropy of the standard logistic is 2 nats a component; the product of the spreads is 1.
    assert abs(loss.item() - 16) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"event_shape": 784}, "event_shape=784: give the shape of an example"),
        ({"event_shape": (1, 3, 3)}, "has 9 components.*an even number"),
        ({"event_shape": (4,), "couplings": 0}, "couplings=0.*at least one coupling"),
        ({"event_shape": (4,), "layers": 0}, "layers=0: give at least one hidden layer"),
        ({"event_shape": (4,), "classes": 0}, "classes=0: give the number of classes"),
        ({"event_shape": (4,), "activations": "keep"}, "activations must be one of"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        nice(**arguments)


def test_8_bit_images_come_back_as_they_were_in_exact_mode():
    flow = nice((1, 28, 28), hidden=8, layers=1)
    x = torch.randint(256, (200, 1, 28, 28)) / 255
    with torch.no_grad():
        assert torch.equal(flow.decode(flow.encode(x)), x)
