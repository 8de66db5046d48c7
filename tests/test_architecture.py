"""Imports flow one way, importing is cheap, and the files speak of the project alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "revnet"

# What each layer may import besides itself and the standard library. A new layer, or a new dependency of one,
# is entered here. Models and data meet in a command by the names in the configuration.
COMMAND = {"revnet.cli", "revnet.training", "hydra", "omegaconf"}
LAYERS = {
    "revnet": {"revnet.reversible"},
    "revnet.reversible": {"torch"},
    "revnet.models": {"revnet.reversible", "torch", "safetensors"},
    "revnet.flows": {"revnet.reversible", "torch"},
    "revnet.timm": {"revnet.models", "revnet.reversible", "torch", "timm"},
    "revnet.torchvision": {"revnet.models", "torch", "torchvision"},
    "revnet.profiling": {"revnet.reversible", "torch"},
    "revnet.data": {
        "revnet.processes",
        *("torch", "torchvision", "webdataset", "pytorch_lightning"),
        *("numpy", "PIL", "rich", "sklearn"),
    },
    "revnet.training": {
        *("revnet.environment", "revnet.flows", "revnet.profiling", "revnet.reversible"),
        *("torch", "torchvision", "pytorch_lightning", "torchmetrics", "numpy", "rich"),
    },
    "revnet.report": {"rich", "matplotlib", "jinja2"},
    "revnet.environment": {"torch"},
    "revnet.processes": {"torch"},
    "revnet.mistakes": {"revnet.flows", "revnet.processes", "revnet.reversible", "torch", "hydra", "omegaconf"},
    "revnet.arguments": {"revnet.mistakes", "hydra", "omegaconf"},
    "revnet.run_directory": {"revnet.mistakes", "revnet.processes", "hydra", "omegaconf"},
    "revnet.saved_overrides": {"revnet.run_directory", "hydra", "omegaconf", "yaml"},
    "revnet.cli": {
        "revnet.arguments",
        "revnet.mistakes",
        "revnet.processes",
        "revnet.run_directory",
        "hydra",
        "omegaconf",
    },
    "revnet.build": {"revnet.processes", "revnet.training", "hydra", "omegaconf", "torch", "pytorch_lightning"},
    "revnet.train": {
        *COMMAND,
        *("revnet.build", "revnet.mistakes", "revnet.processes", "revnet.reversible", "revnet.run_directory"),
        *("revnet.saved_overrides", "torch", "pytorch_lightning"),
    },
    "revnet.evaluate": {*COMMAND, "revnet.build", "revnet.models", "revnet.processes", "pytorch_lightning"},
    "revnet.predict": {"revnet.data", "revnet.training", "hydra", "torch"},
    "revnet.sample": {*COMMAND, "torch", "torchvision"},
    "revnet.shards": {"revnet.cli", "hydra", "omegaconf"},
    "revnet.profile": {
        *("revnet.cli", "revnet.environment", "revnet.mistakes", "revnet.profiling", "revnet.report"),
        *("hydra", "omegaconf"),
    },
    "revnet.profile_cell": {"revnet.mistakes", "revnet.profiling", "revnet.reversible", "hydra", "omegaconf", "torch"},
    "revnet.profile_sweep": {"revnet.mistakes", "revnet.report", "hydra", "omegaconf", "rich"},
}


class Import(NamedTuple):
    """An imported module; eager when it is imported as soon as the importer is."""

    module: str
    eager: bool


def read_imports(package: Path) -> dict[str, list[Import]]:
    """The modules of a package by name, each with what it imports."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if path.stem == "__init__" else parts)] = path
    imports = {}
    for name, path in files.items():
        package_name = name if path.stem == "__init__" else name.rpartition(".")[0]
        imports[name] = list(imports_of(ast.parse(path.read_text("utf-8")), package_name, files))
    return imports


def imports_of(node: ast.AST, package: str, known: Collection[str], eager: bool = True) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, eager) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.rsplit(".", node.level - 1)[0] if node.level else ""
        base = ".".join(filter(None, [above, node.module]))
        submodules = {f"{base}.{alias.name}" for alias in node.names}.intersection(known)
        yield from (Import(module, eager) for module in sorted(submodules) or [base])
    eager = eager and not is_deferred(node)
    for child in ast.iter_child_nodes(node):
        yield from imports_of(child, package, known, eager)


def is_deferred(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def forbidden_imports(imports: dict[str, list[Import]]) -> list[str]:
    def layer(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2]) if parts[0] == "revnet" else parts[0]

    return [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target, _ in targets
        if layer(target) not in sys.stdlib_module_names
        and layer(target) not in {layer(module), *LAYERS.get(layer(module), ())}
    ]


def import_cycle(imports: dict[str, list[Import]]) -> list[str]:
    graph = {
        module: {target for target, eager in targets if eager and target in imports}
        for module, targets in imports.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_flow_one_way() -> None:
    imports = read_imports(PACKAGE)
    assert {".".join(module.split(".")[:2]) for module in imports} == LAYERS.keys()
    assert forbidden_imports(imports) == []


def test_imports_are_not_circular() -> None:
    assert import_cycle(read_imports(PACKAGE)) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("models/a.py", "import os, torch.nn\nimport numpy.linalg", "revnet.models.a imports numpy.linalg"),
        ("models/a.py", "from revnet import reversible, train", "revnet.models.a imports revnet.train"),
        ("models/deep/a.py", "from ...data import x", "revnet.models.deep.a imports revnet.data"),
        ("reversible/__init__.py", "from .. import models", "revnet.reversible imports revnet.models"),
        ("training/a.py", "if True:\n    import hydra", "revnet.training.a imports hydra"),
        ("train.py", "def f():\n    from revnet.data import x", "revnet.train imports revnet.data"),
        ("train.py", "import hydra\nfrom experiments import x", "revnet.train imports experiments"),
        ("other.py", "import torch", "revnet.other imports torch"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    package = tmp_path / "revnet"
    files = {"models/__init__.py": "", "reversible/__init__.py": "", "train.py": "", file: source}
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert forbidden_imports(read_imports(package)) == [complaint]


@pytest.mark.parametrize(
    ("source", "circular"),
    [
        ("from revnet.models.b import x", True),
        ("from . import b", True),
        ("from . import x", True),
        ("def f():\n    from . import b", False),
        ("if TYPE_CHECKING:\n    from . import b", False),
        ("from torch import b", False),
    ],
)
def test_a_circular_import_is_found(tmp_path: Path, source: str, circular: bool) -> None:
    models = tmp_path / "revnet" / "models"
    models.mkdir(parents=True)
    (models / "__init__.py").write_text("from .a import x")
    (models / "a.py").write_text(source)
    (models / "b.py").write_text("from .a import x")
    assert bool(import_cycle(read_imports(tmp_path / "revnet"))) is circular


def test_importing_revnet_loads_torch_alone() -> None:
    code = "import sys, revnet; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "torch" in loaded
    others = {"hydra", "matplotlib", "omegaconf", "pytorch_lightning", "rich", "sklearn", "tensorboard"}
    assert loaded.isdisjoint(others | {"torchmetrics", "torchvision"})


def text_files() -> Iterator[tuple[Path, str]]:
    folders = [ROOT / name for name in (".ci", "conf", "docs", "experiments", "revnet", "tests")]
    for path in [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]:
        if path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                yield path, content.decode("utf-8")


def test_files_name_no_registry_and_no_place_of_one_machine() -> None:
    registry = r"pypi\.|pythonhosted\.|download\.pytorch\.|anaconda\.|--(extra-)?index-url|--find-links"
    place = r"(?<![\w.}])/(work|root|home|Users)/\w"
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, text in text_files()
        if path != Path(__file__)
        for match in re.finditer(f"{registry}|{place}", text)
    ]
    assert found == []
