"""A .tflite model as C source, for microcontrollers: the bytes, their sizes, and the operators to register."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import files, flatbuffer

ALIGNED = 16  # bytes: what interpreters for microcontrollers want a model to begin at
A_LINE = 16  # numbers
SIZES = {"FLOAT32": 4, "INT32": 4, "INT8": 1, "UINT8": 1, "INT16": 2, "INT64": 8, "BOOL": 1, "FLOAT16": 2}


@dataclass(frozen=True)
class Port:
    """An input or output of a model. A real number is scale * (stored - zero_point); scale is 0 for floats."""

    type: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    size_bytes: int


@dataclass(frozen=True)
class Needs:
    """What running a model takes."""

    size_bytes: int
    activations_bytes: int  # most that is alive at once: an arena holds this and the interpreter's own records
    operators: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def write(model: Path, folder: Path) -> list[Path]:
    """Write model.h and model.c into `folder`, from a .tflite file; returns their paths."""
    content = model.read_bytes()
    made = {"model.h": _header(needs(content)), "model.c": _source(content)}
    for name, text in made.items():
        with files.writing(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")
    return [folder / name for name in made]


def needs(content: bytes) -> Needs:
    """What a model takes, from its bytes."""
    model = flatbuffer.schema().ModelT.InitFromPackedBuf(content, 0)
    graph = model.subgraphs[0]
    return Needs(
        size_bytes=len(content),
        activations_bytes=_alive_bytes(model, graph),
        operators=tuple(sorted(set(flatbuffer.operators(content)))),
        inputs=tuple(_port(graph.tensors[at]) for at in graph.inputs),
        outputs=tuple(_port(graph.tensors[at]) for at in graph.outputs),
    )


def _port(tensor: Any) -> Port:
    found = tensor.quantization
    scaled = found is not None and found.scale is not None and len(found.scale) == 1
    scale, zero = (float(found.scale[0]), int(found.zeroPoint[0])) if scaled else (0.0, 0)
    return Port(_type(tensor), tuple(int(n) for n in tensor.shape), scale, zero, _bytes(tensor))


def _type(tensor: Any) -> str:
    kinds: dict[str, Any] = vars(flatbuffer.schema().TensorType)
    return next(name for name, number in kinds.items() if number == tensor.type and not name.startswith("_"))


def _bytes(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * SIZES.get(_type(tensor), 8)


def _alive_bytes(model: Any, graph: Any) -> int:
    """The largest sum of tensors alive together: from the operator that makes one to the last that reads it."""
    born = {int(t): 0 for t in graph.inputs}
    dies = {int(t): len(graph.operators) for t in graph.outputs}
    for at, op in enumerate(graph.operators):
        for tensor in op.outputs:
            born[int(tensor)] = at
        for tensor in op.inputs:
            dies[int(tensor)] = max(at, dies.get(int(tensor), 0))
    alive = [
        sum(_bytes(graph.tensors[t]) for t in born if born[t] <= at <= dies.get(t, born[t]))
        for at in range(len(graph.operators))
    ]
    return max(alive, default=0)


def _header(found: Needs) -> str:
    listed = "\n".join(f"     {name} (Add{_method(name)})" for name in found.operators)
    lines = [
        "/* A network pruned by edgeprune, as a .tflite model.",
        "",
        f"   It needs these {len(found.operators)} operators (in TensorFlow Lite for Microcontrollers, with a",
        f"   MicroMutableOpResolver<{len(found.operators)}>):",
        listed,
        "*/",
        "#ifndef EDGEPRUNE_MODEL_H",
        "#define EDGEPRUNE_MODEL_H",
        "",
        f"#define EDGEPRUNE_MODEL_BYTES {found.size_bytes}",
        f"#define EDGEPRUNE_MODEL_OPERATORS {len(found.operators)}",
        "/* Most that is alive at once; the arena holds this and the interpreter's own records. */",
        f"#define EDGEPRUNE_MODEL_ACTIVATIONS_BYTES {found.activations_bytes}",
        *_ports("INPUT", found.inputs),
        *_ports("OUTPUT", found.outputs),
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "extern const unsigned char edgeprune_model[EDGEPRUNE_MODEL_BYTES];",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def _method(operator: str) -> str:
    """CONV_2D is registered by AddConv2D, PADV2 by AddPadV2."""
    words = operator.replace("PADV2", "PAD_V2").split("_")
    return "".join(word if word[0].isdigit() or word == "V2" else word.capitalize() for word in words)


def _ports(kind: str, ports: Sequence[Port]) -> list[str]:
    lines = []
    for at, port in enumerate(ports):
        name = f"EDGEPRUNE_MODEL_{kind}" + (f"_{at}" if len(ports) > 1 else "")
        lines.append(f"/* {kind.lower()}: {port.type} {'x'.join(map(str, port.shape))} */")
        lines.append(f"#define {name}_BYTES {port.size_bytes}")
        if port.scale:
            lines.append(f"#define {name}_SCALE {np.float32(port.scale)!s}f")
            lines.append(f"#define {name}_ZERO_POINT ({port.zero_point})")
    return lines


def _source(content: bytes) -> str:
    rows = [content[at : at + A_LINE] for at in range(0, len(content), A_LINE)]
    numbers = "\n".join("  " + "".join(f"0x{byte:02x}," for byte in row) for row in rows)
    return (
        '#include "model.h"\n\n'
        "#if defined(__GNUC__)\n"
        f"__attribute__((aligned({ALIGNED})))\n"
        "#endif\n"
        f"const unsigned char edgeprune_model[EDGEPRUNE_MODEL_BYTES] = {{\n{numbers}\n}};\n"
    )
