# SPDX-License-Identifier: Apache-2.0
"""Finish the folder of a model that ships: files that every reader takes, adapters, manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msdda_fast.files import write_atomically
from msdda_fast.pipelines.accelerator import ACCELERATOR_FOLDER, MANIFEST, Accelerator
from msdda_fast.pipelines.manifest import OBJECTIVES_FILE
from msdda_fast.pipelines.saving import load_in_float32
from msdda_fast.training.adapter import WEIGHT_NAME


def finish_pipeline(folder: Path) -> None:
    """Let old and new readers load a folder of `save_pretrained` in float32, without warnings."""
    for tokenizer in folder.glob("tokenizer*"):
        _write_slow_tokenizer(tokenizer)
    _drop_entries(folder / "vae" / "config.json")
    load_in_float32(folder)


def add_adapters(folder: Path, adapters: Mapping[str, Path], objectives: Mapping[str, Any]) -> None:
    """Copy LoRA folders into a model's, by name, and write `objectives.json`."""
    for name, source in adapters.items():
        (folder / name).mkdir(exist_ok=True)
        shutil.copy2(source / WEIGHT_NAME, folder / name)
    _write_json(folder / OBJECTIVES_FILE, objectives)


def add_logs(folder: Path, logs: Mapping[str, Path]) -> None:
    """Copy training logs into a model's folder, as `training/NAME.jsonl`."""
    (folder / "training").mkdir(exist_ok=True)
    for name, source in logs.items():
        shutil.copy2(source, folder / "training" / f"{name}.jsonl")


def write_manifest(
    folder: Path, model: str, objectives: Mapping[str, Any], more_objectives: Mapping[str, Any]
) -> None:
    """Write `manifest.json`: the adapters and noise levels of the model, and a hash of each file.

    Args:
        folder: Of the model, complete.
        model: Its id.
        objectives: As in `objectives.json`: those that the model loads by default.
        more_objectives: Those that are there to be asked for.
    """
    files = {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".json") and path.name != MANIFEST
    }
    manifest = {
        "id": model,
        "license": "Apache-2.0",
        "notices": "THIRD_PARTY_NOTICES",
        "objectives": objectives,
        "more_objectives": more_objectives,
        "sha256": files,
    }
    _write_json(folder / MANIFEST, manifest)


def add_accelerator(folder: Path, source: Path, log: Path, accelerator: Accelerator) -> None:
    """Copy an accelerator and its log into a finished model, whose manifest then has its entry.

    Args:
        folder: Of the model.
        source: LoRA folder.
        log: Of its training.
        accelerator: How it is sampled; its place becomes `accelerator/` in the model.
    """
    target = folder / ACCELERATOR_FOLDER / WEIGHT_NAME
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source / WEIGHT_NAME, target)
    add_logs(folder, {ACCELERATOR_FOLDER: log})
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    files = {**manifest.pop("sha256"), str(target.relative_to(folder)): _sha256(target)}
    manifest["accelerator"] = accelerator.to_json(ACCELERATOR_FOLDER)
    _write_json(path, {**manifest, "sha256": dict(sorted(files.items()))})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


def _drop_entries(config: Path) -> None:
    """Drop what AutoencoderTiny derives itself and warns about, and the path it was read from."""
    entries = json.loads(config.read_text())
    for name in ("block_out_channels", "_name_or_path"):
        entries.pop(name, None)
    config.write_text(json.dumps(entries, indent=2) + "\n")


def _write_slow_tokenizer(folder: Path) -> None:
    """Add `vocab.json` and `merges.txt`, which transformers 4 and other tools read."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
