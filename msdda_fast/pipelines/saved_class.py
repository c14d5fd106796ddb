# SPDX-License-Identifier: Apache-2.0
"""The class of a saved pipeline, before anything of it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from msdda_fast.adapters.sources import locate, model_file
from msdda_fast.files import read_json
from msdda_fast.pipelines.loading import STABLE_DIFFUSION
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["saved_class"]


def saved_class(model: str | Path) -> Any:  # noqa: ANN401 - a class
    """Return the class that `MSDDAPipeline.from_pretrained` will load: ours, or a stock one.

    Args:
        model: A shipped model, a local folder, or a hub id, of which the index is fetched.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: Its index is damaged, or names a class that this diffusers does not have.
    """
    place = locate(model)
    index = model_file(place, "model_index.json", {})
    if index is None:
        raise FileNotFoundError(f"{place} is not a diffusers pipeline: it has no model_index.json")
    name = read_json(index, "a diffusers pipeline's index").get("_class_name")
    if name in STABLE_DIFFUSION:
        return MSDDAPipeline
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise ValueError(
            f"{index} names the class {name!r:.80}, which diffusers {diffusers.__version__} does "
            "not have"
        )
    return found
