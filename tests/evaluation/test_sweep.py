# SPDX-License-Identifier: Apache-2.0
"""A sweep draws every cell once, whatever interrupts it, and never mixes settings."""

import contextlib
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import msdda_fast as mf
from msdda_fast.errors import ResumeMismatch
from msdda_fast.evaluation import cells
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


SMALLEST = sweep(prompts=PROMPTS[:1], weights=(1.0,))


def contents(folder) -> dict:
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


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


def test_objectives_go_as_far_from_the_base_as_asked(pipe, tmp_path):
    asked = replace(SMALLEST, weights=(0.5,), strength={"cool": 2.0})
    report = read(run_sweep(pipe, asked, tmp_path / "strong"))
    given = dict(weights=(0.5, 0.5), seed=0, num_inference_steps=2, guidance_scale=2.0)
    expected = pipe(PROMPTS[:1], strength={"warm": 1.0, "cool": 2.0}, **given).images[0]
    with Image.open(tmp_path / "strong" / report["cells"][1]["file"]) as image:
        assert image.tobytes() == expected.tobytes()
        assert image.tobytes() != pipe(PROMPTS[:1], **given).images[0].tobytes()
    plain = read(run_sweep(pipe, replace(asked, strength=None), tmp_path / "plain"))
    base = [folder / report["cells"][0]["file"] for folder in tmp_path.iterdir()]
    assert np.array_equal(*(np.asarray(Image.open(file)) for file in base))
    assert plain["cells"][0] == report["cells"][0] != plain["cells"][1]


def test_a_strength_of_one_continues_a_sweep_without(pipe, finished, tmp_path, calls):
    shutil.copytree(finished, tmp_path / "copy")
    for strength in (1.0, {"cool": 1.0}):
        run_sweep(pipe, replace(SMALLEST, strength=strength), tmp_path / "copy")
    assert calls == []


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


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_sweep(tiny.shared(), SMALLEST, folder)
    return folder


@pytest.mark.parametrize("record", [True, False], ids=["", "record-lost"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps was 2, is 3"),
        ({"guidance_scale": 3.0}, r"guidance_scale was 2\.0, is 3\.0"),
        ({"toward": "warm"}, "toward was 'cool', is 'warm'"),
        ({"strength": {"cool": 2}}, r"strength\.warm was absent, is 1\.0; strength\.cool was"),
    ],
)
def test_other_settings_are_refused_and_named(
    pipe, finished, tmp_path, calls, change, message, record
):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    if not record:
        (folder / "settings.json").unlink()
    before = contents(folder)
    with pytest.raises(ResumeMismatch, match=message):
        run_sweep(pipe, replace(SMALLEST, **change), folder)
    assert calls == [] and contents(folder) == before


def test_other_objectives_are_refused_and_named(pipe, finished, tmp_path, calls):
    shutil.copytree(finished, tmp_path / "copy")
    objectives = {"warm": mf.Objective(), "cool": mf.Objective(eta=0.5)}
    with pytest.raises(ResumeMismatch, match=r"objectives\.cool\.eta was 0\.8, is 0\.5"):
        run_sweep(
            mf.MSDDAPipeline.from_pipe(pipe, objectives=objectives), SMALLEST, tmp_path / "copy"
        )
    assert calls == []


def test_a_lost_record_is_made_again_from_the_cells(pipe, finished, tmp_path, calls):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "settings.json").unlink()
    run_sweep(pipe, replace(SMALLEST, batch_size=1), folder)
    assert calls == [] and contents(folder) == contents(finished)


def test_a_cell_under_the_name_of_another_is_refused(pipe, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    names = [Cell(PROMPTS[0], 1.0, seed).file_name for seed in (0, 1)]
    (folder / "cells" / names[0]).rename(folder / "cells" / names[1])
    with pytest.raises(ResumeMismatch, match=f"{names[1]} was made otherwise: seed was 0, is 1"):
        run_sweep(pipe, replace(SMALLEST, seeds=(1,)), folder)
    Image.new("RGB", (32, 32)).save(folder / "cells" / names[1])
    with pytest.raises(ResumeMismatch, match=f"{names[1]} has no fingerprint"):
        run_sweep(pipe, replace(SMALLEST, seeds=(1,)), folder)


def test_of_two_sweeps_that_start_together_with_other_settings_one_loses(pipe, tmp_path):
    """The other starts, and finishes, after this one has found the folder empty."""
    slow = replace(SMALLEST, num_inference_steps=3)

    def meanwhile(finished, total):
        if finished == 0:
            run_sweep(pipe, SMALLEST, tmp_path)

    with pytest.raises(ResumeMismatch, match="num_inference_steps was 2, is 3"):
        run_sweep(pipe, slow, tmp_path, progress=meanwhile)
    run_sweep(pipe, SMALLEST, tmp_path, progress=lambda done, total: done == total or pytest.fail())


def test_a_sweep_that_never_drew_leaves_the_folder_to_others(pipe, tmp_path):
    def stop(finished, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(pipe, replace(SMALLEST, num_inference_steps=3), tmp_path / "new", progress=stop)
    run_sweep(pipe, SMALLEST, tmp_path / "new")


def test_a_batch_that_was_cut_short_is_drawn_whole_again_in_the_same_company(pipe, tmp_path):
    drawn, asked = sweep(seeds=(0, 1), weights=(0.5,), batch_size=3), []

    def draw(batches):
        asked.append(batches)
        yield from ((batch, [Image.new("RGB", (8, 8))] * len(batch)) for batch in batches)

    run_sweep(pipe, drawn, tmp_path, elsewhere=draw)
    batches = asked.pop()
    assert [len(batch) for batch in batches] == [3, 1, 3, 1]
    for cell in (batches[0][1], batches[3][0]):
        (tmp_path / "cells" / cell.file_name).unlink()
    run_sweep(pipe, drawn, tmp_path, elsewhere=draw)
    assert asked == [[batches[0], batches[3]]]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_killed_at_any_file_and_resumed_it_ends_with_the_bits_of_a_straight_run(
    pipe, tmp_path, monkeypatch, seed
):
    drawn = sweep(seeds=(0, 1), weights=(0.5,), batch_size=3)
    run_sweep(pipe, drawn, tmp_path / "straight")
    pick, killed, real = random.Random(seed), 0, cells.write_atomically
    for _ in range(3):
        left = iter([None] * pick.randrange(1, 4))

        def dies(path, write, left=left):
            if next(left, 0) == 0:
                raise KeyboardInterrupt
            real(path, write)

        with monkeypatch.context() as patch:
            patch.setattr(cells, "write_atomically", dies)
            with contextlib.suppress(KeyboardInterrupt):
                run_sweep(pipe, drawn, tmp_path / "killed")
                killed -= 1
            killed += 1
    assert killed
    run_sweep(pipe, drawn, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(prompts=()), ValueError, r"prompts.*\[\]"),
        (dict(prompts=("a", "a")), ValueError, "prompts.*distinct"),
        (dict(weights=(1.5,)), mf.InvalidWeights, r"\[0, 1\].*1\.5"),
        (dict(weights=(float("nan"),)), mf.InvalidWeights, "nan"),
        (dict(seeds=()), ValueError, "seeds"),
        (dict(batch_size=0), ValueError, "batch_size.*0"),
        (dict(strength={"hot": 2.0}), mf.UnknownObjective, "strength: unknown objective 'hot'"),
        (dict(strength=-1.0), mf.InvalidWeights, "strength must be finite and not negative"),
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
