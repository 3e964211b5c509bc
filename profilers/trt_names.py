"""Which part of a network does a layer of an engine belong to?

TensorRT fuses, and names what it made after what went in: `conv1/Conv + relu/Relu`, `PWN(relu/Relu)`,
`{ForeignNode[a/MatMul...b/Add]}`, `Reformatting CopyNode for Input Tensor 0 to conv1/Conv + relu/Relu`. The nodes of
exported graphs are called after their modules, `MODULE/OPERATOR`, so that modules are found again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

REFORMATS, MIXED, UNKNOWN = "(reformats)", "(several layers in one)", "(not attributed)"
COPIES = re.compile(r"^\W*(Reformat|reformat|CopyNode|Copy_|copy_)|Reformatting CopyNode|\bReformat\b")
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QUANTISERS = ("QuantizeLinear", "DequantizeLinear", "Cast")
RANGE = re.compile(r"ForeignNode\[(.*)\.\.\.(.*)\]")


class Names:
    """The nodes of a graph.

    Args:
        nodes: their names, in the order they run.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._place = {name: at for at, name in enumerate(nodes)}
        self._nodes = list(nodes)
        words = "|".join(re.escape(name) for name in sorted(self._place, key=len, reverse=True))
        # a name ends where no further letter follows; before it may stand the dots of a range
        self._pattern = re.compile(r"(?:(?<![\w./])|(?<=\.\.\.))(?:%s)(?![\w/])" % words) if nodes else None

    def within(self, layer: str) -> list[str]:
        """The nodes that a layer's name mentions, and those between the two ends of a range."""
        if self._pattern is None:
            return []
        found = self._pattern.findall(layer)
        ends = RANGE.search(layer)
        if ends and len(found) > 1:
            first, last = sorted((self._place[found[0]], self._place[found[-1]]))
            return self._nodes[first : last + 1]
        return list(dict.fromkeys(found))

    def owner(self, layer: str, kind: str = "") -> str:
        """The module whose time a layer's is, or a bucket: reformats, several layers in one, not attributed."""
        if kind in ("Reformat", "NoOp") or COPIES.search(layer):
            return REFORMATS
        nodes = self.within(layer)
        if nodes and all(operator(n) in QUANTISERS for n in nodes):
            return REFORMATS
        nodes = [n for n in nodes if operator(n) not in QUANTISERS]
        heavy = list(dict.fromkeys(module(n) for n in nodes if operator(n) in HEAVY))
        if heavy:
            return heavy[0] if len(heavy) == 1 else MIXED
        return module(nodes[0]) if nodes else UNKNOWN


def module(node: str) -> str:
    """`layer1.0.conv1` of `layer1.0.conv1/Conv`; of a node outside any module, the node itself."""
    return node.rpartition("/")[0] or node.strip("/")


def operator(node: str) -> str:
    """`Conv` of `layer1.0.conv1/Conv_2`."""
    return re.sub(r"_\d+$", "", node.rpartition("/")[2])


def gathered(rows: Iterable[tuple[str, float]], names: Names, kinds: dict[str, str] | None = None) -> dict[str, float]:
    """Milliseconds by module and bucket, in the order in which they first run; they add up to those of `rows`."""
    found: dict[str, float] = {}
    for layer, ms in rows:
        owner = names.owner(layer, (kinds or {}).get(layer, ""))
        found[owner] = found.get(owner, 0.0) + ms
    return found
