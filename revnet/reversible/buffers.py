"""Which buffers of a branch must be in a second evaluation what they were before the first."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = [
    "STATISTICS",
    "Changed",
    "Unchanged",
    "can_go_untracked",
    "copy_buffers",
    "copy_of",
    "sort_out",
    "version_of",
]

Buffer = tuple[nn.Module, str, Tensor | None, Tensor | None, int]
"""Owner, name, value, a copy of it from before the evaluation, and how often the value had been changed by then."""
Changed = tuple[tuple[nn.Module, str, Tensor | None], ...]
Unchanged = tuple[tuple[nn.Module, str, Tensor | None, int], ...]

SMALL = 2**16  # elements of a buffer
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_BATCH_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_called: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Batch normalisations whose own `forward` was seen to run; of others a branch may use the statistics itself."""


def _only_writes(module: nn.Module) -> bool:
    """Whether a module is one of torch's own normalisations in training mode, which never reads its statistics."""
    if not (isinstance(module, _NormBase) and module.training):
        return False
    return module in _called or type(module).forward is _InstanceNorm.forward


def can_go_untracked(module: nn.Module) -> bool:
    """Whether `_only_writes` holds, and it computes the same without statistics to write to.

    In half precision it takes the dtype to compute in from its weight, or else from its statistics; synchronised, from
    these alone.
    """
    return _only_writes(module) and module.weight is not None and not isinstance(module, nn.SyncBatchNorm)


def _was_called(module: nn.Module, name: str, buffer: Tensor | None, version: int) -> bool:
    """Whether a batch normalisation has counted a batch since its `buffer` of this name had this version."""
    if name != "num_batches_tracked" or type(module).forward not in _BATCH_NORM_FORWARDS or not module.training:
        return False
    return module._buffers[name] is buffer and version_of(buffer) != version


def copy_buffers(owners: Iterable[nn.Module], reads_statistics: bool) -> list[Buffer]:
    """Copies of the buffers whose value could enter the result and change: all but running statistics in training.

    torch's own normalisation in training mode writes its running statistics and never reads them (nor bumps their
    version), so nothing needs to be kept for it, unless something else in the branch `reads_statistics`: as what folds
    a normalisation into a convolution does, to train with quantised weights. A buffer that requires grad is a parameter
    to the engine.
    """
    found: list[Buffer] = []
    copies: dict[int, Tensor] = {}  # a buffer in several places has one
    for owner in owners:
        left_out = STATISTICS if not reads_statistics and _only_writes(owner) else ()
        for name, value in owner._buffers.items():
            if value is None:
                found.append((owner, name, None, None, 0))
            elif not value.requires_grad and name not in left_out:
                if id(value) not in copies:
                    copies[id(value)] = copy_of(value)
                found.append((owner, name, value, copies[id(value)], version_of(value)))
    return found


def copy_of(buffer: Tensor) -> Tensor:
    """A clone with the attributes that somebody has given the buffer, which a plain clone has not."""
    copy = buffer.clone()
    # What a subclass keeps of its own is there already, and is a copy.
    vars(copy).update(vars(buffer) | vars(copy))
    return copy


def sort_out(buffers: list[Buffer], reads_statistics: bool) -> tuple[Changed, Unchanged]:
    """After the evaluation: copies of those that a second one needs as they were; the others, with their versions."""
    _called.update(owner for owner, name, value, _, version in buffers if _was_called(owner, name, value, version))
    if not reads_statistics:
        buffers = [buffer for buffer in buffers if buffer[1] not in STATISTICS or not _only_writes(buffer[0])]
    written = {
        id(value)  # in every place that holds it
        for owner, name, value, copy, version in buffers
        # In evaluation mode the statistics are read, and a later step in training mode may change them.
        if version_of(value) != version or isinstance(owner, _NormBase) or _may_differ(copy, value)
    }
    changed, unchanged = [], []
    for owner, name, value, copy, version in buffers:
        if owner._buffers[name] is not value or (value is not None and id(value) in written):
            changed.append((owner, name, copy))
        else:
            unchanged.append((owner, name, value, version))
    return tuple(changed), tuple(unchanged)


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
