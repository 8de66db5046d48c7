import json
import platform
import re
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

from revnet.environment import environment


def test_environment_is_plain_and_true() -> None:
    described = environment()
    assert json.loads(json.dumps(described)) == described
    assert described["python"] == platform.python_version()
    assert described["torch"] == torch.__version__.partition("+")[0]
    begun = datetime.fromisoformat(str(described["date"]))
    assert abs(datetime.now(timezone.utc) - begun) < timedelta(minutes=1)
    assert described["threads"] == torch.get_num_threads()
    assert (described["gpu"] is None) == (not torch.cuda.is_available())


def test_the_commit_of_the_directory_that_a_training_runs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment()["commit_here"] is None
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", str(environment()["commit_here"]))
    Path("file").touch()
    subprocess.run(["git", "add", "file"], check=True)
    assert re.fullmatch("[0-9a-f]{40}-dirty", str(environment()["commit_here"]))
