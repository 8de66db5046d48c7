"""The family among the models of torchvision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import _api

import revnet.torchvision
from revnet.models import RevNet, get_model, save_weights
from revnet.torchvision import RevNetWeights, register

FAMILY = ["revnet18", "revnet34", "revnet50", "revnet101", "revnet152", "revnext50_32x4d", "wide_revnet50_2"]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def theirs(monkeypatch):
    """The models that torchvision has by itself; what a test registers is gone behind it."""
    models = {name: build for name, build in _api.BUILTIN_MODELS.items() if name not in FAMILY}
    registry = dict(models)
    for module in (_api, revnet.torchvision):
        monkeypatch.setattr(module, "BUILTIN_MODELS", registry)
    return models


def test_importing_the_networks_does_not_load_torchvision():
    code = "import sys, revnet.models, revnet.profiling; print('torchvision' in sys.modules)"
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


def test_registration_adds_the_family_and_nothing_else_as_often_as_it_is_called(theirs):
    assert not set(FAMILY) & set(torchvision.models.list_models())
    register()
    once = dict(_api.BUILTIN_MODELS)
    register()
    assert once == _api.BUILTIN_MODELS
    assert once.keys() - theirs.keys() == set(FAMILY)
    assert all(once[name] is build for name, build in theirs.items())
    assert set(torchvision.models.list_models(include="*rev*")) == set(FAMILY)
    assert set(torchvision.models.list_models(module=revnet.models)) == set(FAMILY)


def test_a_name_that_torchvision_has_stays_what_it_is():
    _api.BUILTIN_MODELS["revnet50"] = theirs = torchvision.models.resnet50
    register()
    assert _api.BUILTIN_MODELS["revnet50"] is theirs
    assert "revnet101" in _api.BUILTIN_MODELS


@pytest.mark.parametrize("name", FAMILY)
def test_get_model_gives_the_network_of_the_builder(name):
    register()
    builder = torchvision.models.get_model_builder(name)
    assert builder.__name__ == name
    assert builder.__doc__ == getattr(revnet.models, name).__doc__
    with torch.device("meta"):
        network = torchvision.models.get_model(name, num_classes=10, progress=False, activations="store")
        expected = get_model(name, num_classes=10)
    assert isinstance(network, RevNet)
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (network, expected)]
    assert shapes[0] == shapes[1]
    assert network.layer1.activations == "store"
    assert network.architecture == {"model": name, "arguments": {"num_classes": 10, "activations": "store"}}


@pytest.mark.parametrize("name", FAMILY)
def test_no_weights_are_published(name):
    register()
    assert torchvision.models.get_model_weights(name) is RevNetWeights
    assert list(RevNetWeights) == []
    with (
        torch.device("meta"),
        pytest.raises(FileNotFoundError, match="weights=DEFAULT is not a file, and no pretrained"),
    ):
        torchvision.models.get_model(name, weights="DEFAULT")


def test_weights_of_a_file(tmp_path):
    register()
    network = torchvision.models.get_model("revnet18", num_classes=3).eval()
    save_weights(network, tmp_path / "weights.safetensors")
    again = torchvision.models.get_model("revnet18", num_classes=3, weights=tmp_path / "weights.safetensors").eval()
    assert torch.equal(again(IMAGES), network(IMAGES))
