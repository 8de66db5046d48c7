import copy

import pytest
import torch
from torch import distributed

from revnet import ReversibleSequence
from revnet.flows import ActNorm, OnHalf, Scaling, nice
from tests.reversible.networks import EVERY


@EVERY
def test_actnorm_is_initialised_once_from_the_first_batch(activations):
    layer = ActNorm(3)
    sequence = ReversibleSequence([layer], activations)
    y = sequence(5 + 2 * torch.randn(8, 3, 4, 4))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(3))
    before = copy.deepcopy(layer.state_dict())
    assert before["initialised"]
    y.square().sum().backward()  # evaluates it again
    sequence(torch.randn(8, 3, 4, 4)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.shift.grad is not None


@EVERY
def test_gradients_of_the_first_step_are_those_of_an_initialised_layer(activations):
    x = 5 + 2 * torch.randn(8, 3, 4, 4, dtype=torch.float64)
    weight = torch.randn_like(x)
    layer = ActNorm(3).double()
    sequence = ReversibleSequence([layer], activations)
    (sequence(x) * weight).sum().backward()
    first = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (sequence(x) * weight).sum().backward()
    torch.testing.assert_close(first, [p.grad for p in layer.parameters()])


@EVERY
def test_scaling_is_initialised_once_from_the_first_batch(activations):
    layer = Scaling((3, 4, 4))
    sequence = ReversibleSequence([layer], activations)
    y = sequence(5 + torch.logspace(-2, 2, 48).view(3, 4, 4) * torch.randn(8, 3, 4, 4))
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(3, 4, 4), atol=1e-4, rtol=0)
    before = copy.deepcopy(layer.state_dict())
    assert before["initialised"]
    y.square().sum().backward()
    sequence(torch.randn(8, 3, 4, 4)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.log_scale.grad is not None


BOTH = pytest.mark.parametrize("build", [lambda: ActNorm(3), lambda: Scaling((3,))], ids=["ActNorm", "Scaling"])


@BOTH
def test_a_checkpoint_says_that_it_is_initialised(build):
    layer = build()
    layer(1 + torch.randn(8, 3))
    restored = build()
    restored(7 + 2 * torch.randn(8, 3))
    restored.load_state_dict(layer.state_dict())
    x = 9 + 3 * torch.randn(8, 3)
    assert torch.equal(restored(x), layer(x))
    restored.load_state_dict(build().state_dict())  # and that it is not
    torch.testing.assert_close(restored(x).std(0, correction=0), torch.ones(3))


@BOTH
def test_evaluation_does_not_initialise(build):
    layer, x = build().eval(), torch.randn(8, 3)
    assert torch.equal(layer(x), x)
    assert torch.equal(layer.train().inverse(x), x)
    assert not layer.initialised


def test_a_constant_channel_keeps_its_scale():
    x = torch.stack((torch.full((8,), 3.0), torch.randn(8)), 1)
    layer, scaling = ActNorm(2), Scaling((2,))
    assert torch.equal(layer(x)[:, 0], torch.zeros(8))
    assert torch.equal(scaling(x)[:, 0], x[:, 0])
    assert layer.log_scale[0] == scaling.log_scale[0] == 0


def test_half_is_0_or_1():
    with pytest.raises(ValueError, match="half=2: give 0 for the first"):
        OnHalf(Scaling((3,)), 2)


def initialised(layer, batches):
    layer = copy.deepcopy(layer)
    layer(batches[distributed.get_rank()])
    return {name: value.tolist() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("layer", [ActNorm(3), Scaling((3, 4, 4))], ids=["actnorm", "scaling"])
def test_two_processes_initialise_by_the_batches_of_both(layer, together):
    batches = 5 + torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1) * torch.randn(2, 8, 3, 4, 4)
    alone = copy.deepcopy(layer)
    alone(batches.flatten(0, 1))
    for found in together(initialised, layer, batches):
        assert found.keys() == alone.state_dict().keys()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(torch.tensor(found[name], dtype=value.dtype), value)


@pytest.mark.parametrize("layer", [ActNorm(4), Scaling((4,))], ids=["ActNorm", "Scaling"])
def test_what_was_learnt_by_way_of_the_inverse_is_kept(layer):
    layer = copy.deepcopy(layer).train()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.inverse(torch.randn(64, 4)).square().sum().backward()
    optimizer.step()
    learnt = layer.log_scale.detach().clone()
    layer(torch.randn(64, 4))
    assert torch.equal(layer.log_scale, learnt)
    assert layer.initialised


@EVERY
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of the compiler
def test_a_compiled_flow_learns_from_its_first_batch_as_an_eager_one(activations):
    torch._dynamo.reset()
    flow = nice((4,), hidden=8, layers=1, dequantise=False, activations=activations)
    eager, x = copy.deepcopy(flow), 5 * torch.randn(16, 4)
    torch.testing.assert_close(torch.compile(flow, backend="aot_eager")(x), eager(x))
    assert all(layer.initialised for layer in flow.modules() if isinstance(layer, (ActNorm, Scaling)))
    torch.testing.assert_close(dict(flow.named_parameters()), dict(eager.named_parameters()))
