"""The processes of a distributed run: which of them this is, and one directory for all."""

from __future__ import annotations

import os

__all__ = ["rank", "is_slurm_task", "started", "started_by_slurm", "agree", "leave_group"]


def rank() -> int:
    """The number of this process, 0 for the first and for a process alone."""
    slurm, own = "SLURM_PROCID", "LOCAL_RANK"  # own: Lightning's, for the processes that it starts
    names = ("RANK", slurm, own) if started_by_slurm() else ("RANK", own, slurm)  # RANK: torchrun's
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def started_by_slurm() -> bool:
    """Whether Lightning takes the processes for Slurm's; in an interactive shell there it starts them itself."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def is_slurm_task() -> bool:
    """Whether srun has started this very process, and not a torchrun that is its parent."""
    return started_by_slurm() and "RANK" not in os.environ


def started() -> int:
    """How many processes torchrun or srun has started for this run."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS" if is_slurm_task() else "WORLD_SIZE", "1"))


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


def leave_group() -> None:
    """End torch's group of processes, which Lightning does for NCCL alone.

    Gloo's threads may hold tensors still, and end a run that has finished in SIGABRT where Python is gone before them.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
