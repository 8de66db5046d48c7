"""A mistake raises an error that names what was wrong, what was received, and the remedy."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from revnet import AdditiveCoupling, AffineCoupling, ReversibleBlock, ReversibleSequence, set_activations
from revnet.reversible import Coupling, Merge, Split, Step
from revnet.reversible.coupling import ADDITION
from tests.reversible.networks import EVERY, EXACT, MODES, VALUES, Transition, blocks, curved, sequence, step


@pytest.fixture
def halves():
    return torch.randn(2, 2, 4, 6, 6)


class Cast(nn.Module):
    """Returns another dtype than it is given."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


class Hides(nn.Module):
    """Holds its weights where nobody sees them."""

    def __init__(self, channels):
        super().__init__()
        self.layers = [nn.Conv2d(channels, channels, 1, bias=False, dtype=torch.float64)]

    def forward(self, x):
        return self.layers[0](x)


HIDDEN = r"a tensor of shape \(4, 4, 1, 1\) .* none of its parameters.*Register it"


class Gated(AdditiveCoupling):
    """Has a parameter that belongs to no branch."""

    def __init__(self, branch=None):
        super().__init__(branch or nn.Identity())
        self.gate = nn.Parameter(torch.ones(3))


class Double(nn.Module):
    """A user's own bijection, which is no addition."""

    def forward(self, x1, x2):
        return 2 * x1, 2 * x2

    def inverse(self, y1, y2):
        return y1 / 2, y2 / 2


def block_with(branch, position):
    branches = [nn.Identity(), nn.Identity()]
    branches[position] = branch
    return ReversibleBlock(*branches)


@EVERY
@EXACT
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("branch", "returned"),
    [
        (nn.AvgPool2d(2), r"\(2, 4, 3, 3\)"),
        (nn.Conv2d(4, 6, 1), r"\(2, 6, 6, 6\)"),
        (nn.Conv2d(4, 1, 1), r"\(2, 1, 6, 6\)"),
    ],
    ids=["smaller", "more channels", "one channel, which would broadcast"],
)
def test_a_branch_that_changes_the_shape_of_its_half(activations, exact, position, branch, returned, halves):
    net = ReversibleSequence([block_with(branch, position)], activations, exact)
    with pytest.raises(
        ValueError, match=rf"returned {returned}, the half is \(2, 4, 6, 6\); change the branch's output"
    ):
        net(*halves)


@EVERY
@EXACT
@pytest.mark.parametrize("position", [0, 1])
def test_a_branch_that_changes_the_dtype_of_its_half(activations, exact, position, halves):
    net = ReversibleSequence([block_with(Cast(torch.float64), position)], activations, exact)
    with pytest.raises(TypeError, match=r"must keep the dtype of the half.*float64.*float32"):
        net(*halves)


@EVERY
def test_a_branch_of_an_affine_coupling_that_changes_the_dtype_of_its_half(activations, halves):
    class Affine(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x), x.double()

    with pytest.raises(TypeError, match=r"must keep the dtype of the half.*float64.*float32"):
        ReversibleSequence([AffineCoupling(Affine())], activations)(*halves)


@EVERY
@EXACT
def test_a_branch_in_half_precision_is_added_to_its_half_in_full_precision(activations, exact, halves):
    net = ReversibleSequence([block_with(Cast(torch.bfloat16), 0)], activations, exact)
    assert [y.dtype for y in net(*halves)] == [torch.float32] * 2


@EVERY
@EXACT
def test_a_branch_that_returns_no_tensor(activations, exact, halves):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="a residual branch must return a tensor, got tuple"):
        ReversibleSequence([block_with(Pair(), 1)], activations, exact)(*halves)


@EVERY
def test_a_branch_of_an_affine_coupling_that_returns_no_pair(activations, halves):
    with pytest.raises(TypeError, match=r"must return a tuple \(log_scale, shift\), got Tensor; .*chunk\(2, dim=1\)"):
        ReversibleSequence([AffineCoupling(nn.Identity())], activations)(*halves)


@EVERY
@EXACT
def test_halves_that_differ_in_shape(activations, exact):
    x1, x2 = torch.randn(2, 4, 6, 6), torch.randn(2, 6, 6, 6)
    with pytest.raises(ValueError, match=r"returned \(2, 6, 6, 6\), the half is \(2, 4, 6, 6\).*split .* evenly"):
        ReversibleSequence([block_with(nn.Identity(), 0)], activations, exact)(x1, x2)


@EVERY
@EXACT
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_halves_that_differ_in_dtype(activations, exact, dtypes, halves):
    x1, x2 = (x.to(dtype) for x, dtype in zip(halves, dtypes, strict=True))
    with pytest.raises(TypeError, match=r"x1 and x2 must agree.*torch\.float\d\d.*torch\.float\d\d"):
        ReversibleSequence([block_with(nn.Identity(), 0)], activations, exact)(x1, x2)


@EVERY
@EXACT
def test_halves_that_differ_in_device(activations, exact, halves):
    with pytest.raises(TypeError, match=r"x1 and x2 must agree.*cpu.*meta"):
        ReversibleSequence([block_with(nn.Identity(), 0)], activations, exact)(halves[0], halves[1].to("meta"))


@EVERY
@EXACT
def test_halves_given_as_one_argument(activations, exact, halves):
    with pytest.raises(TypeError, match="x1 must be a tensor, got tuple; pass the halves as two arguments"):
        ReversibleSequence([block_with(nn.Identity(), 0)], activations, exact)(tuple(halves))


@EVERY
@EXACT
def test_one_tensor_where_two_halves_are_needed(activations, exact, halves):
    with pytest.raises(TypeError, match=r"x2 is missing: layer 0 \(ReversibleBlock\).*Split\(\)"):
        ReversibleSequence([block_with(nn.Identity(), 0)], activations, exact)(halves[0])


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: ReversibleBlock(torch.relu, nn.Identity()), "f"),
        (lambda: ReversibleBlock(nn.Identity(), torch.relu), "g"),
        (lambda: AdditiveCoupling(torch.relu), "branch"),
        (lambda: AffineCoupling(torch.relu), "branch"),
    ],
    ids=["f of a block", "g of a block", "additive", "affine"],
)
def test_a_branch_that_is_no_module(build, name):
    with pytest.raises(TypeError, match=rf"^{name} must be an nn\.Module.*got builtin_function_or_method; wrap it"):
        build()


def test_a_value_that_is_none_of_the_three():
    with pytest.raises(ValueError, match=r"one of 'store', 'recompute', 'reconstruct'; got 'keep'"):
        ReversibleSequence(blocks(2, 4), "keep")
    with pytest.raises(ValueError, match=r"one of 'store', 'recompute', 'reconstruct'; got 'keep'"):
        ReversibleSequence(blocks(2, 4), ["store", "keep"])
    with pytest.raises(ValueError, match="got 'all'"):
        set_activations(sequence("store"), "all")
    with pytest.raises(ValueError, match="got 3"):
        set_activations(sequence("store"), 3)


@pytest.mark.parametrize("length", [0, 4, 6])
def test_a_plan_of_the_wrong_length(length):
    layers = [Split(), *blocks(3, 4), Merge()]
    message = f"a plan needs one value for each layer; got {length} values for 5 layers"
    with pytest.raises(ValueError, match=message):
        ReversibleSequence(layers, ["store"] * length)
    net = ReversibleSequence(layers)
    with pytest.raises(ValueError, match=message):
        net.activations = ["store"] * length
    with pytest.raises(ValueError, match=message):
        set_activations(nn.Sequential(net), ["store"] * length)


@EXACT
def test_a_plan_that_a_layer_added_later_makes_too_short(exact):
    net = ReversibleSequence(blocks(4, 2), ["store", "recompute", "reconstruct", "store"], exact)
    net.append(blocks(1, 2)[0])
    with pytest.raises(ValueError, match="4 values for 5 layers"):
        net(*torch.randn(2, 2, 2, 4, 4, dtype=torch.float64))


def test_a_plan_that_asks_a_layer_without_inverse_to_reconstruct():
    with pytest.raises(ValueError, match=r"layer 3 \(Transition\) to reconstruct.*give it \"recompute\" or \"store\""):
        ReversibleSequence([Split(), *blocks(2, 4), Transition(4), Merge()], ["reconstruct"] * 5)


def test_set_activations_of_a_module_without_sequences():
    with pytest.raises(ValueError, match="Linear holds no ReversibleSequence"):
        set_activations(nn.Linear(2, 2), "store")


@EVERY
@EXACT
def test_an_inverse_or_a_log_determinant_over_a_layer_without_one(activations, exact):
    net = ReversibleSequence([Split(), *blocks(1, 4), Transition(4).double(), Merge()], activations, exact)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="Transition cannot be inverted"):
        net.inverse(x)
    with pytest.raises(TypeError, match="Transition has no log-determinant"):
        net.forward_and_log_det(x)


@EVERY
@EXACT
def test_an_odd_number_of_channels(activations, exact):
    with pytest.raises(ValueError, match=r"cannot split 7 channels \(dimension 1 of shape .*give an even number"):
        sequence(activations, exact=exact)(torch.randn(2, 7, 4, 4, dtype=torch.float64))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exact_sequence_of_a_dtype_that_its_grid_cannot_hold(activations, dtype, halves):
    net = ReversibleSequence([block_with(nn.Identity(), 0)], activations, exact=True)
    with pytest.raises(TypeError, match=rf"needs .* float32 or float64, got {dtype}: .*torch\.autocast instead"):
        net(*halves.to(dtype))


@EVERY
def test_an_exact_sequence_of_a_layer_that_is_no_addition(activations):
    layers = [Split(), AffineCoupling(nn.Identity()), Merge()]
    with pytest.raises(ValueError, match=r"layer 1 \(AffineCoupling\) cannot be undone to the bit.*exact=False"):
        ReversibleSequence(layers, activations, exact=True)
    net = ReversibleSequence(layers, activations)
    with pytest.raises(ValueError, match=r"layer 1 \(AffineCoupling\)"):
        net.exact = True
    assert net.exact is None


@EVERY
def test_a_layer_appended_to_an_exact_sequence_that_is_no_addition(activations, halves):
    net = ReversibleSequence(blocks(1, 4, dtype=torch.float32), activations, exact=True)
    net(*halves)
    net.append(Double())
    with pytest.raises(ValueError, match=r"layer 1 \(Double\) cannot be undone to the bit.*exact=False"):
        net(*halves)
    with pytest.raises(ValueError, match=r"layer 1 \(Double\)"):
        net.inverse(*halves)


@EVERY
def test_a_layer_of_an_exact_sequence_that_leaves_the_dtypes_that_its_grid_can_hold(activations, halves):
    net = ReversibleSequence([Cast(torch.bfloat16), Split()], activations, exact=True)
    with pytest.raises(TypeError, match=r"needs .* float32 or float64, got torch\.bfloat16: .*or set exact=False"):
        net(halves[0])


def test_a_value_of_exact_that_is_no_truth_value():
    with pytest.raises(ValueError, match=r"exact must be True, False or None .*got 'yes'"):
        ReversibleSequence([Split()], exact="yes")


@EXACT
def test_a_parameter_outside_the_branches_of_a_coupling(exact, halves):
    with pytest.raises(TypeError, match=r"'gate' of Gated belongs to no branch .*move it into a branch"):
        ReversibleSequence([Gated()], "reconstruct", exact)(*halves)


@EXACT
def test_a_parameter_outside_the_branches_of_a_coupling_that_is_appended_after_a_step(exact, halves):
    net = ReversibleSequence(blocks(1, 4, dtype=torch.float32), "reconstruct", exact)
    sum(net(*halves)).sum().backward()
    net.append(Gated())
    with pytest.raises(TypeError, match="'gate' of Gated belongs to no branch"):
        net(*halves)


@EVERY
@EXACT
def test_a_coupling_without_steps(activations, exact, halves):
    class Empty(Coupling):
        pass

    with pytest.raises(TypeError, match="Empty must define `steps`"):
        ReversibleSequence([Empty()], activations, exact)(*halves)


@EXACT
def test_a_tensor_that_a_branch_hides(exact):
    with pytest.raises(TypeError, match=HIDDEN):
        step(sequence("reconstruct", branch=Hides, exact=exact), torch.randn(2, 8, 4, 4, dtype=torch.float64))


@EXACT
def test_a_tensor_that_a_branch_hides_gets_its_gradient_where_the_branch_is_recomputed(exact):
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    found = []
    for activations in ("store", "recompute"):
        net = sequence(activations, branch=Hides, exact=exact)
        step(net, x)
        found.append([branch.layers[0].weight.grad for block in net[1:-1] for branch in (block.f, block.g)])
    assert all(map(torch.equal, *found))


@EXACT
def test_a_tensor_hidden_in_a_layer_that_was_stored_so_far(exact, halves):
    net = ReversibleSequence([*blocks(1, 4), block_with(Hides(4), 0)], ["reconstruct", "store"], exact)
    halves = halves.double()
    sum(net(*halves)).sum().backward()
    net.activations = "reconstruct"
    with pytest.raises(TypeError, match=HIDDEN):
        sum(net(*halves)).sum().backward()


@EXACT
def test_a_tensor_hidden_in_a_layer_that_is_appended_after_a_step(exact, halves):
    net = ReversibleSequence(blocks(1, 4), "reconstruct", exact)
    halves = halves.double()
    sum(net(*halves)).sum().backward()
    net.append(block_with(Hides(4), 0))
    with pytest.raises(TypeError, match=HIDDEN):
        sum(net(*halves)).sum().backward()


@EXACT
@pytest.mark.parametrize(
    ("layer", "used"),
    [(lambda: block_with(Hides(4), 1), 0), (lambda: AdditiveCoupling(Hides(4)), 1)],
    ids=["block", "additive"],
)
def test_a_tensor_hidden_in_a_branch_that_the_first_backward_pass_skipped(exact, layer, used, halves):
    net = ReversibleSequence([*blocks(1, 4), layer()], "reconstruct", exact)
    halves = halves.double()
    net(*halves)[used].sum().backward()
    with pytest.raises(TypeError, match=HIDDEN):
        sum(net(*halves)).sum().backward()


@EXACT
def test_a_tensor_hidden_in_a_branch_in_which_nothing_else_requires_grad(exact, halves):
    net = ReversibleSequence([ReversibleBlock(Hides(4), nn.Conv2d(4, 4, 1).double())], "reconstruct", exact)
    with pytest.raises(TypeError, match=HIDDEN):
        sum(net(*halves.double())).sum().backward()


@EVERY
@EXACT
def test_a_branch_that_changes_its_input_in_place(activations, exact):
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    net = sequence(activations, branch=lambda c: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c, c, 1)), exact=exact)
    before = x.clone()
    with pytest.raises(ValueError, match=r"changes its input in place.*inplace=False"):
        net(x)
    assert torch.equal(x, before)


@MODES
@pytest.mark.parametrize("position", [0, 3], ids=["first", "behind blocks"])
def test_a_recomputed_layer_that_changes_its_input_in_place(activations, exact, position):
    layers = [Split(), *blocks(1, 4), Merge()]
    layers.insert(position, nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(8, 8, 1)).double())
    net = ReversibleSequence(layers, activations, exact)
    with pytest.raises(ValueError, match=r"Sequential changes its input in place.*inplace=False"):
        net(torch.randn(2, 8, 4, 4, dtype=torch.float64))


@MODES
def test_a_branch_that_changes_the_context_in_place(activations, exact, halves):
    class Counts(nn.Module):
        def forward(self, x, context):
            return x * context["count"].add_(1)

    net = ReversibleSequence([ReversibleBlock(Counts(), Counts())], activations, exact)
    with pytest.raises(ValueError, match=r"a branch changes the context in place.*let it make a new tensor"):
        net(*halves.requires_grad_(), context={"count": torch.zeros(())})


@MODES
@pytest.mark.parametrize("change", ["append", "replace"])
def test_a_branch_that_leaves_something_in_the_context(activations, exact, change, halves):
    """Which somebody waits for, such as the auxiliary losses of a mixture of experts."""

    class Leaves(nn.Module):
        def forward(self, x, context):
            if change == "append":
                context["losses"].append(x.square().mean())
            else:
                context["scale"] = context["scale"] * 2
            return x * context["scale"]

    net = ReversibleSequence([ReversibleBlock(Leaves(), Leaves())], activations, exact)
    with pytest.raises(ValueError, match=r"a branch puts something into the context .*; give its layer \"store\""):
        net(*halves.requires_grad_(), context={"losses": [], "scale": torch.ones(())})


def test_a_tensor_hidden_in_a_shift_that_the_first_loss_did_not_use(halves):
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = curved(4).double(), Hides(4)

        def forward(self, x):
            return self.scale(x), self.shift(x)

    net = ReversibleSequence([AffineCoupling(Shift())], "reconstruct")
    net.forward_and_log_det(*halves.double())[1].sum().backward()
    with pytest.raises(TypeError, match=HIDDEN):
        sum(net(*halves.double())).sum().backward()


@EXACT
def test_a_tensor_hidden_in_a_module_that_replaces_another_within_a_branch(exact):
    net = sequence("reconstruct", branch=curved, exact=exact)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    step(net, x)
    net[2].f[0] = Hides(4)
    with pytest.raises(TypeError, match=HIDDEN):
        net(x).sum().backward()


@EXACT
def test_a_parameter_outside_the_branches_of_a_coupling_that_shares_its_branch(exact, halves):
    net = ReversibleSequence(blocks(1, 4), "reconstruct", exact)
    sum(net(*halves.double())).sum().backward()
    net.append(Gated(net[0].f).double())
    with pytest.raises(TypeError, match="'gate' of Gated belongs to no branch"):
        net(*halves.double())


@pytest.mark.parametrize("activations", VALUES[1:])
def test_parameters_without_a_shape_yet_are_refused_with_the_remedy(activations):
    net = ReversibleSequence([ReversibleBlock(nn.LazyLinear(4), nn.LazyLinear(4))], activations)
    x1, x2 = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"0\.f .*LazyLinear.* without a shape yet; run one forward pass under"):
        net(x1, x2)
    with torch.no_grad():
        net(x1, x2)
    sum(net(x1, x2)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


class Penalised(AffineCoupling):
    """Adds a term of its own to the log-determinant."""

    def forward_and_log_det(self, x1, x2, context=None):
        y, log_det = super().forward_and_log_det(x1, x2, context)
        return y, log_det - 1


def test_a_coupling_that_does_more_than_its_steps_is_refused(halves):
    penalised, replaced = Penalised(nn.Identity()), AdditiveCoupling(nn.Identity())
    replaced.forward = lambda x1, x2, context=None: (x1, x2)
    with pytest.raises(TypeError, match="Penalised has a `forward_and_log_det` of its own"):
        ReversibleSequence([penalised])(*halves.requires_grad_())
    with pytest.raises(TypeError, match="AdditiveCoupling has a `forward` of its own"):
        ReversibleSequence([replaced])(*halves)


def test_a_parameter_that_is_removed_between_the_passes_is_named(halves):
    branch = prune.identity(nn.Linear(6, 6), "weight")
    outputs = ReversibleSequence([AdditiveCoupling(branch)])(*halves)
    prune.remove(branch, "weight")
    with pytest.raises(RuntimeError, match=r"parameter 'weight_orig' of Linear .* was removed between the forward and"):
        outputs[0].sum().backward()


class Plain(nn.Module):
    """Has no inverse."""

    def forward(self, x1, x2):
        return 1 * x1, 1 * x2


def test_a_coupling_with_a_forward_put_in_place_behind_a_transition_is_recomputed(halves):
    coupling = AdditiveCoupling(nn.Linear(6, 6))
    coupling.forward = lambda x1, x2, context=None: (2 * x1, x2)
    outputs = ReversibleSequence([Plain(), coupling], "recompute", exact=False)(*halves.requires_grad_())
    outputs[0].sum().backward()
    assert torch.equal(halves.grad[0], torch.full_like(halves[0], 2))


class Unfreezes(nn.Linear):
    """Lets its bias require grad once it is called."""

    def forward(self, x):
        self.bias.requires_grad_(True)
        return super().forward(x)


@EXACT
def test_a_parameter_that_the_forward_pass_unfreezes_is_too_late(exact):
    branch = Unfreezes(6, 6)
    branch.bias.requires_grad_(False)
    sequence, x = ReversibleSequence([AdditiveCoupling(branch)], exact=exact), torch.randn(2, 4, 6)
    outputs = sequence(*x)
    with pytest.raises(RuntimeError, match="too late for a gradient of this step; run one forward pass"):
        outputs[0].sum().backward()
    sequence(*x)[0].sum().backward()
    assert branch.bias.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_branch_that_changes_its_input_is_refused_without_gradients_too(mode, halves):
    branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    with mode(), pytest.raises(ValueError, match="Sequential changes its input in place"):
        ReversibleSequence([AdditiveCoupling(branch)])(*halves)


@pytest.mark.parametrize("activations", VALUES[1:])
def test_a_replica_of_data_parallel_is_refused_with_the_remedy(activations, halves):
    replica = ReversibleSequence(blocks(4, 2), activations)._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"nn\.DataParallel .*DistributedDataParallel, or activations="):
        replica(*halves)


class Shift(nn.Module):
    """Whose inverse changes what it is given."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x):
        return x + self.shift

    def inverse(self, y):
        return y.sub_(self.shift)


def test_an_inverse_that_changes_what_it_is_given_in_place():
    sequence = ReversibleSequence([Shift()])
    y = sequence(torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"Shift changes in place what its `inverse` is given.*let it make a new"):
        y.sum().backward()
    with pytest.raises(ValueError, match="Shift changes in place"), torch.no_grad():
        sequence.inverse(y)


class Doubling:
    """A rule whose undo changes what it is given."""

    def move(self, x, h):
        return x * 2 + h, None

    def undo(self, y, h, out=None):
        return y.sub_(h).div_(2)


class Doubled(AdditiveCoupling):
    def steps(self):
        return (Step(self.branch, 0, Doubling()),)


def test_an_undo_that_changes_what_it_is_given_in_place(halves):
    y1, y2 = ReversibleSequence([Doubled(nn.Conv2d(4, 4, 1))], exact=False)(*halves)
    with pytest.raises(ValueError, match=r"Doubling changes in place what its `undo` is given"):
        (y1.sum() + y2.sum()).backward()


class Unregistered(Coupling):
    def __init__(self):
        super().__init__()
        self.parts = [nn.Conv2d(4, 4, 1)]

    def steps(self):
        return (Step(self.parts[0], 0, ADDITION),)


def test_a_branch_that_the_coupling_has_not_registered(halves):
    blocks = [ReversibleBlock(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), Unregistered()]
    with pytest.raises(TypeError, match=r"'weight' of Conv2d, in a branch of Unregistered, .*nn\.ModuleList"):
        ReversibleSequence(blocks)(*halves)


def test_a_buffer_with_a_gradient_that_a_branch_replaces_is_registered(halves):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(4, 1, 1, requires_grad=True))

        def forward(self, x):
            self.scale = self.scale * 2
            return x * self.scale

    y1, y2 = ReversibleSequence([ReversibleBlock(Scaled(), Scaled())], exact=False)(*halves)
    (y1.sum() + y2.sum()).backward()
