# SPDX-License-Identifier: Apache-2.0
"""Parse the values of command line options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdda_fast.objective import Objective

__all__ = ["numbers", "objective", "pair", "part", "prompts", "seeds"]


def objective(text: str) -> tuple[str, Objective]:
    """Read NAME=PATH[:ETA]; a colon without a number after it belongs to the path.

    A path of more than two parts that does not exist here is a folder inside a hub repository or
    the shipped model: owner/name/folder.

    Raises:
        ValueError: The text does not have this form.
        InvalidSchedule: eta lies outside [0, 1].
    """
    from msdda_fast.objective import Objective

    form = "NAME=PATH or NAME=PATH:ETA, such as aesthetic=my/lora:0.8"
    name, source = pair(text, "--objective", str, form)
    match = re.fullmatch(r"(.+?)(?::(-?[0-9.]+))?", source)
    assert match is not None  # `pair` returns no empty value
    path, eta = match.groups("1")
    if path == "base":
        return name, Objective.base(eta=float(eta))
    parts = path.split("/")
    if len(parts) > 2 and all(parts) and parts[0][0] not in ".~" and not Path(path).exists():
        repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
        return name, Objective(repository, subfolder=folder, eta=float(eta))
    return name, Objective(path, eta=float(eta))


def pair(
    text: str, option: str, kind: type, form: str = "NAME=VALUE, such as consistency=0.7"
) -> tuple[str, Any]:
    """Read NAME=VALUE.

    Args:
        text: The value of the option.
        option: Its name, for the message.
        kind: Type of the value.
        form: What the text must look like, for the message.

    Raises:
        ValueError: The text does not have this form, or its value is not of this kind.
    """
    name, equals, value = text.partition("=")
    try:
        if name and equals and value:
            return name.strip(), kind(value)
    except ValueError:
        pass
    raise ValueError(f"{option} {text!r} must be {form}")


def numbers(text: str, option: str, kind: type) -> list[Any]:
    """Read comma-separated numbers.

    Raises:
        ValueError: An item is not of this kind.
    """
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be comma-separated numbers") from None


def prompts(file: Path) -> list[str]:
    """Read a text file with one prompt per line; blank lines are ignored.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It has no prompts, or repeats one; the message names both lines.
    """
    seen: dict[str, int] = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        text = line.strip()
        if text in seen:
            raise ValueError(f"{file} line {number} repeats line {seen[text]}: {text!r}")
        if text:
            seen[text] = number
    if not seen:
        raise ValueError(f"{file} has no prompts")
    return list(seen)


def seeds(text: str, option: str) -> list[int]:
    """Read comma-separated integers and ranges of integers, such as 0-31 or 0,1,5.

    Raises:
        ValueError: An item is neither, or a range is empty.
    """
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        first, last = (int(end or match[1]) for end in match.groups()) if match else (1, 0)
        if first > last:
            raise ValueError(f"{option} {text!r} must be numbers or ranges, such as 0-31 or 0,1,5")
        found += range(first, last + 1)
    return found


def part(text: str) -> tuple[int, int]:
    """Read I/N with 0 <= I < N.

    Raises:
        ValueError: The text does not have this form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"--part {text!r} must be I/N with I = 0 to N - 1, such as 0/2")
    return int(match[1]), int(match[2])
