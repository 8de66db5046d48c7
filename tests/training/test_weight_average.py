from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.optim.swa_utils import AveragedModel

from revnet.training import Classifier, LastCheckpoint, WeightAverage
from tests.training.tiny import tiny_batches, tiny_network


class Spy(pl.Callback):
    """Keeps the weights of every step, and saves a checkpoint after the second."""

    def __init__(self, path):
        self.path = path
        self.weights = []

    def on_train_batch_end(self, trainer, classifier, *rest):
        self.weights.append(classifier.network[0].weight.detach().clone())
        if len(self.weights) == 2:
            trainer.save_checkpoint(self.path)


# The classifier shards itself where the strategy asks for it, which none does here.
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_the_average_is_kept_and_tested_and_the_weights_are_trained(tmp_path):
    path = tmp_path / "second.ckpt"
    spy, classifier = Spy(path), Classifier(tiny_network(), partial(torch.optim.SGD, lr=0.1))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=[WeightAverage(decay=0.1, update_every_n_steps=1), spy],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(classifier, tiny_batches(6), tiny_batches(1))
    first, second, third = spy.weights
    average = 0.1 * first + 0.9 * second
    assert not torch.equal(first, second)
    torch.testing.assert_close(classifier.network[0].weight, 0.1 * average + 0.9 * third)
    checkpoint = torch.load(path, weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"]["network.0.weight"], average)
    assert torch.equal(checkpoint["current_model_state"]["network.0.weight"], second)
    trainer.test(classifier, tiny_batches(2), ckpt_path=path, weights_only=True, verbose=False)
    torch.testing.assert_close(classifier.network[0].weight, average)


def test_the_average_of_a_short_training_does_not_reach_back_to_its_beginning():
    averaged = AveragedModel(torch.nn.BatchNorm1d(1).double(), **WeightAverage(0.99)._kwargs, use_buffers=True)
    expected = 0.0
    for n in range(2000):
        module = torch.nn.BatchNorm1d(1).double()
        module.weight.data.fill_(n)
        module.num_batches_tracked.fill_(n)
        averaged.update_parameters(module)
        kept = min(0.99, (1 + n) / (10 + n)) if n else 0
        expected = kept * expected + (1 - kept) * n
        if n == 100:
            assert 100 - 15 < averaged.module.weight.item() < 100 - 5
    assert averaged.module.weight.item() == pytest.approx(expected)
    assert 1999 - averaged.module.weight.item() == pytest.approx(99, abs=1)
    assert averaged.module.num_batches_tracked == 1999


@pytest.mark.parametrize("wrong", [{"decay": 1.1}, {"decay": -0.1}, {"update_every_n_steps": 0}])
def test_what_is_no_average_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}=.*: give a number"):
        WeightAverage(**wrong)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_training_that_is_gone_on_with_behind_its_end_leaves_the_average(fit, tmp_path):
    def run(ckpt=None):
        module = Classifier(tiny_network(), partial(torch.optim.SGD, lr=0.1))
        callbacks = [WeightAverage(decay=0.5, update_every_n_steps=1), LastCheckpoint(tmp_path)]
        fit(module, callbacks=callbacks, enable_checkpointing=True, ckpt=ckpt)
        return module.state_dict()

    averaged, again = run(), run(tmp_path / "last.ckpt")
    assert all(torch.equal(averaged[name], again[name]) for name in averaged)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not all(torch.equal(averaged[name], weights) for name, weights in last["current_model_state"].items())
