"""A run is a folder: each stage reads the last one's files and writes its own, beside and renamed.

run.json              what was asked for, of which network
example.safetensors   the input it was traced with
preflight.json        dense latency, floor, networks that calibrated the table
step-1/search.jsonl   every candidate that a searching strategy has judged
step-1/front.json     of a genetic search: candidates that none beats in both accuracy and latency
step-1/plan.json      widths, units kept, predicted and measured latency
floors.json           metrics of each trained network on the search split, where floors were asked for
step-1/*.safetensors  checkpoints; weights.safetensors when the step is done
model.safetensors     the pruned network's weights; with recipe.json it is rebuilt from the original class
dense/ floor/         exported files of the network and of the smallest that it can become
artifact/             of the pruned one
verify.json report.html
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from torch import Tensor, nn

from . import files, surgery
from .errors import RunError
from .finetune import load_state, read_tensors, save_tensors
from .graph import Example, ModelGraph, as_call, trace
from .records import Keep

RUN = "edgeprune.run/1"
RECIPE = "edgeprune.recipe/1"
EXAMPLE = "example.safetensors"
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """Paths of one run."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def write(self, name: str, format_name: str, content: Any) -> None:
        files.write_json(self.path(name), format_name, content)

    def read(self, name: str, format_name: str) -> dict[str, Any]:
        return files.read_json(self.path(name), format_name)


def claim(run: Run, graph: ModelGraph, asked: Mapping[str, Any], facts: Mapping[str, Any], resume: bool) -> None:
    """Make a folder this run's own, or go on in it.

    Args:
        run: the folder.
        graph: of the network.
        asked: what was asked for: the same again when a run goes on.
        facts: what else is worth keeping: versions, the network's name, training settings.
        resume: go on in a folder that holds this run already.
    Raises:
        RunError: it belongs to another network or to other settings, or holds a run and `resume` is off.
    """
    wanted = {"fingerprint": graph.fingerprint, "asked": files.plain(dict(asked))}
    if not run.has("run.json"):
        if run.folder.exists() and any(_is_foreign(path) for path in run.folder.iterdir()):
            raise RunError(f"{run.folder} is not empty and holds no run; give another folder with --run")
        save_example(graph.example, run.path(EXAMPLE))
        run.write("run.json", RUN, {**wanted, **facts})
        return
    found = run.read("run.json", RUN)
    if found["fingerprint"] != graph.fingerprint:
        raise RunError(
            f"{run.folder} belongs to another network (fingerprint {found['fingerprint']}, this one has "
            f"{graph.fingerprint}); start a new run with --run"
        )
    if not resume:
        raise RunError(f"{run.folder} holds a run already; go on with --resume, or give another folder with --run")
    changed = [k for k in wanted["asked"] if found["asked"].get(k) != wanted["asked"][k]]
    if changed:
        was = ", ".join(f"{k} was {found['asked'].get(k)!r}, is {wanted['asked'][k]!r}" for k in sorted(changed)[:3])
        raise RunError(f"{run.folder} was started with other settings ({was}); set them back, or start a new run")


def _is_foreign(path: Path) -> bool:
    """Is this something that a run which was killed before it wrote run.json cannot have left?"""
    return path.name != EXAMPLE and not path.name.startswith(f".{EXAMPLE}.") and not path.name.startswith(".run.json.")


def save_example(example: Example, path: Path) -> None:
    args, kwargs = as_call(example)
    tensors = {f"arg.{i}": t for i, t in enumerate(args) if isinstance(t, Tensor)}
    tensors |= {f"kwarg.{k}": t for k, t in kwargs.items() if isinstance(t, Tensor)}
    save_tensors(tensors, path)


def read_example(path: Path) -> Example:
    tensors = read_tensors(path)
    if any(name.startswith("kwarg.") for name in tensors):
        return {name.removeprefix("kwarg."): t for name, t in tensors.items()}
    return tuple(tensors[f"arg.{i}"] for i in range(len(tensors)))


# ---- the pruned network --------------------------------------------------------------------------------------


def save_model(run: Run, module: nn.Module, graph: ModelGraph, keep: Keep) -> None:
    """Weights and recipe; the recipe comes last."""
    save_tensors(module.state_dict(), run.path("model.safetensors"))
    kept = {g: list(units) for g, units in keep.items()}
    run.write(
        "recipe.json", RECIPE, {"fingerprint": graph.fingerprint, "protected": list(graph.protected), "keep": kept}
    )


def load_model(run: Run, dense: nn.Module) -> nn.Module:
    """Rebuild the pruned network from the original class, the recipe and the weights; no pickle anywhere.

    Args:
        run: a finished run.
        dense: the original network; its own weights do not matter.
    Raises:
        RunError: the run is not finished, damaged, or of another network.
    """
    recipe = run.read("recipe.json", RECIPE)
    graph = trace(dense, read_example(run.path(EXAMPLE)), recipe.get("protected", ()))
    if graph.fingerprint != recipe["fingerprint"]:
        raise RunError(
            f"{run.folder} was made from another network (fingerprint {recipe['fingerprint']}, this one has "
            f"{graph.fingerprint})"
        )
    module = surgery.cut(dense, graph, keep_of(recipe["keep"]))
    load_state(module, read_tensors(run.path("model.safetensors")), run.folder)
    return module.eval()


def keep_of(content: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {group: tuple(units) for group, units in content.items()}


# ---- records from JSON ---------------------------------------------------------------------------------------


def as_record(kind: type[T], content: Any) -> T:
    """Build a (nested) frozen record from what `files.plain` made of it.

    Raises:
        RunError: a field is missing or unknown.
    """
    try:
        return typing.cast("T", _build(kind, content))
    except (TypeError, KeyError, ValueError) as error:
        raise RunError(f"a stored {kind.__name__} cannot be read: {error}") from error


def _build(kind: Any, content: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if content is None else _build(inner[0], content)
    if origin is tuple:
        inner = [k for k in typing.get_args(kind) if k is not Ellipsis]
        many = len(inner) == 1
        return tuple(_build(inner[0] if many else inner[i], item) for i, item in enumerate(content))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_validate(content)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], value) for name, value in content.items()})
    return content
