from datetime import timedelta
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl

from revnet.flows import nice
from revnet.training import Classifier, DensityEstimator, FullyShard, WeightAverage
from tests.training.tiny import tiny_network


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (Classifier(tiny_network()), [WeightAverage()], "callbacks=ema does not go with trainer=fsdp"),
        (DensityEstimator(nice((1, 4, 4), hidden=4, layers=1)), [], "trainer=fsdp is for classifiers"),
    ],
)
def test_what_cannot_be_sharded_is_refused_at_once(module, callbacks, message):
    module.trainer = SimpleNamespace(callbacks=callbacks)
    with pytest.raises(ValueError, match=message):
        FullyShard(timedelta(minutes=1)).connect(module)


def test_normalisation_that_would_not_be_synchronised_is_refused():
    module = Classifier(tiny_network())
    module.trainer = SimpleNamespace(callbacks=[])
    trainer = pl.Trainer(
        accelerator="cpu", strategy=FullyShard(timedelta(minutes=1)), sync_batchnorm=True, logger=False
    )
    with pytest.raises(ValueError, match="sync_batchnorm=true does not go with trainer=fsdp"):
        trainer.strategy.connect(module)
