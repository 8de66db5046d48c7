"""What autograd offers around a backward pass works as it does over ordinary modules."""

import pytest
import torch
from torch import nn

from revnet import ReversibleSequence, is_recomputing, set_activations
from revnet.reversible import AdditiveCoupling, Merge, ReconstructionError, Split
from revnet.reversible.evaluation import Evaluation
from revnet.reversible.run import Run
from tests.reversible.networks import (
    BRANCHES,
    EXACT,
    MODES,
    Transition,
    basic,
    blocks,
    curved,
    relative,
    same,
    sequence,
    step,
)


@pytest.fixture
def x():
    return torch.randn(3, 8, 4, 4, dtype=torch.float64)


@MODES
@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_changed_in_place_between_the_passes_is_named(activations, exact, frozen, x):
    net = sequence(activations, exact=exact)
    net[3].f[5].weight.requires_grad_(not frozen)
    y = net(x)
    with torch.no_grad():
        net[3].f[5].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"parameter 3\.f\.5\.weight of a reversible sequence was changed in place"):
        y.sum().backward()


@EXACT
@pytest.mark.parametrize("plan", [["reconstruct"] * 6, ["recompute"] * 5 + ["reconstruct"]], ids=["all", "last"])
@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y.detach().mul_(2)], ids=["itself", "an alias"])
def test_an_output_modified_in_place_before_backward_is_autograds_version_error(plan, exact, change, x):
    y = sequence(plan, exact=exact)(x)
    loss = y.sum()
    change(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EXACT
@pytest.mark.parametrize("change", [lambda y: y.mul_(2), lambda y: y.detach().mul_(2)], ids=["itself", "an alias"])
@pytest.mark.parametrize("activations", ["recompute", ["recompute"] * 6], ids=["value", "plan"])
def test_an_output_that_is_not_kept_may_be_modified_in_place(activations, exact, change, x):
    net = sequence(activations, exact=exact)
    y = net(x)
    loss = y.sum()
    change(y)
    loss.backward()
    _, (_, *truth) = step(sequence("store", exact=exact), x, loss=torch.sum)
    assert same([p.grad for p in net.parameters()], truth, exact)


class Forgetful(nn.Module):
    """Counts its evaluations in a place that nobody knows of."""

    def __init__(self, channels):
        super().__init__()
        self.inner = basic(channels)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * self.calls


def with_one_forgetful_branch(activations, exact):
    net = sequence(activations, exact=exact)
    net[2].g = Forgetful(4).double()
    return net


@MODES
def test_a_branch_that_is_not_deterministic_is_named_by_the_debug_switch(activations, exact, x):
    net = with_one_forgetful_branch(activations, exact)
    net.check_determinism = True
    # A recomputed layer is evaluated as a whole.
    name = r"2\.g \(Forgetful\)" if activations == "reconstruct" else r"2 \(ReversibleBlock\)"
    with pytest.raises(RuntimeError, match=name + " of a reversible sequence is not deterministic"):
        step(net, x)


@EXACT
def test_a_branch_that_is_not_deterministic_is_seen_in_reconstruction_without_the_switch(exact, x):
    with pytest.raises(ReconstructionError, match=r"reversible sequence is .* off"):
        step(with_one_forgetful_branch("reconstruct", exact), x)


@MODES
def test_the_debug_switch_says_nothing_where_all_is_right_and_costs_nothing_where_it_is_off(
    activations, exact, x, monkeypatch
):
    net, compared = sequence(activations, branch=BRANCHES["dropout"], exact=exact), []
    sampled, check = Evaluation.sampled, Run.check_repeated

    def checked(self, module, evaluation, result):
        compared.append(evaluation.sample is not None)
        check(self, module, evaluation, result)

    monkeypatch.setattr(Run, "check_repeated", checked)
    monkeypatch.setattr(Evaluation, "sampled", lambda self, result: compared.append("sample") or sampled(self, result))
    step(net, x)
    assert set(compared) <= {False}  # perhaps asked, but nothing compared
    net.check_determinism = True
    compared.clear()
    step(net, x)
    evaluated = {"recompute": 4, "reconstruct": 2 * 4}[activations]  # blocks; branches
    assert (compared.count("sample"), compared.count(True), compared.count(False)) == (evaluated, evaluated, 0)


@MODES
def test_backward_twice_doubles_the_gradients_and_a_freed_graph_is_torchs_own_error(activations, exact, x):
    net = sequence(activations, exact=exact)
    loss = net(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(net.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@EXACT
def test_second_derivatives_are_refused_with_the_remedy(exact, x):
    x.requires_grad_()
    y = sequence("reconstruct", branch=curved, exact=exact)(x).square().sum()
    with pytest.raises(RuntimeError, match=r'differentiated twice .*activations="store", or to a plan'):
        torch.autograd.grad(y, x, create_graph=True)


@EXACT
@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_second_derivatives_work_where_nothing_is_reconstructed(activations, exact):
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    net = sequence(activations, 1, 2, branch=curved, exact=exact)
    if exact:  # finite differences see the steps of the grid; the gradients pass straight through it
        truth = sequence("store", 1, 2, branch=curved)
        found, expected = (
            torch.autograd.functional.hessian(lambda a, n=n: n(a).square().sum(), x) for n in (net, truth)
        )
        assert torch.allclose(found, expected, atol=1e-6)
    else:
        assert torch.autograd.gradgradcheck(net, (x,))


def test_second_derivatives_behind_a_layer_without_an_inverse_work_under_a_plan(x):
    """The single value "recompute" reconstructs the coupling there."""
    x.requires_grad_()
    couplings = [AdditiveCoupling(curved(4), swap) for swap in (True, False)]
    net = ReversibleSequence([Split(), Transition(4), *couplings, Merge()], "recompute").double()

    def second():
        (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match='or to a plan of "store" and "recompute" alone'):
        second()
    set_activations(net, ["recompute"] * len(net))
    found = second()
    set_activations(net, "store")
    assert relative(found, second()) < 1e-10


@MODES
@pytest.mark.parametrize("targets", ["input", "parameters", "one parameter"])
def test_autograd_grad_of_inputs_or_parameters_alone(activations, exact, targets, x):
    def gradients(value):
        net, leaf = sequence(value, exact=exact), x.clone().requires_grad_()
        parameters = list(net.parameters())
        wanted = {"input": [leaf], "parameters": parameters, "one parameter": [net[2].g[2].weight]}[targets]
        found = torch.autograd.grad(net(leaf).square().sum(), wanted)
        assert all(t.grad is None for t in (leaf, *parameters))
        return found

    assert same(gradients(activations), gradients("store"), exact)


@MODES
def test_hooks_of_parameters_run_once_and_may_change_the_gradient(activations, exact, x):
    net, order = sequence(activations, exact=exact), []
    for p in net.parameters():
        p.register_hook(lambda g: order.append("tensor") or 2 * g)
        p.register_post_accumulate_grad_hook(lambda _: order.append("accumulated"))
    _, (_, *found) = step(net, x)
    _, (_, *truth) = step(sequence("store", exact=exact), x)
    assert order.count("tensor") == order.count("accumulated") == len(found)
    assert same(found, [2 * g for g in truth], exact)


@MODES
def test_backward_hooks_of_branches_run_once_with_the_gradients_of_store(activations, exact, x):
    def seen(value):
        net, gradients = sequence(value, exact=exact), {}
        for name, module in net.named_modules():
            if name.endswith(("f", "g")):
                module.register_full_backward_hook(
                    lambda _, inputs, outputs, name=name: gradients.setdefault(name, []).extend((*inputs, *outputs))
                )
        step(net, x)
        return gradients

    found, truth = seen(activations), seen("store")
    assert len(found) == 8
    assert all(same(found[name], truth[name], exact) for name in truth)


@EXACT
@pytest.mark.parametrize("activations", ["store", "recompute", ["reconstruct"] * 3 + ["recompute", "reconstruct"]])
def test_backward_hooks_of_blocks_that_are_not_reconstructed_run_once(activations, exact, x):
    net, seen = sequence(activations, 3, exact=exact), []
    net[3].register_full_backward_hook(lambda _, inputs, outputs: seen.append(len(inputs) + len(outputs)))
    for _ in range(2):
        step(net, x)
    assert seen == [4, 4]


@EXACT
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_reconstructed_blocks_are_refused_with_the_remedy(exact, register, x):
    net = sequence("reconstruct", exact=exact)
    getattr(net[3], register)(lambda *_: None)
    remedy = r'ReversibleBlock has a backward hook.*on its branches, or give the layer "recompute" or "store"'
    with pytest.raises(ValueError, match=remedy):
        net(x)


@MODES
def test_forward_hooks_of_branches_run_again_and_can_tell(activations, exact, x):
    net, calls = sequence(activations, exact=exact), []
    net[2].f.register_forward_hook(lambda *_: calls.append(is_recomputing()))
    step(net, x)
    assert calls == [False, True]


@MODES
def test_an_optimizer_inside_the_backward_pass_steps_once_per_parameter(activations, exact, x):
    def after(value, inside):
        # A branch is shared by layers that are differentiated one after the other, in two runs.
        layers = blocks(3, 4)
        layers[2].f = layers[0].g
        net = ReversibleSequence([Split(), *layers, Merge()], value, exact)
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}

        def update(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        if inside:
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(update)
        for _ in range(2):
            net(x).square().sum().backward()
            if not inside:
                for p in net.parameters():
                    update(p)
        assert all(p.grad is None for p in net.parameters())
        return [p.detach() for p in net.parameters()]

    truth = after("store", inside=False)
    assert same(after(activations, inside=True), truth, exact)
    assert same(after([activations, activations, "store", activations, activations], inside=True), truth, exact)


@MODES
def test_what_autograd_saves_may_be_moved_to_the_cpu(activations, exact, x):
    _, truth = step(sequence("store", exact=exact), x)
    with torch.autograd.graph.save_on_cpu():
        _, found = step(sequence(activations, exact=exact), x)
    assert same(found, truth, exact)


@MODES
def test_many_backward_passes_at_once(activations, exact, x):
    cotangents = torch.randn(3, *x.shape, dtype=torch.float64)
    net = sequence(activations, branch=curved, exact=exact)
    found = torch.autograd.grad(net(x), list(net.parameters()), cotangents, is_grads_batched=True)
    for index, cotangent in enumerate(cotangents):
        net = sequence("store", branch=curved, exact=exact)
        truth = torch.autograd.grad(net(x), list(net.parameters()), cotangent)
        assert same([each[index] for each in found], truth, exact=False)


@MODES
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_accumulate_over_micro_batches(activations, exact, interleaved):
    batches = torch.randn(3, 4, 8, 4, 4, dtype=torch.float64)

    def gradients(value):
        net = sequence(value, exact=exact)
        if interleaved:
            for loss in [net(x).square().sum() for x in batches][::-1]:
                loss.backward()
        else:
            for x in batches:
                net(x).square().sum().backward()
        return [p.grad for p in net.parameters()]

    assert same(gradients(activations), gradients("store"), exact)


@EXACT
def test_backward_hooks_of_reconstructed_blocks_are_refused_after_a_step_too(exact, x):
    net = sequence("reconstruct", exact=exact)
    step(net, x)
    net[3].register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="ReversibleBlock has a backward hook"):
        net(x)
