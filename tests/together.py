"""Two processes in one group, in which tests call functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import distributed

__all__ = ["together"]

SECONDS = 60


def _join_group(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS)
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """Calls a function in both processes at once, and returns what both return.

    What either raises is raised here, a deadlock after a minute.
    """
    rendezvous = (tmp_path_factory.mktemp("group") / "rendezvous").as_uri()
    spawn = get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, _join_group, (rank, rendezvous)) for rank in range(2)]

    def call(function: Callable[..., Any], *args: Any) -> list[Any]:
        futures = [pool.submit(function, *args) for pool in pools]
        return [future.result(timeout=2 * SECONDS) for future in futures]

    yield call
    for pool in pools:
        pool.shutdown()
