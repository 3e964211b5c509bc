"""Read what TensorRT and trtexec say about engines: times of layers, of whole runs, what a layer is, which flags exist.

trtexec puts its JSON together from strings: names are not escaped, and numbers may be `nan`. What cannot be read is a
ReportError, whatever the text is. Formats: NVIDIA/TensorRT, samples/common/sampleReporting.cpp, of 8.4 to 11.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

ROW = re.compile(r'\{\s*"name"\s*:\s*"(?P<name>.*)"\s*,\s*"timeMs"\s*:(?P<rest>[^{}]*)\}')  # a line of exportProfile
NUMBER = re.compile(r'"(\w+)"\s*:\s*(-?[\d.]+(?:[eE][-+]?\d+)?|-?nan|-?inf)')
FLAG = re.compile(r"(?<![\w-])--([A-Za-z][A-Za-z0-9]*)")
MEDIAN = re.compile(r"GPU Compute Time:.*?\bmedian = ([\d.eE+-]+) ms")
PROFILE_SUFFIX = re.compile(r"\s*\[profile \d+\]$")


class ReportError(ValueError):
    """A report that holds nothing usable; the message says what was missing."""


def profile(text: str) -> list[tuple[str, float]]:
    """Milliseconds of each layer, in the order they run, from `trtexec --exportProfile`.

    The median of the runs; releases before 8.4 write no median, and then it is their mean. Names may come twice, and
    some layers take no time.

    Raises:
        ReportError: there is no layer in it, or none with a finite time.
    """
    rows, count = [], 0.0
    for entry in _entries(text):
        if "name" not in entry:
            count = _number(entry.get("count")) or count
            continue
        total = _number(entry.get("timeMs"))
        mean = total / count if total is not None and count else None
        found = [_number(entry.get("medianMs")), _number(entry.get("averageMs")), mean]
        ms = next((f for f in found if f is not None and f >= 0), None)
        if ms is not None:
            rows.append((clean(str(entry["name"])), ms))
    if not rows:
        raise ReportError("the profile has no layer with a time (it begins with %r)" % text[:80])
    return rows


def times(text: str) -> list[float]:
    """Milliseconds on the GPU of each run, from `trtexec --exportTimes`; raises ReportError when there are none."""
    found = [_number(entry.get("computeMs")) for entry in _entries(text)]
    kept = [ms for ms in found if ms is not None and ms > 0]
    if not kept:
        raise ReportError("the report has no computeMs above 0 (it begins with %r)" % text[:80])
    return kept


def layers(text: str) -> list[dict[str, Any]]:
    """The layers of an engine, from its inspector or `--exportLayerInfo`: name, kind, and where it is told, precision.

    An engine that was built without detailed verbosity gives names only.

    Raises:
        ReportError: it is no JSON, or has no layers.
    """
    try:
        content = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise ReportError("the description of the engine is no JSON: %s" % error) from error
    found = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ReportError("the description of the engine has no list of Layers")
    return [_layer(entry) for entry in found if isinstance(entry, (str, dict))]


def tensors(text: str) -> list[str]:
    """Names of an engine's inputs and outputs: `Bindings` to TensorRT 10, `I/O Tensors` from 11."""
    try:
        content = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise ReportError("the description of the engine is no JSON: %s" % error) from error
    entries = content.get("Bindings", content.get("I/O Tensors")) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ReportError("the description of the engine names no inputs and outputs")
    return [str(e.get("Name", "")) if isinstance(e, dict) else str(e) for e in entries]


def output(text: str) -> list[float]:
    """The values of the first output, from `trtexec --exportOutput`; raises ReportError when there are none."""
    for entry in _entries(text):
        values = entry.get("values")
        if isinstance(values, list) and values and all(isinstance(v, (int, float)) for v in values):
            return [float(v) for v in values]
    raise ReportError("trtexec wrote no output values (it begins with %r)" % text[:80])


def flags(text: str) -> frozenset[str]:
    """The options that `trtexec --help` lists, without their dashes."""
    return frozenset(FLAG.findall(text))


def median_ms(text: str) -> float:
    """The median time on the GPU from what trtexec prints; raises ReportError when it is not there."""
    found = MEDIAN.search(text)
    number = _number(found.group(1)) if found else None
    if number is None:
        raise ReportError("trtexec printed no `GPU Compute Time` with a median")
    return number


def clean(name: str) -> str:
    """A layer's name without what TensorRT adds: separators of metadata, the optimisation profile."""
    return PROFILE_SUFFIX.sub("", re.split("[\x1e\x1f]", name)[0]).strip()


def _layer(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": clean(entry), "kind": "", "precision": "", "tactic": ""}
    outputs = entry.get("Outputs")
    first = outputs[0] if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict) else {}
    kept = {"name": "Name", "kind": "LayerType", "tactic": "TacticName"}
    found = {key: str(entry.get(name, "")) for key, name in kept.items()}
    precision = str(first.get("Format/Datatype", first.get("Datatype", "")))  # one field to 10, two from 11
    return {**found, "name": clean(found["name"]), "precision": precision}


def _entries(text: str) -> list[dict[str, Any]]:
    """The objects of a JSON list; of one that is damaged by its own names, those of its lines that can be read."""
    try:
        content = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return [entry for entry in map(_row, text.split("\n")) if entry]
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


def _row(line: str) -> dict[str, Any]:
    found = ROW.search(line)
    numbers = NUMBER.findall('"timeMs":' + found.group("rest") if found else line)
    entry: dict[str, Any] = dict(numbers)
    if found:
        entry["name"] = found.group("name")
    return entry


def _number(value: Any) -> float | None:
    """A finite number, from JSON or from text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
