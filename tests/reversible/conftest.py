import pytest
import torch


@pytest.fixture
def deterministic(monkeypatch):
    """Without it some of CUDA's kernels give other last bits in every run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
