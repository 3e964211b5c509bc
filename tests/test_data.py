"""The [data] section against Pillow, numpy and brute force; every error by its text."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from edgeprune import data
from edgeprune.config import DataSection
from edgeprune.data import images
from edgeprune.errors import DataError

RGB = (1, 3, 6, 8)  # not square, so that a swap of height and width shows
GREY = (1, 1, 6, 8)
AS_IS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # x is then the pixels / 255


def _noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _save(file: Path, pixels: NDArray[np.uint8]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def _pictures(folder: Path, classes: tuple[str, ...] = ("bee", "ant"), each: int = 10) -> dict[str, list[Path]]:
    """Noise of 9x7 pixels, a folder per class."""
    return {
        name: [_save(folder / name / f"{i:02}.png", _noise(7, 9, 3, seed=100 * c + i)) for i in range(each)]
        for c, name in enumerate(classes)
    }


def _npz(file: Path, x: NDArray[Any], y: NDArray[Any] | None = None) -> Path:
    np.savez(file, x=x, y=np.arange(len(x)) % 2 if y is None else y)
    return file


def _load(folder: Path, source: str, shape: tuple[int, ...] = RGB, **keys: Any) -> data.Data:
    return data.load(DataSection(source=source, **keys), folder, shape)


def _all(part: data.Subset) -> tuple[torch.Tensor, torch.Tensor]:
    xs, ys = zip(*part.batches(7), strict=True)
    return torch.cat(xs), torch.cat(ys)


def _everything(loaded: data.Data) -> dict[bytes, int]:
    """Bytes of every image in the three parts -> its label."""
    found: dict[bytes, int] = {}
    for part in (loaded.train, loaded.search, loaded.final):
        for x, y in zip(*_all(part), strict=True):
            assert x.numpy().tobytes() not in found, "an image is in two places"
            found[x.numpy().tobytes()] = int(y)
    return found


def _by_pillow(file: Path, mode: str = "RGB", width: int = 8, height: int = 6) -> bytes:
    image = Image.open(file).convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.array(image, dtype=np.float32).reshape(height, width, -1).transpose(2, 0, 1) / np.float32(255)
    return np.ascontiguousarray(pixels).tobytes()


# ---- folders of images -----------------------------------------------------------------------------------


def test_a_folder_gives_what_pillow_decodes_labelled_by_the_sorted_folder_names(tmp_path: Path) -> None:
    names = ("wasp", "bee", "moth", "ant", "fly")
    files = _pictures(tmp_path / "pictures", names)
    loaded = _load(tmp_path, "folder:pictures", **AS_IS)
    assert loaded.classes == ("ant", "bee", "fly", "moth", "wasp")
    expected = {_by_pillow(file): loaded.classes.index(name) for name in names for file in files[name]}
    assert _everything(loaded) == expected


def test_images_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for i in np.random.default_rng(0).permutation(20):
        _save(tmp_path / "a" / "bc"[i % 2] / f"{i:02}.png", np.full((6, 8, 3), i, dtype=np.uint8))
    x, _ = _all(_load(tmp_path, "folder:a", test="folder:a", **AS_IS).train)
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [*range(0, 20, 2), *range(1, 20, 2)]


def test_a_grey_model_gets_grey_images(tmp_path: Path) -> None:
    files = _pictures(tmp_path)
    loaded = _load(tmp_path, "folder:.", GREY, mean=(0.0,), std=(1.0,))
    assert set(_everything(loaded)) == {_by_pillow(file, "L") for name in files for file in files[name]}


def test_of_a_larger_resize_the_middle_is_used(tmp_path: Path) -> None:
    files = _pictures(tmp_path)
    loaded = _load(tmp_path, "folder:.", resize=(10, 14), **AS_IS)
    whole = [
        np.frombuffer(_by_pillow(file, width=14, height=10), dtype=np.float32).reshape(3, 10, 14)
        for name in files
        for file in files[name]
    ]
    assert set(_everything(loaded)) == {image[:, 2:8, 3:11].tobytes() for image in whole}


def test_images_are_found_in_subfolders_and_other_files_are_left_alone(tmp_path: Path) -> None:
    files = _pictures(tmp_path)
    deeper = _save(tmp_path / "ant" / "more" / "deep.BMP", _noise(7, 9, 3, seed=999))
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / "._00.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / ".git").mkdir()
    loaded = _load(tmp_path, "folder:.", **AS_IS)
    assert set(_everything(loaded)) == {_by_pillow(file) for file in [*files["ant"], *files["bee"], deeper]}


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    files = _pictures(tmp_path)
    image = Image.fromarray(_noise(7, 9, seed=5)).convert("P")
    image.save(files["ant"][0], transparency=bytes(range(256)))
    assert len(_everything(_load(tmp_path, "folder:.", **AS_IS))) == 20


def test_a_folder_that_fits_is_decoded_once(tmp_path: Path) -> None:
    files = _pictures(tmp_path)
    loaded = _load(tmp_path, "folder:.", **AS_IS)
    before = _everything(loaded)
    for file in files["ant"]:
        file.unlink()
    assert _everything(loaded) == before


def test_a_folder_too_large_for_the_cache_gives_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _pictures(tmp_path)
    cached = _everything(_load(tmp_path, "folder:.", **AS_IS))
    monkeypatch.setattr(images, "CACHE_BYTES", 20 * 3 * 6 * 8 - 1)
    loaded = _load(tmp_path, "folder:.", **AS_IS)
    assert _everything(loaded) == cached
    files["ant"][3].unlink()
    with pytest.raises(DataError, match=r"03\.png cannot be decoded"):
        _everything(loaded)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    bad = _pictures(tmp_path)["bee"][4]
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(DataError, match=r"bee/04\.png cannot be decoded \(.+\): replace or delete it"):
        _everything(_load(tmp_path, "folder:.", **AS_IS))


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    _pictures(tmp_path)["bee"][4].write_text("hello")
    with pytest.raises(DataError, match=r"bee/04\.png cannot be decoded \(cannot identify image file"):
        _everything(_load(tmp_path, "folder:.", **AS_IS))


def test_pixels_of_16_bits_are_refused_rather_than_clipped_to_white(tmp_path: Path) -> None:
    bad = _pictures(tmp_path)["bee"][4]
    Image.fromarray(np.full((7, 9), 40000, dtype=np.uint16)).save(bad)
    with pytest.raises(DataError, match=r"bee/04\.png cannot be decoded \(mode I;16; only 8-bit pixels are read"):
        _everything(_load(tmp_path, "folder:.", **AS_IS))


def test_a_missing_image_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image folder .*nowhere does not exist; it should hold a folder of images"):
        _load(tmp_path, "folder:nowhere")


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "loose.png", _noise(7, 9, 3))
    with pytest.raises(DataError, match="has no class folders: put the images of each class in a folder"):
        _load(tmp_path, "folder:.")


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    _pictures(tmp_path)
    (tmp_path / "wasp").mkdir()
    (tmp_path / "wasp" / "notes.txt").write_text("later")
    with pytest.raises(DataError, match=r"class folder .*wasp has no images: add some, or delete the folder"):
        _load(tmp_path, "folder:.")


def test_a_single_class_folder_is_refused(tmp_path: Path) -> None:
    _pictures(tmp_path, classes=("ant",))
    with pytest.raises(DataError, match=r"has only one class \(ant\): a classifier needs two or more"):
        _load(tmp_path, "folder:.")


def test_images_for_an_input_of_four_channels_are_refused(tmp_path: Path) -> None:
    _pictures(tmp_path)
    with pytest.raises(DataError, match=r"have 1 or 3 channels, but the model's input is \(1, 4, 6, 8\): use npz"):
        _load(tmp_path, "folder:.", (1, 4, 6, 8))


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pictures(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)  # Python's own way to make an import fail
    with pytest.raises(DataError, match=r"need Pillow: pip install 'edgeprune\[images\]'"):
        _load(tmp_path, "folder:.")


# ---- arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_an_npz_gives_its_own_pixels_in_either_layout(tmp_path: Path, layout: str) -> None:
    x = _noise(20, 3, 6, 8)
    y = np.arange(20) % 4
    _npz(tmp_path / "a.npz", x if layout == "NCHW" else x.transpose(0, 2, 3, 1), y)
    loaded = _load(tmp_path, "npz:a.npz", **AS_IS)
    assert loaded.classes == ("0", "1", "2", "3")
    unit = x.astype(np.float32) / np.float32(255)
    assert _everything(loaded) == {image.tobytes(): label for image, label in zip(unit, y, strict=True)}


def test_an_npz_of_grey_images_needs_no_channel_axis(tmp_path: Path) -> None:
    x = _noise(20, 6, 8)
    _npz(tmp_path / "a.npz", x)
    loaded = _load(tmp_path, "npz:a.npz", GREY, mean=(0.0,), std=(1.0,))
    assert set(_everything(loaded)) == {(image / np.float32(255)).tobytes() for image in x}


def test_the_layout_that_matches_the_input_wins_when_both_have_its_channels(tmp_path: Path) -> None:
    x = _noise(20, 3, 8, 3)  # as NCHW an image of 8x3, as NHWC one of 3x8
    _npz(tmp_path / "a.npz", x)
    unit = x.astype(np.float32) / np.float32(255)
    channels_first = _everything(_load(tmp_path, "npz:a.npz", (1, 3, 8, 3), **AS_IS))
    channels_last = _everything(_load(tmp_path, "npz:a.npz", (1, 3, 3, 8), **AS_IS))
    assert set(channels_first) == {image.tobytes() for image in unit}
    assert set(channels_last) == {image.transpose(2, 0, 1).tobytes() for image in unit}


@pytest.mark.parametrize("kind", [np.float16, np.float64, ">f4"])
def test_floats_of_any_kind_are_used_as_they_are(tmp_path: Path, kind: Any) -> None:
    x = (np.random.default_rng(0).normal(size=(20, 3, 6, 8)) * 200).astype(kind)
    _npz(tmp_path / "a.npz", x)
    assert set(_everything(_load(tmp_path, "npz:a.npz", **AS_IS))) == {v.astype(np.float32).tobytes() for v in x}


def test_an_npz_is_resized_as_pillow_would_to_within_one_level(tmp_path: Path) -> None:
    x = _noise(20, 13, 17, 3)
    _npz(tmp_path / "a.npz", x)
    loaded = _load(tmp_path, "npz:a.npz", resize=(6, 8), **AS_IS)
    small = [Image.fromarray(image).resize((8, 6), Image.Resampling.BILINEAR) for image in x]
    expected = np.stack([np.asarray(image) for image in small]).transpose(0, 3, 1, 2).astype(np.float64)
    for part in (loaded.train, loaded.search, loaded.final):
        for image in _all(part)[0].double().numpy() * 255:
            assert np.abs(expected - image).max(axis=(1, 2, 3)).min() < 1.01


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((20, 3, 9, 9), r"set data.resize = \[6, 8\]"),
        ((20, 9, 9, 3), r"set data.resize = \[6, 8\]"),
        ((20, 6, 8), "store 3 channels"),
        ((20, 1, 6, 8), "store 3 channels"),
        ((20, 48), "store 3 channels"),
        ((20,), "store 3 channels"),
    ],
)
def test_an_npz_that_does_not_fit_names_both_shapes(tmp_path: Path, shape: tuple[int, ...], hint: str) -> None:
    _npz(tmp_path / "a.npz", _noise(*shape))
    both = rf"a\.npz has shape {re.escape(str(shape))}, but the model's input is \(1, 3, 6, 8\): {hint}"
    with pytest.raises(DataError, match=both):
        _load(tmp_path, "npz:a.npz")


def test_a_resize_does_not_mend_wrong_channels(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz", _noise(20, 1, 9, 9))
    with pytest.raises(DataError, match=r"\(20, 1, 9, 9\), but the model's input is \(1, 3, 6, 8\): store 3"):
        _load(tmp_path, "npz:a.npz", resize=(6, 8))


def test_a_missing_npz_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.npz does not exist; it should be an \.npz file with arrays x and y"):
        _load(tmp_path, "npz:a.npz")


@pytest.mark.parametrize(("names", "held"), [("x", "x"), ("y", "y"), ("images labels", "images, labels")])
def test_an_npz_without_x_or_y_says_what_it_holds(tmp_path: Path, names: str, held: str) -> None:
    arrays: dict[str, Any] = {name: np.arange(4) for name in names.split()}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=rf"holds {held}; it needs x \(images\) and y \(labels\)"):
        _load(tmp_path, "npz:a.npz")


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.arange(4))
    (tmp_path / "text.npz").write_text("hello")
    cut = _npz(tmp_path / "cut.npz", _noise(20, 3, 6, 8))
    cut.write_bytes(cut.read_bytes()[:500])
    np.savez(tmp_path / "objects.npz", x=np.array([{}, []], dtype=object), y=np.arange(2))
    for name in ("array.npy", "text.npz", "cut.npz", "objects.npz"):
        with pytest.raises(DataError, match=rf"{name} is no \.npz file of plain arrays \(.+\): use numpy\.savez"):
            _load(tmp_path, f"npz:{name}")


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (np.arange(19), r"has 20 images but labels of shape \(19,\): give each image one label"),
        (np.zeros((20, 10), dtype=int), r"has 20 images but labels of shape \(20, 10\)"),
        (np.arange(20) / 2, "are float64, not integers: number the classes 0, 1, 2"),
        (np.array(["ant", "bee"] * 10), "are <U3, not integers: number the classes 0, 1, 2"),
        (np.arange(20) - 1, r"are negative \(-1\): number the classes 0, 1, 2"),
        (np.full(20, 7), r"has only one class \(7\): a classifier needs two or more"),
    ],
)
def test_wrong_labels_are_refused(tmp_path: Path, y: NDArray[Any], text: str) -> None:
    _npz(tmp_path / "a.npz", _noise(20, 3, 6, 8), y)
    with pytest.raises(DataError, match=text):
        _load(tmp_path, "npz:a.npz")


def test_wrong_pixels_are_refused(tmp_path: Path) -> None:
    _npz(tmp_path / "ints.npz", np.zeros((20, 3, 6, 8), dtype=np.int64))
    with pytest.raises(DataError, match=r"x in .*ints\.npz is int64: store uint8 \(0\.\.255\), or floats"):
        _load(tmp_path, "npz:ints.npz")
    _npz(tmp_path / "nan.npz", np.full((20, 3, 6, 8), np.nan))
    with pytest.raises(DataError, match=r"x in .*nan\.npz has values that are not finite: remove these images"):
        _load(tmp_path, "npz:nan.npz")
    _npz(tmp_path / "empty.npz", np.zeros((0, 3, 6, 8), dtype=np.uint8))
    with pytest.raises(DataError, match=r"empty\.npz is empty: it needs images"):
        _load(tmp_path, "npz:empty.npz")


# ---- digits ----------------------------------------------------------------------------------------------


def test_digits_of_their_own_size_are_scikit_learns_in_each_channel(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    loaded = _load(tmp_path, "digits", (1, 3, 8, 8), **AS_IS)
    assert loaded.classes == tuple("0123456789")
    images, labels = (
        torch.cat(each) for each in zip(_all(loaded.train), _all(loaded.search), _all(loaded.final), strict=True)
    )
    assert len(images) == 1797
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    found = {((x * 16).round().numpy().tobytes(), int(y)) for x, y in zip(images[:, 0], labels, strict=True)}
    expected = zip(bunch.images.astype(np.float32), bunch.target, strict=True)
    assert found == {(image.tobytes(), int(label)) for image, label in expected}


def test_digits_grow_to_the_models_input(tmp_path: Path) -> None:
    loaded = _load(tmp_path, "digits", (1, 1, 32, 32))
    x, _ = next(loaded.train.batches(4))
    assert x.shape == (4, 1, 32, 32)


def test_without_scikit_learn_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"need scikit-learn: pip install 'edgeprune\[digits\]'"):
        _load(tmp_path, "digits", (1, 1, 8, 8))


# ---- functions -------------------------------------------------------------------------------------------

PAIRS = """
import numpy as np
def part(seed, count):
    x = np.random.default_rng(seed).normal(size=(count, 3, 6, 8)).astype("float32")
    return x, np.arange(count) % 3
"""


@pytest.mark.parametrize(
    "returned",
    [
        "{'train': part(0, 9), 'val': part(1, 5), 'test': part(2, 4)}",
        "{'final': part(2, 4), 'search': part(1, 5), 'train': part(0, 9)}",
        "part(0, 9), part(1, 5), part(2, 4)",
    ],
)
def test_a_function_gives_its_three_parts_as_they_are(tmp_path: Path, returned: str) -> None:
    (tmp_path / "mine.py").write_text(PAIRS + f"def make():\n    return {returned}\n")
    loaded = _load(tmp_path, "mine.py:make")
    assert (loaded.mean, loaded.std, loaded.classes) == ((0.0,) * 3, (1.0,) * 3, ("0", "1", "2"))
    for seed, (part, count) in enumerate(((loaded.train, 9), (loaded.search, 5), (loaded.final, 4))):
        x, y = _all(part)
        expected = np.random.default_rng(seed).normal(size=(count, 3, 6, 8)).astype("float32")
        assert np.array_equal(x.numpy(), expected)
        assert y.tolist() == [i % 3 for i in range(count)]


def test_a_function_is_normalised_when_the_section_says_how(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PAIRS + "def make():\n    return part(0, 9), part(1, 5), part(2, 4)\n")
    x, _ = _all(_load(tmp_path, "mine.py:make", mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0)).train)
    raw = np.random.default_rng(0).normal(size=(9, 3, 6, 8)).astype("float32")
    expected = (raw - np.array([1, 2, 3]).reshape(3, 1, 1)) / np.array([2, 4, 8]).reshape(3, 1, 1)
    assert np.allclose(x.numpy(), expected, atol=1e-6)


DATASETS = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

@dataclass
class Mine(Dataset):
    count: int
    reads: int = 0
    def __len__(self):
        return self.count
    def __getitem__(self, position):
        self.reads += 1
        return torch.full((3, 6, 8), float(position)), position % 3

class Listed(Mine):
    @property
    def targets(self):
        return [i % 3 for i in range(self.count)]
"""


def test_torch_datasets_are_read_item_by_item(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        DATASETS
        + "def make():\n"
        + "    tensors = TensorDataset(torch.ones(4, 3, 6, 8, dtype=torch.uint8), torch.arange(4))\n"
        + "    return Mine(8), Subset(Listed(9), [7, 2, 5]), tensors\n"
    )
    loaded = _load(tmp_path, "mine.py:make")
    assert loaded.classes == ("0", "1", "2", "3")
    x, y = _all(loaded.train)
    assert torch.equal(x, torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 6, 8))
    assert y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    x, y = _all(loaded.search)
    assert x[:, 0, 0, 0].tolist() == [7, 2, 5]
    assert y.tolist() == [1, 2, 2]
    assert torch.equal(_all(loaded.final)[0], torch.full((4, 3, 6, 8), 1 / 255))


def test_labels_listed_in_targets_spare_reading_every_image(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        DATASETS + "parts = Listed(8), Subset(Listed(9), [7, 2, 5]), Mine(4)\ndef make():\n    return parts\n"
    )
    loaded = _load(tmp_path, "mine.py:make")
    data.check_labels(loaded, 3)
    parts = sys.modules["edgeprune_user_mine"].parts
    assert [parts[0].reads, parts[1].dataset.reads, parts[2].reads] == [0, 0, 4]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (
            "torch.zeros(3, 6, 8), 0.5",
            "item 0 in train of mine.py:make is no pair of image tensor and integer",
        ),
        ("torch.zeros(3, 6, 8)", "item 0 in train of mine.py:make is no pair of image tensor and integer"),
        ("'picture', 1", "item 0 in train of mine.py:make is no pair of image tensor and integer label"),
    ],
)
def test_items_that_are_no_pairs_of_image_and_label_are_refused(tmp_path: Path, item: str, text: str) -> None:
    odd = f"class Odd(Mine):\n    def __getitem__(self, position):\n        return {item}\n"
    (tmp_path / "mine.py").write_text(DATASETS + odd + "def make():\n    return Odd(4), Mine(4), Mine(4)\n")
    with pytest.raises(DataError, match=text):
        _load(tmp_path, "mine.py:make")


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (
            "torch.zeros(3, 9, 9), 0",
            r"image 0 in train of .* has shape \(3, 9, 9\), but .* \(1, 3, 6, 8\): resize",
        ),
        (
            "torch.zeros(3, 6, 8), 2",
            "image 0 in train of .* has label 2, but 0 when its .*: make .*`targets` agree",
        ),
    ],
)
def test_items_that_do_not_fit_are_named_when_they_are_read(tmp_path: Path, item: str, text: str) -> None:
    odd = f"class Odd(Listed):\n    def __getitem__(self, position):\n        return {item}\n"
    (tmp_path / "mine.py").write_text(DATASETS + odd + "def make():\n    return Odd(4), Mine(4), Mine(4)\n")
    train = _load(tmp_path, "mine.py:make").train
    with pytest.raises(DataError, match=text):
        _all(train)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            "import nothing_of_this_name",
            r"mine\.py cannot be imported: ModuleNotFoundError: No module named 'nothing",
        ),
        ("def make(:", r"mine\.py cannot be imported: SyntaxError"),
        ("other = 3", r"mine\.py has no function 'make'; write file\.py:function"),
        (
            "def make():\n    return 1 / 0",
            r"make\(\) in .*mine\.py failed: ZeroDivisionError: division by zero",
        ),
        ("def make():\n    return [1, 2]", "must return train, val and test, .*; it returned list"),
        (
            "def make():\n    return {'train': 1, 'test': 2}",
            "must return train, val and test, .*; it returned 2 of",
        ),
        (
            "def make():\n    return iter(''), 1, 2",
            "train of mine.py:make is a str_.*: return a Dataset with a length",
        ),
    ],
)
def test_functions_that_do_not_work_are_explained(tmp_path: Path, code: str, text: str) -> None:
    (tmp_path / "mine.py").write_text(code + "\n")
    with pytest.raises(DataError, match=text):
        _load(tmp_path, "mine.py:make")


def test_a_missing_function_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine\.py does not exist; write file\.py:function"):
        _load(tmp_path, "mine.py:make")


def test_a_function_and_a_test_source_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a function brings its own test images: delete data\.test"):
        _load(tmp_path, "mine.py:make", test="npz:a.npz")


# ---- the split -------------------------------------------------------------------------------------------


def _tagged(folder: Path, labels: NDArray[np.int64], name: str = "a.npz") -> None:
    """Images whose every pixel is their position."""
    x = np.broadcast_to(np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1), (len(labels), 1, 2, 2))
    _npz(folder / name, x, labels)


def _positions(part: data.Subset) -> list[int]:
    return [int(value) for value in _all(part)[0][:, 0, 0, 0]]


def _split(folder: Path, **keys: Any) -> list[list[int]]:
    loaded = _load(folder, "npz:a.npz", (1, 1, 2, 2), mean=(0.0,), std=(1.0,), **keys)
    return [_positions(part) for part in (loaded.train, loaded.search, loaded.final)]


@pytest.mark.parametrize("classes", [2, 10, 300])
@pytest.mark.parametrize("shares", [(0.7, 0.15, 0.15), (0.34, 0.33, 0.33), (0.05, 0.9, 0.05)])
def test_the_split_is_disjoint_covers_everything_and_divides_every_class(
    tmp_path: Path, classes: int, shares: tuple[float, float, float]
) -> None:
    labels = np.random.default_rng(classes).integers(0, classes, 1000)
    _tagged(tmp_path, labels)
    parts = _split(tmp_path, split=shares, seed=classes)
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(1000))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - 1000 * share) < 1.5
        counts = np.bincount(labels[part], minlength=classes)
        assert np.abs(counts - share * np.bincount(labels, minlength=classes)).max() < 2


def test_a_part_of_the_final_images_is_drawn_at_random_and_always_the_same(tmp_path: Path) -> None:
    _tagged(tmp_path, np.arange(100) % 2)
    whole, part = _split(tmp_path), _split(tmp_path, final_images=10)
    assert part[:2] == whole[:2]
    assert len(part[2]) == 10
    assert set(part[2]) < set(whole[2])
    assert part[2] != whole[2][:10]
    assert part == _split(tmp_path, final_images=10)
    assert _split(tmp_path, final_images=1000) == whole


def test_another_seed_splits_differently(tmp_path: Path) -> None:
    _tagged(tmp_path, np.arange(100) % 2)
    assert _split(tmp_path, seed=1) == _split(tmp_path, seed=1)
    assert _split(tmp_path, seed=1)[2] != _split(tmp_path, seed=2)[2]


def test_the_split_of_a_seed_never_changes(tmp_path: Path) -> None:
    """Pinned: a `final` that changed between versions would have been trained on by older runs."""
    _tagged(tmp_path, np.arange(20) % 2)
    assert _split(tmp_path, seed=5)[1:] == [[12, 13, 14], [7, 8, 17]]


def test_a_part_without_images_is_named(tmp_path: Path) -> None:
    _tagged(tmp_path, np.arange(4) % 2)
    with pytest.raises(DataError, match=r"the final part has no images: add images, or enlarge .* data\.split"):
        _split(tmp_path, split=(0.6, 0.39, 0.01))


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    _tagged(tmp_path, np.arange(20) % 2)
    with pytest.raises(DataError, match="seed -1 is negative: take 0 or more"):
        _split(tmp_path, seed=-1)


def test_a_test_source_is_halved_by_class_and_leaves_all_of_source_for_training(tmp_path: Path) -> None:
    _tagged(tmp_path, np.arange(30) % 2)
    labels = np.repeat([0, 1], [12, 8])
    _tagged(tmp_path, labels, "test.npz")
    train, search, final = _split(tmp_path, test="npz:test.npz")
    assert train == list(range(30))
    assert sorted(search + final) == list(range(20))
    assert np.bincount(labels[search]).tolist() == np.bincount(labels[final]).tolist() == [6, 4]


def test_a_test_folder_is_matched_to_numbered_classes_by_name(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz", _noise(24, 3, 6, 8), np.arange(24) % 12)
    files = _pictures(tmp_path / "test", tuple(str(label) for label in range(12)), each=2)
    loaded = _load(tmp_path, "npz:a.npz", test="folder:test", **AS_IS)
    labels = {_by_pillow(file): int(name) for name in files for file in files[name]}  # "10" sorts before "2"
    images, found = (torch.cat(each) for each in zip(_all(loaded.search), _all(loaded.final), strict=True))
    assert {x.numpy().tobytes(): int(y) for x, y in zip(images, found, strict=True)} == labels


def test_a_test_source_with_other_classes_is_refused(tmp_path: Path) -> None:
    _pictures(tmp_path / "train", ("ant", "bee"))
    _pictures(tmp_path / "test", ("ant", "wasp"))
    with pytest.raises(DataError, match=r"\(only in test: \['wasp'\], only in source: \['bee'\]\): give both"):
        _load(tmp_path, "folder:train", test="folder:test")
    _npz(tmp_path / "a.npz", _noise(20, 3, 6, 8), np.arange(20) % 2)
    _npz(tmp_path / "b.npz", _noise(20, 3, 6, 8), np.arange(20) % 3)
    with pytest.raises(DataError, match=r"different classes \(only in test: \['2'\], only in source: \[\]\)"):
        _load(tmp_path, "npz:a.npz", test="npz:b.npz")


@pytest.mark.parametrize("source", ["zip:a.zip", "pictures", "folder:", "npz:", "digits:8"])
def test_an_unknown_source_lists_the_known_ones(tmp_path: Path, source: str) -> None:
    known = "is not known; write folder:DIR, npz:FILE, file.py:function or digits"
    with pytest.raises(DataError, match=f"data.source '{source}' {known}"):
        _load(tmp_path, source)


def test_an_unknown_test_source_lists_the_known_ones(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz", _noise(20, 3, 6, 8))
    with pytest.raises(DataError, match=r"data\.test 'digits' is not known; write folder:DIR or npz:FILE"):
        _load(tmp_path, "npz:a.npz", test="digits")


def test_inputs_and_resizes_that_are_no_images_are_refused(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz", _noise(20, 3, 6, 8))
    with pytest.raises(DataError, match=r"input is \(1, 40\), but images need \(1, channels, height, width\)"):
        _load(tmp_path, "npz:a.npz", (1, 40))
    with pytest.raises(DataError, match=r"resize is \(6, 7\), smaller than the model's input \(6, 8\): take that"):
        _load(tmp_path, "npz:a.npz", resize=(6, 7))


def test_a_label_beyond_the_classifier_is_refused(tmp_path: Path) -> None:
    _tagged(tmp_path, np.arange(260) % 13)
    loaded = _load(tmp_path, "npz:a.npz", (1, 1, 2, 2))
    data.check_labels(loaded, 13)
    with pytest.raises(DataError, match="label 12 but the model has 12 outputs"):
        data.check_labels(loaded, 12)
    with pytest.raises(DataError, match=r"label 12 but the model has 10 outputs \(for labels 0 to 9\), in the train"):
        data.check_labels(loaded, 10)


# ---- normalisation ---------------------------------------------------------------------------------------


def test_mean_and_std_come_from_the_training_images_alone(tmp_path: Path) -> None:
    x = _noise(200, 3, 6, 8)
    _npz(tmp_path / "a.npz", x, np.arange(200) % 2)
    _npz(tmp_path / "b.npz", np.full_like(x, 255), np.arange(200) % 2)
    loaded = _load(tmp_path, "npz:a.npz", test="npz:b.npz")
    unit = x.astype(np.float64) / 255
    assert np.allclose(loaded.mean, unit.mean(axis=(0, 2, 3)), atol=1e-6)
    assert np.allclose(loaded.std, unit.std(axis=(0, 2, 3)), atol=1e-6)


def test_mean_and_std_leave_out_what_the_split_keeps_for_search_and_final(tmp_path: Path) -> None:
    _tagged(tmp_path, np.arange(100) % 2)
    train = _split(tmp_path, seed=3)[0]
    loaded = _load(tmp_path, "npz:a.npz", (1, 1, 2, 2), seed=3)
    assert np.allclose([loaded.mean[0], loaded.std[0]], [np.mean(train), np.std(train)])


def test_batches_are_normalised_channel_by_channel(tmp_path: Path) -> None:
    x = _noise(40, 3, 6, 8)
    _npz(tmp_path / "a.npz", x)
    _npz(tmp_path / "b.npz", x)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    images, _ = _all(_load(tmp_path, "npz:a.npz", test="npz:b.npz", mean=mean, std=std).train)
    expected = (x / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert images.dtype == torch.float32
    assert np.allclose(images.numpy(), expected, atol=1e-5)


def test_the_section_wins_over_what_train_would_give(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz", _noise(40, 3, 6, 8))
    loaded = _load(tmp_path, "npz:a.npz", mean=(0.0, 0.0, 0.0))
    assert loaded.mean == (0.0, 0.0, 0.0)
    assert loaded.std == _load(tmp_path, "npz:a.npz").std


@pytest.mark.parametrize("constant", [np.uint8(77), np.float32(200.3), np.float32(-1e4)])
def test_a_channel_that_never_changes_becomes_zero(tmp_path: Path, constant: np.generic) -> None:
    x = _noise(40, 3, 6, 8).astype(constant.dtype)
    x[:, 1] = constant
    _npz(tmp_path / "a.npz", x)
    loaded = _load(tmp_path, "npz:a.npz")
    images, _ = _all(loaded.train)
    assert loaded.std[1] == 1
    assert images[:, 1].abs().max() < 1e-3
    assert images[:, 0].std() > 0.9


def test_a_mean_for_other_channels_is_refused(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz", _noise(40, 3, 6, 8))
    with pytest.raises(DataError, match=r"data\.std has 1 values, but the model's input has 3 channels"):
        _load(tmp_path, "npz:a.npz", std=(0.5,))


# ---- batches ---------------------------------------------------------------------------------------------


def _train(folder: Path, count: int, **keys: Any) -> data.Subset:
    """A train part of exactly `count` tagged images."""
    _tagged(folder, np.arange(count) % 2)
    _tagged(folder, np.arange(4) % 2, "test.npz")
    keys = {"mean": (0.0,), "std": (1.0,), **keys}
    return _load(folder, "npz:a.npz", (1, 1, 2, 2), test="npz:test.npz", **keys).train


def test_without_a_seed_batches_are_in_order_and_complete(tmp_path: Path) -> None:
    part = _train(tmp_path, 9)
    assert len(part) == 9
    assert [x[:, 0, 0, 0].tolist() for x, _ in part.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [y.tolist() for _, y in part.batches(4)] == [[0, 1, 0, 1], [0, 1, 0, 1], [0]]
    assert part.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_shuffled_batches_keep_images_with_their_labels(tmp_path: Path) -> None:
    batches = list(_train(tmp_path, 50).batches(8, shuffle_seed=1))
    assert [len(y) for _, y in batches] == [8, 8, 8, 8, 8, 8, 2]
    order = torch.cat([x[:, 0, 0, 0] for x, _ in batches])
    assert order.tolist() != list(range(50))
    assert sorted(order.tolist()) == list(range(50))
    assert torch.equal(torch.cat([y for _, y in batches]), order.long() % 2)


def test_a_shuffled_last_batch_of_one_image_is_dropped(tmp_path: Path) -> None:
    part = _train(tmp_path, 9)
    assert [len(y) for _, y in part.batches(4, shuffle_seed=1)] == [4, 4]
    assert [len(y) for _, y in part.batches(1, shuffle_seed=1)] == [1] * 9


def test_augmentation_shifts_within_the_padding_and_mirrors_nothing_else(tmp_path: Path) -> None:
    crop, height, width = 2, 6, 8
    x = _noise(300, 3, height, width)
    _npz(tmp_path / "a.npz", x)
    part = _load(tmp_path, "npz:a.npz", crop=crop, flip=True).train
    plain, _ = _all(part)
    padded = functional.pad(plain, (crop,) * 4)
    candidates: dict[bytes, tuple[int, int, int, bool]] = {}
    for top in range(2 * crop + 1):
        for left in range(2 * crop + 1):
            for index, image in enumerate(padded[:, :, top : top + height, left : left + width]):
                candidates[image.numpy().tobytes()] = (index, top, left, False)
                candidates[image.flip(2).numpy().tobytes()] = (index, top, left, True)
    found = [candidates[x.numpy().tobytes()] for xs, _ in part.batches(32, 4, augment=True) for x in xs]
    assert sorted(index for index, *_ in found) == list(range(len(part)))
    for choice, options in ((1, 5), (2, 5), (3, 2)):
        counts = np.bincount([int(each[choice]) for each in found], minlength=options)
        assert counts.min() > 0.5 * len(found) / options, "one option is rarer than chance allows"


def test_a_seed_gives_the_same_batches_again_and_another_seed_others(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz", _noise(100, 3, 6, 8))
    part = _load(tmp_path, "npz:a.npz", crop=1, flip=True).train
    assert _digest(part, 3) == _digest(part, 3)
    assert _digest(part, 3) != _digest(part, 4)


def test_augmentation_without_a_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="augment=True draws at random: pass a shuffle_seed"):
        _train(tmp_path, 9).batches(4, augment=True)


def test_a_batch_of_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a batch of 0 images was asked for: take 1 or more"):
        _train(tmp_path, 9).batches(0)


# ---- another process -------------------------------------------------------------------------------------


def _digest(part: data.Subset, seed: int) -> str:
    digest = hashlib.sha256()
    for x, y in part.batches(16, shuffle_seed=seed, augment=True):
        digest.update(x.numpy().tobytes() + y.numpy().tobytes())
    return digest.hexdigest()


CHILD = """
import hashlib, json, pathlib, sys
from edgeprune import config, data
early = sorted({"PIL", "sklearn", "torchvision"} & set(sys.modules))
section = config.DataSection(source="npz:a.npz", crop=1, flip=True)
part = data.load(section, pathlib.Path(sys.argv[1]), (1, 3, 6, 8)).train
digest = hashlib.sha256()
for x, y in part.batches(16, shuffle_seed=3, augment=True):
    digest.update(x.numpy().tobytes() + y.numpy().tobytes())
print(json.dumps([early, digest.hexdigest()]))
"""


def test_another_process_draws_the_same_batches_and_imports_pillow_and_sklearn_only_when_needed(
    tmp_path: Path,
) -> None:
    _npz(tmp_path / "a.npz", _noise(100, 3, 6, 8))
    here = _digest(_load(tmp_path, "npz:a.npz", crop=1, flip=True).train, 3)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == [[], here]
    assert done.stderr == ""
