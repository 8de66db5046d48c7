import json
import platform

import torch

from revnet.training import environment


def test_environment_is_plain_and_true() -> None:
    described = environment()
    assert json.loads(json.dumps(described)) == described
    assert described["python"] == platform.python_version()
    assert described["torch"] == torch.__version__.partition("+")[0]
    assert described["threads"] == torch.get_num_threads()
    assert (described["gpu"] is None) == (not torch.cuda.is_available())
