"""The sources of images and labels: folders, arrays in files, the user's function, the digits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import userfile
from ..config import DataSection
from ..errors import DataError
from .images import Array, Files, Images, Ints, Items, Shape, fitted, item_of, pillow


@dataclass(frozen=True, eq=False)
class Set:
    images: Images
    labels: Ints  # (N,)
    names: tuple[str, ...] | None  # of the classes; None: they are only numbered


def open_source(text: str, key: str, section: DataSection, folder: Path, shape: Shape) -> Set:
    kind, _, rest = text.partition(":")
    resize = _resize(section, shape)
    path = folder / Path(rest).expanduser()
    if kind == "folder" and rest:
        return _folder(path, resize or shape[1:], shape)
    if kind == "npz" and rest:
        return _arrays(*_npz(path), resize, shape, str(path))
    if text == "digits":
        return _digits(resize or shape[1:], shape)
    raise DataError(f"{key} {text!r} is not known; write folder:DIR, npz:FILE, file.py:function or digits")


def _folder(path: Path, resize: tuple[int, int], shape: Shape) -> Set:
    """A folder per class; labels follow the sorted folder names."""
    _check_channels(shape, f"images in {path}")
    if not path.is_dir():
        raise DataError(f"the image folder {path} does not exist; it should hold a folder of images per class")
    named = {inner.name: inner for inner in path.iterdir() if inner.is_dir() and inner.name[0] != "."}
    if not named:
        raise DataError(f"{path} has no class folders: put the images of each class in a folder of its own")
    reader = pillow()
    endings = {ending for ending, kind in reader.registered_extensions().items() if kind in reader.OPEN}
    files = [_image_files(named[name], endings) for name in sorted(named)]
    labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(of_class) for of_class in files])
    images = Files([file for of_class in files for file in of_class], resize, shape)
    return Set(images, labels, tuple(sorted(named)))


def _image_files(folder: Path, endings: set[str]) -> list[Path]:
    """All images below a class folder, in an order that does not depend on the file system."""
    files = [Path(here, name) for here, _, names in os.walk(folder) for name in names if name[0] != "."]
    images = [file for file in files if file.suffix.lower() in endings]
    if not images:
        raise DataError(f"the class folder {folder} has no images: add some, or delete the folder")
    return sorted(images, key=lambda file: file.as_posix())


def _npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            names = sorted(arrays)
            found = [arrays[name] for name in ("x", "y") if name in names]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; it should be an .npz file with arrays x and y") from None
    except Exception as error:  # numpy, zipfile and zlib each fail in their own ways on other or damaged files
        raise DataError(f"{path} is no .npz file of plain arrays ({error}): use numpy.savez") from error
    if len(found) < 2:
        raise DataError(f"{path} holds {', '.join(names) or 'nothing'}; it needs x (images) and y (labels)")
    return found[0], found[1]


def _digits(resize: tuple[int, int], shape: Shape) -> Set:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels, 0..16; three channels are three copies."""
    _check_channels(shape, "digits")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits need scikit-learn: pip install 'edgeprune[digits]'") from None
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    grey = fitted(torch.from_numpy(pixels).unsqueeze(1), resize, shape)  # (1797, 1, H, W)
    images = Array(grey.expand(-1, shape[0], -1, -1))  # a view: three channels take no more memory
    return Set(images, bunch.target.astype(np.int64), tuple(map(str, bunch.target_names)))


def from_function(section: DataSection, folder: Path, shape: Shape) -> list[Set]:
    """Train, search and final from the user's function: a dict or 3-tuple of Datasets or (x, y) pairs."""
    name, _, function = section.source.rpartition(":")
    given = userfile.call(folder / Path(name).expanduser(), function, DataError)
    if isinstance(given, dict):
        keys = ("train",), ("val", "search"), ("test", "final")
        given = tuple(part for names in keys for part in [given[name] for name in names if name in given][:1])
    if not isinstance(given, tuple) or len(given) != 3:
        raise DataError(
            f"{section.source} must return train, val and test, as a dict with these keys or as a tuple; "
            f"it returned {f'{len(given)} of them' if isinstance(given, tuple) else type(given).__name__}"
        )
    names = [f"{part} of {section.source}" for part in ("train", "val", "test")]
    return [_user_set(part, section, shape, name) for part, name in zip(given, names, strict=True)]


def _user_set(part: Any, section: DataSection, shape: Shape, where: str) -> Set:
    if isinstance(part, tuple) and len(part) == 2:
        x, y = (each.detach().cpu().numpy() if isinstance(each, Tensor) else each for each in part)
        return _arrays(np.asarray(x), np.asarray(y), _resize(section, shape), shape, where)
    if not hasattr(part, "__getitem__") or not hasattr(part, "__len__"):
        raise DataError(f"{where} is a {type(part).__name__}: return a Dataset with a length, or a pair (x, y)")
    stored = _stored_labels(part)
    if stored is None:
        stored = [item_of(part, position, where)[1] for position in range(len(part))]
    labels = _labels(np.asarray(stored), len(part), where)
    return Set(Items(part, labels, shape, where), labels, None)


def _stored_labels(dataset: Any) -> Any:
    """torchvision's Datasets keep labels in `targets`: reading every image just for its label takes hours."""
    if isinstance(dataset, torch.utils.data.Subset):
        stored = _stored_labels(dataset.dataset)
        return None if stored is None else np.asarray(stored)[np.asarray(dataset.indices)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    return getattr(dataset, "targets", None)


def _arrays(x: NDArray[Any], y: NDArray[Any], resize: tuple[int, int] | None, shape: Shape, where: str) -> Set:
    """x (N, H, W), (N, H, W, C) or (N, C, H, W), whichever matches the model's input, and y (N,)."""
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"x in {where} is {x.dtype}: store uint8 (0..255), or floats that are used as they are")
    labels = _labels(y, len(x) if x.ndim else 0, where)
    nchw = _channels_first(x, resize is not None, shape, where)
    kind = np.uint8 if x.dtype == np.uint8 else np.float32
    pixels = np.require(nchw, kind, ["C", "W"])  # torch takes native, contiguous, writable memory
    if kind == np.float32 and not np.isfinite(pixels).all():
        raise DataError(f"x in {where} has values that are not finite: remove these images")
    return Set(Array(fitted(torch.from_numpy(pixels), resize or shape[1:], shape)), labels, None)


def _channels_first(x: NDArray[Any], resizes: bool, shape: Shape, where: str) -> NDArray[Any]:
    """x as (N, C, h, w): the layout that has the input's shape, or else its channels when it is resized."""
    layouts = [x[:, None]] if x.ndim == 3 else [x, np.moveaxis(x, 3, 1)] if x.ndim == 4 else []
    fitting = [layout for layout in layouts if layout.shape[1] == shape[0]]
    exact = [layout for layout in fitting if layout.shape[1:] == shape]
    if exact or (resizes and fitting):
        return (exact or fitting)[0]
    hint = f"set data.resize = {list(shape[1:])}" if fitting else f"store {shape[0]} channels"
    raise DataError(f"x in {where} has shape {x.shape}, but the model's input is {(1, *shape)}: {hint}")


def _labels(y: NDArray[Any], count: int, where: str) -> Ints:
    if y.shape != (count,):
        raise DataError(f"{where} has {count} images but labels of shape {y.shape}: give each image one label")
    if not count:
        raise DataError(f"{where} is empty: it needs images")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"labels in {where} are {y.dtype}, not integers: number the classes 0, 1, 2, ...")
    if y.min() < 0:
        raise DataError(f"labels in {where} are negative ({y.min()}): number the classes 0, 1, 2, ...")
    return y.astype(np.int64)


def same_classes(test: Set, source: Set) -> Set:
    """`test` with the labels of `source`: classes match by name, not by position."""
    known = source.names or numbered(int(source.labels.max()))
    names = test.names or tuple(str(label) for label in np.unique(test.labels))
    strange = set(names) - set(known)
    missing = set(known) - set(names) if test.names else set()  # an array need not hold every label
    if strange or missing:
        raise DataError(
            f"data.test and data.source have different classes (only in test: {sorted(strange)}, only in "
            f"source: {sorted(missing)}): give both the same"
        )
    if test.names is None:
        return test
    place = np.array([known.index(name) for name in names], dtype=np.int64)
    return Set(test.images, place[test.labels], known)


def numbered(highest: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(highest + 1))


def _check_channels(shape: Shape, what: str) -> None:
    if shape[0] not in (1, 3):
        raise DataError(f"{what} have 1 or 3 channels, but the model's input is {(1, *shape)}: use npz:FILE instead")


def _resize(section: DataSection, shape: Shape) -> tuple[int, int] | None:
    if section.resize and (section.resize[0] < shape[1] or section.resize[1] < shape[2]):
        raise DataError(
            f"data.resize is {section.resize}, smaller than the model's input {shape[1:]}: take that size "
            "or a larger one, of which the middle is used"
        )
    return section.resize
