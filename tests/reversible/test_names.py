"""What the code of a module names is found through whatever it calls by name."""

import functools
import gc
import types
import weakref

import pytest
import torch
from torch import nn

from revnet.models import get_model, list_models
from revnet.reversible import ReversibleSequence
from revnet.reversible.buffers import STATISTICS
from revnet.reversible.evaluation import GRAD_MODE
from revnet.reversible.names import COMPILED, names_in

helpers = types.ModuleType("helpers")


def wanted(x):
    return x.wanted


def deeper(x):
    return wanted(x)


wanted.__module__ = deeper.__module__ = "helpers"
helpers.deeper = deeper
helpers.below = types.ModuleType("helpers.below")
helpers.below.deeper = deeper


class Helper:
    @staticmethod
    def scale(x):
        return x.wanted


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


class ByDeepModule(nn.Module):
    def forward(self, x):
        return helpers.below.deeper(x)


class ByHelper(nn.Module):
    def forward(self, x):
        return Helper.scale(x)


class ByPartialMethod(nn.Module):
    def scale(self, x):
        return x

    half = functools.partialmethod(wanted)


def naming(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return x.wanted + function(self, x)

    return wrapper


class ByWrapper(nn.Module):
    @naming
    def forward(self, x):
        return x


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
        *(ByDeepModule, ByHelper, ByPartialMethod, ByWrapper),
        *(by_closure, by_instance),
    ],
)
def test_a_name_is_found(make):
    module = make()
    assert "wanted" in names_in(module)
    assert "wanted" not in names_in(nn.Identity())


def test_nothing_that_this_package_builds_is_taken_for_reading_statistics_or_the_mode_of_gradients():
    assert names_in(ReversibleSequence([])) == frozenset()
    for name in list_models():
        with torch.device("meta"):
            network = get_model(name)
        named = set().union(*map(names_in, network.modules()))
        assert named.isdisjoint({*STATISTICS, *GRAD_MODE}), name


class Moody:
    """Stands in for something that is not there."""

    def __getattribute__(self, name):
        raise ImportError(name)

    def __call__(self):
        pass


def test_what_cannot_be_looked_at_is_passed_over():
    moody = Moody()

    class Uses(nn.Module):
        def forward(self, x):
            moody()
            return x.wanted

    assert "wanted" in names_in(Uses())


compiled = torch.compile(torch.nn.functional.gelu)


disabled = torch.compiler.disable(torch.nn.functional.gelu)


class Disabled(nn.Module):
    def forward(self, x):
        return disabled(x)


class Compiled(nn.Module):
    def forward(self, x):
        return compiled(x)


def test_a_function_that_is_compiled_is_known():
    assert COMPILED in names_in(Compiled())
    assert COMPILED not in names_in(Disabled())
    assert COMPILED not in names_in(ByMethod())


@pytest.mark.parametrize(
    "bind",
    [lambda module: types.MethodType(ByMethod.forward, module), lambda module: functools.partial(deeper, module)],
)
def test_a_module_whose_forward_refers_to_it_is_not_kept(bind):
    module = nn.Identity()
    module.forward = bind(module)
    assert "wanted" in names_in(module)
    assert "wanted" in names_in(module)
    module = weakref.ref(module)
    gc.collect()
    assert module() is None
