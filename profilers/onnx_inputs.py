"""The inputs of an ONNX file, read without the onnx package: devices do not have it.

Wire format: protobuf. ModelProto.graph is field 7, GraphProto.input 11, GraphProto.node 1, ValueInfoProto.name 1 and
.type 2, TypeProto.tensor_type 1, its shape 2, TensorShapeProto.dim 1, Dimension.dim_value 1, NodeProto.name 3.
"""

from __future__ import annotations

from collections.abc import Iterator

GRAPH, INPUT, NODE, NODE_NAME = 7, 11, 1, 3


class OnnxError(ValueError):
    """It is no ONNX file."""


def inputs(content: bytes) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each input in order; sizes that are not fixed are -1."""
    found = []
    for graph in _all(content, GRAPH):
        for entry in _all(graph, INPUT):
            name = b"".join(_all(entry, 1)).decode("utf-8", "replace")
            shapes = [s for kind in _all(entry, 2) for tensor in _all(kind, 1) for s in _all(tensor, 2)]
            found.append((name, tuple(_size(dim) for shape in shapes for dim in _all(shape, 1))))
    if not found:
        raise OnnxError("the file has no network with inputs; export it again")
    return found


def nodes(content: bytes) -> list[str]:
    """Names of a network's nodes, in the order they run."""
    return [
        b"".join(_all(node, NODE_NAME)).decode("utf-8", "replace")
        for graph in _all(content, GRAPH)
        for node in _all(graph, NODE)
    ]


def _size(dim: bytes) -> int:
    return next((value for number, value in _fields(dim) if number == 1 and isinstance(value, int)), -1)


def _all(content: bytes, wanted: int) -> Iterator[bytes]:
    return (value for number, value in _fields(content) if number == wanted and isinstance(value, bytes))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield tag >> 3, value
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varint(content, at)
            if at + size > len(content):
                raise OnnxError("the file is cut off; send it again")
            yield tag >> 3, content[at : at + size]
            at += size
        else:
            raise OnnxError("the file is no ONNX file")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(content) and shift < 70:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise OnnxError("the file is cut off, or no ONNX file; send it again")
