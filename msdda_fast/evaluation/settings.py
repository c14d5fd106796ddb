# SPDX-License-Identifier: Apache-2.0
"""The fingerprints of a comparison's results, and JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdda_fast.files import write_atomically
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.pipelines.identity import model_identity
from msdda_fast.resume import file_digest, named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from msdda_fast.evaluation.runs import Comparison, Entry
    from msdda_fast.methods.method import Pipeline

__all__ = ["comparison_identity", "shard_identity", "write_json"]


def comparison_identity(pipe: Pipeline, comparison: Comparison) -> dict[str, Any]:
    """Return what all shards of a comparison depend on, objectives' own rewards included."""
    return {
        "num_inference_steps": comparison.num_inference_steps,
        "guidance_scale": comparison.guidance_scale,
        "rewards": {n: named(r) for n, r in comparison.rewards.items() if n in pipe.objectives},
        "prompts": list(comparison.prompts),
        **model_identity(pipe),
    }


def shard_identity(
    common: Mapping[str, Any], comparison: Comparison, entry: Entry, seed: int
) -> dict[str, Any]:
    """Return what the images of one shard depend on; scores have fingerprints of their own.

    Args:
        common: `comparison_identity` of the comparison.
        comparison, entry, seed: The shard.
    """
    guiding = [name for name in entry.weights if name in comparison.rewards]
    return {
        **common,
        "method": repr(entry.method),
        "weights": dict(entry.weights),
        "guided_by": guiding if entry.method.needs_rewards else [],
        "adapters": _adapters(entry),
        "seed": seed,
    }


def _adapters(entry: Entry) -> dict[str, str]:
    """Return digests of the adapters that a method loads itself, by preference."""
    if not isinstance(entry.method, MORLOracle):
        return {}
    paths = {f"{w!r}": Path(path) for w, path in entry.method.adapters.items()}
    return {w: file_digest(path) if path.exists() else str(path) for w, path in paths.items()}


def write_json(file: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(file, lambda partial: partial.write_text(text, "utf-8"))
