"""What a network must be good at, besides being right on average: metrics that a project sets floors for.

    [compress.floors]
    accuracy = 0.9
    recall_of_class_3 = 0.97
    psnr = 28.0                      # dB, of networks that give back their input
    "inspection.py:found" = 0.99     # found(outputs, labels, inputs) -> float, larger is better; numpy arrays

They are computed from the outputs of whatever ran the network: torch while choices are made, the target's own runtime
in the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import userfile
from .errors import ConfigError

Array = NDArray[Any]
Metric = Callable[[Array, Array, Array], float]  # (outputs, labels, inputs), all of one length; larger is better
RECALL = re.compile(r"recall_of_class_(\d+)")


def resolve(name: str, folder: Path) -> Metric:
    """The metric that a floor names.

    Args:
        name: accuracy, recall_of_class_N, psnr, or file.py:function.
        folder: where files are looked for.
    Raises:
        ConfigError: there is no such metric, or its file does not hold it.
    """
    found = RECALL.fullmatch(name)
    if found is not None:
        return recall_of(int(found[1]))
    if name in ("accuracy", "psnr"):
        return accuracy if name == "accuracy" else psnr
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ConfigError(
            f"compress.floors: there is no metric {name!r}; write accuracy, recall_of_class_3, psnr or "
            '"file.py:function"'
        )
    return _of_user(name, userfile.function_in(folder / file, function, ConfigError))


def accuracy(outputs: Array, labels: Array, inputs: Array) -> float:
    """Share of (N, classes) scores whose largest is the label's."""
    return float((_scores("accuracy", outputs).argmax(axis=1) == labels).mean())


def recall_of(wanted: int) -> Metric:
    """Share of the inputs of one class that are recognised as such."""
    name = f"recall_of_class_{wanted}"

    def recall(outputs: Array, labels: Array, inputs: Array) -> float:
        of_class = labels == wanted
        if not of_class.any():
            raise ConfigError(f"compress.floors: {name} cannot be measured: no image has the label {wanted}")
        return float((_scores(name, outputs)[of_class].argmax(axis=1) == wanted).mean())

    return recall


def psnr(outputs: Array, labels: Array, inputs: Array) -> float:
    """Peak signal-to-noise ratio in dB of outputs that should be the inputs; the peak is the inputs' range."""
    if outputs.shape != inputs.shape:
        raise ConfigError(
            f"compress.floors: psnr compares outputs with inputs, but they are {outputs.shape} and {inputs.shape}; "
            "write a function of your own for a network that gives back something else"
        )
    error = float(np.square(outputs.astype(np.float64) - inputs).mean())
    peak = float(inputs.max() - inputs.min())
    return 10 * math.log10(peak**2 / error) if error > 0 else math.inf


def measure(metrics: Mapping[str, Metric], outputs: Array, labels: Array, inputs: Array) -> dict[str, float]:
    """Every metric of one network's outputs."""
    return {name: float(metric(outputs, labels, inputs)) for name, metric in metrics.items()}


def broken(floors: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """A line for every floor that does not hold; one that was not measured does not hold either."""
    lines = []
    for name, floor in floors.items():
        value = found.get(name, math.nan)
        if not value >= floor:
            lines.append(f"{name} {'was not measured' if math.isnan(value) else f'{value:.4g}'}, floor {floor:.4g}")
    return lines


def _scores(name: str, outputs: Array) -> Array:
    if outputs.ndim != 2:
        raise ConfigError(
            f"compress.floors: {name} needs (images, classes) scores, but the network gives {outputs.shape}; "
            'write a function of your own: "file.py:function"'
        )
    return outputs


def _of_user(name: str, function: Callable[..., Any]) -> Metric:
    def metric(outputs: Array, labels: Array, inputs: Array) -> float:
        try:
            value = function(outputs, labels, inputs)
        except Exception as problem:  # the user's code may raise anything
            raise ConfigError(f"compress.floors: {name} failed: {type(problem).__name__}: {problem}") from problem
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise ConfigError(f"compress.floors: {name} returned {value!r}, not a number")
        return float(value)

    return metric
