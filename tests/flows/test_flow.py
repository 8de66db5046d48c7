"""A flow is a density: it integrates to one, samples follow it, and a mistake is named."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from revnet import AffineCoupling, ReversibleSequence, set_activations
from revnet.flows import MLP, ActNorm, FactorOut, Flow, NonFiniteError, ScaleAndShift, Scaling, nice, realnvp
from revnet.profiling import estimate, measure_memory
from revnet.reversible import Merge, Split
from tests.reversible.networks import relative


def couplings(depth=4, dims=2, condition=0):
    branches = [ScaleAndShift(MLP(dims // 2, dims, 16, 1, condition), dims // 2) for _ in range(depth)]
    return [AffineCoupling(branch, swap=bool(index % 2)) for index, branch in enumerate(branches)]


def plane(activations="reconstruct", **arguments):
    """A flow on the plane."""
    torch.manual_seed(2)
    return Flow([ReversibleSequence([Split(), *couplings(), Merge()], activations)], (2,), **arguments).double()


def images(activations="reconstruct", **arguments):
    """A small RealNVP whose couplings are none of the beginning's identities."""
    torch.manual_seed(2)
    flow = realnvp((2, 4, 4), blocks=1, width=8, activations=activations, **arguments).double()
    flow.log_prob(torch.rand(8, 2, 4, 4).double(), arguments.get("classes") and torch.arange(8) % 3)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "last" in name:
                parameter += 0.1 * torch.randn_like(parameter)  # more takes samples to where the logit saturates
    return flow


@pytest.mark.parametrize("prior", ["normal", "logistic"])
def test_the_density_integrates_to_one(prior):
    flow, axis = plane(prior=prior), torch.linspace(-60, 60, 801, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    with torch.no_grad():
        density = flow.log_prob(grid.view(-1, 2)).exp().view(801, 801)
    assert abs(torch.trapezoid(torch.trapezoid(density, axis), axis) - 1) < 1e-2


def test_samples_follow_the_density():
    flow = plane()
    samples = flow.sample(20_000)
    axis = torch.linspace(-60, 60, 801, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    with torch.no_grad():
        weights = flow.log_prob(grid).exp()
    mean = (weights[:, None] * grid).sum(0) / weights.sum()
    assert torch.allclose(samples.mean(0), mean, atol=0.1)
    assert not samples.requires_grad


def test_log_prob_of_samples_is_that_of_log_prob():
    flow = plane()
    x, log_prob = flow.sample_and_log_prob(16, temperature=0.7)
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    image_flow = images(dequantise=False, logit=None)
    x, log_prob = image_flow.sample_and_log_prob(4)
    torch.testing.assert_close(log_prob, image_flow.log_prob(x))


def test_log_determinant_is_that_of_the_jacobian():
    flow, x = images(dequantise=False), torch.rand(1, 2, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.encode(x)[0], x).view(32, 32)
    z, log_det = flow.encode_and_log_det(x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1][None])
    back, inverse_log_det = flow.decode_and_log_det(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_8_bit_images_come_back_as_they_were():
    flow, x = images(), torch.randint(256, (8, 2, 4, 4)).double() / 255
    assert torch.equal(flow.decode(flow.encode(x)), x)


def gradients(flow, backwards, context=None, dtype=torch.float64):
    flow.zero_grad()
    torch.manual_seed(4)  # of the noise
    if backwards:
        z = torch.randn(6, flow.dims, dtype=torch.float64).to(dtype)
        x, log_det = flow.decode_and_log_det(z, context)
        (x.square().mean() + log_det.sin().sum()).backward()
    else:
        x = torch.rand(6, *flow.event_shape, dtype=torch.float64).to(dtype)
        z, log_det = flow.encode_and_log_det(x, context)
        (z.square().mean() + log_det.sin().sum()).backward()
    return [p.grad for p in flow.parameters()]


@pytest.mark.parametrize("backwards", [False, True], ids=["encode", "decode"])
@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
@pytest.mark.parametrize("classes", [None, 3])
def test_gradients_are_those_of_store(activations, backwards, classes):
    context = None if classes is None else torch.arange(6) % 3
    truth = gradients(images("store", classes=classes), backwards, context)
    found = gradients(images(activations, classes=classes), backwards, context)
    assert all(g is not None for g in truth)
    assert relative(found, truth) <= 1e-10


@pytest.mark.parametrize("backwards", [False, True], ids=["encode", "decode"])
def test_gradients_under_autocast_are_those_of_store_to_its_rounding(backwards):
    with torch.autocast("cpu", torch.bfloat16):
        truth = gradients(images("store").float(), backwards, dtype=torch.float32)
        found = gradients(images("reconstruct").float(), backwards, dtype=torch.float32)
    assert relative(found, truth) <= 5e-2  # the branches round to bf16 what was reconstructed in fp32


def test_training_through_samples_brings_them_to_a_target():
    target = MultivariateNormal(torch.tensor([2.0, -1.0]), torch.diag(torch.tensor([0.25, 1.0])))
    stages = [ReversibleSequence([Split(), *couplings(), Merge(), ActNorm(2)])]
    flow = Flow(stages, (2,))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(150):
        x, log_prob = flow.sample_and_log_prob(128)
        loss = (log_prob - target.log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 <= loss < 0.1
    assert torch.allclose(flow.sample(5000).mean(0), target.mean, atol=0.2)


class Direction(nn.Module):
    """A flow as a module from one tensor to one tensor."""

    def __init__(self, scales, couplings, backwards):
        super().__init__()
        self.flow = realnvp((4, 8, 8), scales, 1, 8, couplings, dequantise=False, logit=None)
        self.backwards = backwards
        self.flow.log_prob(torch.randn(8, 4, 8, 8))  # initialises ActNorm

    def forward(self, x):
        return self.flow.decode(x.flatten(1)) if self.backwards else self.flow.log_prob(x)


@pytest.mark.parametrize("backwards", [False, True], ids=["log_prob", "decode"])
@pytest.mark.parametrize(("scales", "depths"), [(1, (7, 15, 31)), (2, (2, 5, 10))])
def test_memory_does_not_grow_with_depth(backwards, scales, depths):
    """With 8, 16 and 32 couplings at one scale, with 7, 16 and 31 at two."""
    memories = [measure_memory(Direction(scales, depth, backwards), torch.randn(4, 4, 8, 8)) for depth in depths]
    assert len({memory.kept for memory in memories}) == 1
    peaks = [memory.peak for memory in memories]
    assert 0 < max(peaks) <= 1.01 * min(peaks)


def test_set_activations_switches_every_stage():
    flow = images()
    set_activations(flow, "store")
    assert [stage.activations for stage in flow.stages] == ["store", "store"]


def test_temperature_scales_the_latents():
    flow = plane()
    mode = flow.decode(torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(flow.sample(3, temperature=0), mode.expand(3, 2))
    torch.manual_seed(1)
    cold = flow.encode(flow.sample(100, temperature=0.5))
    torch.manual_seed(1)
    torch.testing.assert_close(cold, 0.5 * flow.encode(flow.sample(100)))


def test_interpolation_goes_from_one_end_to_the_other():
    flow = images()
    x1, x2 = torch.randint(256, (2, 3, 2, 4, 4)).double() / 255
    path = flow.interpolate(x1, x2, 5)
    assert path.shape == (5, 3, 2, 4, 4)
    assert torch.equal(path[0], x1)
    assert torch.equal(path[-1], x2)
    plane_flow, x = plane(), torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(plane_flow.interpolate(x, x, 4), x.expand(4, 3, 2))


def test_a_condition_changes_the_density_and_gets_gradients():
    flow, x = images(classes=3), torch.rand(2, 2, 4, 4, dtype=torch.float64)
    log_probs = []
    for label in range(3):
        torch.manual_seed(0)
        log_probs.append(flow.log_prob(x, torch.full((2,), label)))
    assert all((log_probs[0] != other).all() for other in log_probs[1:])
    log_probs[1].sum().backward()
    assert (flow.embedding.weight.grad.abs().sum(1) > 0).tolist() == [False, True, False]
    assert flow.sample(4, context=2).shape == (4, 2, 4, 4)
    assert flow.sample(2, context=torch.tensor([0, 1])).shape == (2, 2, 4, 4)


def test_a_condition_of_the_callers_own_gets_gradients():
    flow = Flow([ReversibleSequence([Split(), *couplings(condition=5), Merge()])], (2,))
    condition = torch.randn(3, 5, requires_grad=True)
    flow.log_prob(torch.randn(3, 2), condition).sum().backward()
    assert condition.grad.abs().sum() > 0


def test_a_prior_of_ones_own():
    prior = MultivariateNormal(torch.ones(2).double(), torch.eye(2).double())
    flow = plane(prior=prior)
    torch.testing.assert_close(flow.sample(2, temperature=0), flow.decode(torch.ones(2, 2).double()))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (MultivariateNormal(torch.zeros(3), torch.eye(3)), r"event shape \(3,\).*takes \(2,\)"),
        (Normal(torch.zeros(2), torch.ones(2)), r"event shape \(\) and batch shape \(2,\).*Independent"),
        (Independent(Normal(torch.zeros(4, 2), torch.ones(4, 2)), 1), r"batch shape \(4,\)"),
        ("gauss", "prior='gauss': give one of 'normal', 'logistic'"),
    ],
)
def test_a_prior_that_does_not_fit(prior, message):
    with pytest.raises(ValueError, match=message):
        plane(prior=prior)


@pytest.mark.parametrize("prior", [None, 3, nn.Identity()])
def test_a_prior_that_is_none(prior):
    with pytest.raises(TypeError, match=r"prior=.*: give one of 'normal', 'logistic' or a distribution"):
        plane(prior=prior)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda flow: flow.sample(0), "n=0: give how many"),
        (lambda flow: flow.sample_and_log_prob(-1), "n=-1: give how many"),
        (lambda flow: flow.sample(2, temperature=-0.1), "temperature=-0.1: give a factor"),
        (lambda flow: flow.log_prob(torch.randn(3, 4)), r"x has shape \(3, 4\).*\(B, 2\)"),
        (lambda flow: flow.log_prob(torch.ones(3, 2, dtype=torch.int64)), "give floating-point examples"),
        (lambda flow: flow.decode(torch.randn(3, 4)), r"z has shape \(3, 4\).*\(B, 2\)"),
        (lambda flow: flow.interpolate(torch.randn(3, 2), torch.randn(2, 2), 3), "as many examples at one end"),
        (lambda flow: flow.interpolate(torch.randn(3, 2), torch.randn(3, 2), 1), "steps=1 .* at least 2"),
        (lambda flow: flow.sample(2, context=torch.randn(2, 5).double()), "built without a condition"),
        (lambda flow: flow.sample(2, context=torch.randn(3, 5).double()), r"context has shape \(3, 5\) for 2"),
        (lambda flow: flow.log_prob(torch.randn(2, 2).double(), torch.tensor(1)), r"context has shape \(\) for 2"),
    ],
)
def test_a_mistake_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(plane())


@pytest.mark.parametrize(
    "labels", [None, torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.tensor([True, False])]
)
def test_labels_that_are_none(labels):
    with pytest.raises(ValueError, match=r"^context: "):
        images(classes=3).log_prob(torch.rand(2, 2, 4, 4).double(), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_be_whole_numbers_of_any_size(dtype):
    flow, x, labels = images(classes=3, dequantise=False), torch.rand(2, 2, 4, 4).double(), torch.tensor([2, 0])
    assert flow.log_prob(x, labels.to(dtype)).equal(flow.log_prob(x, labels))


def test_a_stage_that_ends_in_two_halves_is_refused():
    halves = ReversibleSequence([Split(), *couplings()])
    for shapes in (None, [(1,), (1,)]):
        with pytest.raises(ValueError, match="stage 0 returns two halves; let Merge or FactorOut end it"):
            Flow([halves], (2,), shapes).log_prob(torch.randn(3, 2))


def test_a_flow_is_measured_and_then_initialised_by_its_first_batch():
    flow, x = Flow([ReversibleSequence([ActNorm(2)])], (2,)), 5 + 2 * torch.randn(64, 2)
    measure_memory(flow.stages[0], torch.randn(64, 2))
    assert not flow.stages[0][0].initialised
    flow.log_prob(x)
    assert flow.stages[0][0].initialised
    torch.testing.assert_close(flow.encode(x).std(0, correction=0), torch.ones(2))


@pytest.mark.parametrize("initialised", [False, True])
def test_a_flow_is_estimated_like_any_module(initialised):
    flow = nice((1, 4, 4), hidden=8, layers=1)
    x = torch.rand(4, 1, 4, 4)
    if initialised:
        flow(x)
    estimated = estimate(flow, tuple(x.shape))
    assert estimated.peak == measure_memory(flow.eval(), x).peak or not initialised
    assert flow(x).shape == (4,)


def test_the_first_finite_batch_initialises():
    flow, x = Flow([ReversibleSequence([ActNorm(2), Scaling((2,))])], (2,)), 5 + 2 * torch.randn(64, 2)
    for value in (float("nan"), float("inf")):
        wrong = x.clone()
        wrong[3, 1] = value
        with pytest.raises(NonFiniteError, match="the examples hold values"):
            flow.log_prob(wrong)
    torch.testing.assert_close(flow.encode(x).std(0, correction=0), torch.ones(2))


def test_a_step_in_both_directions_wants_a_batch_first():
    flow, batch = Flow([ReversibleSequence([ActNorm(2), Scaling((2,))])], (2,)), 5 + 2 * torch.randn(16, 2)

    def backward():
        _, log_prob = flow.sample_and_log_prob(8)
        (log_prob.mean() - flow.log_prob(batch).mean()).backward()

    with pytest.raises(RuntimeError, match="changed in place between the forward and the backward pass"):
        backward()
    flow.zero_grad()
    backward()  # by now they have seen it
    assert all(parameter.grad.isfinite().all() for parameter in flow.parameters())


def test_stages_and_shapes_that_do_not_fit():
    stages = [ReversibleSequence([FactorOut()]), ReversibleSequence([Scaling((2, 4, 4))])]
    with pytest.raises(ValueError, match=r"hold 96 components, but event_shape=\(4, 4, 4\) has 64"):
        Flow(stages, (4, 4, 4), [(2, 4, 4), (4, 4, 4)])
    with pytest.raises(ValueError, match=r"but the stages gave \(\(2, 4, 4\), \(2, 4, 4\)\); name these"):
        Flow(stages, (4, 4, 4)).log_prob(torch.randn(2, 4, 4, 4))
    with pytest.raises(ValueError, match="FactorOut stands inside a stage"):
        Flow([ReversibleSequence([FactorOut(), Merge()])], (4, 4, 4))


def test_images_outside_the_unit_interval():
    with pytest.raises(ValueError, match="Dequantise takes values"):
        images().log_prob(2 * torch.rand(2, 2, 4, 4).double())


def test_an_exploding_inverse_is_caught_and_named():
    flow = images(dequantise=False)
    with torch.no_grad():
        flow.stages[0][4].branch.network.scale.fill_(-1e4)
    with pytest.raises(NonFiniteError, match=r"the inverse of stages\.0\.4 \(AffineCoupling\) .* NaN or infinite"):
        flow.decode(torch.randn(4, 32).double())


def test_nan_in_a_parameter_is_caught_and_named():
    flow = nice((4,), hidden=8, layers=1, dequantise=False)
    with torch.no_grad():
        flow.stages[0][3].branch.last.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the output of stages\.0\.3 \(AdditiveCoupling\)"):
        flow.log_prob(torch.rand(2, 4))
    with pytest.raises(NonFiniteError, match=r"the inverse of stages\.0\.3 \(AdditiveCoupling\)"):
        flow.decode(torch.rand(2, 4))


def test_nan_in_what_goes_in_is_named_as_such():
    with pytest.raises(NonFiniteError, match="the latents hold"):
        plane().decode(torch.full((1, 2), float("nan")).double())
    with pytest.raises(NonFiniteError, match="the examples hold"):
        plane().log_prob(torch.full((1, 2), float("nan")).double())


def test_copies_are_flows_of_their_own(tmp_path):
    flow, x = images("reconstruct", dequantise=False), torch.rand(2, 2, 4, 4).double()
    z = flow.encode(x)
    flow.decode(z)  # which makes the inverted sequences
    torch.save(flow, tmp_path / "flow.pt")
    for other in (copy.deepcopy(flow), torch.load(tmp_path / "flow.pt", weights_only=False)):
        assert torch.equal(other.decode(z), flow.decode(z))
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(other.decode(z), flow.decode(z))
    fresh = realnvp((2, 4, 4), blocks=1, width=8, dequantise=False).double()
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(fresh.encode(x), z)


def test_a_flow_of_one_dtype_or_another_has_its_prior_there():
    assert plane().sample(2).dtype == torch.float64
    assert plane().float().sample(2).dtype == torch.float32


@pytest.mark.parametrize("prior", ["normal", "logistic"])
def test_a_density_has_its_prior_where_the_latents_are(prior):
    flow = Flow([ReversibleSequence([Split(), Merge()])], (2,), prior=prior)  # which nothing else says
    assert flow.log_prob(torch.empty(3, 2, device="meta")).device.type == "meta"
    assert flow.log_prob(torch.randn(3, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
def test_a_flow_that_was_made_without_data_gets_it_from_a_checkpoint(assign):
    flow = nice((8,), hidden=8, layers=1, dequantise=False).eval()
    with torch.device("meta"):
        other = nice((8,), hidden=8, layers=1, dequantise=False).eval()
    if not assign:
        other.to_empty(device="cpu")
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.data.fill_(1)  # as memory may be that was not cleared
    other.load_state_dict(flow.state_dict(), assign=assign)
    x = torch.randn(2, 8)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
