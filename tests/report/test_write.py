import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from revnet.report import write_report
from tests.report.examples import MB, failed, measured, write_cells


class Page(HTMLParser):
    """The texts of a page's cells, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.rows, self.sources = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_sweep_leaves_tables_plots_and_a_page(tmp_path: Path) -> None:
    cells = [
        measured(0, 512, 0.25, model="a", batch_size="8"),
        failed(1, "<too> much", model="b", batch_size="8"),
        measured(2, 4096, 0.5, model="b", batch_size="9"),
    ]
    assert write_report(write_cells(tmp_path, *cells)) == cells
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"results.json", "results.csv", "memory.png", "time.png", "report.html"}
    assert json.loads((tmp_path / "results.json").read_text()) == cells

    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert (rows[1]["reason"], rows[1]["memory.total"]) == ("<too> much", "")
    assert (rows[2]["model"], rows[2]["batch_size"], rows[2]["memory.total"]) == ("b", "9", str(4096 * MB))

    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.rows[0] == ["cell", "model", "batch_size", "memory", "time", "images/s", "parameters", "activations"]
    assert page.rows[1] == ["1", "a", "8", "512 MB", "250 ms", "32", "128 MB", "384 MB"]
    assert page.rows[2] == ["2", "b", "8", "<too> much"]
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "revnet-profile -m &lt;made up&gt;" in text
    assert "data=fake" in text
    assert re.search(r"torch 2\.15", text)


def colours(plot: Path) -> dict[tuple[int, int, int], int]:
    pixels, counts = np.unique(np.asarray(Image.open(plot).convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    return {(int(r), int(g), int(b)): int(count) for (r, g, b), count in zip(pixels, counts, strict=True)}


def test_bars_are_as_long_as_their_parts(tmp_path: Path) -> None:
    write_report(write_cells(tmp_path, measured(0, 512, 0.25, model="a"), measured(1, 4096, 0.5, model="b")))
    found = colours(tmp_path / "memory.png")
    parameters, activations = found[0x00, 0x72, 0xB2], found[0xE6, 0x9F, 0x00]
    assert 2.5 < activations / parameters < 3.2


def test_without_times_there_is_no_plot_of_them(tmp_path: Path) -> None:
    cells = [measured(n, 512, 0.25, batch_size=str(n)) for n in range(2)]
    for cell in cells:
        del cell["time"], cell["images_per_second"]
    write_report(write_cells(tmp_path, *cells))
    assert (tmp_path / "memory.png").exists()
    assert not (tmp_path / "time.png").exists()


def test_a_sweep_in_which_all_failed_has_a_report(tmp_path: Path) -> None:
    write_report(write_cells(tmp_path, failed(0, "one", model="a"), failed(1, "other", model="b")))
    assert not (tmp_path / "memory.png").exists()
    assert Page((tmp_path / "report.html").read_text()).rows[1:] == [["1", "a", "one"], ["2", "b", "other"]]
