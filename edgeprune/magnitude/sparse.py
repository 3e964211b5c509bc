"""A pruned network as a file: the weights that are left and the gaps between them, as Han et al. (1506.02626) count.

A tensor that is mostly zero is stored as its values (float32) and, for each, how many zeros lie before it, in `bits`
bits; a longer gap is bridged by zeros among the values. Everything else is stored as it is. The file is safetensors:
`NAME` (as it is) or `NAME.values` and `NAME.gaps` (uint8, bits packed, most significant first); its metadata has
`format`, and as JSON under `sparse` the shape, the bits and the number of values of each.

It is smaller on disk and on the way to a device. It is not faster: see README, "magnitude".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..errors import RunError

FORMAT = "edgeprune.sparse/1"
CONV_BITS, LINEAR_BITS = 8, 5  # of a gap, as in the paper


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors, and what the gaps and the bridging zeros are of the sparse ones."""

    dense_bytes: int
    stored_bytes: int
    index_share: float


def save(state: Mapping[str, Tensor], path: Path) -> Sizes:
    """Write a state dict, each tensor as its smaller form.

    Args:
        state: of a network with zeros in it.
        path: the file; written beside and renamed.
    """
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict[str, object]] = {}
    spent = 0
    for name, tensor in state.items():
        dense = tensor.detach().cpu().contiguous()
        tensors[name] = dense.clone()
        if dense.dtype != torch.float32 or dense.dim() < 2:
            continue
        bits = LINEAR_BITS if dense.dim() == 2 else CONV_BITS
        values, gaps = encode(dense.numpy().ravel(), bits)
        packed = pack(gaps, bits)
        if values.nbytes + packed.nbytes < dense.numpy().nbytes:
            del tensors[name]
            tensors[f"{name}.values"], tensors[f"{name}.gaps"] = torch.from_numpy(values), torch.from_numpy(packed)
            sparse[name] = {"shape": list(dense.shape), "bits": bits, "values": len(values)}
            spent += packed.nbytes + 4 * int((values == 0).sum())
    with files.writing(path) as beside:
        save_file(tensors, beside, {"format": FORMAT, "sparse": json.dumps(sparse)})
    before, after = (sum(t.numel() * t.element_size() for t in s.values()) for s in (state, tensors))
    return Sizes(before, after, spent / after)


def read(path: Path) -> dict[str, Tensor]:
    """The state dict that `save` wrote.

    Raises:
        RunError: the file is missing, damaged, or something else.
    """
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged or missing ({error}); write it again with magnitude.sparse.save") from error
    if metadata.get("format") != FORMAT:
        raise RunError(f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}: it is no sparse network")
    for name, how in json.loads(metadata["sparse"]).items():
        values = tensors.pop(f"{name}.values").numpy()
        gaps = unpack(tensors.pop(f"{name}.gaps").numpy(), how["bits"], how["values"])
        size = int(np.prod(how["shape"]))
        tensors[name] = torch.from_numpy(decode(values, gaps, size)).reshape(how["shape"])
    return tensors


def encode(flat: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(values, zeros before each), (stored,) both; a gap too long for `bits` is bridged by values of 0.

    Args:
        flat: (size,).
    """
    most = 2**bits - 1
    where = np.flatnonzero(flat)
    gaps = np.diff(where, prepend=-1) - 1
    bridges = gaps // (most + 1)  # each is `most` zeros and one more that is stored
    ends = np.cumsum(bridges + 1) - 1  # where each real value comes to lie
    values = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.float32)
    stored = np.full(len(values), most, dtype=np.int64)
    values[ends] = flat[where]
    stored[ends] = gaps - bridges * (most + 1)
    return values, stored


def decode(values: NDArray[np.float32], gaps: NDArray[np.int64], size: int) -> NDArray[np.float32]:
    """The (size,) array that `encode` was given."""
    flat = np.zeros(size, dtype=np.float32)
    flat[np.cumsum(gaps + 1) - 1] = values
    return flat


def pack(numbers: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Numbers below 2**bits, one after the other, most significant bit first, (bytes,)."""
    each = (numbers[:, None] >> np.arange(bits - 1, -1, -1)) & 1  # (numbers, bits)
    return np.packbits(each.astype(np.uint8).ravel())


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """The (count,) numbers that `pack` was given."""
    each = np.unpackbits(packed, count=count * bits).reshape(count, bits).astype(np.int64)
    numbers: NDArray[np.int64] = each @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    return numbers
