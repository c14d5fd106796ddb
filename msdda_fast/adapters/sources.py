# SPDX-License-Identifier: Apache-2.0
"""Resolves a name: a shipped model, a local path, or a repository on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from msdda_fast import assets
from msdda_fast.lora.adapter import DEFAULT_WEIGHT_NAME, find_adapter_file
from msdda_fast.objective import Objective

__all__ = ["adapter_files", "fetch", "hub_options", "locate", "model_file"]

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
#: Options of diffusers' `from_pretrained` that say how to reach the hub, not what to load.
_HUB_OPTIONS = ("cache_dir", "token", "local_files_only", "force_download")


def locate(source: str | Path) -> Path | str:
    """Return the local path that `source` stands for, or `source` itself when it is a hub id.

    Raises:
        FileNotFoundError: The path does not exist, and is not a hub id such as `owner/name`: it is
            a file, by its suffix, or no such name.
    """
    if assets.is_shipped(str(source)):
        return assets.resolve(str(source))
    path = Path(source).expanduser()
    if path.exists():
        return path
    is_file = path.suffix == ".safetensors"  # and no name of a repository
    if isinstance(source, Path) or is_file or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"no file or folder at {source}")
    return source


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the options of `from_pretrained` that every download shares."""
    return {key: options[key] for key in _HUB_OPTIONS if key in options}


def fetch(
    repo: str, file: str, options: Mapping[str, Any], *, required: bool = True
) -> Path | None:
    """Return the local copy of one file of a hub repository; None if the repository lacks it.

    With `required=False`, also None if the hub cannot be reached and the file is not in the cache.

    Raises:
        FileNotFoundError: The repository does not exist, or a required file cannot be reached.
    """
    try:
        return Path(hf_hub_download(repo, file, **options))
    except EntryNotFoundError as error:
        if required and isinstance(error, LocalEntryNotFoundError):
            raise _unreachable(repo, error) from error
        return None
    except Exception as error:  # the transport's own errors differ between hub client versions
        raise _unreachable(repo, error) from error


def model_file(
    place: Path | str, name: str, options: Mapping[str, Any], *, required: bool = True
) -> Path | None:
    """Return a file of a model's folder or hub repository; None if there is none.

    Args:
        place: As `locate` returned it.
        name: Relative to it.
        options: Of `from_pretrained`.
        required: As in `fetch`.
    """
    if isinstance(place, Path):
        return place / name if (place / name).is_file() else None
    revision = {"revision": options["revision"]} if "revision" in options else {}
    return fetch(place, name, {**hub_options(options), **revision}, required=required)


def adapter_files(objective: Objective, options: Mapping[str, Any]) -> list[Path]:
    """Return the local safetensors file of each of an objective's adapters, downloaded if needed.

    A `weight_name` or `subfolder` of the objective is that of every source.

    Raises:
        FileNotFoundError: There is no such file, folder or repository.
        ValueError: The file is not safetensors, or several files match.
    """
    return [_adapter_file(source, objective, options) for source in objective.sources]


def _adapter_file(source: str | Path, objective: Objective, options: Mapping[str, Any]) -> Path:
    place = locate(source)
    if isinstance(place, Path):
        return find_adapter_file(
            place, weight_name=objective.weight_name, subfolder=objective.subfolder
        )
    folder = PurePosixPath(objective.subfolder or ".")
    name = str(folder / (objective.weight_name or _choose(place, folder)))
    file = fetch(place, name, options)
    if file is None:
        raise FileNotFoundError(f"hub repository {place!r} has no file {name!r}")
    # where peft keeps alpha, beside the weights
    beside = PurePosixPath(name).with_name("adapter_config.json")
    fetch(place, str(beside), options, required=False)
    return find_adapter_file(file)


def _choose(repo: str, folder: PurePosixPath) -> str:
    try:
        files = [PurePosixPath(file) for file in HfApi().list_repo_files(repo)]
    except Exception as error:  # as in fetch
        raise _unreachable(repo, error) from error
    names = [f.name for f in files if f.parent == folder and f.suffix == ".safetensors"]
    if DEFAULT_WEIGHT_NAME in names:
        return DEFAULT_WEIGHT_NAME
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise ValueError(
            f"hub repository {repo!r}: choose a .safetensors file with weight_name=; found {found}"
        )
    return names[0]


def _unreachable(repo: str, error: Exception) -> FileNotFoundError:
    reason = str(error).strip().splitlines()
    return FileNotFoundError(
        f"{repo!r} is neither a local file or folder nor a hub repository that can be reached "
        f"({type(error).__name__}: {reason[0] if reason else ''})"
    )
