"""Copies of a network that share its parameters: cheap to make, safe to run."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError

CUSTOM = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")  # how a class may copy itself
TABLES = ("_parameters", "_buffers", "_modules")
PLAIN = frozenset([int, float, str, bool, type(None), type])
EMPTY = frozenset([dict, OrderedDict, set])


@dataclass(frozen=True)
class Parts:
    """Every module, parameter and buffer of a network once, under PyTorch's name for it."""

    modules: dict[str, nn.Module]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @property
    def root(self) -> nn.Module:
        return self.modules[""]

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers


def parts(model: nn.Module) -> Parts:
    """What `named_modules`, `named_parameters` and `named_buffers` say, in a single walk."""
    found = Parts({}, {}, {})
    modules, seen = found.modules, {id(model)}

    def visit(path: str, dot: str, module: nn.Module) -> None:
        modules[path] = module
        for table, known in ((module._parameters, found.parameters), (module._buffers, found.buffers)):
            for key, tensor in table.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    known[dot + key] = tensor
        for key, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                visit(dot + key, f"{dot}{key}.", child)

    visit("", "", model)
    return found


def without_weights(found: Parts) -> Parts:
    """A copy of the modules that shares every parameter and owns its buffers.

    Raises:
        TraceError: the network holds something that cannot be copied.
    """
    return with_tensors(found, {id(p): p for p in found.parameters.values()})


def with_tensors(found: Parts, instead: Mapping[int, Tensor]) -> Parts:
    """A copy of the modules with other tensors in the place of some, by their id().

    Raises:
        TraceError: the network holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(instead)
    try:
        if all(_is_plain(kind) for kind in set(map(type, found.modules.values()))):
            return _copied(found, memo)
        return parts(copy.deepcopy(found.root, memo))
    except Exception as error:  # a user's module may hold anything
        raise TraceError(
            f"{type(found.root).__name__} cannot be copied ({type(error).__name__}: {error}); edgeprune never changes "
            "your model, it works on copies. Remove what cannot be copied (open files, locks, cached tensors)."
        ) from error


def switch(found: Parts, training: bool) -> nn.Module:
    """What `train(training)` does to a network, in less time where no module has a `train` of its own."""
    kinds: set[type[nn.Module]] = set(map(type, found.modules.values()))
    if any(kind.train is not nn.Module.train or issubclass(kind, torch.jit.ScriptModule) for kind in kinds):
        return found.root.train(training)
    for module in found.modules.values():
        vars(module)["training"] = training
    return found.root


def _is_plain(kind: type) -> bool:
    """Does a module's class leave copying to Python? Those of torch.nn only mend old pickles."""
    if issubclass(kind, nn.RNNBase) or hasattr(kind, "__deepcopy__"):
        return False
    own = [c for c in kind.__mro__ if c not in (nn.Module, object) and not c.__module__.startswith("torch.nn")]
    return not any(name in vars(c) for c in own for name in (*CUSTOM, "__slots__"))


def _copied(found: Parts, memo: dict[int, Any]) -> Parts:
    """What deepcopy makes, without its bookkeeping for each of a module's dozen empty dictionaries."""
    for module in found.modules.values():
        memo[id(module)] = type(module).__new__(type(module))
    for module in found.modules.values():
        own = vars(module)
        made = own.copy()
        object.__setattr__(memo[id(module)], "__dict__", made)  # as it is: to fill the one there takes longer
        for key, value in own.items():
            kind = type(value)
            if kind in PLAIN:
                continue
            if kind in EMPTY and not value:
                made[key] = kind()
            elif kind is not tuple or not PLAIN.issuperset(map(type, value)):
                made[key] = _value(key, value, memo)
    tables = (found.modules, found.parameters, found.buffers)
    return Parts(*({name: memo[id(item)] for name, item in table.items()} for table in tables))


def _value(key: str, value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is dict and key in TABLES:
        return {name: _entry(item, memo) for name, item in value.items()}
    if kind is list and PLAIN.issuperset(map(type, value)):
        return memo.setdefault(id(value), list(value))
    return copy.deepcopy(value, memo)


def _entry(item: Any, memo: dict[int, Any]) -> Any:
    if item is None or id(item) in memo:
        return memo.get(id(item))
    if type(item) is Tensor and item.is_leaf:
        memo[id(item)] = item.detach().clone().requires_grad_() if item.requires_grad else item.clone()
        return memo[id(item)]
    return copy.deepcopy(item, memo)
