import pytest
import torch

pytest_plugins = ["pytester", "tests.promises", "tests.together"]

# The tensors of the tests are small: on one thread they are faster, and they do not mind a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    """Doctests too: a sum in the last bit of its output must not depend on the order of the tests."""
    torch.manual_seed(0)
