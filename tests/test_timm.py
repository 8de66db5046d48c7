"""The family in timm: its factory, its features, its tests."""

import ast
import importlib
import os
import subprocess
import sys
import tarfile
from copy import deepcopy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from timm.models import group_parameters

import revnet.models
import revnet.timm
from revnet.models import save_weights
from revnet.profiling import measure_memory
from revnet.reversible import Rearrangement, slots

ROOT = Path(__file__).parents[1]
TWINS = {
    "revnet18": "resnet18",
    "revnet34": "resnet34",
    "revnet50": "resnet50",
    "revnet101": "resnet101",
    "revnet152": "resnet152",
    "revnext50_32x4d": "resnext50_32x4d",
    "wide_revnet50_2": "wide_resnet50_2",
}


def build(name="revnet18", **arguments):
    return timm.create_model(name, **arguments)


def on_meta(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def images(size=64, channels=3, device=None):
    return torch.randn(2, channels, size, size, device=device)


def total(outputs):
    """A loss of one output or several."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return sum(output.square().mean() for output in outputs)


def gradients(model, x):
    return torch.autograd.grad(total(model(x)), list(model.parameters()))


def test_the_family_is_registered_with_its_configuration():
    assert set(timm.list_models(module="timm")) == TWINS.keys()
    assert set(revnet.timm.__all__) == {"TimmRevNet", *TWINS}
    assert timm.list_models("*rev*net*", pretrained=True) == []
    model = on_meta("revnet50")
    assert model.default_cfg is model.pretrained_cfg
    assert model.default_cfg["architecture"] == "revnet50"
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


def test_without_timm_the_import_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "revnet.timm")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'revnet\[timm\]'"):
        importlib.import_module("revnet.timm")


def test_importing_the_networks_does_not_load_timm():
    code = "import sys, revnet.models, revnet.profiling; print('timm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


@pytest.mark.parametrize("name", TWINS)
def test_features_and_logits_have_the_shapes_of_the_twin(name):
    x = images(device="meta")
    ours, theirs = on_meta(name), on_meta(TWINS[name])
    assert ours(x).shape == theirs(x).shape == (2, 1000)
    for attribute in ("num_features", "head_hidden_size", "num_classes", "drop_rate"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    for out_indices in ((0, 1, 2, 3, 4), (1, 3), (-2,)):
        ours, theirs = (on_meta(model, features_only=True, out_indices=out_indices) for model in (name, TWINS[name]))
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert ours.feature_info.reduction() == theirs.feature_info.reduction()
        assert [feature.shape for feature in ours(x)] == [feature.shape for feature in theirs(x)]


def test_a_model_computes_what_the_builder_of_its_name_does():
    model, network, x = build("revnet50", num_classes=7), revnet.models.revnet50(num_classes=7), images()
    network.load_state_dict(model.state_dict())
    assert torch.equal(model(x), network(x))
    taps = model.forward_intermediates(x, intermediates_only=True)
    stem = network.relu(network.bn1(network.conv1(x)))
    assert torch.equal(taps[0], stem)
    assert torch.equal(taps[1], network.layer1(network.maxpool(stem)))


@pytest.mark.parametrize(
    ("arguments", "reduction"),
    [
        ({"small_images": True}, [1, 1, 2, 4, 8]),
        ({"replace_stride_with_dilation": (False, True, True)}, [2, 4, 8, 8, 8]),
    ],
)
def test_reductions_follow_the_strides(arguments, reduction):
    model = on_meta("revnet50", features_only=True, **arguments)
    assert model.feature_info.reduction() == reduction
    assert [64 // feature.shape[-1] for feature in model(images(device="meta"))] == reduction


def test_intermediates_are_the_features():
    model, x = build().eval(), images()
    last, taps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(model.forward_head(last), model(x))
    assert [len(taps), last.min().item()] == [5, 0]
    assert all(map(torch.equal, model.forward_intermediates(x, [-1, 1], intermediates_only=True), [taps[1], taps[4]]))
    assert all(map(torch.equal, model.forward_intermediates(x, 2, norm=True)[1], [taps[3], last]))
    for index, tap in enumerate(taps):
        state, early = model.forward_intermediates(x, [index], stop_early=True)
        assert torch.equal(early[0], tap)
        assert torch.equal(state, tap if index < 4 else last)
    features = timm.create_model("revnet18", features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert all(map(torch.equal, features(x), taps))
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match=r"\(2, 1, 64, 64\): this network takes 3 channels"):
        features.model.forward_intermediates(images()[:, :1])


def test_another_pooling_stands_behind_the_relu_of_the_stem_with_and_without_that_feature():
    model, x = build().eval(), images()
    model.maxpool = torch.nn.AvgPool2d(3, 2, 1)
    last, taps = model.forward_intermediates(x)
    assert len(taps) == 5
    assert torch.equal(last, model.forward_features(x))


def test_the_tail_leaves_the_last_feature_alone():
    model, x = build(norm_layer=lambda _: torch.nn.Identity()).eval(), images()
    with torch.no_grad():
        (alone,) = model.forward_intermediates(x, [4], intermediates_only=True)
        _, (feature,) = model.forward_intermediates(x, [4])
    assert alone.min() < 0
    assert torch.equal(feature, alone)


@pytest.mark.parametrize("index", range(5))
def test_a_pruned_network_is_the_part_that_its_features_need(index):
    model, x = build().eval(), images()
    tap = model.forward_intermediates(x, [index], intermediates_only=True)[0]
    pruned = deepcopy(model)
    assert pruned.prune_intermediate_layers([index - 5], prune_norm=True) == [index]
    assert torch.equal(pruned(x), tap)
    assert pruned.head_hidden_size == pruned.num_features == tap.shape[1]
    total(pruned.train()(x)).backward()
    assert [name for name, parameter in pruned.named_parameters() if parameter.grad is None] == []
    pruned.reset_classifier(7, "avg")
    assert pruned(x).shape == (2, 7)
    with_head = deepcopy(model)
    with_head.prune_intermediate_layers([4], prune_head=False)
    assert torch.equal(with_head(x), model(x))


@pytest.mark.parametrize(("pool", "factor"), [("avg", 1), ("max", 1), ("catavgmax", 2)])
def test_a_new_classifier_keeps_the_pooling_unless_told(pool, factor):
    model, x = build(num_classes=0, global_pool=pool).eval(), images()
    assert model.head_hidden_size == factor * model.num_features
    pooled = model(x)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(pooled, model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(5)
    assert torch.equal(pooled, model.forward_head(model.forward_features(x), pre_logits=True))
    assert torch.equal(model(x), model.get_classifier()(pooled))
    assert model.num_classes == 5
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 512, 2, 2)


def test_dropout_is_in_front_of_the_classifier_in_training():
    model, x = build(drop_rate=0.5, num_classes=0), images()
    features = model.forward_features(x)
    dropped = model.forward_head(features) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert model.eval().forward_head(features).count_nonzero() > model.num_features


def test_gray_images_device_and_dtype():
    model = build(in_chans=1, dtype=torch.float64)
    assert model.in_chans == 1
    assert model(images(channels=1).double()).shape == (2, 1000)
    assert {parameter.device.type for parameter in build(device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("features_only", [False, True])
def test_gradients_are_equal_under_checkpointing(features_only):
    x, found = images().double(), {}
    for activations in ("store", "reconstruct", "recompute"):
        torch.manual_seed(1)
        model = build(features_only=features_only, activations=activations, dtype=torch.float64)
        found[activations] = gradients(model, x)
        (model.model if features_only else model).set_grad_checkpointing()
        assert all(slot.value() != "store" for slot in slots(model) if keeps_activations(slot))
        found[f"{activations}, checkpointed"] = gradients(model, x)
    assert len(found) == 6
    for gradient in found.values():
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(gradient, found["store"], strict=True))


def keeps_activations(slot):
    return not any(isinstance(module, Rearrangement) for module in slot.modules())


@pytest.mark.parametrize(
    ("built", "checkpointed", "again"),
    [("store", "recompute", "store"), ("recompute", "recompute", "store"), ("reconstruct",) * 3],
)
def test_checkpointing_recomputes_what_is_stored_and_never_keeps_more(built, checkpointed, again):
    model = on_meta("revnet18", activations=built)
    for enable, expected in ((True, checkpointed), (False, again)):
        model.set_grad_checkpointing(enable)
        assert {model.layer1.activations, model.stem_activations, model.tail_activations} == {expected}


def test_children_in_their_order_are_the_features_of_the_network():
    x = images()
    model = build().eval()
    features = torch.nn.Sequential(*list(model.children())[:-1])
    assert model.get_classifier()(features(x)).equal(model(x))
    assert [name for name, _ in model.named_children()][-2:] == ["global_pool", "fc"]
    assert model.get_classifier(name_only=True) == "fc"


@pytest.mark.parametrize(("output_stride", "size"), [(32, 2), (16, 4), (8, 8)])
def test_output_strides_are_timm_s(output_stride, size):
    model = timm.create_model("revnet50", features_only=True, output_stride=output_stride).eval()
    assert model(torch.randn(1, 3, 64, 64))[-1].shape == (1, 2048, size, size)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 1}, TypeError, "unexpected keyword argument 'in_channels'; timm calls it in_chans"),
        ({"drop_path_rate": 0.1}, ValueError, "drop_path_rate=0.1: these networks have no stochastic depth"),
        ({"output_stride": 4}, ValueError, "output_stride=4: give one of 32, 16, 8"),
        ({"output_stride": 8, "small_images": True}, ValueError, "output_stride=8, small_images=True: give one of"),
        ({"output_stride": 16, "downsampling": "space_to_depth"}, ValueError, "output_stride=16: .* are not dilated"),
    ],
)
def test_arguments_of_timm_s_that_cannot_be_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("revnet50", **arguments)


def test_the_last_convolutions_begin_at_zero_where_timm_asks_for_it():
    model = timm.create_model("revnet50", zero_init_last=True, drop_path_rate=0.0)
    assert model.layer2[1].branch.last.weight.abs().max() == 0


@pytest.mark.parametrize("out_indices", [(1, 2, 3, 4), (0, 1, 2, 3, 4)])
def test_features_keep_no_more_than_themselves(out_indices):
    kept, x = {}, images()
    for activations in ("store", "reconstruct"):
        model = build(features_only=True, out_indices=out_indices, activations=activations)
        kept[activations] = measure_memory(model, x, total).kept
    features = sum(feature.nbytes for feature in model(x))
    samples = kept["reconstruct"] - features
    assert 0 <= samples <= 40 * 1024
    assert kept["store"] > 5 * kept["reconstruct"]


def test_a_classifier_keeps_a_tenth_of_what_store_does():
    reconstruct, store = (measure_memory(build(activations=name), images()).kept for name in ("reconstruct", "store"))
    assert store > 10 * reconstruct


def test_groups_of_parameters_are_stem_layers_and_tail():
    for arguments in ({}, {"downsampling": "space_to_depth"}):
        model = on_meta("revnet18", **arguments)
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert groups["conv1.weight"] == groups["bn1.bias"] == 0
        assert groups["norm.weight"] == groups["fc.weight"] == max(groups.values())
        layers = [name for name, _ in model.named_parameters() if name.startswith("layer")]
        assert [groups[name] for name in layers] == sorted(groups[name] for name in layers)
        blocks = {name.split(".")[1] if arguments else tuple(name.split(".")[:2]) for name in layers}
        assert len(set(groups.values())) == len(blocks) + 2
    model = on_meta("revnet18")
    assert len(set(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values())) == 6


def test_weights_go_from_the_builders_to_timm_and_back(tmp_path):
    file, x = tmp_path / "weights.safetensors", images()
    network = revnet.models.revnet18(num_classes=7).eval()
    save_weights(network, file)
    for arguments in (
        {"checkpoint_path": file},
        {"weights": file},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "num_classes": 7}},
    ):
        assert torch.equal(build(num_classes=7, **arguments).eval()(x), network(x))
    model = build().eval()
    model.reset_classifier(3)
    save_weights(model, file)
    assert revnet.models.architecture_of(file)["arguments"]["num_classes"] == 3
    assert torch.equal(revnet.models.revnet18(num_classes=3, weights=file).eval()(x), model(x))


def test_a_fully_reversible_network_has_no_features_at_its_stages():
    model = on_meta("revnet50", downsampling="space_to_depth")
    assert [feature["reduction"] for feature in model.feature_info] == [2, 32]
    assert model(images(device="meta")).shape == (2, 1000)
    with pytest.raises(ValueError, match=r"\(2, 3, 48, 48\): height and width must be multiples of 32"):
        model(torch.empty(2, 3, 48, 48, device="meta"))
    assert torch.fx.symbolic_trace(model)(images(device="meta")).shape == (2, 1000)
    model.prune_intermediate_layers([0])  # the stem alone takes images of any size
    assert model(torch.empty(2, 3, 47, 48, device="meta")).shape == (2, 64, 24, 24)
    with pytest.raises(ValueError, match=r"features_only=True, downsampling='space_to_depth'.*leave one"):
        on_meta("revnet50", downsampling="space_to_depth", features_only=True)


def test_mistakes_say_what_to_do():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for revnet18"):
        build(pretrained=True)
    with pytest.raises(ValueError, match=r"feature_cls='hook'.*forward_intermediates"):
        build(features_only=True, feature_cls="hook")
    with pytest.raises(TypeError, match="no_argument"):
        build(no_argument=1)


# Functions of timm's tests/test_models.py that draw from `timm.list_models` and have nothing to say about the family.
NOT_FOR_US = {
    "test_model_default_cfgs_non_std",  # models whose names are those of transformers
    "test_model_features_space2depth_reduction",  # EfficientNet-H and -X
    "test_model_load_pretrained",  # models with published weights
    "test_model_features_pretrained",  # the same
    "test_model_forward_torchscript",  # TorchScript cannot script the reversible engine
    "test_model_forward_fx_torchscript",  # the same
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_timm_passes_its_own_tests_with_the_family(tmp_path):
    source = f"timm=={timm.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=timm", "--dest", str(tmp_path), source]
    download = subprocess.run(pip, capture_output=True, text=True)
    if download.returncode:
        pytest.fail(f"the source distribution of {source}, which has its tests, needs the network:\n{download.stderr}")
    (archive,) = tmp_path.glob("timm-*.tar.gz")
    with tarfile.open(archive) as members:
        tests = members.extractfile(f"{archive.name.removesuffix('.tar.gz')}/tests/test_models.py").read()
    (tmp_path / "test_models.py").write_bytes(tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # so that none of a directory above is taken

    environment = {key: value for key, value in os.environ.items() if key != "GITHUB_ACTIONS"}  # it leaves models out
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.timm_family", "-q", f"--junitxml={report}", "test_models.py"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]

    listed = {
        node.name
        for node in ast.walk(ast.parse(tests))
        if isinstance(node, ast.FunctionDef)
        and any("list_models(" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    passed = {
        (function, name)
        for case in ElementTree.parse(report).iter("testcase")
        if len(case) == 0  # neither failed nor skipped
        for function, _, parameters in [case.get("name").partition("[")]
        for name in parameters.removesuffix("]").split("-")
        if name in TWINS
    }
    assert listed >= NOT_FOR_US
    assert passed == {(function, name) for function in listed - NOT_FOR_US for name in TWINS}
