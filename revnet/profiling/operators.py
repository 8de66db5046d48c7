"""Operators whose results torch takes for smaller than they are where there is no data: set right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TrueSizes", "UnknownSize"]

aten = torch.ops.aten
RECURRENT = (aten.mkldnn_rnn_layer.default, aten._cudnn_rnn.default, aten.miopen_rnn.default)
COMPOSE = aten._sparse_coo_tensor_with_dims_and_tensors.default


class UnknownSize(Exception):
    """The size of what an operator returns is known only when it runs with data."""


class TrueSizes(TorchDispatchMode):
    """Stands between tensors without data and what counts their memory.

    The libraries behind recurrent layers return a workspace for the backward pass, of a size that they alone know;
    without data it is empty. Sparse tensors lose their entries in most operators.
    """

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RECURRENT:
            raise UnknownSize(f"{func}")
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_sparse or func in (COMPOSE, aten.detach.default):
            return result
        if func is not aten.clone.default:
            raise UnknownSize(f"{func} of sparse tensors")
        (sparse,) = args
        parts = sparse._indices().clone(), sparse._values().clone()
        kind = {"dtype": sparse.dtype, "layout": sparse.layout, "device": sparse.device}
        return COMPOSE(sparse.sparse_dim(), sparse.dense_dim(), sparse.shape, *parts, **kind)
