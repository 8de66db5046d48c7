import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from revnet import profile as profile_module
from revnet.cli import compose
from revnet.models import revnet38
from revnet.profile_cell import profile_cell
from revnet.profiling import estimate
from tests.commands import invoke

TINY = ("model=revnet38", "data=fake", "data.image_shape=[3,8,8]", "batch_size=2", "threads=1", "repeats=1")
ESTIMATE = (*TINY, "mode=estimate", "~optimizer")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/model").mkdir(parents=True)
    models = {
        "killed": "_target_: signal.raise_signal\n_args_: [9]\n",
        "endless": "_target_: time.sleep\n_args_: [500]\n",
        "useless": "_target_: torch.nn.Linear\nin_features: 7\nout_features: 7\n",
    }
    for name, text in models.items():
        (tmp_path / "mine/model" / f"{name}.yaml").write_text(text)


def profile(*arguments: str) -> int:
    return invoke(profile_module.main, *arguments)


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def cell(*overrides: str) -> dict[str, Any]:
    return profile_cell(compose("profile", *overrides))


def test_a_measurement_is_printed_and_written(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert profile(*TINY, "run_dir=here", "activations=recompute", "channels_last=true") == 0
    output = capsys.readouterr()
    assert output.err == ""
    for row in ("memory", "activations", "temporaries", "optimizer", "time", "images/s", "GFLOP", "here/result.json"):
        assert row in output.out
    result = read("here/result.json")
    assert result["status"] == "ok"
    assert result["memory"]["peak"] == result["memory"]["activations"] + result["memory"]["temporaries"] > 0
    assert result["memory"]["optimizer"] > 0
    assert result["time"]["step"] > 0
    assert result["images_per_second"] == pytest.approx(2 / result["time"]["step"])
    assert result["flops"] > 0
    assert result["config"]["model"]["_target_"] == "revnet.models.revnet38"
    assert result["config"]["activations"] == "recompute"
    assert result["environment"]["command"].startswith("revnet-profile model=revnet38 ")
    assert result["environment"].keys() >= {"python", "torch", "device", "threads"}
    assert {path.name for path in tmp_path.iterdir()} == {"here", "mine"}  # no data was looked for


@pytest.mark.parametrize("activations", ["store", "reconstruct"])
def test_an_estimate_is_that_of_the_network(activations: str) -> None:
    found = cell("data=cifar10", "batch_size=2", "mode=estimate", "~optimizer", f"activations={activations}")
    memory = estimate(revnet38(activations=activations), (2, 3, 32, 32))
    assert found.keys() == {"memory"}
    assert found["memory"]["total"] == memory.total
    assert found["memory"]["peak"] == memory.peak


@pytest.mark.parametrize(
    ("data", "shape", "classes"),
    [
        (["data=cifar100"], (3, 32, 32), 100),
        (["data=digits"], (3, 8, 8), 10),
        (["data=imagenet"], (3, 224, 224), 1000),
        (["data=image_folder", "data.num_classes=7", "image_size=16"], (3, 16, 16), 7),
    ],
)
def test_data_need_not_be_there(data: list[str], shape: tuple[int, int, int], classes: int) -> None:
    found = cell("model=resnet18", "mode=estimate", "batch_size=2", *data)["memory"]
    parameters = 11_689_512 - 513 * (1000 - classes)
    assert found["input"] == 2 * 4 * torch.Size(shape).numel()
    assert found["gradients"] == 4 * parameters


@pytest.mark.parametrize(("model", "size"), [("revnet38", 32), ("revnet56", 224), ("resnet18", 224)])
def test_without_data_a_network_gets_images_of_its_usual_size(model: str, size: int) -> None:
    found = cell(f"model={model}", "mode=estimate", "batch_size=2")["memory"]
    assert found["input"] == 2 * 4 * 3 * size * size
    assert cell(f"model={model}", "mode=estimate", "image_size=64")["memory"]["input"] == 32 * 4 * 3 * 64 * 64


def test_the_optimizer_counts() -> None:
    sgd, adamw = (cell(*TINY, "mode=estimate", f"optimizer={name}")["memory"] for name in ("sgd", "adamw"))
    assert sgd["optimizer"] == sgd["gradients"]
    assert adamw["optimizer"] == pytest.approx(2 * sgd["optimizer"], rel=0.01)


def test_a_budget_says_the_largest_batch() -> None:
    found = cell(*ESTIMATE, "mode=max_batch", "budget=30MiB")
    assert found["max_batch"] > 8
    assert 0.9 * 30 * 2**20 < found["memory"]["total"] <= 30 * 2**20


def test_a_budget_is_planned_for() -> None:
    options = (*ESTIMATE, "batch_size=64")
    least, most = (cell(*options, f"activations={value}")["memory"]["total"] for value in ("reconstruct", "store"))
    budget = (least + most) // 2
    found = cell(*options, "mode=plan", f"budget={budget}")
    assert found["memory"]["total"] <= budget
    assert found["seconds_over_store"] >= 1
    assert found["plan"]


def test_a_network_without_a_sequence_stores() -> None:
    options = (*ESTIMATE, "model=resnet18")
    assert cell(*options, "activations=store") == cell(*options)
    with pytest.raises(ValueError, match="ResNet holds no ReversibleSequence"):
        cell(*options, "activations=recompute")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["mode=guess"], "mode=guess: valid: measure, estimate, max_batch, plan"),
        (["dtype=float8"], "dtype=float8: valid: float32, bfloat16, float16"),
        (["batch_size=0"], "batch_size=0: give a whole number, at least 1"),
        (["image_size=1.5"], "image_size=1.5: give a whole number, at least 1, or null"),
        (["threads=0"], "threads=0: .*, or null"),
        (["mode=plan"], "mode=plan .* budget=16GiB"),
        (["mode=max_batch", "budget=many"], ".*many.*"),
        (["budget=16GiB"], "budget=16GiB, mode=measure: say what it is for by mode=max_batch or mode=plan"),
        (["mode=plan", "budget=16GiB", "activations=store"], "activations=store: mode=plan chooses them"),
        (["mode=estimate", "compile=true"], "compile=true, mode=estimate: .*"),
        (["device=abacus"], "device=abacus: give auto, .*"),
        (["activations=forget"], ".*forget.*"),
    ],
)
def test_a_mistake_names_its_value_and_a_remedy(overrides: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        cell(*TINY, *overrides)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_failed_run_ends_in_one_line(capsys: pytest.CaptureFixture) -> None:
    assert profile(*TINY, "device=cuda", "run_dir=here") == 1
    assert capsys.readouterr().err == "revnet-profile: device=cuda: there is no CUDA device here; give device=cpu\n"
    assert read("here/result.json")["status"] == "failed"


def test_a_directory_with_something_in_it_is_left_untouched(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/result.json").write_text("precious")
    assert profile(*TINY, "run_dir=here") == 2
    assert "here is not empty" in capsys.readouterr().err
    assert (tmp_path / "here/result.json").read_text() == "precious"


def test_cells_that_fail_do_not_stop_a_sweep(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    options = ("data=image_folder", "batch_size=2", "mode=estimate", "hydra.sweep.dir=sweep")
    assert profile("--config-dir", "mine", "-m", *options, "model=killed,useless,revnet38") == 1
    output = capsys.readouterr()
    assert output.err == "revnet-profile: 2 of 3 cells failed\n"
    lines = output.out.splitlines()
    assert lines[0].startswith("cell 1 of 3: model=killed: failed: killed, most likely because memory ran out")
    assert any(line.startswith("cell 3 of 3: model=revnet38: memory ") for line in lines)
    killed, useless, revnet = read("sweep/results.json")
    assert [killed["status"], useless["status"], revnet["status"]] == ["failed", "failed", "ok"]
    assert "Linear" in useless["reason"]
    assert "Traceback" in useless["stderr"]
    assert "\n" not in killed["reason"] + useless["reason"]
    assert [read(f"sweep/{number}/result.json") for number in range(3)] == [killed, useless, revnet]
    assert {"report.html", "results.csv", "memory.png"} <= {path.name for path in (tmp_path / "sweep").iterdir()}


def test_a_single_value_for_what_an_experiment_sweeps_is_no_sweep(capsys: pytest.CaptureFixture) -> None:
    options = ("mode=estimate", "hydra.sweep.dir=sweep", "hydra.sweeper.params.model=resnet32")
    assert profile("experiment=memory_vs_speed", *options, "activations=store", "batch_size=2") == 0
    assert capsys.readouterr().out.startswith("cell 1 of 1: memory ")


@pytest.mark.slow
def test_an_experiment_lays_down_a_sweep(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    swept = ("model='resnet32,revnet38'", "activations=store", "batch_size='2'")
    options = ("mode=estimate", "hydra.sweep.dir=sweep", *(f"hydra.sweeper.params.{values}" for values in swept))
    assert profile("experiment=memory_vs_speed", *options) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("cell 1 of 2: model=resnet32: memory ")
    assert second.startswith("cell 2 of 2: model=revnet38: memory ")
    assert [cell["config"]["batch_size"] for cell in read("sweep/results.json")] == [2, 2]
    assert (tmp_path / "sweep/report.html").is_file()


@pytest.mark.parametrize("recipe", ["cifar10_fast", "cifar10_revnet38_paper"])
def test_a_recipe_of_a_training_is_refused_in_one_line(recipe: str, capsys: pytest.CaptureFixture) -> None:
    assert profile(f"experiment={recipe}") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"revnet-profile: experiment=cifar10_\w+ is for another command: it chooses scheduler, .+\n", error
    )


@pytest.mark.slow
def test_an_interrupted_sweep_keeps_what_was_measured(tmp_path: Path) -> None:
    options = ("data=image_folder", "batch_size=2", "mode=estimate", "hydra.sweep.dir=sweep")
    command = [sys.executable, "-m", "revnet.profile", "--config-dir", "mine", "-m", *options]
    sweep = subprocess.Popen(
        [*command, "model=revnet38,endless,useless"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    # The second cell has begun once its directory is there and the first was reported.
    while not Path("sweep/report.html").exists() or not Path("sweep/1/.hydra/overrides.yaml").exists():
        assert sweep.poll() is None, sweep.stderr.read() if sweep.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    sweep.send_signal(signal.SIGINT)
    try:
        out, err = sweep.communicate(timeout=30)  # the pipes close when the process of the second cell has ended, too
    except subprocess.TimeoutExpired:  # Python loses a Ctrl-C that comes while it clears something up
        sweep.send_signal(signal.SIGINT)
        out, err = sweep.communicate(timeout=30)
    assert sweep.returncode == 130
    assert err == "revnet-profile: interrupted\n"
    assert "written to sweep/report.html" in out
    (only,) = read("sweep/results.json")
    assert only["overrides"]["model"] == "revnet38"
    assert "revnet38" in (tmp_path / "sweep/report.html").read_text()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_nothing_runs_on_once_the_command_has_ended(number: signal.Signals, tmp_path: Path) -> None:
    os.mkfifo("alive")
    code = "import time\nalive = open('alive', 'w')\nprint('begun', file=alive, flush=True)\ntime.sleep(100)\n"
    (tmp_path / "busy.py").write_text(code)
    (tmp_path / "mine/model/busy.yaml").write_text("_target_: busy.Network\n")
    command = [sys.executable, "-m", "revnet.profile", "--config-dir", "mine", "model=busy", "run_dir=here"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(os.open("alive", os.O_RDONLY | os.O_NONBLOCK)) as alive:
        assert select.select([alive], [], [], 120)[0], parent.communicate(timeout=1)
        assert alive.readline() == "begun\n"
        parent.send_signal(number)
        parent.communicate(timeout=30)
        assert select.select([alive], [], [], 30)[0]
        assert alive.read() == ""  # it closes with the process that measures


def test_help_tells_a_newcomer_what_to_type(capsys: pytest.CaptureFixture) -> None:
    assert profile("--help") == 0
    text = capsys.readouterr().out
    for part in ("revnet-profile -m ", "mode=plan budget=", "revnet104", "cifar10", "batch_size", "optimizer:\n"):
        assert part in text
