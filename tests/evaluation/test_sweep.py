# SPDX-License-Identifier: Apache-2.0
"""A sweep draws every cell once, whatever interrupts it, and never mixes settings."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import msdda_fast as mf
from msdda_fast.errors import ResumeMismatch
from msdda_fast.evaluation.cells import Cell
from msdda_fast.evaluation.sweep import Sweep, run_sweep
from msdda_fast.rewards.aesthetic import Aesthetic

PROMPTS = ("a red dog", "a blue cat")


def sweep(**changes) -> Sweep:
    options = dict(
        prompts=PROMPTS,
        weights=(0.0, 0.5, 1.0),
        toward="cool",
        num_inference_steps=2,
        guidance_scale=2.0,
        rewards=("aesthetic",),
    )
    return Sweep(**{**options, **changes})


def read(result) -> dict:
    return json.loads(result.rewards.read_text())


def test_every_cell_is_its_preference_seed_and_prompt(pipe, tmp_path, calls):
    result = run_sweep(pipe, sweep(seeds=(3, 4)), tmp_path)
    # the base column and both ends run one network a step, the middle two
    assert calls == [()] * 2 + [("warm",)] * 2 + [("warm",), ("cool",)] * 2 + [("cool",)] * 2
    report = read(result)
    assert report["columns"] == [None, 0.0, 0.5, 1.0]
    assert len(report["cells"]) == 4 * 2 * 2
    for cell in report["cells"]:
        if cell["weight"] is None:
            continue
        weights = {"cool": cell["weight"], "warm": 1 - cell["weight"]}
        image = pipe(
            cell["prompt"],
            weights=weights,
            seed=cell["seed"],
            num_inference_steps=2,
            guidance_scale=2.0,
        ).images[0]
        stored = np.asarray(Image.open(tmp_path / cell["file"])).astype(int)
        # batches of other sizes round differently: one level of 255
        assert abs(stored - np.asarray(image)).max() <= 1


def test_rewards_are_of_the_stored_images(pipe, tmp_path):
    result = run_sweep(pipe, sweep(), tmp_path)
    report = read(result)
    values = []
    for cell in report["cells"]:
        pixels = np.asarray(Image.open(tmp_path / cell["file"]))
        image = torch.tensor(pixels).permute(2, 0, 1)[None] / 255
        expected = Aesthetic()(image, [cell["prompt"]]).item()
        assert cell["rewards"]["aesthetic"] == pytest.approx(expected)
        values.append(expected)
    means = [sum(values[i : i + 2]) / 2 for i in range(0, 8, 2)]
    assert result.means["aesthetic"] == pytest.approx(means)
    assert report["means"]["aesthetic"] == pytest.approx(means)


def test_the_grid_has_a_row_per_prompt_and_a_column_per_preference(pipe, tmp_path):
    result = run_sweep(pipe, sweep(), tmp_path)
    narrow = run_sweep(pipe, sweep(prompts=PROMPTS[:1], weights=(0.5,)), tmp_path / "narrow")
    with Image.open(result.grid) as grid:
        wide = grid.size
    with Image.open(narrow.grid) as grid:
        small = grid.size
    assert wide[0] - small[0] == 2 * (wide[1] - small[1])  # square cells: two columns, one row


def test_an_interrupted_sweep_continues_where_it_stopped(pipe, tmp_path, calls):
    class Stop(Exception):
        pass

    def stop_after(finished, total):
        if finished >= 4:
            raise Stop

    with pytest.raises(Stop):
        run_sweep(pipe, sweep(), tmp_path, progress=stop_after)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cells/*.png")}
    assert len(kept) == 4 and not list(tmp_path.rglob("*.partial"))
    calls.clear()
    seen = []
    run_sweep(pipe, sweep(), tmp_path, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(4, 8), (6, 8), (8, 8)]
    assert calls == [("warm",), ("cool",)] * 2 + [("cool",)] * 2
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    calls.clear()
    run_sweep(pipe, sweep(), tmp_path)
    assert calls == []


def test_more_prompts_weights_and_seeds_add_cells(pipe, tmp_path, calls):
    run_sweep(pipe, sweep(prompts=PROMPTS[:1], weights=(1.0,)), tmp_path)
    calls.clear()
    run_sweep(pipe, sweep(prompts=PROMPTS, weights=(1.0,)), tmp_path)
    assert calls == [()] * 2 + [("cool",)] * 2
    assert len(list(tmp_path.glob("cells/*.png"))) == 4


@pytest.mark.sweep(change=1)
@pytest.mark.parametrize(
    "change", [{"num_inference_steps": 3}, {"guidance_scale": 3.0}, {"toward": "warm"}]
)
def test_other_settings_are_refused_and_named(pipe, tmp_path, calls, change):
    run_sweep(pipe, sweep(), tmp_path)
    calls.clear()
    with pytest.raises(ResumeMismatch, match=next(iter(change))):
        run_sweep(pipe, sweep(**change), tmp_path)
    assert calls == []


def test_other_weights_of_the_model_are_refused(tiny, pipe, tmp_path):
    run_sweep(pipe, sweep(), tmp_path)
    changed = tiny.load()
    with torch.no_grad():
        changed.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ResumeMismatch, match=r"model\.unet was"):
        run_sweep(changed, sweep(), tmp_path)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(prompts=()), ValueError, r"prompts.*\[\]"),
        (dict(prompts=("a", "a")), ValueError, "prompts.*distinct"),
        (dict(weights=(1.5,)), mf.InvalidWeights, r"\[0, 1\].*1\.5"),
        (dict(weights=(float("nan"),)), mf.InvalidWeights, "nan"),
        (dict(seeds=()), ValueError, "seeds"),
        (dict(batch_size=0), ValueError, "batch_size.*0"),
        (dict(toward="hot"), mf.UnknownObjective, "'hot'.*warm, cool"),
        (dict(rewards=("beauty",)), ValueError, "'beauty'"),
    ],
)
def test_bad_input(pipe, tmp_path, calls, change, error, message):
    with pytest.raises(error, match=message):
        run_sweep(pipe, sweep(**change), tmp_path)
    assert calls == [] and not list(tmp_path.iterdir())


def test_a_model_without_two_objectives_is_refused(pipe, tmp_path):
    one = mf.MSDDAPipeline.from_pipe(pipe, objectives={"cool": mf.Objective()})
    with pytest.raises(ValueError, match=r"two objectives.*cool"):
        run_sweep(one, sweep(), tmp_path)


def test_file_names_tell_cells_apart():
    cells = [
        Cell(prompt, weight, seed)
        for prompt in ("a dog", "A dog!", "a " + 100 * "x", "a " + 100 * "x" + "y", "狗")
        for weight in (None, 0.0, 0.25, 1e-5)
        for seed in (0, 1)
    ]
    names = {cell.file_name for cell in cells}
    assert len(names) == len(cells)
    assert all(name.isascii() and len(name) < 100 and "/" not in name for name in names)


def test_a_damaged_cell_is_named(pipe, tmp_path):
    run_sweep(pipe, sweep(), tmp_path)
    damaged = next(tmp_path.glob("cells/*.png"))
    damaged.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{damaged.name}.*delete it"):
        run_sweep(pipe, sweep(), tmp_path)
