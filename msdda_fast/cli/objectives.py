# SPDX-License-Identifier: Apache-2.0
"""Parse --objective: NAME=PATH[ + PATH][:LEVEL][@FIRST-LAST]."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdda_fast.cli.values import pair, pairs

if TYPE_CHECKING:
    from msdda_fast.levels import FlowNoise
    from msdda_fast.objective import Objective

__all__ = ["FORM", "objective", "objectives"]

FORM = "NAME=PATH, NAME=PATH:LEVEL or NAME=PATH:LEVEL@FIRST-LAST, such as aesthetic=my/lora:0.8"
_NUMBER = r"\d+(?:\.\d+)?"
_LEVEL = r"(?:([a-z-]+)=([^:/@]*)|(-?[0-9.]+))"
_TEXT = re.compile(rf"(.+?)(?::{_LEVEL})?(?:@({_NUMBER})-({_NUMBER}))?", re.DOTALL)
#: Adapters of one objective; paths have no spaces around a plus.
_TOGETHER = " + "


def objectives(texts: list[str]) -> dict[str, Objective] | None:
    """Read --objective, given once for each name; None: not given.

    Raises:
        ValueError, InvalidSchedule: As `objective`; or a name is given twice.
    """
    return pairs(map(objective, texts), "--objective") or None


def objective(text: str) -> tuple[str, Objective]:
    """Read NAME=PATH[ + PATH][:LEVEL][@FIRST-LAST].

    A level is eta, or noise of flow models: flow-sde=0.7, dance=0.3, cps=0.8, flow-ddim=0.5. FIRST
    and LAST are the timesteps in which the objective acts. A colon without a level after it belongs
    to the path. A path of more than two parts that does not exist here is a folder inside a hub
    repository or the shipped model: owner/name/folder.

    Raises:
        ValueError: The text does not have this form.
        InvalidSchedule: The level or the timesteps are outside their range.
    """
    from msdda_fast.objective import Objective

    name, value = pair(text, "--objective", str, FORM)
    match = _TEXT.fullmatch(value)
    assert match is not None  # `pair` returns no empty value
    path, kind, of_kind, plain, first, last = match.groups()
    number = plain if kind is None else of_kind
    given: dict[str, Any] = {}
    if number is not None:
        try:
            level = float(number)
        except ValueError:
            raise ValueError(f"--objective {text!r} must be {FORM}") from None
        given |= {"eta": level} if kind is None else {"noise": _noise(kind, level)}
    if first is not None:
        given["timesteps"] = (float(first), float(last))
    if path == "base":
        return name, Objective(**given)
    if _TOGETHER in path and not Path(path).exists():
        return name, Objective([_alone(part) for part in path.split(_TOGETHER)], **given)
    source, folder = _place(path)
    return name, Objective(source, subfolder=folder, **given)


def _noise(kind: str, level: float) -> FlowNoise:
    from msdda_fast.levels import CPS, DanceSDE, FlowDDIM, FlowSDE

    kinds: dict[str, type[FlowNoise]] = {
        "flow-sde": FlowSDE,
        "dance": DanceSDE,
        "cps": CPS,
        "flow-ddim": FlowDDIM,
    }
    if kind not in kinds:
        raise ValueError(
            f"--objective: noise {kind!r} is none of {', '.join(kinds)}; plain numbers are eta"
        )
    return kinds[kind](level)


def _place(path: str) -> tuple[str, str | None]:
    """Return a source, and the folder inside it."""
    parts = path.split("/")
    if len(parts) > 2 and all(parts) and parts[0][0] not in ".~" and not Path(path).exists():
        return "/".join(parts[:2]), "/".join(parts[2:])
    return path, None


def _alone(path: str) -> str:
    """Return one of several sources, none of which may be a folder inside a repository."""
    from msdda_fast import assets

    source, folder = _place(path.strip())
    if source == "base":
        raise ValueError("--objective: base is the model without adapters, and joins none")
    if folder is None:
        return source
    if assets.is_shipped(source):
        return str(assets.resolve(source) / folder)
    raise ValueError(
        f"--objective: {path.strip()!r} is a folder inside a repository, and adapters that act "
        f"together are files, local folders or repositories of their own"
    )
