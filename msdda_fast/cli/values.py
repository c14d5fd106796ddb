# SPDX-License-Identifier: Apache-2.0
"""Parse the values of command line options."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "distinct",
    "image_file",
    "numbers",
    "pair",
    "pairs",
    "part",
    "preference",
    "prompts",
    "seed",
    "seeds",
    "strength",
    "weights",
]

#: Most seeds that one option may name: more are a slip, such as 0-31 without its hyphen.
MOST_SEEDS = 100_000
_NUMBER = r"\d+(?:\.\d+)?"


def pair(
    text: str,
    option: str,
    kind: Callable[[str], Any],
    form: str = "NAME=VALUE, such as consistency=0.7",
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
        if name.strip() and equals and value:
            return name.strip(), kind(value)
    except ValueError:
        pass
    raise ValueError(f"{option} {text!r} must be {form}")


def strength(texts: list[str]) -> float | dict[str, float] | None:
    """Read --strength: one number for all objectives, or NAME=NUMBER for each of some.

    Raises:
        ValueError: A text has neither form, or a name is given twice.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        try:
            return float(texts[0])
        except ValueError:
            raise ValueError(f"--strength {texts[0]!r} must be a number or NAME=NUMBER") from None
    form = "a number, or NAME=NUMBER once for each of some objectives"
    return pairs((pair(text, "--strength", float, form) for text in texts), "--strength") or None


def weights(texts: list[str]) -> dict[Any, Any] | None:
    """Read --weight: NAME=VALUE for each objective, or FIRST-LAST:NAME=VALUE in each range.

    Returns: By name, or by range of timesteps and name; None: none are given.

    Raises:
        ValueError: A text has neither form, some have a range and others none, or a name is given
            twice.
    """
    found: dict[Any, list[tuple[str, float]]] = {}
    for text in texts:
        ranged = re.fullmatch(rf"({_NUMBER})-({_NUMBER}):(.+)", text, re.DOTALL)
        steps = None if ranged is None else (float(ranged[1]), float(ranged[2]))
        chosen = pair(text if ranged is None else ranged[3], "--weight", float)
        found.setdefault(steps, []).append(chosen)
    if None in found and len(found) > 1:
        raise ValueError(
            "--weight: give a range of timesteps, such as 500-999:NAME=VALUE, with every weight or "
            "with none"
        )
    by_range = {steps: pairs(chosen, "--weight") for steps, chosen in found.items()}
    return by_range.get(None, by_range) or None


def pairs(found: Iterable[tuple[Any, Any]], option: str) -> dict[Any, Any]:
    """Collect the (name, value) of an option that is given once for each name.

    Raises:
        ValueError: A name is given twice.
    """
    values: dict[Any, Any] = {}
    for name, value in found:
        if name in values:
            raise ValueError(f"{option} names {name!r} twice; give it once")
        values[name] = value
    return values


def distinct(values: Iterable[str], option: str) -> list[str]:
    """Return the values of an option that may be repeated, but not with the same value.

    Raises:
        ValueError: A value is given twice.
    """
    return list(pairs(((value, None) for value in values), option))


def numbers(text: str, option: str, kind: type) -> list[Any]:
    """Read comma-separated numbers.

    Raises:
        ValueError: An item is not of this kind.
    """
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be comma-separated numbers") from None


def preference(value: str | float, otherwise: str) -> float:
    """Return a preference weight w.

    Raises:
        ValueError: It is no number in [0, 1]; with the message `otherwise`.
    """
    try:
        if 0 <= (w := float(value)) <= 1:
            return w
    except ValueError:
        pass
    raise ValueError(otherwise)


def prompts(file: Path) -> list[str]:
    """Read a UTF-8 text file with one prompt per line; blank lines are ignored.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: It is not text, has no prompts, or repeats one; the message names both lines.
    """
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8: {error}") from None
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        prompt = line.strip()
        if prompt in seen:
            raise ValueError(f"{file} line {number} repeats line {seen[prompt]}: {prompt!r}")
        if prompt:
            seen[prompt] = number
    if not seen:
        raise ValueError(f"{file} has no prompts")
    return list(seen)


def seed(value: int, option: str = "--seed", count: int = 1) -> int:
    """Return the first of `count` consecutive seeds.

    Raises:
        ValueError: One of them has more than 64 bits.
    """
    if not -(2**63) <= value <= 2**64 - count:
        raise ValueError(f"{option} {value}: seeds have 64 bits, from -2^63 to 2^64 - 1")
    return value


def seeds(text: str, option: str) -> list[int]:
    """Read comma-separated integers and ranges of integers, such as 0-31 or 0,1,5.

    Raises:
        ValueError: An item is neither, a range is empty, a seed is named twice or has more than 64
            bits, or there are more than `MOST_SEEDS`.
    """
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        first, last = (int(end or match[1]) for end in match.groups()) if match else (1, 0)
        if first > last:
            raise ValueError(f"{option} {text!r} must be numbers or ranges, such as 0-31 or 0,1,5")
        seed(first, option)
        seed(last, option)
        if len(found) + last - first >= MOST_SEEDS:
            raise ValueError(f"{option} {text!r} names more than {MOST_SEEDS} seeds")
        found += range(first, last + 1)
    return list(pairs(((number, None) for number in found), option))


def part(text: str) -> tuple[int, int]:
    """Read I/N with 0 <= I < N.

    Raises:
        ValueError: The text does not have this form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"--part {text!r} must be I/N with I = 0 to N - 1, such as 0/2")
    return int(match[1]), int(match[2])


def image_file(text: str, option: str) -> tuple[Path, str]:
    """Return a path and Pillow's name of the image format that its suffix stands for.

    Raises:
        ValueError: The path is a folder, or Pillow writes no images with this suffix.
    """
    from PIL import Image

    path = Path(text)
    if not text or text.endswith("/") or path.is_dir():
        raise ValueError(f"{option} {text!r} is a folder; name a file in it: {path / 'out.png'}")
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError):
        raise ValueError(
            f"{option} {text!r} must end in the suffix of an image format, such as .png or .jpg"
        ) from None
    return path, kind
