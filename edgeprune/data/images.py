"""Images by index: in memory, in files, or in a Dataset of the user."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..errors import DataError

CACHE_BYTES = 1 << 30  # decoded images of a folder stay in memory up to this size

Ints = NDArray[np.int64]
Shape = tuple[int, int, int]  # (channels, height, width) of the model's input


class Images(Protocol):
    """N images of one shape, by index."""

    def take(self, indices: Ints) -> Tensor:
        """(B,) positions -> (B, C, H, W) uint8 or float32."""
        ...


@final
class Array:
    """Images in memory: (N, C, H, W) uint8 or float32."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def take(self, indices: Ints) -> Tensor:
        return self._images[torch.from_numpy(indices)]


@final
class Files:
    """Image files, decoded when first asked for, and kept when all of them fit into CACHE_BYTES."""

    def __init__(self, files: Sequence[Path], resize: tuple[int, int], shape: Shape) -> None:
        self._files, self._resize, self._shape = files, resize, shape
        self._decoded = np.zeros(len(files), dtype=bool)
        fits = len(files) * math.prod(shape) <= CACHE_BYTES
        self._cache = torch.empty((len(files), *shape), dtype=torch.uint8) if fits else None

    def take(self, indices: Ints) -> Tensor:
        if self._cache is None:
            return torch.stack([self._decode(self._files[index]) for index in indices])
        for index in indices[~self._decoded[indices]]:
            self._cache[index] = self._decode(self._files[index])
            self._decoded[index] = True
        return self._cache[torch.from_numpy(indices)]

    def _decode(self, file: Path) -> Tensor:
        """One file as (C, H, W) uint8."""
        reader = pillow()
        channels, height, width = self._shape
        try:
            with reader.open(file) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255: white images
                    raise ValueError(f"mode {image.mode}; only 8-bit pixels are read")
                plain = image.convert("RGBA") if "transparency" in image.info else image
                pixels = plain.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # each of Pillow's decoders has its own ways to fail on a damaged file
            raise DataError(f"{file} cannot be decoded ({error}): replace or delete it") from error
        resized = pixels.resize(self._resize[::-1], reader.Resampling.BILINEAR)
        top, left = (self._resize[0] - height) // 2, (self._resize[1] - width) // 2
        middle = np.array(resized.crop((left, top, left + width, top + height)))
        return torch.from_numpy(middle).view(height, width, channels).permute(2, 0, 1)


@final
class Items:
    """A Dataset of the user, read anew for every batch, so that its own random transforms stay random."""

    def __init__(self, dataset: Any, labels: Ints, shape: Shape, where: str) -> None:
        self._dataset, self._labels, self._shape, self._where = dataset, labels, shape, where

    def take(self, indices: Ints) -> Tensor:
        return torch.stack([self._image(int(index)) for index in indices])

    def _image(self, position: int) -> Tensor:
        image, label = item_of(self._dataset, position, self._where)
        if label != self._labels[position]:
            raise DataError(
                f"image {position} in {self._where} has label {label}, but {self._labels[position]} when its "
                "labels were listed: make the Dataset's `targets` agree with its items"
            )
        if tuple(image.shape) != self._shape:
            raise DataError(
                f"image {position} in {self._where} has shape {tuple(image.shape)}, but the model's input is "
                f"{(1, *self._shape)}: resize it in the Dataset"
            )
        return image


def item_of(dataset: Any, position: int, where: str) -> tuple[Tensor, int]:
    item = dataset[position]
    try:
        image, label = item
        image, label = torch.as_tensor(image), operator.index(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"item {position} in {where} is no pair of image tensor and integer label ({error}): "
            "make the Dataset return such pairs"
        ) from error
    return image if image.dtype == torch.uint8 else image.float(), label


def fitted(images: Tensor, resize: tuple[int, int], shape: Shape) -> Tensor:
    """(N, C, h, w) -> (N, C, H, W): resized, then the middle."""
    if images.shape[2:] != resize:
        images = functional.interpolate(images, size=resize, mode="bilinear", antialias=True)
    top, left = (resize[0] - shape[1]) // 2, (resize[1] - shape[2]) // 2
    return images[:, :, top : top + shape[1], left : left + shape[2]]


def unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1; floats stay."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("image folders need Pillow: pip install 'edgeprune[images]'") from None
    return Image
