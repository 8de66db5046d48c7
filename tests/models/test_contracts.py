"""What others build upon: the drop-in family in torchvision's detection and segmentation, extraction, export, names."""

import hashlib
import re
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d

from revnet import ReversibleSequence, set_activations
from revnet.models import get_model
from revnet.profiling import measure_memory
from tests.sizes import large_ones_slow, others_slow

BASIC = ["revnet18", "revnet34"]
BOTTLENECK = ["revnet50", "revnet101", "revnet152", "revnext50_32x4d", "wide_revnet50_2"]
FAMILY = BASIC + BOTTLENECK
FEW = ["revnet18", "revnet50"]
STAGES = ["layer1", "layer2", "layer3", "layer4"]
BUILDERS = pytest.mark.parametrize("name", FAMILY)
NOT_LARGE = pytest.mark.parametrize("name", large_ones_slow(FAMILY))


def images(batch=2, size=64):
    return torch.randn(batch, 3, size, size)


def gradients(module, loss):
    """By name, those of one seeded step."""
    torch.manual_seed(3)
    loss(module).backward()
    found = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return found


def check_gradients(module, loss, frozen=()):
    """Everything has the gradient of store, to the bit, but for the names that begin with one of `frozen`: none."""
    found = gradients(module, loss)
    assert all(any(name.startswith(prefix) for name in found) for prefix in frozen)
    for name, gradient in found.items():
        assert (gradient is None) == name.startswith(frozen), name
        assert gradient is None or gradient.isfinite().all(), name
    set_activations(module, "store")
    truth = gradients(module, loss)
    assert [name for name, gradient in found.items() if gradient is not None and not gradient.equal(truth[name])] == []
    assert any(gradient.count_nonzero() for gradient in truth.values() if gradient is not None)


def detector(network, trainable_layers):
    """Faster R-CNN with a pyramid of features, as `fasterrcnn_resnet50_fpn` makes it, for small images."""
    return FasterRCNN(
        _resnet_fpn_extractor(network, trainable_layers),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
        min_size=64,
        max_size=64,
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        box_batch_size_per_image=16,
    )


def detection_loss(model):
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    targets = [{"boxes": boxes[:number], "labels": torch.arange(1, number + 1)} for number in (1, 2)]
    return sum(model(list(torch.rand(2, 3, 64, 64)), targets).values())


@pytest.mark.parametrize("trainable_layers", [3, 5])
@NOT_LARGE
def test_faster_rcnn_trains_what_is_not_frozen(name, trainable_layers):
    model = detector(get_model(name), trainable_layers)
    frozen = tuple(f"backbone.body.{child}." for child in ("conv1", "bn1", "layer1")) if trainable_layers == 3 else ()
    check_gradients(model.train(), detection_loss, frozen)


@NOT_LARGE
def test_frozen_normalisation_computes_with_the_statistics_of_a_trained_network(name):
    trained = get_model(name, num_classes=3)
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        trained(images(8))  # after which the statistics are those of a batch
    network = get_model(name, num_classes=3, norm_layer=FrozenBatchNorm2d)
    network.load_state_dict(trained.state_dict())
    assert {type(module) for path, module in network.named_modules() if "bn" in path} == {FrozenBatchNorm2d}
    x = images()
    torch.testing.assert_close(network(x), trained.eval()(x), rtol=1e-3, atol=1e-3)
    buffers = {key: value.clone() for key, value in network.named_buffers()}
    check_gradients(detector(network, 3), detection_loss, ("backbone.body.conv1.", "backbone.body.layer1."))
    assert all(value.equal(buffers[key]) for key, value in network.named_buffers())


@pytest.mark.parametrize("trainable", [1, 2, 3, 4])
def test_a_frozen_prefix_is_neither_changed_nor_differentiated(trainable):
    network = get_model("revnet50", num_classes=3)
    for child in ["conv1", "bn1", *STAGES][: 6 - trainable]:
        network.get_submodule(child).requires_grad_(False)
    frozen = tuple(f"{child}." for child in ["conv1", "bn1", *STAGES][: 6 - trainable])
    check_gradients(network, lambda net: net(images()).square().sum(), frozen)


def segmentation_loss(model):
    outputs = model(images())
    assert {key: value.shape for key, value in outputs.items()} == dict.fromkeys(["out", "aux"], (2, 3, 64, 64))
    return sum(value.square().mean() for value in outputs.values())


@pytest.mark.parametrize("model", [DeepLabV3, FCN])
@NOT_LARGE
def test_segmentation_trains(name, model):
    dilation = {} if name in BASIC else {"replace_stride_with_dilation": [False, True, True]}
    network = get_model(name, **dilation)
    head = DeepLabHead if model is DeepLabV3 else FCNHead
    body = IntermediateLayerGetter(network, {"layer4": "out", "layer3": "aux"})
    assert body(images())["out"].shape[-1] == (2 if name in BASIC else 8)
    heads = head(network.inplanes, 3), FCNHead(network.inplanes // 2, 3)
    check_gradients(model(body, *heads).train(), segmentation_loss)


@pytest.mark.parametrize("name", BASIC)
def test_basic_branches_are_not_dilated(name):
    with pytest.raises(ValueError, match=r"replace_stride_with_dilation=\[False, True, True\].*take revnet50"):
        get_model(name, replace_stride_with_dilation=[False, True, True])


def total(outputs):
    return sum(output.square().mean() for output in outputs.values())


@NOT_LARGE
def test_an_extractor_gives_the_outputs_of_the_stages(name):
    network, truth, x = get_model(name).eval(), {}, images()
    for stage in STAGES:
        network.get_submodule(stage).register_forward_hook(lambda _m, _i, y, stage=stage: truth.update({stage: y}))
    logits = network(x)
    extractor = create_feature_extractor(network, [*STAGES, "fc"])
    assert all(isinstance(getattr(extractor, stage), ReversibleSequence) for stage in STAGES)
    features = extractor(x)
    assert features.keys() == {*STAGES, "fc"}
    assert all(torch.equal(features[stage], truth[stage]) for stage in STAGES)
    assert torch.equal(features["fc"], logits)
    check_gradients(extractor.train(), lambda module: total(module(x)))


def test_the_stem_is_seen_as_that_of_a_resnet():
    """An extractor, a getter and a hook see the same, of the sizes and signs of torchvision's."""
    network, x, hooked = get_model("revnet18").eval(), images(), {}
    names = {"relu": "relu", "maxpool": "maxpool"}
    found = create_feature_extractor(network, names)(x)
    gotten = IntermediateLayerGetter(network, names)(x)
    logits = network(x)
    for name in names:
        network.get_submodule(name).register_forward_hook(lambda _m, _i, y, name=name: hooked.update({name: y.clone()}))
    assert torch.equal(network(x), logits)
    assert found["relu"].shape == (2, 64, 32, 32)
    assert found["maxpool"].shape == (2, 64, 16, 16)
    assert found["maxpool"].min() >= 0
    for name in names:
        assert torch.equal(found[name], gotten[name])
        assert torch.equal(found[name], hooked[name])


def test_features_of_the_last_stage_are_its_own_behind_a_normalisation_that_is_none():
    network, x, truth = get_model("revnet18", norm_layer=lambda _: nn.Identity()).eval(), images(), []
    network.layer4.register_forward_hook(lambda _m, _i, y: truth.append(y.detach().clone()))
    network(x)
    found = create_feature_extractor(network, ["layer4", "fc"])(x)
    gotten = IntermediateLayerGetter(network, {"layer4": "layer4", "avgpool": "avgpool"})(x)
    assert truth[0].min() < 0
    assert torch.equal(found["layer4"], truth[0])
    assert torch.equal(gotten["layer4"], truth[0])


@pytest.mark.parametrize(("name", "share"), [("revnet50", 0.4), ("revnet101", 0.3)])
def test_an_extractor_keeps_the_saving_of_memory(name, share):
    extractor = create_feature_extractor(get_model(name), STAGES)
    x, peaks = images(4), {}
    for activations in ("reconstruct", "store"):
        set_activations(extractor, activations)
        peaks[activations] = measure_memory(extractor, x, total).peak
    assert peaks["reconstruct"] <= share * peaks["store"]


@NOT_LARGE
def test_an_exported_network_has_the_same_output(name):
    network, x = get_model(name, num_classes=3).eval(), images()
    exported = torch.export.export(network, (x,))
    assert torch.equal(exported.module()(x), network(x))


@pytest.mark.parametrize("name", others_slow(FAMILY, ["revnet18"]))
def test_onnx_has_the_same_output(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    network, x = get_model(name, num_classes=3).eval(), images()
    torch.onnx.export(network, (x,), tmp_path / "network.onnx", dynamo=True, verbose=False)
    evaluator = ReferenceEvaluator(onnx.load(tmp_path / "network.onnx"))
    (found,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    expected = network(x).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@NOT_LARGE
def test_another_number_of_classes(name):
    network, x = get_model(name, num_classes=3), images()
    network.fc = nn.Linear(network.fc.in_features, 5)
    network(x).sum().backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    with torch.device("meta"):
        other = get_model(name, num_classes=5)
    other.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(other.eval()(x), network.eval()(x))


# The first 16 digits of the SHA-256 of the sorted lines "name shape" of `state_dict`. A weight by another name, or of
# another shape, makes the files of weights that people have worthless: such a change needs a reason.
NAMES = {
    "revnet18": "883553ace8f5739e",
    "revnet34": "f3b3e1209705d052",
    "revnet50": "f617e7b5facb733b",
    "revnet101": "b3ba3fe1be657ca1",
    "revnet152": "afd3d0eeed7c260e",
    "revnext50_32x4d": "a5c2265e9b7d94dd",
    "wide_revnet50_2": "773c5302a4e26e64",
}
PATTERN = (
    r"conv1\.weight|fc\.(weight|bias)|layer[1-4]\.\d+\.((f|g|branch)\.conv[123]|shortcut[12])\.weight"
    r"|(bn1|norm|layer[1-4]\.\d+\.(f|g|branch)\.bn[123])\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)


@BUILDERS
def test_the_names_and_shapes_of_state_dict_are_what_they_were(name):
    with torch.device("meta"):
        state = get_model(name).state_dict()
    assert [key for key in state if not re.fullmatch(PATTERN, key)] == []
    lines = sorted(f"{key} {'x'.join(map(str, value.shape))}" for key, value in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == NAMES[name]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm_layer": 3}, TypeError, r"norm_layer=3 is no function; .*nn\.BatchNorm2d"),
        ({"norm_layer": nn.BatchNorm2d(64)}, TypeError, r"norm_layer=BatchNorm2d\(64.* is no function"),
        ({"norm_layer": lambda channels: None}, TypeError, r"norm_layer=.* returned None for 64 channels"),
        ({"norm_layer": nn.GroupNorm}, ValueError, r"norm_layer=.*GroupNorm.* fails for 64 channels: .*num_channels"),
        ({"norm_layer": partial(nn.GroupNorm, 7)}, ValueError, r"norm_layer=.* fails for 64 channels: .*divisible"),
        ({"num_classes": 0}, ValueError, "num_classes=0: give an integer of at least 1"),
        ({"num_classes": "10"}, ValueError, "num_classes='10': give an integer of at least 1"),
        ({"num_classes": None}, ValueError, "num_classes=None: give an integer of at least 1"),
        ({"in_channels": 2.5}, ValueError, "in_channels=2.5: give an integer of at least 1"),
        ({"groups": 0}, ValueError, "groups=0: give an integer of at least 1"),
        ({"width_per_group": -4}, ValueError, "width_per_group=-4: give an integer of at least 1"),
        ({"downsampling": "x"}, ValueError, "downsampling='x': give 'strided' or 'space_to_depth'"),
        ({"replace_stride_with_dilation": True}, ValueError, "replace_stride_with_dilation=True: give three values"),
        ({"replace_stride_with_dilation": []}, ValueError, r"replace_stride_with_dilation=\[\]: give three values"),
        ({"replace_stride_with_dilation": [1, 2, 4]}, ValueError, r"=\[1, 2, 4\]: give three values of False or True"),
        ({"activations": "all"}, ValueError, "activations must be one of 'store', 'recompute', 'reconstruct'"),
        ({"activations": ["store"]}, ValueError, "activations: a plan needs one value for each layer"),
        ({"exact": "yes"}, ValueError, "exact must be True, False or None"),
        (
            {"pretrained": True},
            TypeError,
            r"'pretrained' \(True\): no pretrained weights are published yet; .*weights=PATH",
        ),
        (
            {"num_class": 3},
            TypeError,
            r"argument 'num_class'; did you mean 'num_classes'\? valid: activations, .*weights",
        ),
        ({"weights": True}, TypeError, "weights=True is no path, and no pretrained weights are published yet"),
    ],
)
@BUILDERS
def test_an_argument_that_cannot_be_is_refused_by_name(name, arguments, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        get_model(name, **arguments)


@pytest.mark.parametrize("groups", [3, 7, 32])
@pytest.mark.parametrize("name", BOTTLENECK)
def test_any_number_of_groups(name, groups):
    with torch.device("meta"):
        network = get_model(name, groups=groups, width_per_group=16)
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
        assert {convolution.groups for convolution in convolutions} == {groups}
        assert len(convolutions) == sum(path.endswith("conv2") for path, _ in network.named_modules())
        assert network.eval()(images()).shape == (2, 1000)
