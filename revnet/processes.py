"""The processes of a distributed run: which of them this is, and one directory for all."""

from __future__ import annotations

import os

__all__ = ["rank", "agree"]

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # torchrun's, Slurm's, Lightning's for the processes that it starts


def rank() -> int:
    """The number of this process, 0 for the first and for a process alone."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


def agree(directory: str) -> str:
    """The directory of the first process of a run that torchrun has started, which the others wait for.

    A directory that is named by the time would not be the same in all of them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return directory  # Lightning gives the processes that it starts the directory of the first
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"revnet/directory/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if rank() == 0:
        store.set(key, directory)
    return store.get(key).decode()
