# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file is complete or absent, whenever the process dies. And strangers' JSON.

A file is made in a hidden folder beside its place, `.NAME.TOKEN.partial`, and renamed into place.
The folder is locked while its process lives; those of killed processes are removed by the next
writer in the same place. Where locks do not work (some network file systems) they stay.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msdda_fast.errors import InvalidOutput, WriteFailed

__all__ = ["check_files", "check_folder", "read_json", "unique_keys", "write_atomically"]

_PARTIAL = re.compile(r"\..+\.[0-9a-f]+\.partial")
#: Longest name that common file systems take, in bytes.
_LONGEST_NAME = 255
#: What must fit on the disk before a run starts, in bytes; the size of a large image.
_ROOM = 2**20
_MAX_JSON = 32 * 2**20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`; make missing folders.

    A reader sees the old file or the whole new one, never a part. If `write` raises, the old file
    stays and the temporary one is removed.

    Raises:
        InvalidOutput: `path` is a folder, a link, or no regular file, such as a device.
        WriteFailed: The folder cannot be made, or the file cannot be written: the disk is full.
    """
    _check_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent, (".*.partial",))
        with _stage(path.parent, path.name) as stage:
            partial = stage / path.name
            _fill(partial, write)
            os.replace(partial, path)
    except Exception as error:
        raise WriteFailed(f"cannot write {path}: {_reason(error)}") from error


def check_files(*paths: Path) -> None:
    """Check, before any work, that `write_atomically` can write these files of one folder.

    Raises:
        InvalidOutput: One is not a regular file, or the folder cannot be written to.
    """
    for path in paths:
        _check_target(path)
    _check_room(paths[0].parent)


def check_folder(folder: Path) -> None:
    """Check, before any work, that files can be written below `folder`, which need not exist.

    What killed writers left in it is removed, up to two folders deep.

    Raises:
        InvalidOutput: It is not a folder, or cannot be written to; or the disk is full.
    """
    _check_room(folder)
    _remove_leftovers(folder, (".*.partial", "*/.*.partial", "*/*/.*.partial"))


def read_json(file: Path, kind: str) -> dict[str, Any]:
    """Read a JSON file of at most 32 MiB that holds an object; `kind` says what it should be.

    Raises:
        ValueError: It does not; one line with the file's name.
    """
    try:
        with file.open("rb") as opened:  # no more than that, even of what has no end
            data = opened.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise ValueError(f"it has more than {_MAX_JSON} bytes")
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {found!r:.80}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not {kind} in JSON: {error}") from error
    return found


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; `object_pairs_hook` of readers that would take the last of two.

    Raises:
        ValueError: A key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"{twice!r:.80} is there twice")
    return found


def _check_target(path: Path) -> None:
    """Raise `InvalidOutput` if renaming something to `path` would replace more than a file."""
    _check_names(path)
    if path.is_symlink():
        raise InvalidOutput(f"{path} is a symbolic link, which writing would replace by a file")
    if path.is_dir() or not path.name:
        raise InvalidOutput(f"{str(path)!r} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise InvalidOutput(f"{path} is a device, pipe or socket; only regular files are written")


def _check_names(path: Path) -> None:
    for name in path.parts:
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise InvalidOutput(f"{name[:40]}... is longer than {_LONGEST_NAME} bytes")


def _check_room(folder: Path) -> None:
    """Raise `InvalidOutput` unless a file can be made and filled in `folder` or where it will be.

    No folder is made: bad input found later must leave nothing behind.
    """
    _check_names(folder)
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise InvalidOutput(f"cannot write in {folder}: {there} is not a folder")
    try:
        with _stage(there, "room") as stage:
            _fill(stage / "room", lambda file: file.write_bytes(bytes(_ROOM)))
    except OSError as error:
        raise InvalidOutput(f"cannot write in {there}: {_reason(error)}") from error


def _fill(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make `file`, and wait until it is on the disk."""
    write(file)
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


@contextmanager
def _stage(folder: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in `folder` that is locked until it is removed."""
    while True:
        stage = folder / f".{name[:40]}.{secrets.token_hex(4)}.partial"
        stage.mkdir()
        try:
            descriptor = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:
            continue  # taken for a leftover before it was locked; so below
        _lock(descriptor, wait=True)
        if stage.is_dir():
            break
        os.close(descriptor)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(descriptor)


def _remove_leftovers(folder: Path, patterns: tuple[str, ...]) -> None:
    """Remove the partial files and folders that no living process has locked."""
    for leftover in (found for pattern in patterns for found in folder.glob(pattern)):
        if not _PARTIAL.fullmatch(leftover.name) or leftover.is_symlink():
            continue
        try:
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue  # gone, or another user's
        try:
            if _lock(descriptor, wait=False):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; return whether that was possible."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False  # no such locks here, or somebody has it
    return True
