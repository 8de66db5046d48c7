"""Two processes in one group train as one process would."""

from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from revnet import ReversibleBlock, ReversibleSequence
from revnet.reversible import Merge, Split, set_chunk_size
from tests.reversible.networks import BRANCHES, EXACT, MODES, relative, sequence


class Network(nn.Module):
    """A sequence between two ordinary layers, and a layer that is not used."""

    def __init__(self, body, unused=False, dtype=torch.float32):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, dtype=dtype)
        self.body = body
        self.head = nn.Linear(8, 5, dtype=dtype)
        if unused:
            self.unused = nn.Linear(8, 5, dtype=dtype)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def network(activations, exact, branch="groupnorm", dtype=torch.float32, unused=False):
    torch.manual_seed(1)
    return Network(sequence(activations, 3, 4, BRANCHES[branch], dtype, exact=exact), unused, dtype)


def shared(activations, exact):
    """Every block of the sequence has the same two branches."""
    torch.manual_seed(1)
    f, g = BRANCHES["groupnorm"](4), BRANCHES["groupnorm"](4)
    return Network(
        ReversibleSequence([Split(), *[ReversibleBlock(f, g) for _ in range(3)], Merge()], activations, exact)
    )


def batches(count, dtype=torch.float32):
    """For each iteration the images of both processes, of shape (2, B, C, H, W)."""
    return torch.randn(count, 2, 4, 3, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(3))


def train(module, data, micro_batches=1):
    """SGD steps; every gradient is the sum over the micro-batches, of which the last one alone is synchronised."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for i, x in enumerate(data, 1):
        last = i % micro_batches == 0
        with nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync():
            module(x).square().mean().backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()


def ddp_deviates(build, activations, exact, kwargs, iterations=5, micro_batches=1):
    """Raises unless parameters after training in two processes are those of one process with both batches."""
    data = batches(iterations)
    net, truth = build(activations, exact), build("store", exact)
    train(DistributedDataParallel(net, **kwargs), data[:, distributed.get_rank()], micro_batches)
    train(truth, data.flatten(1, 2), micro_batches)
    for found, expected in zip(net.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1.3e-6, atol=5e-5)


def chunked(activations, exact):
    net = network(activations, exact)
    set_chunk_size(net, 2)
    return net


def with_unused(activations, exact):
    return network(activations, exact, unused=True)


@MODES
@pytest.mark.parametrize(
    ("build", "kwargs"),
    [
        (network, {}),
        (with_unused, {"find_unused_parameters": True}),
        (network, {"static_graph": True}),
        (network, {"gradient_as_bucket_view": True}),
        (network, {"bucket_cap_mb": 0.001}),
        (chunked, {"bucket_cap_mb": 0.001}),
        (shared, {}),
        (shared, {"static_graph": True}),
    ],
    ids=[
        "default",
        "unused",
        "static",
        "bucket-view",
        "many-buckets",
        "chunks",
        "shared-weights",
        "shared-weights-static",
    ],
)
def test_ddp_trains_as_one_process_with_both_batches(together, activations, exact, build, kwargs):
    together(ddp_deviates, build, activations, exact, kwargs)


@MODES
def test_ddp_accumulates_gradients_without_synchronisation(together, activations, exact):
    together(ddp_deviates, network, activations, exact, {}, 6, 3)


def ddp_statistics(activations, exact):
    """Parameters and running statistics under DDP, where each process normalises its own batch."""
    net = network(activations, exact, "basic")
    train(DistributedDataParallel(net), batches(5)[:, distributed.get_rank()])
    return {name: value.numpy() for name, value in net.state_dict().items()}


@MODES
def test_ddp_keeps_normalisation_statistics_as_store_does(together, activations, exact):
    for found, truth in zip(
        together(ddp_statistics, activations, exact), together(ddp_statistics, "store", exact), strict=True
    ):
        for name in truth:
            tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": 1.3e-6, "atol": 5e-5}
            torch.testing.assert_close(found[name], truth[name], **tolerances)


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def fsdp_branch_behind_an_evaluation(activations):
    net = network(activations, True)
    fully_shard(net.body[2].g, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    x = batches(1, torch.float32)[0, distributed.get_rank()]
    with torch.no_grad():
        net.body[2].g(torch.randn(4, 4, 6, 6))
    net(x)


def fsdp_deviates(activations, exact, sharded, reshard):
    """The error of the gradients in the third step of training with sharded parameters."""
    rank, data = distributed.get_rank(), batches(3, torch.float64)
    mesh = init_device_mesh("cpu", (2,))
    net, truth = (network(value, exact, dtype=torch.float64) for value in (activations, "store"))
    targets = {"sequence": [net.body, net], "network": [net], "branch": [net.body[2].g, net]}[sharded]
    for module in targets:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    for x in data:
        for module in (net, truth):
            with torch.no_grad():
                for p in module.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
            module.zero_grad()
        net(x[rank]).square().mean().backward()
        truth(x.flatten(0, 1)).square().mean().backward()
    return relative([whole(p.grad) for p in net.parameters()], [p.grad for p in truth.parameters()])


@MODES
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("sharded", ["sequence", "network"])
def test_fsdp_shards_a_sequence_or_a_network(together, activations, exact, sharded, reshard):
    assert max(together(fsdp_deviates, activations, exact, sharded, reshard)) <= 1e-10


@MODES
def test_fsdp_of_a_branch_inside_a_sequence_is_refused_with_the_remedy(together, activations, exact):
    with pytest.raises(ValueError, match=r"2\.g of a reversible sequence was given to fully_shard.*whole sequence"):
        together(fsdp_deviates, activations, exact, "branch", True)


@pytest.mark.parametrize("activations", ["recompute", "reconstruct"])
def test_fsdp_of_a_branch_is_refused_while_its_parameters_are_whole(together, activations):
    with pytest.raises(ValueError, match=r"2\.g of a reversible sequence was given to fully_shard.*whole sequence"):
        together(fsdp_branch_behind_an_evaluation, activations)


@EXACT
def test_fsdp_of_a_branch_inside_a_stored_sequence_works(together, exact):
    assert max(together(fsdp_deviates, "store", exact, "branch", True)) <= 1e-10


def steps(net, data):
    """Gradients of the last step, and buffers."""
    for x in data:
        net.zero_grad()
        net(x).square().mean().backward()
    return [t.cpu().numpy() for t in (*(p.grad for p in net.parameters()), *net.buffers())]


def synchronised(activations, exact, device, wrap):
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network(activations, exact, "basic", torch.float64)).to(device)
    return steps(wrap(net), batches(2, torch.float64)[:, distributed.get_rank()].to(device))


def synchronised_in_half_precision(activations, exact):
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network(activations, exact, "postnorm", torch.float32)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        return steps(DistributedDataParallel(net), batches(2, torch.float32)[:, distributed.get_rank()].cuda())


@MODES
@pytest.mark.parametrize("wrap", [nn.Sequential, DistributedDataParallel])
def test_sync_batch_norm_on_a_cpu_is_torchs_clear_error(together, activations, exact, wrap):
    with pytest.raises(ValueError, match=r"SyncBatchNorm .* GPU"):
        together(synchronised, activations, exact, "cpu", wrap)


@pytest.mark.gpu
@MODES
def test_sync_batch_norm_has_the_statistics_and_gradients_of_both_batches(together, activations, exact):
    truth = steps(
        network("store", exact, "basic", torch.float64).cuda(), batches(2, torch.float64).flatten(1, 2).cuda()
    )
    for results in together(synchronised, activations, exact, "cuda", DistributedDataParallel):
        for found, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@MODES
def test_sync_batch_norm_in_half_precision_has_the_gradients_of_store(together, activations, exact):
    truth = together(synchronised_in_half_precision, "store", exact)
    for results, expected in zip(together(synchronised_in_half_precision, activations, exact), truth, strict=True):
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)
