import subprocess
import sys

import pytest


@pytest.mark.parametrize("split", ["train", pytest.param("val", marks=pytest.mark.slow)])
def test_a_script_ends_where_a_loader_has_processes(split):
    """The loader itself is gone by then, and its iterator is not."""
    lines = [
        "from revnet.data import Fake",
        "data = Fake((1, 2, 2), num_workers=1)",
        "data.setup()",
        f"batches = iter(data.{split}_dataloader())",
        "next(batches)",
    ]
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", "; ".join(lines)], timeout=120, capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")


@pytest.mark.slow
def test_a_script_ends_where_a_process_of_a_loader_does_not_answer():
    lines = [
        "import os, signal",
        "from revnet.data import Fake",
        "data = Fake((1, 2, 2), num_workers=1)",
        "data.setup()",
        "batches = iter(data.val_dataloader())",
        "os.kill(batches._workers[0].pid, signal.SIGSTOP)",
    ]
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", "; ".join(lines)], timeout=60, capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")
