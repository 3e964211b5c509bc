"""Import a file of the user's by its path, and call a function in it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import EdgepruneError

PREFIX = "edgeprune_user_"  # of the modules' names
CHANGED = "__edgeprune_changed_ns__"  # in them: when the file was changed last


def call(path: Path, name: str, error: type[EdgepruneError], arguments: Mapping[str, Any] | None = None) -> Any:
    """Import `path` and call its function `name`; whatever goes wrong there becomes an `error` that says where."""
    function = function_in(path, name, error)
    try:
        return function(**(arguments or {}))
    except Exception as problem:  # the user's code may raise anything
        raise error(f"{name}() in {path} failed: {type(problem).__name__}: {problem}") from problem


def function_in(path: Path, name: str, error: type[EdgepruneError]) -> Callable[..., Any]:
    module = import_file(path, error)
    found = getattr(module, name, None)
    if not callable(found):
        raise error(f"{path} has no function {name!r}; write file.py:function, as in model.py:build")
    return found  # type: ignore[no-any-return]


def import_file(path: Path, error: type[EdgepruneError]) -> ModuleType:
    """Run a file as a module; it may import its neighbours. One that has not changed since is not run again: classes
    of it stay the same ones, and can be sent to other processes."""
    if not path.is_file():
        raise error(f"{path} does not exist; write file.py:function, with the file beside edgeprune.toml")
    spec = importlib.util.spec_from_file_location(f"{PREFIX}{path.stem}", path.resolve())
    assert spec is not None, path  # the name ends in .py
    assert spec.loader is not None
    changed_ns = path.stat().st_mtime_ns
    known = sys.modules.get(spec.name)
    if known is not None and known.__file__ == spec.origin and known.__dict__[CHANGED] == changed_ns:
        return known
    module = importlib.util.module_from_spec(spec)
    module.__dict__[CHANGED] = changed_ns
    sys.modules[spec.name] = module  # where the user's dataclasses look for their module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # the user's code may raise anything
        del sys.modules[spec.name]
        raise error(f"{path} cannot be imported: {type(problem).__name__}: {problem}") from problem
    finally:
        sys.path.remove(str(path.parent))
    return module
