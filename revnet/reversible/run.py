"""Consecutive layers of a sequence that are undone or done again as one, and the extra inputs of their branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from revnet.reversible.evaluation import Evaluation
from revnet.reversible.layer import as_state
from revnet.reversible.modules import modules_in, parameters_of

__all__ = ["ContextStructure", "Run"]

_TENSOR = object()


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive layers of a sequence that are reconstructed by one Function, or one that is recomputed.

    Attributes:
        layers: the layers in forward order.
        first: number of the first of them in its sequence.
        exact: whether the stream is on the fixed-point grid.
        enters_grid: whether its input has yet to be put there.
        tolerance: relative difference from which a branch's two evaluations are called different; None: not compared.
        report: receives the reconstruction error of every backward pass over the run.
        inspected: layers that were found before to have all their parameters in branches.
    """

    layers: tuple[nn.Module, ...]
    first: int
    exact: bool
    enters_grid: bool
    tolerance: float | None
    report: Callable[[Tensor], None]
    inspected: set[nn.Module]

    def parameters(self) -> list[Tensor]:
        """The parameters, and the buffers that require grad, each once."""
        modules = [module for layer in self.layers for module in modules_in(layer)]
        unique = list({id(p): p for module in modules for _, p in parameters_of(module)}.values())
        if any(type(p) not in (nn.Parameter, Tensor) for p in unique):
            _check_materialised(self)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _check_unsharded(self, modules)
        return unique

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules with their names in the sequence."""
        for index, layer in enumerate(self.layers, self.first):
            yield from layer.named_modules(prefix=str(index))

    def check_unchanged(self, versions: list[tuple[Tensor, int]]) -> None:
        """RuntimeError if a parameter is no longer what it was in the forward pass."""
        for parameter, version in versions:
            if parameter._version != version:
                named = [
                    name
                    for index, layer in enumerate(self.layers, self.first)
                    for name, p in (*layer.named_parameters(str(index)), *layer.named_buffers(str(index)))
                    if p is parameter
                ]
                which = f"parameter {', '.join(named)}" if named else "a former parameter"
                raise RuntimeError(
                    f"{which} of a reversible sequence was changed in place between the forward "
                    f"and the backward pass; change it after the backward pass (the optimizer's step too)"
                )

    def check_repeated(self, module: nn.Module, evaluation: Evaluation, result: Any) -> None:
        """RuntimeError if `result`, that of a second evaluation, is not that of the first, where they are compared."""
        if evaluation.sample is None or self.tolerance is None:
            return
        difference = evaluation.sample.error(as_state(result, module)).item()
        if difference > self.tolerance:
            name = next((name for name, found in self.named_modules() if found is module), "a branch")
            raise RuntimeError(
                f"{name} ({type(module).__name__}) of a reversible sequence is not deterministic: the result of its "
                f"second evaluation is {difference:.1e} off that of the first (relative); let it draw from torch's "
                f'default generators and keep its state in buffers, or keep its activations (activations="store")'
            )


class ContextStructure:
    """The structure of the branches' extra inputs: any nesting of tuples, lists and dicts that holds tensors."""

    def __init__(self, context: Any) -> None:
        leaves, self.spec = pytree.tree_flatten(context)
        self.constants = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.count = sum(constant is _TENSOR for constant in self.constants)

    @staticmethod
    def tensors(context: Any) -> list[Tensor]:
        leaves = [leaf for leaf in pytree.tree_leaves(context) if isinstance(leaf, Tensor)]
        return [leaf.clone() if leaf.is_inference() else leaf for leaf in leaves]  # autograd keeps none of those

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        leaves = [next(rest) if constant is _TENSOR else constant for constant in self.constants]
        return pytree.tree_unflatten(leaves, self.spec)

    def check_unchanged(self, context: Any, tensors: Sequence[Tensor], versions: list[int]) -> None:
        """ValueError if a branch wrote to one of the tensors, whose versions were these before, or to what holds them.

        Args:
            context: what the branches were given, from `rebuild(tensors)`.
        """
        leaves, spec = pytree.tree_flatten(context)
        rest = iter(tensors)
        given = [next(rest) if constant is _TENSOR else constant for constant in self.constants]
        if spec != self.spec or any(leaf is not other for leaf, other in zip(leaves, given, strict=True)):
            raise ValueError(
                "a branch puts something into the context or takes something out, of which nobody else would know: the "
                'lists and dicts that it sees are copies where activations are not stored; give its layer "store"'
            )
        if [tensor._version for tensor in tensors] != versions:
            raise ValueError(
                "a branch changes the context in place, which every other branch still reads; let it make a new tensor"
            )


def _check_materialised(run: Run) -> None:
    for name, module in run.named_modules():
        if any(is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(
                f"{name} of a reversible sequence ({type(module).__name__}) has parameters without a shape yet; "
                f"run one forward pass under torch.no_grad() first"
            )


def _check_unsharded(run: Run, modules: list[nn.Module]) -> None:
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in modules):
        name = next(name for name, module in run.named_modules() if isinstance(module, FSDPModule))
        raise ValueError(
            f"{name} of a reversible sequence was given to fully_shard, whose hooks do not reach the second evaluation "
            f"of a branch; give it the whole sequence or the network instead, or keep the activations of that layer "
            f'(activations="store")'
        )
