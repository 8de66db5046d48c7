from pathlib import Path

import pytest

from revnet.training import Classifier, TrainingMonitor, print_summary
from tests.training.tiny import tiny_network

METRICS = {"test/accuracy": 0.98765, "test/loss": 0.1, "train/accuracy": 1.0, "train/loss": 0.01, "learning": 3.0}


def test_the_summary_says_what_was_reached_how_fast_and_where(capsys: pytest.CaptureFixture) -> None:
    monitor = TrainingMonitor()
    monitor.images_per_second, monitor.seconds_per_epoch = 12345.6, 3.21
    monitor.peak_memory_mb, monitor.reconstruction_error = 789.0, 2e-6
    classifier = Classifier(tiny_network())
    print_summary("tiny on noise", classifier, METRICS, epochs=7, monitor=monitor, files={"run directory": "runs/a"})
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert out.startswith("tiny on noise")
    assert lines == [
        ["parameters", "748"],
        ["test accuracy", "98.77 %"],
        ["test loss", "0.1000"],
        ["train accuracy", "100.00 %"],
        ["train loss", "0.0100"],
        ["epochs", "7"],
        ["seconds per epoch", "3.21"],
        ["images per second", "12,346"],
        ["peak memory of the process", "789 MB"],
        ["largest reconstruction error", "2.0e-06"],
        ["run directory", "runs/a"],
    ]


def test_paths_are_shown_as_seen_from_here(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"a": str(tmp_path / "runs/a"), "b": "/b", "c": "none"}
    print_summary("tiny", Classifier(tiny_network()), {}, files=files)
    shown = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line.startswith(("│ a", "│ b", "│ c"))]
    assert shown == ["runs/a", "/b", "none"]


def test_what_is_not_known_is_left_out(capsys: pytest.CaptureFixture) -> None:
    print_summary("tiny", Classifier(tiny_network()), {"test/accuracy": 0.5, "test/loss": 1.0})
    out = capsys.readouterr().out
    assert "50.00 %" in out
    assert not any(word in out for word in ("train", "epoch", "memory", "reconstruction"))
