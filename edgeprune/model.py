"""Load the network that a project file names: from a function, a package, torchvision or timm, with its weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import lowrank, userfile
from .config import ModelSection
from .errors import ModelError

SHAPES_SHOWN = 3


def load(section: ModelSection, folder: Path) -> nn.Module:
    """Build the network, load its weights, and run it once on its input shape.

    Args:
        section: [model] of the project file.
        folder: where the file lies; relative paths start there.
    Raises:
        ModelError: the source does not import or makes no Module, weights do not fit, or the forward fails.
    """
    model = build(section.source, section.arguments, folder)
    if section.weights is not None:
        load_weights(model, folder / section.weights)
    model = lowrank.factored(model, section.low_rank).eval() if section.low_rank else model.eval()
    try:
        with torch.inference_mode():
            model(example_of(section))
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(
            f"{section.source} fails on an input of shape {list(section.input)}: {type(error).__name__}: {error}; set "
            "model.input to a shape that it takes, batch first"
        ) from error
    return model


def example_of(section: ModelSection) -> Tensor:
    """A random input of the project's shape, the same every time."""
    return torch.randn(section.input, generator=torch.Generator().manual_seed(0))


def build(source: str, arguments: Mapping[str, Any], folder: Path) -> nn.Module:
    """Call `file.py:function`, `package.module:function`, `torchvision:NAME` or `timm:NAME`."""
    origin, colon, name = source.rpartition(":")
    if not colon or not origin or not name:
        raise ModelError(
            f"model.source {source!r} is none of file.py:function, package.module:function, torchvision:NAME, timm:NAME"
        )
    try:
        function = function_of(origin, name, folder)
        model = function(**arguments)
    except ModelError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise ModelError(f"model.source {source} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.source {source} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def function_of(origin: str, name: str, folder: Path) -> Any:
    """The function that makes the model."""
    if origin == "torchvision":
        return _zoo("torchvision.models", "get_model", name)
    if origin == "timm":
        return _zoo("timm", "create_model", name)
    if origin.endswith(".py"):
        return userfile.function_in(folder / origin, name, ModelError)
    found = getattr(_import(origin), name, None)
    if not callable(found):
        raise ModelError(f"{origin} has no function {name!r}")
    return found


def _zoo(package: str, maker: str, name: str) -> Any:
    top = package.partition(".")[0]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ModelError(f"{top} is not installed; install it with: pip install 'edgeprune[zoo]'") from error

    def make(**arguments: Any) -> Any:
        return getattr(module, maker)(name, **arguments)

    return make


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"{name} does not import: {error}; is it installed in this environment?") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict strictly; raises ModelError that names the keys that do not fit."""
    state = read_state(path)
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [
        f"{k} is {list(state[k].shape)}, the model has {list(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if own[k].shape != state[k].shape
    ]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    problems = []
    for label, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if keys:
            more = f" and {len(keys) - SHAPES_SHOWN} more" if len(keys) > SHAPES_SHOWN else ""
            problems.append(f"{label}: {', '.join(keys[:SHAPES_SHOWN])}{more}")
    if problems:
        raise ModelError(
            f"{path} does not fit the model ({'; '.join(problems)}); check model.arguments and model.weights"
        )
    model.load_state_dict({k: state.get(k, own[k]) for k in own})


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pt/.pth without running any code in it."""
    if not path.is_file():
        raise ModelError(f"model.weights: {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format raises its own kinds
        if "weights_only" in str(error) or "Unsupported" in str(error) or "unpickl" in str(error).lower():
            raise ModelError(
                f"{path} is a pickle that holds more than tensors; loading it would run code. Save the state dict "
                "alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
            ) from error
        raise ModelError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path} holds no state dict (names to tensors)")
    return dict(content)
