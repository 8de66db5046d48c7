import pytest
import torch

# The tensors of the tests are small: on one thread they are faster, and they do not mind a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
