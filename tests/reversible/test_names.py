"""What the code of a module names is found through whatever it calls by name."""

import functools
import types

import pytest
import torch
from torch import nn

from revnet.models import get_model, list_models
from revnet.reversible import ReversibleSequence
from revnet.reversible.buffers import STATISTICS
from revnet.reversible.names import MATRIX_PRODUCT, names_in

helpers = types.ModuleType("helpers")


def wanted(x):
    return x.wanted


def deeper(x):
    return wanted(x)


wanted.__module__ = deeper.__module__ = "helpers"
helpers.deeper = deeper


class ByMethod(nn.Module):
    def forward(self, x):
        return x.wanted


class ByText(nn.Module):
    def forward(self, x):
        return [getattr(x, name) for name in ("other", "wanted")]


class ByFunction(nn.Module):
    def forward(self, x):
        return deeper(x)


class ByModule(nn.Module):
    def forward(self, x):
        return helpers.deeper(x)


class ByProperty(nn.Module):
    @property
    def value(self):
        return self.norm.wanted


class ByCachedProperty(nn.Module):
    @functools.cached_property
    def value(self):
        return self.norm.wanted


class ByDecorator(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return x.wanted


class ByStaticMethod(nn.Module):
    @staticmethod
    def scale(x):
        return x.wanted


class Inner(nn.Module):
    def forward(self, x):
        return [y.wanted for y in (lambda: x)()]


class ByBase(Inner):
    pass


def by_closure():
    def inside(x):
        return x.wanted

    class ByClosure(nn.Module):
        def forward(self, x):
            return inside(x)

    return ByClosure()


def by_instance():
    module = nn.Identity()
    module.forward = lambda x: x.wanted
    return module


@pytest.mark.parametrize(
    "make",
    [
        *(ByMethod, ByText, ByFunction, ByModule, ByProperty, ByCachedProperty, ByDecorator, ByStaticMethod, ByBase),
        *(by_closure, by_instance),
    ],
)
def test_a_name_is_found(make):
    module = make()
    assert "wanted" in names_in(module)
    assert "wanted" not in names_in(nn.Identity())


def test_the_operator_of_matrix_products_is_found():
    class Product(nn.Module):
        def forward(self, x):
            return x @ self.weight

    assert MATRIX_PRODUCT in names_in(Product())
    assert MATRIX_PRODUCT not in names_in(ByMethod())


def test_nothing_that_this_package_builds_reads_statistics_or_is_taken_for_it():
    assert names_in(ReversibleSequence([])) == frozenset()
    for name in list_models():
        with torch.device("meta"):
            network = get_model(name)
        named = set().union(*map(names_in, network.modules()))
        assert named.isdisjoint((*STATISTICS, MATRIX_PRODUCT, "linear", "matmul")), name
