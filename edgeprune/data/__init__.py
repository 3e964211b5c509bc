"""Images and labels from the [data] section: three disjoint parts, in normalised batches.

`train` trains, `search` steers the choice of widths, `final` is looked at once, for the reported accuracy.

Pixels that are uint8 (0..255) become 0..1; floating-point pixels are used as they are. Then each channel is
normalised with `mean` and `std`: from the section, or else from train, never from search or final. Only a
function's images count as normalised already: there, what the section does not set is 0 and 1.

Images are resized bilinearly to `resize`, or else to the model's input; of a larger `resize` the middle is
used. Arrays (npz:FILE, or from a function) are resized only when `resize` is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..config import DataSection
from ..errors import DataError
from .images import Images, Ints, Shape, unit
from .sources import Set, from_function, numbered, open_source, same_classes

STATISTICS_IMAGES = 2048  # the error of the mean is then about 0.002; more would mostly cost decoding


@dataclass(frozen=True, eq=False)
class Data:
    """What `load` returns; `mean` and `std` have one number a channel and belong to the model from now on."""

    train: Subset
    search: Subset
    final: Subset
    classes: tuple[str, ...]  # by label
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(section: DataSection, folder: Path, input_shape: Sequence[int]) -> Data:
    """Open the images and labels of a project and divide them into train, search and final.

    Args:
        section: [data] of edgeprune.toml.
        folder: where edgeprune.toml lies; relative paths start there.
        input_shape: (1, C, H, W) of the model.
    Raises:
        DataError: anything missing, empty or corrupt, or that does not fit the input.
    """
    shape = _image_shape(input_shape)
    sets, picks = _parts(section, folder, shape)
    train = sets[0]
    names = train.names or numbered(max(int(part.labels.max()) for part in sets))
    if len(np.unique(train.labels)) < 2:
        only = names[train.labels[0]]
        raise DataError(f"{section.source} has only one class ({only}): a classifier needs two or more")
    for name, pick in zip(("train", "search", "final"), picks, strict=True):
        if not len(pick):
            raise DataError(f"the {name} part has no images: add images, or enlarge its share in data.split")
    if section.final_images is not None:
        picks[2] = np.sort(_shuffled(picks[2], _bits(section.seed, 3))[: section.final_images])
    mean, std = _normalisation(section, shape, train.images, picks[0])
    subsets = [Subset(sets[i], picks[i], section, mean, std) for i in range(3)]
    return Data(subsets[0], subsets[1], subsets[2], names, mean, std)


def check_labels(data: Data, outputs: int) -> None:
    """Raise DataError unless every label is one of the classifier's `outputs`."""
    for name, part in (("train", data.train), ("search", data.search), ("final", data.final)):
        highest = int(part.labels.max())
        if highest >= outputs:
            raise DataError(
                f"label {highest} but the model has {outputs} outputs (for labels 0 to {outputs - 1}), in "
                f"the {name} images: change the model's last layer or the labels"
            )


@final
class Subset:
    """Some of a set's images, in a fixed order; `labels` is (len,) int64."""

    def __init__(
        self, part: Set, pick: Ints, section: DataSection, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.labels = torch.from_numpy(part.labels[pick])
        self._images = part.images
        self._pick = pick  # (len,) positions in the images
        self._crop, self._flip = section.crop, section.flip
        self._mean = torch.tensor(mean).view(1, -1, 1, 1)
        self._std = torch.tensor(std).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self._pick)

    def batches(
        self, size: int, shuffle_seed: int | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) float32, normalised, and labels (B,) int64; the last batch may be smaller.

        Without a seed the images come in order, all of them. With one they are shuffled for training, and a
        last batch of a single image is dropped, because batch norm cannot train on it. The same seed gives
        the same batches in any process.

        Args:
            size: images a batch.
            shuffle_seed: 0 or more; another one for every epoch.
            augment: crop and mirror at random, as the section says.
        """
        if size < 1:
            raise DataError(f"a batch of {size} images was asked for: take 1 or more")
        if augment and shuffle_seed is None:
            raise DataError("augment=True draws at random: pass a shuffle_seed, another one for every epoch")
        return self._batches(size, shuffle_seed, augment)

    def _batches(self, size: int, seed: int | None, augment: bool) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.arange(len(self))
        if seed is not None:
            order = _shuffled(order, _bits(seed, 0))
            if size > 1 and len(order) % size == 1:
                order = order[:-1]
        draws = _bits(seed or 0, 1)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            x = (unit(self._images.take(self._pick[batch])) - self._mean).div_(self._std)
            if augment:
                x = _augmented(x, self._crop, self._flip, draws)
            yield x, self.labels[torch.from_numpy(batch)]


def _parts(section: DataSection, folder: Path, shape: Shape) -> tuple[list[Set], list[Ints]]:
    """Three sets, and the positions in each that make train, search and final."""
    if ".py:" in section.source:
        if section.test is not None:
            raise DataError("data.test is set, but a function brings its own test images: delete data.test")
        sets = from_function(section, folder, shape)
        return sets, [np.arange(len(part.labels)) for part in sets]
    source = open_source(section.source, "data.source", section, folder, shape)
    if section.test is None:
        return [source] * 3, _split(source.labels, section.split, section.seed)
    if not section.test.startswith(("folder:", "npz:")):
        raise DataError(f"data.test {section.test!r} is not known; write folder:DIR or npz:FILE")
    test = same_classes(open_source(section.test, "data.test", section, folder, shape), source)
    halves = _split(test.labels, (0.5, 0.5), section.seed)
    return [source, test, test], [np.arange(len(source.labels)), *halves]


def _image_shape(input_shape: Sequence[int]) -> Shape:
    if len(input_shape) != 4:
        raise DataError(f"the model's input is {tuple(input_shape)}, but images need (1, channels, height, width)")
    return input_shape[1], input_shape[2], input_shape[3]


# ---- chance: only raw PCG64 numbers, which are the same on every machine and in every numpy --------------


def _bits(seed: int, stream: int) -> np.random.PCG64:
    if seed < 0:
        raise DataError(f"seed {seed} is negative: take 0 or more")
    return np.random.PCG64([stream, seed])


def _shuffled(items: Ints, bits: np.random.PCG64) -> Ints:
    return items[np.argsort(bits.random_raw(len(items)), kind="stable")]


def _split(labels: Ints, shares: Sequence[float], seed: int) -> list[Ints]:
    """Disjoint ascending positions that cover (N,) labels; every class is divided by `shares`."""
    bits = _bits(seed, 2)
    parts: list[list[Ints]] = [[] for _ in shares]
    owed = np.zeros(len(shares))  # what rounding down has kept from each part, over the classes so far
    for label in np.unique(labels):
        members = _shuffled(np.flatnonzero(labels == label), bits)
        wanted = np.array(shares) * len(members)
        counts = np.floor(wanted).astype(np.int64)
        owed += wanted - counts
        for _ in range(len(members) - int(counts.sum())):
            neediest = int(owed.argmax())
            counts[neediest] += 1
            owed[neediest] -= 1
        for part, piece in zip(parts, np.split(members, np.cumsum(counts)[:-1]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def _augmented(x: Tensor, crop: int, flip: bool, bits: np.random.PCG64) -> Tensor:
    """Each image of (B, C, H, W) is shifted by up to `crop` and mirrored; what enters is the mean, 0."""
    count, _, height, width = x.shape
    if crop:
        shifts = (bits.random_raw(2 * count) % (2 * crop + 1)).astype(np.int64)
        top, left = torch.from_numpy(shifts).view(2, count)
        padded = functional.pad(x, (crop, crop, crop, crop))
        # a view of every possible crop: (B, C, 2 crop + 1, 2 crop + 1, H, W)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        x = windows[torch.arange(count), :, top, left]  # (B, C, H, W)
    if flip:
        mirrored = torch.from_numpy(bits.random_raw(count) % 2 == 1)
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return x


# ---- normalisation ---------------------------------------------------------------------------------------


def _normalisation(
    section: DataSection, shape: Shape, images: Images, train: Ints
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for key, values in (("mean", section.mean), ("std", section.std)):
        if values is not None and len(values) != shape[0]:
            raise DataError(f"data.{key} has {len(values)} values, but the model's input has {shape[0]} channels")
    if section.mean and section.std:
        return section.mean, section.std
    if ".py:" in section.source:
        mean, std = (0.0,) * shape[0], (1.0,) * shape[0]
    else:
        mean, std = _statistics(images, train)
    return section.mean or mean, section.std or std


def _statistics(images: Images, train: Ints) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, over evenly spaced training images."""
    sample = train[np.linspace(0, len(train) - 1, min(len(train), STATISTICS_IMAGES)).astype(np.int64)]
    pixels, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for start in range(0, len(sample), 64):  # few at a time: float64 takes eight times the memory
        x = unit(images.take(sample[start : start + 64])).double()
        pixels += x.shape[0] * x.shape[2] * x.shape[3]
        total, squares = total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))  # (C,)
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp_min(0).sqrt()
    # a channel that never changes: dividing by its rounding noise would invent a signal
    std = torch.where(std < 1e-6 * (1 + mean.abs()), 1.0, std)
    return tuple(mean.tolist()), tuple(std.tolist())
