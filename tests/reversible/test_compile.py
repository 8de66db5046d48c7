"""One switch compiles the branches, and they share their code."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from revnet import ReversibleSequence, compile_branches, set_activations
from revnet.models import RevNet
from revnet.models.branches import BasicBranch
from revnet.models.paper import table_1
from tests.reversible.networks import BRANCHES, MODES, relative, same, sequence, step

# Dynamo itself looks at the `.grad` of the tensors that it meets.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(activations, exact, depth, branch=BRANCHES["basic"], **options):
    net = sequence(activations, depth, 4, branch, exact=exact)
    compile_branches(net, **options)
    return net


@MODES
@pytest.mark.parametrize("branch", ["basic", "dropout"])
def test_compiled_branches_have_the_gradients_of_compiled_store(activations, exact, branch):
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    _, truth = step(compiled("store", exact, 4, BRANCHES[branch]), x)
    _, found = step(compiled(activations, exact, 4, BRANCHES[branch]), x)
    assert same(found, truth, exact)
    _, eager = step(sequence("store", 4, 4, BRANCHES["basic"], exact=exact), x)
    if branch == "basic":  # compiled dropout draws other numbers
        assert relative(found, eager) <= 1e-7


@pytest.mark.parametrize("exact", [False, True])
def test_one_graph_serves_every_block_every_mode_and_both_evaluations(exact):
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    for depth in (1, 6):
        mixed = [("reconstruct", "recompute", "store")[index % 3] for index in range(depth)]
        for activations in ("reconstruct", "store", "recompute", ["reconstruct", *mixed, "reconstruct"]):
            compiled(activations, exact, depth, backend="aot_eager")(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def network(units):
    torch.manual_seed(2)
    return RevNet(*table_1(BasicBranch, (units,) * 3, (8, 8, 16, 32)), small_images=True, num_classes=10, exact=True)


def test_a_deeper_network_compiles_no_more_graphs():
    graphs = []
    for units in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        net = network(units)
        compile_branches(net, backend="aot_eager")
        for activations in ("reconstruct", "store"):
            set_activations(net, activations)
            net(torch.randn(2, 3, 8, 8)).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    # A basic branch for each width, the network's first branch, and a transition into each later stage.
    assert graphs == [6, 6]


def test_all_kinds_of_branches_are_compiled_for_evaluation_and_for_training():
    net = network(2)
    compile_branches(net, backend="aot_eager")
    with torch.no_grad():
        net.eval()(torch.randn(2, 3, 8, 8))
    net.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2 * 6


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_gradients_are_bit_equal_to_compiled_store_in_single_and_half_precision(autocast):
    def gradients(activations):
        net = sequence(activations, 2, 4, dtype=torch.float32, exact=True)
        compile_branches(net)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return step(net, torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(3)))[1]

    truth = gradients("store")
    for activations in ("recompute", "reconstruct"):
        assert all(map(torch.equal, gradients(activations), truth))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_gradients_of_a_compiled_network_are_bit_equal_to_compiled_store_under_autocast():
    def gradients(activations):
        net = network(2)
        compile_branches(net)
        set_activations(net, activations)
        with torch.autocast("cpu", torch.bfloat16):
            return step(net, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)))[1]

    assert all(map(torch.equal, gradients("reconstruct"), gradients("store")))


def test_names_and_statistics_are_those_of_the_eager_network():
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    net, eager = compiled("reconstruct", None, 2, backend="aot_eager"), sequence("reconstruct", 2)
    step(net, x)
    step(eager, x)
    assert net.state_dict().keys() == eager.state_dict().keys()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-7, atol=1e-9)


def test_a_module_without_a_sequence_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"Linear holds no ReversibleSequence; compile it by torch\.compile"):
        compile_branches(nn.Linear(2, 2))


def test_a_branch_given_as_a_compiled_module_is_known_too():
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    net = sequence("reconstruct", 2)
    blocks = list(net)
    for block in blocks[1:-1]:
        block.f, block.g = (torch.compile(b, backend="aot_eager") for b in (block.f, block.g))
    ReversibleSequence(blocks, "reconstruct")(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
