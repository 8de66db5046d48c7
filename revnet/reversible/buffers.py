"""Which buffers of a branch must be in a second evaluation what they were before the first."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import CodeType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = [
    "STATISTICS",
    "Changed",
    "Unchanged",
    "copy_buffers",
    "names_statistics",
    "only_writes",
    "sort_out",
    "version_of",
]

Buffer = tuple[nn.Module, str, Tensor | None, Tensor | None, int]
"""Owner, name, value, a copy of it from before the evaluation, and how often the value had been changed by then."""
Changed = tuple[tuple[nn.Module, str, Tensor | None], ...]
Unchanged = tuple[tuple[nn.Module, str, Tensor | None, int], ...]

SMALL = 1024  # elements of a buffer
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_BATCH_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_called: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Batch normalisations whose own `forward` was seen to run; of others a branch may use the statistics itself."""
_names_statistics: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def only_writes(module: nn.Module) -> bool:
    """Whether a module is one of torch's own normalisations in training mode, which never reads its statistics."""
    if not (isinstance(module, _NormBase) and module.training):
        return False
    return module in _called or type(module).forward is _InstanceNorm.forward


def names_statistics(kind: type[nn.Module]) -> bool:
    """Whether the code of a module names running statistics, and so may read those of a normalisation that it holds.

    So do modules that fold a normalisation into a convolution to train with quantised weights.
    """
    found = _names_statistics.get(kind)
    if found is None:
        own = (base for base in kind.__mro__ if not base.__module__.startswith(("torch.nn.modules.", "builtins")))
        members = (getattr(member, "__func__", member) for base in own for member in vars(base).values())
        codes = [member.__code__ for member in members if hasattr(member, "__code__")]
        for code in codes:
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        found = any(not {*STATISTICS}.isdisjoint((*code.co_names, *code.co_consts)) for code in codes)
        _names_statistics[kind] = found
    return found


def _was_called(module: nn.Module, name: str, buffer: Tensor | None, version: int) -> bool:
    """Whether a batch normalisation has counted a batch since its `buffer` of this name had this version."""
    if name != "num_batches_tracked" or type(module).forward not in _BATCH_NORM_FORWARDS or not module.training:
        return False
    return module._buffers[name] is buffer and version_of(buffer) != version


def copy_buffers(owners: Iterable[nn.Module], reads_statistics: bool) -> list[Buffer]:
    """Copies of the buffers whose value could enter the result and change: all but running statistics in training.

    torch's own normalisation in training mode writes its running statistics and never reads them (nor bumps their
    version), so nothing needs to be kept for it. A buffer that requires grad is a parameter to the engine.
    """
    found: list[Buffer] = []
    for owner in owners:
        if reads_statistics or not only_writes(owner):
            for name, value in owner._buffers.items():
                if value is None:
                    found.append((owner, name, None, None, 0))
                elif not value.requires_grad:
                    found.append((owner, name, value, value.clone(), version_of(value)))
    return found


def sort_out(buffers: list[Buffer], reads_statistics: bool) -> tuple[Changed, Unchanged]:
    """After the evaluation: copies of those that a second one needs as they were; the others, with their versions."""
    _called.update(owner for owner, name, value, _, version in buffers if _was_called(owner, name, value, version))
    buffers = [buffer for buffer in buffers if reads_statistics or not only_writes(buffer[0])]
    changed = tuple(
        (owner, name, copy)
        for owner, name, value, copy, version in buffers
        # In evaluation mode the statistics are read, and a later step in training mode may change them.
        if owner._buffers[name] is not value
        or version_of(value) != version
        or isinstance(owner, _NormBase)
        or _may_differ(copy, value)
    )
    kept = {(id(owner), name) for owner, name, _ in changed}
    unchanged = tuple((o, n, value, v) for o, n, value, _, v in buffers if (id(o), n) not in kept)
    return changed, unchanged


def _may_differ(copy: Tensor | None, value: Tensor | None) -> bool:
    """Whether a buffer may have been written in a way that autograd does not count, as `F.batch_norm` does.

    To ask an accelerator would be to wait for it; what is small is kept there.
    """
    if not (type(copy) is type(value) is Tensor and value.layout is torch.strided):
        return False
    if value.device.type == "cpu":
        return not torch.equal(copy, value)
    return value.numel() <= SMALL and value.device.type != "meta"


def version_of(x: Tensor | None) -> int:
    """How often `x` was changed in place; 0 where a tensor does not count that or a trace runs."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.is_inference():
        return 0
    return x._version
