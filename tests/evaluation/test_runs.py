# SPDX-License-Identifier: Apache-2.0
"""A comparison is drawn shard by shard; what is finished stays, and its scores add up."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msdda_fast.errors import ResumeMismatch
from msdda_fast.evaluation import runs
from msdda_fast.evaluation.runs import Comparison, Entry, collect_scores, run_comparison, strip_of
from msdda_fast.evaluation.scores import merge_scores, read_scores
from msdda_fast.methods.best_of_n import BestOfN
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.sd import SD

PROMPTS = ["a dog", "a cat"]
WEIGHTS = {"warm": 0.3, "cool": 0.7}


class Red:
    name, differentiable = "red", True

    def __init__(self, offset=0.0):
        self._offset = offset

    def __call__(self, images, prompts):
        return (
            self._offset
            + images[:, 0].mean((1, 2))
            + torch.tensor([float(len(p)) for p in prompts])
        )


class Dark(Red):
    name = "dark"

    def __call__(self, images, prompts):
        return 1 - images.mean((1, 2, 3))


COMPARISON = Comparison(prompts=PROMPTS, rewards={"red": Red()}, num_inference_steps=2)
ENTRIES = [
    Entry(SD(), "", WEIGHTS, seeds=[0, 1], weighted=False),
    Entry(MSDDA(), "", WEIGHTS, seeds=[0]),
]


def test_every_image_is_the_methods_own(pipe, tmp_path):
    run_comparison(pipe, COMPARISON, ENTRIES, tmp_path)
    rows = {row.key: row for row in collect_scores(COMPARISON, ENTRIES, tmp_path)}
    assert len(rows) == 2 * 2 + 2
    drawn = MSDDA()(pipe, PROMPTS, WEIGHTS, [0, 0], num_inference_steps=2)
    images = (255 * drawn.images).round() / 255
    for i, prompt in enumerate(PROMPTS):
        row = rows["MSDDA", "", 0.3, "warm=0.3 cool=0.7", 2, prompt, 0]
        assert row.rewards["red"] == pytest.approx(float(Red()(images, PROMPTS)[i]), abs=1e-6)
        assert row.costs == {
            "unet_forwards": 2 * 2 * 2, "unet_backwards": 0, "decodes": 1, "reward_calls": 0
        }  # fmt: skip
        assert rows["SD", "", None, "", 2, prompt, 1].costs["unet_forwards"] == 2 * 2
        stored = torch.from_numpy(np.array(strip_of(tmp_path, ENTRIES[1], 0)[i]))
        assert torch.equal(stored.permute(2, 0, 1) / 255, images[i])


def test_batches_make_no_difference(pipe, tmp_path):
    alone = replace(COMPARISON, batch_size=1)
    run_comparison(pipe, COMPARISON, ENTRIES[1:], tmp_path / "a")
    run_comparison(pipe, alone, ENTRIES[1:], tmp_path / "b")
    a, b = (list(collect_scores(alone, ENTRIES[1:], tmp_path / name)) for name in "ab")
    for one, other in zip(a, b, strict=True):
        assert one.rewards == pytest.approx(other.rewards, abs=5e-3)
        assert one.costs == other.costs


def test_an_interrupted_run_continues(pipe, tmp_path, calls, monkeypatch):
    draw, budget = runs.draw_shard, [2]

    def stops(*arguments):
        if not budget[0]:
            raise KeyboardInterrupt
        budget[0] -= 1
        return draw(*arguments)

    monkeypatch.setattr(runs, "draw_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(pipe, COMPARISON, ENTRIES, tmp_path)
    assert len(list(collect_scores(COMPARISON, ENTRIES, tmp_path))) == 4
    monkeypatch.setattr(runs, "draw_shard", draw)
    seen = []
    run_comparison(
        pipe, COMPARISON, ENTRIES, tmp_path, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(4, 6), (6, 6)]
    calls.clear()
    run_comparison(pipe, COMPARISON, ENTRIES, tmp_path)
    assert calls == []


def test_processes_share_a_folder_without_overlap(pipe, tmp_path):
    seen = []
    for i in range(2):
        run_comparison(
            pipe, COMPARISON, ENTRIES, tmp_path, part=(i, 2), progress=lambda *c: seen.append(c)
        )
    assert seen == [(0, 4), (2, 4), (4, 4), (0, 2), (2, 2)]


def test_a_later_reward_judges_the_stored_images(pipe, tmp_path, calls):
    run_comparison(pipe, COMPARISON, ENTRIES, tmp_path)
    calls.clear()
    both = replace(COMPARISON, rewards={"red": Red(), "dark": Dark()})
    run_comparison(pipe, both, ENTRIES, tmp_path)
    assert calls == []
    run_comparison(pipe, both, ENTRIES, tmp_path / "fresh")
    again, fresh = (
        [row.rewards for row in collect_scores(both, ENTRIES, folder)]
        for folder in (tmp_path, tmp_path / "fresh")
    )
    assert again == fresh and "dark" in again[0]


def test_other_settings_of_a_method_are_other_shards():
    names = {
        Entry(method, "", weights, [0]).folder_name
        for method in (MSDDA(), MSDDA(fusion="eps"), SD(), SD(eta=0.8))
        for weights in (WEIGHTS, {"warm": 0.5, "cool": 0.5})
    }
    assert len(names) == 8


OWN = Comparison(prompts=PROMPTS, rewards={"warm": Red(), "red": Red()}, num_inference_steps=1)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_comparison(tiny.shared(), OWN, ENTRIES[1:], folder)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("record", [True, False], ids=["", "record-lost"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps was 1, is 3"),
        ({"guidance_scale": 2.0}, r"guidance_scale was None, is 2\.0"),
        ({"prompts": ["a dog"]}, r"prompts\[1\] was 'a cat', is absent"),
        # the columns keep their names: other rewards stand behind them
        ({"rewards": {"warm": Dark(), "red": Red()}}, r"rewards\.warm was 'red \w+', is 'dark"),
        ({"rewards": {"warm": Red(), "red": Dark()}}, r"scored_by\.red was 'red \w+', is 'dark"),
        ({"rewards": {"warm": Red(1.0), "red": Red()}}, r"rewards\.warm was 'red \w+', is 'red "),
    ],
)
def test_other_settings_of_the_comparison_are_refused(
    pipe, finished, tmp_path, calls, change, message, record
):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    if not record:
        (folder / "settings.json").unlink()
    before = contents(folder)
    with pytest.raises(ResumeMismatch, match=message):
        run_comparison(pipe, replace(OWN, **change), ENTRIES[1:], folder, out=tmp_path / "out")
    assert calls == [] and contents(folder) == before and not (tmp_path / "out").exists()


def test_a_lost_record_is_made_again_from_the_shards(pipe, finished, tmp_path, calls):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "settings.json").unlink()
    run_comparison(pipe, replace(OWN, batch_size=1), ENTRIES[1:], folder)
    assert calls == []
    kept = [file.read_bytes() for file in (folder / "settings.json", finished / "settings.json")]
    assert kept[0] == kept[1]


def test_shards_of_an_earlier_version_are_refused(pipe, finished, tmp_path, calls):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (shard,) = (folder / "shards").rglob("*.json")
    record = json.loads(shard.read_text())
    del record["settings"], record["scored_by"]
    shard.write_text(json.dumps(record))
    with pytest.raises(ResumeMismatch, match=rf"{shard.name} has no fingerprint.*delete it"):
        run_comparison(pipe, OWN, ENTRIES[1:], folder)
    assert calls == []


def test_preferences_that_print_alike_are_told_apart(pipe, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    close = {"warm": 0.3 + 1e-9, "cool": 0.7 - 1e-9}
    with pytest.raises(ResumeMismatch, match=r"weights\.warm was 0\.3, is 0\.300000001"):
        run_comparison(pipe, OWN, [replace(ENTRIES[1], weights=close)], folder)


def test_an_adapter_of_the_oracle_that_was_trained_again_is_noticed(pipe, tiny, tmp_path, calls):
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny.warm, adapter)
    method = MORLOracle(objective="warm", adapters={0.3: adapter})
    oracle = [Entry(method, "", WEIGHTS, seeds=[0])]
    run_comparison(pipe, OWN, oracle, tmp_path / "work")
    calls.clear()
    run_comparison(pipe, OWN, oracle, tmp_path / "work")
    (weights,) = adapter.glob("*.safetensors")
    tensors = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(ResumeMismatch, match=r"adapters\.0\.3 was '\w+', is '\w+'"):
        run_comparison(pipe, OWN, oracle, tmp_path / "work")
    assert calls == []


def test_what_guides_a_search_may_not_come_later(pipe, tmp_path, calls):
    search = [Entry(BestOfN(num_particles=2), "", {"warm": 1.0}, seeds=[0])]
    run_comparison(pipe, OWN, search, tmp_path)
    calls.clear()
    both = [replace(search[0], weights={"warm": 1.0, "red": 0.0})]
    with pytest.raises(ResumeMismatch):
        shard = runs._file(tmp_path, both[0], 0)
        shutil.copytree(runs._file(tmp_path, search[0], 0).parent, shard.parent)
        run_comparison(pipe, OWN, both, tmp_path)
    assert calls == []


def test_scores_of_another_folder_of_images_are_not_mixed(pipe, tiny, tmp_path, calls):
    out = tmp_path / "out"
    run_comparison(pipe, OWN, ENTRIES[1:], tmp_path / "float32", out=out)
    calls.clear()
    half = tiny.shared(torch.bfloat16)
    with pytest.raises(ResumeMismatch, match=r"out.*dtype was 'float32', is 'bfloat16'"):
        run_comparison(half, OWN, ENTRIES[1:], tmp_path / "bfloat16", out=out)
    assert calls == [] and not (tmp_path / "bfloat16").exists()
    turned = [replace(ENTRIES[1], weights={"cool": 0.7, "warm": 0.3})]
    with pytest.raises(ResumeMismatch, match=r"toward\[0\] was 'warm', is 'cool'"):
        run_comparison(pipe, OWN, turned, tmp_path / "float32", out=out)
    (out / "settings.json").unlink()
    (out / "scores.csv").touch()  # as results from before there were records
    with pytest.raises(ResumeMismatch, match=r"scores\.csv is there without settings\.json"):
        run_comparison(pipe, OWN, ENTRIES[1:], tmp_path / "float32", out=out)
    assert calls == []


def test_a_reward_that_cannot_judge_is_found_before_any_work(pipe, tmp_path, calls):
    class Picky(Red):
        def __call__(self, images, prompts):
            raise ValueError("no cats")

    with pytest.raises(ValueError, match="no cats"):
        run_comparison(pipe, replace(COMPARISON, rewards={"red": Picky()}), ENTRIES, tmp_path)
    assert calls == [] and not list(tmp_path.iterdir())


def test_a_score_that_is_no_number_is_named_and_not_kept(pipe, tmp_path):
    class Broken(Red):
        def __call__(self, images, prompts):
            scores = super().__call__(images, prompts)
            return scores.index_fill(0, torch.tensor([1]), float("nan")) if images.any() else scores

    broken = replace(COMPARISON, rewards={"red": Broken()})
    with pytest.raises(ValueError, match="reward 'red' is not finite for the prompt 'a cat'"):
        run_comparison(pipe, broken, ENTRIES[1:], tmp_path)
    assert not list((tmp_path / "shards").rglob("*.json"))


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_a_part_is_one_of_its_number(pipe, tmp_path, part):
    with pytest.raises(ValueError, match="part"):
        run_comparison(pipe, COMPARISON, ENTRIES, tmp_path, part=part)


@pytest.mark.parametrize("name", ["scores.csv", "scores.csv.gz"])
def test_scores_survive_the_file_and_only_grow(pipe, tmp_path, name):
    file = tmp_path / name
    run_comparison(pipe, COMPARISON, ENTRIES, tmp_path)
    rows = list(collect_scores(COMPARISON, ENTRIES, tmp_path))
    merge_scores(file, rows[:3])
    merged = merge_scores(file, [replace(rows[3], seconds=7.0), *rows[4:]])
    assert {row.key for row in merged} == {row.key for row in rows}
    assert read_scores(file) == read_scores(file) and len(read_scores(file)) == len(rows)
    back = {row.key: row for row in read_scores(file)}
    for row in rows:
        assert back[row.key].rewards == pytest.approx(row.rewards, abs=1e-5)
    assert back[rows[3].key].seconds == 7.0


def test_a_file_that_is_no_scores_is_named(tmp_path):
    file = tmp_path / "scores.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column method"):
        read_scores(file)
    merged = merge_scores(tmp_path / "good.csv", [])
    assert merged == []
    lines = (tmp_path / "good.csv").read_text() + "SD,,x,,50,a dog,0,1,10,0,1,0\n"
    file.write_text(lines)
    with pytest.raises(ValueError, match="line 2"):
        read_scores(file)
    for cut in ("SD,,,,50,a dog,0,1,10", "SD,,,,50,a dog,0,1,10,0,1,0,0"):
        file.write_text((tmp_path / "good.csv").read_text() + cut)
        with pytest.raises(ValueError, match="line 2: expected one value for each column"):
            read_scores(file)


def test_shards_say_what_made_them(pipe, tmp_path):
    run_comparison(pipe, COMPARISON, ENTRIES[1:], tmp_path)
    (file,) = (tmp_path / "shards").rglob("*.json")
    assert json.loads(file.read_text())["method"] == repr(MSDDA())
