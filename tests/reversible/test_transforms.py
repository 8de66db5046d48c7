"""torch.compile, torch.func, torch.export, ONNX and FX work over sequences."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torchvision.models.feature_extraction import create_feature_extractor

from revnet import ReversibleSequence
from revnet.models import revnet38
from tests.reversible.networks import BRANCHES, EXACT, MODES, basic, relative, same, sequence, step

# Forward-mode derivatives of some operators are decomposed by torch with a compiler of its own that it has deprecated.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


class Network(nn.Module):
    """A sequence between ordinary layers."""

    def __init__(self, activations, exact=None, branch=basic, depth=2, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).to(dtype)
        self.body = sequence(activations, depth, 4, branch, dtype, exact=exact)
        self.head = nn.Linear(8, 5).to(dtype)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).relu().mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(3, 3, 6, 6, dtype=torch.float64)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiles(test):
    # Dynamo itself looks at the `.grad` of the tensors that it meets.
    ignored = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    return ignored(pytest.mark.usefixtures("_fresh_compiler")(test))


@MODES
@pytest.mark.parametrize("branch", ["basic", "dropout"])
@compiles
def test_a_compiled_network_has_the_gradients_and_statistics_of_store(activations, exact, branch, images):
    truth = Network("store", exact, BRANCHES[branch])
    net = Network(activations, exact, BRANCHES[branch])
    compiled = torch.compile(net)
    for _ in range(2):
        _, expected = step(truth, images)
        _, found = step(compiled, images)
    # In exact mode a rounding in the compiled stem can move the state by a step of the grid.
    assert relative(found, expected) <= (1e-7 if exact else 1e-10)
    for a, b in zip(net.buffers(), truth.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@EXACT
@compiles
def test_store_compiles_into_one_graph(exact, images):
    _, truth = step(Network("store", exact), images)
    _, found = step(torch.compile(Network("store", exact), fullgraph=True, backend="aot_eager"), images)
    assert relative(found, truth) <= (1e-7 if exact else 1e-10)
    assert counters["stats"]["unique_graphs"] == 1


@MODES
@compiles
def test_fullgraph_is_refused_with_the_reason_where_activations_are_not_kept(activations, exact, images):
    compiled = torch.compile(Network(activations, exact), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"reason: .*reversible sequence"):
        compiled(images)


@MODES
def test_functional_call_has_the_gradients_of_the_tensors_that_it_is_given(activations, exact):
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)

    def gradients(value):
        net = sequence(value, exact=exact)
        given = {name: (1.1 * p.detach()).requires_grad_() for name, p in net.named_parameters()}
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        loss = functional_call(net, (given, buffers), (x,)).square().sum()
        assert all(b == 0 for name, b in net.named_buffers() if name.endswith("num_batches_tracked"))
        return torch.autograd.grad(loss, list(given.values()))

    assert same(gradients(activations), gradients("store"), exact)


def evaluating(activations, exact):
    return sequence(activations, exact=exact).eval()


@MODES
def test_func_grad_of_parameters(activations, exact):
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    net, stored = evaluating(activations, exact), evaluating("store", exact)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    found = grad(lambda p: functional_call(net, p, (x,)).square().mean())(parameters)
    _, (_, *truth) = step(stored, x)
    assert same(list(found.values()), truth, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_vmap_over_gradients_of_what_is_reconstructed_is_refused_with_the_remedy(exact):
    net, x = evaluating("reconstruct", exact), torch.randn(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    y = net(x)
    with pytest.raises(RuntimeError, match=r"refused; take torch.autograd.grad\(..., is_grads_batched=True\)"):
        vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True))(torch.eye(32, dtype=x.dtype).view(32, *y.shape))


@MODES
def test_vmap_and_gradients_of_every_example(activations, exact):
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    net, stored = evaluating(activations, exact), evaluating("store", exact)
    assert torch.allclose(vmap(lambda a: net(a[None])[0])(x), net(x), rtol=1e-10, atol=1e-8)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    loss = grad(lambda p, a: functional_call(net, p, (a[None],)).square().mean())
    found = vmap(loss, (None, 0))(parameters, x)
    for i in range(3):
        _, (_, *truth) = step(stored, x[i : i + 1])
        assert relative([g[i] for g in found.values()], truth) <= (1e-7 if exact else 1e-10)


@MODES
@FORWARD_MODE
def test_forward_mode_and_jacobians(activations, exact):
    x, tangent = torch.randn(2, 1, 8, 2, 2, dtype=torch.float64)
    net, stored = evaluating(activations, exact), evaluating("store", exact)
    truth = torch.autograd.functional.jvp(stored, x, tangent)[1]
    assert torch.allclose(jvp(net, (x,), (tangent,))[1], truth)
    with forward_ad.dual_level():
        assert torch.allclose(forward_ad.unpack_dual(net(forward_ad.make_dual(x, tangent))).tangent, truth)
    jacobian = jacrev(net)(x)
    assert torch.allclose(torch.einsum("abcdefgh,efgh->abcd", jacobian, tangent), truth)


@MODES
def test_export_gives_the_same_output(activations, exact, images):
    net = Network(activations, exact).eval()
    exported = torch.export.export(net, (images,))
    assert torch.equal(exported.module()(images), net(images))


@MODES
def test_onnx_gives_the_same_output(activations, exact, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    net, x = Network(activations, exact, dtype=torch.float32).eval(), torch.randn(2, 3, 6, 6)
    torch.onnx.export(net, (x,), tmp_path / "network.onnx", dynamo=True, verbose=False)
    evaluator = ReferenceEvaluator(onnx.load(tmp_path / "network.onnx"))
    (found,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=1e-4, atol=1e-4)


@MODES
def test_a_sequence_is_a_leaf_of_a_symbolic_trace_and_keeps_its_gradients(activations, exact, images):
    net = Network(activations, exact)
    traced = torch.fx.symbolic_trace(net)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"][-2:] == ["body", "head"]
    assert isinstance(traced.body, ReversibleSequence)
    _, found = step(traced, images)
    _, truth = step(Network("store", exact), images)
    assert same(found, truth, exact)
    assert (net.body.reconstruction_error is not None) == (activations == "reconstruct")


@MODES
def test_a_symbolic_trace_of_a_sequence_itself_is_refused_with_the_remedy(activations, exact):
    with pytest.raises(TypeError, match="trace a module that holds it"):
        torch.fx.symbolic_trace(sequence(activations, exact=exact))


@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
@EXACT
def test_feature_extractors_of_torchvision_find_the_stages(activations, exact):
    net = revnet38(activations=activations, exact=exact).eval()
    images, truth = torch.randn(2, 3, 32, 32), {}
    for name in ("layer1", "layer3"):
        getattr(net, name).register_forward_hook(lambda _m, _i, output, name=name: truth.update({name: output}))
    net(images)
    features = create_feature_extractor(net, {"layer1": "a", "layer3": "b"})(images)
    assert torch.equal(features["a"], truth["layer1"])
    assert torch.equal(features["b"], truth["layer3"])
