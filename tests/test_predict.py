from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from revnet import train as train_module
from revnet.build import build
from revnet.predict import Predictor
from tests.commands import invoke
from tests.test_train import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run."""
    directory = tmp_path_factory.mktemp("run") / "here"
    assert invoke(train_module.main, *TINY, "logger=csv", f"run_dir={directory}") == 0
    return directory


def test_a_predictor_takes_bytes(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints/best.ckpt"
    predictor = Predictor(path)
    data, task = build(OmegaConf.create(torch.load(path, weights_only=True)["config"]))
    data.setup()
    images, _ = next(iter(data.test_dataloader()))
    task.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        truth = task.network.eval()(data.preprocess(images, training=False))
        assert predictor(images).equal(truth)
    assert predictor.class_names is None
    state = torch.load(path, weights_only=True)
    del state["Fake"]
    torch.save(state, tmp_path / "older.ckpt")
    with pytest.raises(ValueError, match=r"ckpt_path=.*older.ckpt does not say how .*"):
        Predictor(tmp_path / "older.ckpt")


def test_a_flow_gives_no_logits(tmp_path: Path) -> None:
    tiny = ("model=nice", "model.hidden=8", "model.layers=1", "data.normalization=unit", "data.flip=false")
    assert invoke(train_module.main, *TINY, *tiny, "logger=none", f"run_dir={tmp_path}/flow") == 0
    with pytest.raises(ValueError, match="is of a flow, which has no logits"):
        Predictor(tmp_path / "flow/checkpoints/best.ckpt")
