from pathlib import Path

import pytest

from revnet.report import end_sweep, headline, print_cell
from tests.report.examples import failed, measured, write_cells


def test_a_headline_is_figures_or_the_reason() -> None:
    assert headline(measured(0, 512, 0.25)) == "memory 512 MB, time 250 ms, images/s 32"
    assert headline(measured(0, 3000, 2)) == "memory 3.00 GB, time 2.00 s, images/s 4"
    assert headline(failed(0, "no [memory]")) == "failed: no [memory]"


def test_a_cell_is_told_from_top_to_bottom(capsys: pytest.CaptureFixture) -> None:
    print_cell({**measured(0, 512, 0.25, model="a"), "plan": "store [1, 2]"}, "there/result.json")
    text = capsys.readouterr().out
    for part in ("revnet-profile data=fake model=a", "parameters", "128 MB", "384 MB", "there/result.json"):
        assert part in text
    assert text.endswith("store [1, 2]\n")


def test_a_sweep_is_a_line_for_each_cell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cells = [measured(0, 512, 0.25, model="a"), *(failed(n, "[no] memory", model="b") for n in (2, 10))]
    assert end_sweep(write_cells(tmp_path, *cells)) == cells
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == [
        ["revnet-profile", "data=fake"],
        ["cell", "model", "memory", "time", "images/s"],
        ["1", "a", "512", "MB", "250", "ms", "32"],
        ["3", "b", "failed"],
        ["11", "b", "failed"],
    ]
    assert lines[5] == ["cell", "3,", "11", "failed:", "[no]", "memory"]


def test_a_sweep_of_one_choice_fits_a_narrow_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    choices = [{"model": "preact101", "batch_size": "32", "activations": value} for value in ("store", "reconstruct")]
    cells = [measured(n, 999, 0.123, **choice) for n, choice in enumerate(choices)]
    end_sweep(write_cells(tmp_path, *cells, measured(2, 999, 0.1, model="revnet104", batch_size="64", activations="")))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines[:5]) <= 80
    assert "reconstruct" in lines[3]


def test_nothing_measured_is_no_error(tmp_path: Path) -> None:
    assert end_sweep(tmp_path) == []
