import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from revnet import evaluate as evaluate_module
from revnet import models
from revnet import train as train_module
from revnet.data import Fake
from tests.commands import invoke
from tests.test_train import TINY, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run."""
    directory = tmp_path_factory.mktemp("run") / "here"
    options = ("trainer.precision=bf16-mixed", "task.loss.label_smoothing=0.1", "logger=csv")
    assert invoke(train_module.main, *TINY, *options, f"run_dir={directory}") == 0
    return directory


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluate(*arguments: str) -> int:
    return invoke(evaluate_module.main, "trainer.limit_test_batches=2", *arguments)


def found_by(run: Path) -> tuple[str, str]:
    """What the run's own test has found."""
    header, *lines = (run / "csv/version_0/metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    return f"{100 * float(row['test/accuracy']):.2f} %", f"{float(row['test/loss']):.4f}"


@pytest.mark.parametrize("overrides", [[], ["trainer=cpu"], ["model.activations=store"]])
def test_it_finds_what_the_run_has_found(
    run: Path, overrides: list[str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert evaluate(f"ckpt_path={run}/checkpoints/best.ckpt", *overrides) == 0
    summary = rows(capsys.readouterr().out)
    assert (summary["test accuracy"], summary["test loss"]) == found_by(run)
    assert list(tmp_path.iterdir()) == []  # it writes nothing


def test_single_values_of_the_run_are_changed(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate(f"ckpt_path={run}/checkpoints/best.ckpt", "task.loss.label_smoothing=0") == 0
    summary = rows(capsys.readouterr().out)
    accuracy, loss = found_by(run)
    assert summary["test accuracy"] == accuracy
    assert summary["test loss"] != loss


def test_other_data_are_normalised_as_for_training(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    preprocess = Fake.preprocess

    def spy(data: Fake, images: torch.Tensor, training: bool) -> torch.Tensor:
        seen.append((data.normalization, data.normalize.shift))
        return preprocess(data, images, training)

    monkeypatch.setattr(Fake, "preprocess", spy)
    path = run / "checkpoints/best.ckpt"
    state = torch.load(path, weights_only=True)["Fake"]
    other = ("data=fake", "data.image_shape=[3,8,8]", "data.seed=7")
    assert evaluate(f"ckpt_path={path}", *other) == 0
    assert seen[-1][0] == state["normalization"] == "mean_std"
    assert seen[-1][1].equal(state["shift"])
    assert "trained with" not in capsys.readouterr().out
    assert evaluate(f"ckpt_path={path}", *other, "data.normalization=symmetric") == 0
    assert seen[-1][0] == "symmetric"
    assert "data.normalization=symmetric, but the network was trained with mean_std" in capsys.readouterr().out
    older = torch.load(path, weights_only=True)
    del older["Fake"]
    torch.save(older, "older.ckpt")
    assert evaluate("ckpt_path=older.ckpt", *other) == 0
    assert "data.normalization=mean_std is measured on these data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "overrides", "line"),
    [
        (1, ["model=resnet32"], r"ckpt_path=.* holds revnet38 for 10 classes .* not the resnet32 for 10 classes .*"),
        (1, ["data.num_classes=7"], r".*10.* 7 classes.*"),
        (1, ["data.num_classes=7", "model.num_classes=null"], r".* holds revnet38 for 10 classes .* 7 classes .*"),
        (2, ["data=fike"], r"unknown data 'fike'; did you mean 'fake'\? valid: .*checkpoint.*"),
        (2, ["data.batchsize=3"], r"unknown key 'data.batchsize'; did you mean 'batch_size'\? .*"),
        (2, ["optimizer=adamw"], r"Could not override 'optimizer'.*"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, status: int, overrides: list[str], line: str, capsys: pytest.CaptureFixture
) -> None:
    assert evaluate(f"ckpt_path={run}/checkpoints/best.ckpt", *overrides) == status
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-eval: " + line, only)


def test_what_is_no_checkpoint_of_a_run_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "anonymous.ckpt")
    for arguments, line in {
        (): "ckpt_path and weights are missing: .*",
        ("ckpt_path=a.ckpt", "weights=b"): "ckpt_path=a.ckpt weights=b: give one of the two",
        ("ckpt_path=nowhere.ckpt",): "ckpt_path=nowhere.ckpt: no such file; .*",
        ("ckpt_path=anonymous.ckpt",): "ckpt_path=anonymous.ckpt does not say how .*",
        ("ckpt_path=a.ckpt,b.ckpt", "-m"): "ckpt_path=a.ckpt,b.ckpt: .*one file at a time",
    }.items():
        assert evaluate(*arguments) == 2
        (only,) = capsys.readouterr().err.strip().splitlines()
        assert re.fullmatch("revnet-eval: " + line, only)


def test_help_needs_no_checkpoint(capsys: pytest.CaptureFixture) -> None:
    assert invoke(evaluate_module.main, "--help") == 0
    assert "revnet-eval ckpt_path=" in capsys.readouterr().out


TEST = ("data=fake", "data.image_shape=[3,8,8]", "trainer=cpu")


def test_weights_of_a_checkpoint_are_written_and_tested(run: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = run / "checkpoints/best.ckpt"
    assert evaluate(f"ckpt_path={checkpoint}", "save_weights=net.safetensors") == 0
    written = rows(capsys.readouterr().out)
    assert written["written weights"] == "net.safetensors"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {f"network.{name}": None for name in load_file("net.safetensors")}.keys() == state.keys()
    assert all(value.equal(state[f"network.{name}"]) for name, value in load_file("net.safetensors").items())
    architecture = models.architecture_of("net.safetensors")
    assert architecture["model"] == "revnet38"
    assert architecture["arguments"]["num_classes"] == 10

    assert evaluate("weights=net.safetensors", *TEST, "trainer.precision=bf16-mixed") == 0
    out = capsys.readouterr().out
    assert "revnet38_fake" in out
    summary = rows(out)
    assert summary["tested weights"] == "net.safetensors"
    assert summary["test accuracy"] == written["test accuracy"] == found_by(run)[0]
    assert summary.keys() == written.keys() - {"written weights"}
    assert evaluate("weights=net.safetensors", *TEST, "model.activations=store", "save_weights=again.safetensors") == 0
    assert models.architecture_of("again.safetensors")["arguments"]["activations"] == "store"
    assert [path.name for path in sorted(Path().iterdir())] == ["again.safetensors", "net.safetensors"]


def test_weights_of_any_network_are_tested(capsys: pytest.CaptureFixture) -> None:
    """Of one built with no arguments but those that it needs."""
    network = models.revnet18(num_classes=10, small_images=True)
    models.save_weights(network, "net.safetensors")
    assert evaluate("weights=net.safetensors", *TEST, "model.activations=recompute", "model.exact=false") == 0
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert rows(capsys.readouterr().out)["parameters"] == f"{parameters:,}"


@pytest.mark.parametrize(
    ("status", "overrides", "line"),
    [
        (2, ["weights=net.safetensors"], "weights=net.safetensors says nothing of data: add data=digits, .*"),
        (2, ["weights=nowhere", "data=fake"], "weights=nowhere is not a file, .*"),
        (2, ["weights=a,b", "-m"], "weights=a,b: revnet-eval takes one file at a time"),
        (
            2,
            ["weights=theirs", "data=fake"],
            "weights=theirs does not say which network of revnet.models it is for; .*",
        ),
        (2, ["weights=other", "data=fike"], "unknown data 'fike'; did you mean 'fake'.*"),
        (1, ["weights=other", *TEST], "unknown model 'revnet39'; did you mean 'revnet38'.*"),
        (
            1,
            ["weights=net.safetensors", *TEST, "data.num_classes=7"],
            "model.num_classes=10, but the data has 7 classes.*",
        ),
        (1, ["weights=net.safetensors", *TEST, "model=revnet110"], r".* are for revnet38\(.*not for revnet110\(.*"),
        (
            1,
            ["weights=net.safetensors", *TEST, "save_weights=theirs"],
            "save_weights=theirs exists already: remove it, .*",
        ),
        (
            1,
            ["weights=net.safetensors", *TEST, "save_weights=no/where"],
            ".*No such file or directory: 'no/where.part'",
        ),
        (1, ["weights=norm", *TEST], "norm_layer='torch.*GroupNorm.4.' is no function; .*"),
    ],
)
def test_a_mistake_with_weights_is_one_line(
    status: int, overrides: list[str], line: str, capsys: pytest.CaptureFixture
) -> None:
    network = models.revnet38(num_classes=10)
    models.save_weights(network, "net.safetensors")
    save_file(network.state_dict(), "theirs")
    save_file({}, "other", {"architecture": json.dumps({"model": "revnet39", "arguments": {"num_classes": 10}})})
    arguments = {"num_classes": 10, "norm_layer": "torch.nn.modules.normalization.GroupNorm(4)"}
    save_file({}, "norm", {"architecture": json.dumps({"model": "revnet18", "arguments": arguments})})
    assert evaluate(*overrides) == status
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-eval: " + line, only)


def test_a_normalisation_that_the_file_names_can_be_given(capsys: pytest.CaptureFixture) -> None:
    norm = torch.nn.BatchNorm2d
    models.save_weights(models.revnet18(num_classes=10, small_images=True, norm_layer=norm), "net.safetensors")
    given = "model.norm_layer={_target_: hydra.utils.get_class, path: torch.nn.BatchNorm2d}"
    assert evaluate("weights=net.safetensors", *TEST, given) == 0
    assert "test accuracy" in rows(capsys.readouterr().out)


def test_weights_of_a_network_of_another_library_are_not_written(capsys: pytest.CaptureFixture) -> None:
    options = ("model=resnet18", "data.image_shape=[3,32,32]", "run_dir=here", "callbacks=none", "logger=none")
    assert invoke(train_module.main, *TINY, *options, "trainer.enable_checkpointing=true") == 0
    (checkpoint,) = Path("here").rglob("*.ckpt")
    checkpoint.rename("resnet18.ckpt")
    capsys.readouterr()
    assert evaluate("ckpt_path=resnet18.ckpt", "save_weights=net.safetensors") == 1
    (only,) = capsys.readouterr().err.strip().splitlines()
    assert re.fullmatch("revnet-eval: network: this ResNet does not know its architecture; give save_weights .*", only)
