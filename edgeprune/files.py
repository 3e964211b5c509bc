"""Files that are never half-written: JSON with a `format` field, and bytes, both written beside and renamed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .errors import EdgepruneError, RunError

BESIDE = re.compile(r"\..+\.(?P<process>\d+)-\w+")  # names of what is written beside its place
STREAM_BYTES = 1 << 16  # with less free than a stream's buffer, a stream that failed has met a full disk


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; when the block succeeds it is synced and renamed into place.

    Raises:
        RunError: the disk is full, or the folder cannot be written; `path` is as it was.
    """
    with not_full(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}-", dir=path.parent)
        except OSError as error:
            raise _unwritten(path, error) from error
        os.fchmod(handle, 0o666 & ~_umask())  # others may read what they may read elsewhere
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
        except OSError as error:
            raise _unwritten(path, error) from error
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def folder_beside(folder: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden folder in `folder`, gone when the block ends."""
    sweep(folder)
    with tempfile.TemporaryDirectory(prefix=f".{name}.{os.getpid()}-", dir=folder) as beside:
        yield Path(beside)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left half-written in a folder."""
    for path in folder.glob(".*"):
        found = BESIDE.fullmatch(path.name)
        if found is None or _lives(int(found["process"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def not_full(path: Path) -> Iterator[None]:
    """Turn what a full disk does to a writer of `path`, in whichever library, into one error that says so.

    Raises:
        RunError: the disk is full; `path` is as it was.
    """
    try:
        yield
    except Exception as error:
        if _is_full(error, path.parent):
            raise RunError(
                f"the disk is full: {path} could not be written and is unchanged; make room and resume"
            ) from error
        raise


def _unwritten(path: Path, error: OSError) -> Exception:
    return error if _is_full(error, path.parent) else RunError(f"{path} could not be written: {error}")


def _is_full(error: BaseException | None, folder: Path) -> bool:
    """Does an error, or one that led to it, come from a full disk? C++ streams do not say: then the disk is asked."""
    while error is not None:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            return True
        if "iostream" in str(error) and shutil.disk_usage(folder).free < STREAM_BYTES:
            return True
        error = error.__cause__ or error.__context__
    return False


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Make a file or a folder's entries survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, format_name: str, content: Any) -> None:
    """Write `{"format": format_name, ...content}`; content is a dict or a record."""
    text = json.dumps({"format": format_name, **plain(content)}, indent=1)
    with writing(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, format_name: str, error: type[EdgepruneError] = RunError) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        `error`: the file is missing, damaged, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise error(f"{path} is damaged ({problem}); delete it and it will be made again") from problem
    found = content.get("format") if isinstance(content, dict) else None
    if found != format_name:
        raise error(f"{path} has format {found!r}, expected {format_name!r}: another version of edgeprune wrote it")
    del content["format"]
    return dict(content)


def plain(content: Any) -> Any:
    """Records, tuples and paths as JSON values."""
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        return {f.name: plain(getattr(content, f.name)) for f in dataclasses.fields(content)}
    if isinstance(content, BaseModel):
        return content.model_dump(mode="json")
    if isinstance(content, dict):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(item) for item in content]
    return str(content) if isinstance(content, Path) else content


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
