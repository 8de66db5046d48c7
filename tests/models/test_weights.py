"""Files of weights: the way out and back, for every builder, and what is no such file."""

import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import ResNet50_Weights, resnet18
from torchvision.ops import FrozenBatchNorm2d

from revnet.models import (
    architecture_of,
    get_model,
    list_models,
    load_weights,
    revnet18,
    revnet38,
    revnet50,
    save_weights,
)
from revnet.profiling import plan
from tests.sizes import large_ones_slow

IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)


def outputs(network):
    return network.eval()(IMAGES)


@pytest.fixture
def file(tmp_path):
    """The weights of a `revnet18` for 7 classes."""
    save_weights(revnet18(num_classes=7), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("name", large_ones_slow(list_models()))
def test_a_network_and_the_one_of_its_file_have_the_same_outputs(name, tmp_path):
    path = tmp_path / "weights.safetensors"
    network = get_model(name, num_classes=3)
    network(IMAGES)  # moves the statistics
    save_weights(network, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]
    architecture = architecture_of(path)
    assert architecture == {"model": name, "arguments": {"num_classes": 3}}
    again = get_model(architecture["model"], weights=path, **architecture["arguments"])
    assert all(value.equal(again.state_dict()[key]) for key, value in network.state_dict().items())
    assert outputs(again).equal(outputs(network))
    assert load_file(path).keys() == network.state_dict().keys()


def test_what_leaves_the_weights_alone_may_differ(tmp_path):
    path = str(tmp_path / "weights.safetensors")
    network = get_model("revnet50", num_classes=3, activations="store", exact=False)
    save_weights(network, path)
    assert architecture_of(path)["arguments"] == {"num_classes": 3, "activations": "store", "exact": False}
    for arguments in ({}, {"activations": "recompute"}, {"exact": True}, {"norm_layer": FrozenBatchNorm2d}):
        again = get_model("revnet50", num_classes=3, weights=path, **arguments)
        torch.testing.assert_close(outputs(again), outputs(network), rtol=1e-3, atol=1e-3)
    get_model("revnet50", num_classes=3, weights=path, replace_stride_with_dilation=[False, True, True])


def test_a_frozen_normalisation_of_another_eps_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    network = revnet38(num_classes=3)  # eps 1e-3, as published
    save_weights(network, path)
    with pytest.raises(ValueError, match=r"eps=0\.001.*eps=1e-05"):
        revnet38(num_classes=3, weights=path, norm_layer=FrozenBatchNorm2d)
    again = revnet38(num_classes=3, weights=path, norm_layer=partial(FrozenBatchNorm2d, eps=1e-3))
    torch.testing.assert_close(again.eval()(IMAGES), network.eval()(IMAGES))


def test_formats_and_dtypes_of_the_weights(tmp_path, file):
    network = revnet18(num_classes=7, weights=file).to(memory_format=torch.channels_last)
    save_weights(network, tmp_path / "last.safetensors")
    assert all(value.equal(load_file(file)[key]) for key, value in load_file(tmp_path / "last.safetensors").items())
    save_weights(network.bfloat16(), file)
    assert load_file(file)["conv1.weight"].dtype == torch.bfloat16
    again = revnet18(num_classes=7, weights=file)
    assert again.conv1.weight.dtype == torch.float32
    assert again.conv1.weight.equal(network.conv1.weight.float())


def test_a_replaced_linear_layer_counts(file):
    network = revnet18(weights=None)
    network.fc = nn.Linear(512, 4)
    save_weights(network, file)  # which replaces the file that was there
    assert architecture_of(file)["arguments"] == {"num_classes": 4}
    assert outputs(revnet18(num_classes=4, weights=file)).equal(outputs(network))


def test_a_plan_is_recorded_as_its_values(tmp_path):
    found = plan(revnet38(), (2, 3, 32, 32), "1GB")
    path = tmp_path / "weights.safetensors"
    save_weights(revnet38(activations=found), path)
    arguments = architecture_of(path)["arguments"]
    assert arguments["activations"] == list(found)
    revnet38(weights=path, **arguments)


def test_numbers_of_numpy_are_recorded_as_numbers(file):
    save_weights(revnet50(in_channels=np.int64(4), replace_stride_with_dilation=[np.bool_(False)] * 3), file)
    held = architecture_of(file)["arguments"]
    assert held == {"num_classes": 1000, "in_channels": 4, "replace_stride_with_dilation": [False] * 3}
    assert revnet50(**held, weights=file).conv1.in_channels == 4


@pytest.mark.parametrize(
    ("norm_layer", "recorded"),
    [
        (nn.BatchNorm2d, "torch.nn.modules.batchnorm.BatchNorm2d"),
        (partial(nn.GroupNorm, 4), "torch.nn.modules.normalization.GroupNorm(4)"),
        (partial(nn.BatchNorm2d, eps=1e-3), "torch.nn.modules.batchnorm.BatchNorm2d(eps=0.001)"),
        (lambda channels: nn.GroupNorm(8, channels), r"tests.*test_weights.*<lambda>"),
    ],
)
def test_a_normalisation_is_recorded_by_name(norm_layer, recorded, file):
    network = revnet18(num_classes=3, norm_layer=norm_layer)
    save_weights(network, file)
    held = architecture_of(file)["arguments"]["norm_layer"]
    assert held == recorded or ("lambda" in recorded and held.endswith("<lambda>"))
    again = revnet18(num_classes=3, norm_layer=norm_layer, weights=file)
    assert outputs(again).equal(outputs(network))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "revnet18",
            {"num_classes": 10},
            r"are for revnet18\(num_classes=7\), not for revnet18\(num_classes=10\), .*fc\.",
        ),
        ("revnet18", {}, r"are for revnet18\(num_classes=7\), not for revnet18\(\), which was to read them: .*fc\."),
        ("revnet34", {"num_classes": 7}, r"not for revnet34\(num_classes=7\), .*layer1\.3"),
        ("revnet50", {"num_classes": 7}, r"not for revnet50\(num_classes=7\)"),
        ("resnet32", {"num_classes": 7}, r"not for resnet32\(num_classes=7\)"),
        (
            "revnet18",
            {"num_classes": 7, "in_channels": 1},
            r"not for revnet18\(num_classes=7, in_channels=1\), .*conv1",
        ),
        ("revnet18", {"num_classes": 7, "downsampling": "space_to_depth"}, "downsampling=space_to_depth"),
        ("revnet18", {"num_classes": 7, "norm_layer": partial(nn.GroupNorm, 8)}, r"norm_layer=torch.*GroupNorm\(8\)"),
        (
            "revnet18",
            {"num_classes": 7, "norm_layer": partial(nn.BatchNorm2d, eps=1e-3)},
            r"norm_layer=.*, which was to read them: BatchNorm2d\(eps=1e-05\).*, here BatchNorm2d\(eps=0\.001\)",
        ),
    ],
)
def test_weights_of_another_network_are_refused_with_both_names(name, arguments, message, file):
    with pytest.raises(ValueError, match=message) as error:
        get_model(name, weights=file, **arguments)
    assert str(file) in str(error.value)
    assert len(str(error.value)) < 700


def test_a_network_of_another_library_is_refused(file):
    with pytest.raises(ValueError, match=r"are for revnet18\(num_classes=7\), not for this ResNet"):
        load_weights(resnet18(num_classes=7), file)
    with pytest.raises(ValueError, match="this ResNet does not know its architecture; give save_weights"):
        save_weights(resnet18(num_classes=7), file)


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V2", "nowhere.safetensors", "", "."])
def test_what_is_no_file_is_refused(weights):
    with pytest.raises(
        FileNotFoundError, match=f"weights={weights} is not a file, and no pretrained weights are published"
    ):
        revnet38(weights=weights)


@pytest.mark.parametrize("weights", [ResNet50_Weights.DEFAULT, True, 3, b"weights.safetensors"])
def test_what_is_no_path_is_refused(weights):
    with pytest.raises(TypeError, match=r"weights=.* is no path, and no pretrained weights are published yet; give"):
        revnet38(weights=weights)


@pytest.mark.parametrize("share", [0, 1e-7, 1e-4, 0.5, 0.999])
def test_a_file_cut_short_is_refused(share, file):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    for read in (architecture_of, lambda path: revnet18(num_classes=7, weights=path)):
        with pytest.raises(
            ValueError, match=r"weights=.*weights\.safetensors is no safetensors file, or one cut short"
        ):
            read(file)


def test_files_of_other_libraries_are_refused_with_the_remedy(tmp_path):
    network = revnet38()
    path = tmp_path / "theirs"
    save_file(network.state_dict(), path)
    with pytest.raises(ValueError, match=r"does not say which network of revnet\.models it is for; .*load_state_dict"):
        revnet38(weights=path)
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match="is no safetensors file"):
        revnet38(weights=path)


@pytest.mark.parametrize(
    "architecture",
    [
        "no JSON",
        "3",
        '{"model": "revnet38"}',
        '{"model": ["revnet38"], "arguments": {}}',
        '{"model": "revnet38", "arguments": {"num_classes": {"_target_": "os.getcwd"}}}',
        '{"model": "revnet38", "arguments": {"activations": [{"_target_": "os.getcwd"}]}}',
    ],
)
def test_metadata_that_are_no_architecture_are_refused(architecture, tmp_path):
    save_file(revnet38().state_dict(), tmp_path / "theirs", {"architecture": architecture})
    with pytest.raises(ValueError, match="does not say which network"):
        architecture_of(tmp_path / "theirs")


def test_the_metadata_are_the_architecture_as_json(file):
    plan = ("store",) * 17
    save_weights(revnet38(activations=plan), file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata.keys() == {"architecture", "normalisation"}
    assert metadata["normalisation"] == "BatchNorm2d(eps=0.001)"
    assert json.loads(metadata["architecture"]) == architecture_of(file)
    assert architecture_of(file)["arguments"] == {"num_classes": 10, "activations": list(plan)}


def test_a_file_that_cannot_be_written_leaves_nothing_and_takes_nothing(tmp_path, file, monkeypatch):
    network, before = revnet38(), file.read_bytes()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_weights(network, tmp_path / "nowhere" / "weights.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        save_weights(network, tmp_path / "folder")

    def full(path, content):
        with path.open("wb") as part:
            part.write(content[:100])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(network, file)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"folder", "weights.safetensors"}


def test_a_network_with_its_architecture_can_be_pickled():
    network = pickle.loads(pickle.dumps(revnet38(num_classes=3)))
    assert network.architecture == {"model": "revnet38", "arguments": {"num_classes": 3}}


def test_a_network_that_torch_compile_has_wrapped_is_written_and_read_as_itself(file):
    network, other = revnet18(num_classes=3), revnet18(num_classes=3)
    save_weights(torch.compile(network), file)
    load_weights(torch.compile(other), file)
    assert outputs(other).equal(outputs(network))
