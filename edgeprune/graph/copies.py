"""Copies of a network that share its parameters: cheap to make, safe to run."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from ..errors import TraceError

CUSTOM = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")  # how a class may copy itself
TABLES = ("_parameters", "_buffers", "_modules")
PLAIN = (int, float, str, bool, type(None), type)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and owns its buffers.

    Raises:
        TraceError: the network holds something that cannot be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    try:
        if all(_is_plain(type(module)) for module in model.modules()):
            return _copied(model, memo)
        return copy.deepcopy(model, memo)
    except Exception as error:  # a user's module may hold anything
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); edgeprune never changes "
            "your model, it works on copies. Remove what cannot be copied (open files, locks, cached tensors)."
        ) from error


def _is_plain(kind: type) -> bool:
    """Does a module's class leave copying to Python? Those of torch.nn only mend old pickles."""
    if issubclass(kind, nn.RNNBase) or hasattr(kind, "__deepcopy__"):
        return False
    own = [c for c in kind.__mro__ if c not in (nn.Module, object) and not c.__module__.startswith("torch.nn")]
    return not any(name in vars(c) for c in own for name in (*CUSTOM, "__slots__"))


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What deepcopy makes, without its bookkeeping for each of a module's dozen empty dictionaries."""
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        made = memo[id(module)].__dict__
        for key, value in module.__dict__.items():
            empty = type(value) in (dict, OrderedDict, set) and not value
            made[key] = type(value)() if empty else _value(key, value, memo)
    copied: nn.Module = memo[id(model)]
    return copied


def _value(key: str, value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, PLAIN):
        return value
    if key in TABLES and type(value) is dict:
        return {name: _entry(item, memo) for name, item in value.items()}
    return copy.deepcopy(value, memo)


def _entry(item: Any, memo: dict[int, Any]) -> Any:
    if id(item) in memo:
        return memo[id(item)]
    if type(item) is Tensor and item.is_leaf:
        memo[id(item)] = item.detach().clone().requires_grad_(item.requires_grad)
        return memo[id(item)]
    return copy.deepcopy(item, memo)
