"""What torch takes for smaller without data than it is: counted in full, or refused."""

from functools import partial

import pytest
import torch
from torch import nn

from revnet.profiling import estimate, max_batch, measure_memory, plan
from revnet.reversible import AdditiveCoupling, Merge, ReversibleSequence, Split

SGD = partial(torch.optim.SGD, lr=0.1)


class Recurrent(nn.Module):
    """The outputs of a recurrent layer, without its last state."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Rows(nn.Module):
    """Looks the same rows up `times` times."""

    def __init__(self, times=1):
        super().__init__()
        self.table, self.times = nn.Embedding(10, 8, sparse=True), times

    def forward(self, x):
        rows = torch.arange(len(x)) % 10
        return x + sum(self.table(rows) for _ in range(self.times))


@pytest.mark.parametrize("train", [True, False])
def test_a_workspace_that_its_library_alone_knows_is_refused(train):
    network = nn.Sequential(Recurrent(nn.LSTM(64, 64, 2)), nn.Linear(64, 3)).train(train)
    match = r"^LSTM '0.layer' of Sequential: .*mkldnn_rnn_layer.* known only when it runs with data; use measure_memory"
    with pytest.raises(ValueError, match=match):
        estimate(network, (50, 32, 64))
    with pytest.raises(ValueError, match=match):
        max_batch(network, (32, 64), "1GB")
    with pytest.raises(ValueError, match=r"^LSTM: .*mkldnn_rnn_layer"):
        estimate(nn.LSTM(64, 64).train(train), (50, 32, 64))
    coupled = [Split(-1), AdditiveCoupling(Recurrent(nn.LSTM(64, 64))), Merge(-1)]
    with pytest.raises(ValueError, match=r"^LSTM '\S+layer' of ReversibleSequence: .*; use measure_memory"):
        plan(ReversibleSequence(coupled), (50, 32, 128), "1GB")


@pytest.mark.parametrize("make", [nn.GRU, nn.RNN])
def test_recurrent_layers_that_torch_itself_computes_are_estimated(make):
    layer = make(64, 64, 2)
    assert estimate(layer, (50, 32, 64)) == measure_memory(layer, torch.randn(50, 32, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_workspaces_of_cudnn_are_refused(make):
    with pytest.raises(ValueError, match=r"cudnn_rnn.* use measure_memory"):
        estimate(make(64, 64).cuda(), (50, 32, 64))


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_sparse_gradients_are_counted(optimizer):
    network = Rows()
    memory = measure_memory(network, torch.randn(1000, 8), optimizer=optimizer)
    assert memory.gradients == 1000 * (8 + 8 * 4)  # an index of 8 bytes and 8 values each
    assert estimate(network, (1000, 8), optimizer=optimizer) == memory


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [(Rows(), partial(SGD, momentum=0.9)), (Rows(), torch.optim.SparseAdam), (Rows(times=2), None)],
    ids=["momentum", "coalesced", "sum"],
)
def test_sparse_tensors_whose_size_is_not_known_are_refused(network, optimizer):
    assert measure_memory(network, torch.randn(100, 8), optimizer=optimizer).gradients > 0
    with pytest.raises(ValueError, match=r"^Rows: .* of sparse tensors .*; use measure_memory"):
        estimate(network, (100, 8), optimizer=optimizer)
