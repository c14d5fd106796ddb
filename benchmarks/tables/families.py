# SPDX-License-Identifier: Apache-2.0
"""Tables of the families: memory of the weights, and what their pipelines take."""

import json

from benchmarks.tables import results

_GB = 2 / 1e9  # of parameters in half precision


def memory_table() -> str:
    """One row per model: the denoiser, one adapter, and what two objectives hold."""
    found = json.loads((results.RESULTS / "families.json").read_text())
    rows = []
    for name, model in found["models"].items():
        base, adapter = model["denoiser"], model["adapter"]
        together = base + 2 * 2 * adapter  # as loaded, and stacked
        rows.append(
            f"| {name} | {base / 1e9:.2f} | {base * _GB:.1f} | {adapter * _GB:.2f} "
            f"| {together * _GB:.1f} | {2 * (base + adapter) * _GB:.1f} |"
        )
    head = (
        f"| model | parameters of the denoiser, 10⁹ | its weights, GB | one adapter of rank "
        f"{found['rank']} on all attention, GB | M = 2 here, GB | two merged models, GB |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    note = (
        "Counted from configs, in half precision, and not measured. Text encoders, autoencoder and "
        "activations come on top; activations are those of M times as many rows."
    )
    return "\n".join([head, *rows, "", note])


def takes_table() -> str:
    """One row per pipeline: its guidance, negative prompts, and the classes that edit images."""
    found = json.loads((results.RESULTS / "families.json").read_text())
    rows = []
    for name, pipeline in found["pipelines"].items():
        tasks = (pipeline[task] for task in ("image to image", "inpainting"))
        cells = [f"`{name}`", f"`{pipeline['guidance']}`"]
        cells += ["yes" if pipeline["negative_prompt"] else "no"]
        cells += [f"`{task}`" if task else "no class in diffusers" for task in tasks]
        rows.append("| " + " | ".join(cells) + " |")
    head = (
        "| pipeline | guidance | negative prompt | image to image | inpainting |\n"
        "|---|---|---|---|---|"
    )
    return "\n".join([head, *rows, "", f"Read off the calls of diffusers {found['diffusers']}."])
