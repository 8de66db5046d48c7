"""The pages say what works: commands compose, the notebook runs, every module is rendered."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from PIL import Image

from revnet import profile, train
from revnet.models import revnet50, save_weights
from tests.commands import invoke

ROOT = Path(__file__).parents[1]


def commands() -> list[tuple[str, str]]:
    """The lines of the pages that call `revnet-train` or `revnet-profile`: the command, and what follows it."""
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
    text = "\n".join(path.read_text() for path in pages)
    calls = r"^(?:    |)(?:.*?-m revnet\.|.*?\brevnet-)(train|profile) ([^`\n]+)$"
    found = re.findall(calls, text.replace("\\\n", ""), re.MULTILINE)
    lines = {(name, re.split(r" +# | {3,}(?=[^ ]+ [^=]*$)", line)[0].strip()) for name, line in found}
    return sorted((name, line) for name, line in lines if "-sc" not in line and "ckpt_path" not in line)


@pytest.mark.parametrize(("name", "line"), commands())
def test_every_command_composes(
    name: str, line: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--config-dir mine" in line:
        (tmp_path / "mine/model").mkdir(parents=True)
        (tmp_path / "mine/model/net.yaml").write_text("_target_: net.Net\nnum_classes: null\n")
    arguments = [word for word in shlex.split(line) if word != "-m" and not re.search("=.*,", word)]
    if not re.search("--(cfg|help|info)", line):
        arguments += ["--cfg", "job"]
    assert invoke({"train": train.main, "profile": profile.main}[name], *arguments) == 0
    assert capsys.readouterr().out.strip()


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "block",
    [pytest.param(code, marks=pytest.mark.slow) if "max_batch" in code else code for code in blocks("README.md")],
)
def test_the_code_of_the_readme_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_code_of_the_other_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory with what it speaks of."""
    monkeypatch.chdir(tmp_path)
    assert invoke(train.main, "debug=fast", "trainer=cpu", "run_dir=runs/NAME/DATE") == 0
    Image.new("RGB", (50, 40), "gray").save("cat.png")
    save_weights(revnet50(), "net.safetensors")
    pages = {page.name: blocks(f"docs/{page.name}") for page in sorted((ROOT / "docs").glob("*.md"))}
    assert len(pages["commands.md"]) == 2
    for page, found in pages.items():
        for block in found:
            exec(compile(block, page, "exec"), {"__name__": page})


def test_the_notebook_begins_with_the_installation_and_ends_with_a_trained_network_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the checkout, whose package is installed beside those that are there, and used from then on."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("revnet", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    site = tmp_path / "site"
    for directory in (tmp_path / "docs", site):  # a place of packages has to be there when Python starts
        directory.mkdir()
    for name, value in {"TARGET": str(site), "NO_DEPS": "1", "NO_BUILD_ISOLATION": "0", "NO_INDEX": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)  # (0 says that there is no isolation)
    monkeypatch.setenv("PYTHONPATH", str(site))
    notebook = nbformat.read(ROOT / "docs/tutorial.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    (install,) = [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", [])]
    assert install is next(cell for cell in notebook.cells if cell.cell_type == "code")
    notebook.cells.append(nbformat.v4.new_code_cell("import revnet; print('installed in', *revnet.__path__)"))
    resources = {"metadata": {"path": tmp_path / "docs"}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert f"installed in {site}/revnet" in text
    accuracy = re.search(r"accuracy on test images: ([\d.]+)%", text)
    assert accuracy is not None
    assert float(accuracy[1]) > 50
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-2]  # ahead of that which was appended
    assert "memory" in last.source
    assert any("image/png" in output.get("data", {}) for output in last.outputs)


def test_every_package_is_rendered_without_a_warning(tmp_path: Path) -> None:
    """By the command of `make docs`, which names all packages, and of modules those that are commands or imported."""
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "revnet").rglob("__init__.py")}
    (line,) = re.findall(r"-m pdoc (.*)", (ROOT / "Makefile").read_text().replace("\\\n", " "))
    options, names = line.split()[:4], line.split()[4:]
    assert options == ["-d", "google", "-o", "build/api"]
    assert {".".join(package.parts) for package in packages if package.name != "conf"} <= set(names)
    command = [sys.executable, "-m", "pdoc", *options[:-1], str(tmp_path), *names]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    # pdoc looks for the hints of a named tuple where it is exported, not where it is defined.
    assert [line for line in run.stderr.splitlines() if "Warn" in line and "reversible.Step.__init__" not in line] == []
    pages = {tmp_path / "/".join(name.split(".")) for name in names}
    assert [page for page in pages if not page.with_suffix(".html").is_file()] == []
    assert "ReversibleSequence" in (tmp_path / "revnet/reversible.html").read_text()


def test_the_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation.get("version", version("revnet")) == version("revnet")
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
