"""Copies of a network that share its parameters: cheap to make, safe to run."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    def state(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers


def parts(model: nn.Module) -> Parts:
    """What `named_modules`, `named_parameters` and `named_buffers` say, in a single walk."""
    modules: dict[str, nn.Module] = {}
    found = Parts(modules, {}, {})
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        modules[path] = module
        dot = f"{path}." if path else ""
        for table, known in ((module._parameters, found.parameters), (module._buffers, found.buffers)):
            for key, tensor in table.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    known[dot + key] = tensor
        for key, child in module._modules.items():
            if child is not None:
                visit(dot + key, child)

    visit("", model)
    return found


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and owns its buffers.

    Raises:
        TraceError: the network holds something that cannot be copied.
    """
    return with_tensors(model, {id(p): p for p in parts(model).parameters.values()})


def with_tensors(model: nn.Module, instead: Mapping[int, Tensor]) -> nn.Module:
    """A copy of the modules with other tensors in the place of some, by their id().

    Raises:
        TraceError: the network holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(instead)
    try:
        modules = list(parts(model).modules.values())
        if all(_is_plain(kind) for kind in {type(module) for module in modules}):
            return _copied(model, modules, memo)
        return copy.deepcopy(model, memo)
    except Exception as error:  # a user's module may hold anything
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); edgeprune never changes "
            "your model, it works on copies. Remove what cannot be copied (open files, locks, cached tensors)."
        ) from error


def switch(model: nn.Module, training: bool) -> nn.Module:
    """What `model.train(training)` does, in less time where no module has a `train` of its own."""
    modules = list(parts(model).modules.values())
    if any(type(m).train is not nn.Module.train or isinstance(m, torch.jit.ScriptModule) for m in modules):
        return model.train(training)
    for module in modules:
        vars(module)["training"] = training
    return model


def _is_plain(kind: type) -> bool:
    """Does a module's class leave copying to Python? Those of torch.nn only mend old pickles."""
    if issubclass(kind, nn.RNNBase) or hasattr(kind, "__deepcopy__"):
        return False
    own = [c for c in kind.__mro__ if c not in (nn.Module, object) and not c.__module__.startswith("torch.nn")]
    return not any(name in vars(c) for c in own for name in (*CUSTOM, "__slots__"))


def _copied(model: nn.Module, modules: Sequence[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """What deepcopy makes, without its bookkeeping for each of a module's dozen empty dictionaries."""
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        made = memo[id(module)].__dict__
        for key, value in module.__dict__.items():
            kind = type(value)
            if kind in PLAIN:
                made[key] = value
            elif kind in EMPTY and not value:
                made[key] = kind()
            else:
                made[key] = _value(key, value, memo)
    copied: nn.Module = memo[id(model)]
    return copied


def _value(key: str, value: Any, memo: dict[int, Any]) -> Any:
    if key in TABLES and type(value) is dict:
        return {name: _entry(item, memo) for name, item in value.items()}
    if type(value) is tuple and all(type(item) in PLAIN for item in value):
        return value
    return copy.deepcopy(value, memo)


def _entry(item: Any, memo: dict[int, Any]) -> Any:
    if item is None or id(item) in memo:
        return memo.get(id(item))
    if type(item) is Tensor and item.is_leaf:
        memo[id(item)] = item.detach().clone().requires_grad_() if item.requires_grad else item.clone()
        return memo[id(item)]
    return copy.deepcopy(item, memo)
