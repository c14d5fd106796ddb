# SPDX-License-Identifier: Apache-2.0
"""Kept results are continued only while everything that they depend on is the same.

A *fingerprint* is a mapping of JSON values with everything that a result depends on: settings as
they are, and digests of networks, adapters, rewards and files. A folder of results holds one as
`settings.json`, made with the first result and by one process only, and each result carries its
own. `check` compares them all before any work.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from msdda_fast.errors import ResumeMismatch
from msdda_fast.files import write_atomically

__all__ = ["RECORD", "bind", "check", "digest", "file_digest", "mark", "named", "require_same"]

Fingerprint = Mapping[str, Any]
#: A file, the fingerprint that it carries (None: it has none), and the one that it should.
Result = tuple[Path, Fingerprint | None, Fingerprint]

RECORD = "settings.json"
#: Raised when equal settings would give other results, or results in other files.
FORMAT = 1
_one_thread = threading.Lock()
_SHOWN = 3  # differences in one message
_ABSENT = "absent"
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEEPEST = 4  # objects within objects in which a digest looks for tensors


def check(
    folder: Path,
    wanted: Fingerprint,
    *,
    record: str = RECORD,
    results: Iterable[Result] = (),
    unmarked: Iterable[Path] = (),
) -> None:
    """Check, before any work, that what `folder` holds was made with the fingerprint `wanted`.

    Args:
        folder: It may be missing.
        wanted: What all results of the folder have in common.
        record: Name of the record.
        results: The results that are there and carry fingerprints.
        unmarked: Files whose fingerprint is the record alone; some may be missing.

    Raises:
        ResumeMismatch: The record or a result differs or has no fingerprint.
    """
    file = folder / record
    if file.exists():
        require_same(file, _read(file), mark(wanted))
    elif found := next((path for path in unmarked if path.exists()), None):
        raise ResumeMismatch(
            f"{found} is there without {record}, which would say what it depends on; "
            "move it away, or choose another folder"
        )
    for path, stored, own in results:
        require_same(path, stored, mark(own))


def bind(folder: Path, wanted: Fingerprint, *, record: str = RECORD) -> None:
    """Make `folder` the place of results with the fingerprint `wanted`, before each is written.

    Of several processes that fill a new folder together the first makes its record, and the others
    are compared with it.

    Raises:
        ResumeMismatch: The record differs.
    """
    file = folder / record
    if not _create(file, mark(wanted)):
        require_same(file, _read(file), mark(wanted))


def mark(own: Fingerprint) -> dict[str, Any]:
    """Return the fingerprint that a result carries, for `check` to find it again."""
    return {"format": FORMAT, **own}


def require_same(place: Path, stored: Fingerprint | None, wanted: Fingerprint) -> None:
    """Check that what is kept at `place` was made with the fingerprint `wanted`.

    Raises:
        ResumeMismatch: It was not; the message names fields with the old and the new value.
    """
    if stored is None:
        raise ResumeMismatch(
            f"{place} has no fingerprint of its settings; delete it, or choose another folder"
        )
    old, new = (dict(_flat(json.loads(json.dumps(given)))) for given in (stored, wanted))
    differ = [
        f"{key} was {old.get(key, _ABSENT)}, is {new.get(key, _ABSENT)}"
        for key in dict.fromkeys(("format", *new, *old))
        if old.get(key) != new.get(key)
    ]
    if differ:
        more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise ResumeMismatch(
            f"{place} was made otherwise: {'; '.join(differ[:_SHOWN])}{more}. "
            "Use the earlier values to continue, or another folder to start anew"
        )


def named(value: object) -> str:
    """Return name and digest of an object, such as a reward."""
    name = getattr(value, "name", getattr(value, "__name__", type(value).__name__))
    return f"{name} {digest(value)}"


def digest(*values: object) -> str:
    """Return 16 hexadecimal digits that change with the content of `values`.

    Counted are tensors with shape and dtype, modules by their state, paths by the files' bytes,
    plain values, collections and dataclasses, functions by their code, and other objects by class
    and attributes. Of what an object's attributes refer to, only tensors, modules and paths count:
    the rest may be caches.
    """
    sha = hashlib.sha256()
    for value in values:
        for part in _parts(value, 0, ()):
            sha.update(part)
    return sha.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return 16 hexadecimal digits of a file's bytes, or of the names and bytes in a folder.

    A file that has its size and time of change is not read again.

    Raises:
        FileNotFoundError: There is neither.
    """
    if not path.is_dir():
        state = path.stat()
        return _bytes_digest(path.resolve(), state.st_size, state.st_mtime_ns)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest([(str(file.relative_to(path)), file_digest(file)) for file in files])


@cache
def _bytes_digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _parts(value: Any, depth: int, within: tuple[int, ...]) -> Iterator[bytes | memoryview]:  # noqa: ANN401
    """Yield the bytes of a digest of a value that is `depth` objects deep, inside those `within`.

    Plain values count at depths 0 and 1.
    """
    if isinstance(value, _PLAIN):
        if depth < 2:
            yield f"{value!r};".encode()
        return
    yield f"{type(value).__qualname__}:".encode()
    if id(value) in within or depth > _DEEPEST:
        return
    inside = (*within, id(value))
    if isinstance(value, Tensor):
        yield f"{tuple(value.shape)}{value.dtype}".encode()
        flat = value.detach().cpu().contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data
    elif isinstance(value, nn.Module):
        yield from _parts(dict(value.state_dict()), 0, inside)
    elif isinstance(value, Path):
        yield (file_digest(value) if value.exists() else str(value)).encode()
    elif isinstance(value, type | ModuleType):
        yield value.__name__.encode()
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield f"{key!r}=".encode()
            yield from _parts(entry, depth, inside)
    elif is_dataclass(value):
        yield from _parts({f.name: getattr(value, f.name) for f in fields(value)}, depth, inside)
    elif isinstance(value, set | frozenset):
        yield repr(sorted(map(repr, value))).encode()
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _parts(entry, depth, inside)
    elif isinstance(value, CodeType):
        yield value.co_code
        yield from _parts((value.co_names, value.co_consts), depth, inside)
    elif isinstance(value, partial):
        yield from _parts((value.func, value.args, value.keywords), depth, inside)
    elif isinstance(value, FunctionType):
        value = unwrap(value)
        cells = (cell.cell_contents for cell in value.__closure__ or ())
        plain = [cell for cell in cells if isinstance(cell, (*_PLAIN, Tensor, nn.Module))]
        yield f"{value.__module__}.{value.__qualname__}".encode()
        yield from _parts((value.__code__, value.__defaults__, plain), depth, inside)
    elif isinstance(value, MethodType):
        yield from _parts((value.__func__, value.__self__), depth, inside)
    elif hasattr(value, "tobytes"):  # of NumPy
        yield f"{value.shape}{value.dtype}".encode() + value.tobytes()
    else:
        for name, entry in sorted(_attributes(value).items()):
            yield f"{name}=".encode()
            yield from _parts(entry, depth + 1, inside)


def _attributes(value: object) -> dict[str, object]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    names = [*getattr(value, "__dict__", ()), *slots]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a JSON value by dotted name, as text."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _flat(entry, f"{name}[{index}]")
    else:
        yield name, repr(value)


def _read(file: Path) -> Fingerprint:
    try:
        stored = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ResumeMismatch(
            f"{file} is damaged ({error}); delete it, and the results are compared one by one"
        ) from error
    if not isinstance(stored, dict):
        raise ResumeMismatch(f"{file} holds no settings; choose another folder")
    return stored


def _create(file: Path, wanted: Fingerprint) -> bool:
    """Write the record whole, and return whether this process was the first."""
    lost = False

    def write(new: Path) -> None:
        nonlocal lost
        new.write_text(json.dumps(wanted, indent=2) + "\n", "utf-8")
        try:
            os.link(new, file)  # unlike renaming it fails where a file is
        except OSError:
            lost = file.exists()  # else the file system has no links, and renaming has to do
            if lost:
                raise

    with _one_thread:  # of a process, whose threads may write under one temporary name
        if file.exists():
            return False
        try:
            write_atomically(file, write)
        except Exception:
            if not lost:
                raise
    return not lost
