# SPDX-License-Identifier: Apache-2.0
"""Every system of the plan runs on one pipeline, and what is written holds them all."""

import contextlib
import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from msdda_fast import resume
from msdda_fast.errors import ResumeMismatch, UnknownObjective
from msdda_fast.evaluation import tuning
from msdda_fast.evaluation.compare import compare, report_scores
from msdda_fast.evaluation.floors import JUDGES
from msdda_fast.evaluation.plan import Plan, published_searches
from msdda_fast.evaluation.runs import Comparison
from msdda_fast.evaluation.scores import read_scores
from msdda_fast.evaluation.settings import comparison_identity
from msdda_fast.evaluation.tuning import candidates, load_tuned, tune
from msdda_fast.methods.code import CoDe
from msdda_fast.methods.rgg import RGG

PROMPTS = ["a dog", "a cat"]


class Channel:
    """Mean of one channel of the image."""

    differentiable = True

    def __init__(self, name: str, index: int) -> None:
        self.name, self._index = name, index

    def __call__(self, images, prompts):
        return images[:, self._index].mean((1, 2))


REWARDS = {"warm": Channel("warm", 0), "cool": Channel("cool", 2)}
COMPARISON = Comparison(prompts=PROMPTS, rewards=REWARDS, num_inference_steps=2, guidance_scale=1.0)
SMALL = {
    "objectives": ["warm", "cool"], "preferences": (0.5,), "seeds": (0,), "search_seeds": (0,),
    "front": (1.0,), "front_seeds": (0,), "factor_soup": False,  # the adapters differ in rank
}  # fmt: skip


@pytest.mark.full  # each system is drawn in tests/methods, three are reported below
def test_every_system_is_drawn_scored_and_reported(pipe, tiny, tmp_path):
    plan = Plan(**SMALL, oracles={0.5: tiny.warm}, tuned={("RGG", "tuned"): RGG(alpha=1.0)})
    page = compare(pipe, COMPARISON, plan, tmp_path / "work", tmp_path / "out", title="Tiny")
    systems = {(row.method, row.variant) for row in read_scores(tmp_path / "out" / "scores.csv")}
    names = {"SD", "MSDDA", "RS", "DB-MPA", "DB-MPA-LS", "DB-KLA", "DeRaDiff", "MORL"}
    searches = {"Best-of-N", "CoDe", "RGG", "DAS", "TFG", "MUDM"}
    assert {name for name, _ in systems} == names | searches
    assert {("MSDDA", "eps"), ("RS", "product"), ("RGG", "tuned"), ("TFG", "dps")} < systems
    assert set(published_searches()) < systems
    text = page.read_text("utf-8")
    assert all(f"<td>{name}" in text for name in names | searches)
    for picture in ("grid.png", "systems.png", "pareto.png"):
        with Image.open(page.parent / picture) as image:
            assert image.width > 300


@pytest.mark.full  # three runs; kept shards are in test_runs.py
def test_rerunning_keeps_earlier_rows_and_systems_can_be_chosen(pipe, tmp_path, calls):
    out = tmp_path / "out"
    for systems in (["SD", "MSDDA", "RS"], ["SD", "MSDDA", "DB-MPA"]):
        plan = Plan(**SMALL, systems=systems)
        compare(pipe, COMPARISON, plan, tmp_path / "work", out, title="Tiny")
    methods = {row.method for row in read_scores(out / "scores.csv")}
    assert methods == {"SD", "MSDDA", "RS", "DB-MPA"}
    calls.clear()
    compare(pipe, COMPARISON, plan, tmp_path / "work", out, title="Tiny")
    assert calls == []


def test_scores_that_are_damaged_are_found_before_any_work(pipe, tmp_path, calls):
    plan, out = Plan(**SMALL, systems=["MSDDA"]), tmp_path / "out"
    out.mkdir()
    (out / "scores.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a file of scores"):
        compare(pipe, COMPARISON, plan, tmp_path / "work", out, title="Tiny")
    assert calls == [] and not (tmp_path / "work").exists()


def test_parts_write_shards_and_the_whole_writes_results(pipe, tmp_path):
    plan = Plan(**SMALL, systems=["SD", "MSDDA"])
    out = tmp_path / "out"
    for i in range(2):
        done = compare(pipe, COMPARISON, plan, tmp_path / "w", out, title="T", part=(i, 2))
        assert done is None and not out.exists()
    assert compare(pipe, COMPARISON, plan, tmp_path / "w", out, title="T").exists()


def without_seconds(file):
    """Rows of a table without the column of times, which is the only one of its kind."""
    rows = list(csv.DictReader(file.read_text().splitlines()))
    return [{name: cell for name, cell in row.items() if name != "seconds"} for row in rows]


def test_a_comparison_killed_and_resumed_differs_in_nothing_but_seconds(pipe, tmp_path):
    """Whatever comes before a shard, its images and scores are the same to the bit."""

    def run(name, stop=None):
        def progress(finished, total):
            if finished == stop:
                raise KeyboardInterrupt

        plan = Plan(**SMALL, systems=["SD", "MSDDA", "Best-of-N"])
        place = tmp_path / name
        with contextlib.suppress(KeyboardInterrupt):
            compare(pipe, COMPARISON, plan, place / "work", place, title="Tiny", progress=progress)
        return place

    straight = run("straight")
    for stop in (2, 6, None):
        killed = run("killed", stop)
    files = {path.relative_to(straight) for path in straight.rglob("*") if path.is_file()}
    assert {path.relative_to(killed) for path in killed.rglob("*") if path.is_file()} == files
    timed = {"scores.csv", "table.csv", "table.md", "report.html"}
    for file in files:
        one, other = straight / file, killed / file
        if "shards" in file.parts and file.suffix == ".json":
            records = [json.loads(path.read_text()) for path in (one, other)]
            assert all(record.pop("seconds") > 0 for record in records)
            assert records[0] == records[1]
        elif file.suffix == ".csv":
            assert without_seconds(one) == without_seconds(other)
        elif file.name not in timed:
            assert one.read_bytes() == other.read_bytes(), file


@pytest.mark.full  # a whole comparison
def test_the_report_needs_nothing_but_the_scores(pipe, tmp_path):
    plan = Plan(**SMALL, systems=["SD", "MSDDA", "RS"])
    compare(pipe, COMPARISON, plan, tmp_path / "work", tmp_path / "a", title="Tiny")
    (tmp_path / "b").mkdir()
    for name in ("scores.csv", "protocol.json", "grid.png"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    report_scores(tmp_path / "b")
    for name in ("table.csv", "table.md", "summary.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"preferences": (1.2,)}, "1.2"), ({"systems": ["SDXL"]}, "unknown system 'SDXL'; known: ")],
)
def test_plans_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Plan(**SMALL | change)


def test_objectives_that_the_model_does_not_have_are_named(pipe, tmp_path, calls):
    plan = Plan(**SMALL | {"objectives": ["warm", "cold"]}, systems=["MSDDA"])
    with pytest.raises(UnknownObjective, match="'cold'"):
        compare(pipe, COMPARISON, plan, tmp_path / "work", tmp_path / "out", title="Tiny")
    assert calls == []


def test_tuning_keeps_the_best_of_each_system(pipe, tmp_path, monkeypatch):
    methods = [RGG(norm="none", alpha=a) for a in (10.0, 1e-3)] + [CoDe(num_particles=2, block=1)]
    weights = {"warm": 0.5, "cool": 0.5}
    scores = tune(pipe, COMPARISON, weights, [0], tmp_path, methods=methods)
    assert list(scores) == [
        "RGG norm=none alpha=10.0", "RGG norm=none alpha=0.001", "CoDe num_particles=2 block=1"
    ]  # fmt: skip
    best = max((s.mean, a) for s, a in zip(list(scores.values())[:2], (10.0, 1e-3), strict=True))
    monkeypatch.setattr(tuning, "_KINDS", {"RGG": RGG, "CoDe": CoDe})
    tuned = load_tuned(tmp_path / "tuned.json")
    assert tuned["RGG", "tuned"] == RGG(norm="none", alpha=best[1])
    assert tuned["CoDe", "tuned"] == methods[2]
    assert (tmp_path / "tuning.csv").exists()


def test_tuning_keeps_what_is_above_the_floors_or_else_closest(pipe, tmp_path, monkeypatch):
    """Whatever its reward: the judges decide first."""
    judges = {name: Channel(name, 0) for name in (*JUDGES, "background_chroma")}
    comparison = replace(COMPARISON, rewards=REWARDS | judges)
    methods = [CoDe(num_particles=n, block=1) for n in (1, 2)]
    monkeypatch.setattr(tuning, "_KINDS", {"CoDe": CoDe})
    weights = {"warm": 0.5, "cool": 0.5}
    for kept in methods:

        def judged(arms, weights, kept=kept):
            assert "SD" in {arm.method for arm in arms}
            short = {tuning._setting(m): 0.0 if m == kept else 0.1 for m in methods}
            return [SimpleNamespace(arm=a, shortfall=short.get(a.variant, 0.0)) for a in arms]

        monkeypatch.setattr(tuning, "floors", judged)
        tune(pipe, comparison, weights, [0], tmp_path, methods=methods)
        assert load_tuned(tmp_path / "tuned.json")["CoDe", "tuned"] == kept


def test_tuning_ranks_by_this_preference_and_these_seeds_only(pipe, tmp_path):
    methods = [CoDe(num_particles=2, block=1)]
    first, second = {"warm": 0.5, "cool": 0.5}, {"warm": 0.9, "cool": 0.1}
    tune(pipe, COMPARISON, first, [0], tmp_path / "both", methods=methods)
    again = tune(pipe, COMPARISON, second, [1], tmp_path / "both", methods=methods)
    assert again == tune(pipe, COMPARISON, second, [1], tmp_path / "fresh", methods=methods)
    rows = read_scores(tmp_path / "both" / "tuning.csv")
    assert {(row.w, row.seed) for row in rows} == {(0.9, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps was 2, is 3"),
        ({"guidance_scale": 2.0}, r"guidance_scale was 1\.0, is 2\.0"),
        ({"prompts": ["a dog"]}, r"prompts\[1\] was 'a cat'"),
        ({"rewards": REWARDS | {"cool": Channel("cool", 1)}}, r"rewards\.cool was 'cool \w+'"),
    ],
)
def test_tuning_refuses_a_folder_of_other_settings(pipe, tmp_path, calls, change, message):
    common = comparison_identity(pipe, COMPARISON)
    resume.bind(tmp_path, common)
    with pytest.raises(ResumeMismatch, match=message):
        tune(pipe, replace(COMPARISON, **change), {"warm": 0.5, "cool": 0.5}, [0], tmp_path)
    assert calls == []


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"GGR": {}}', "unknown system 'GGR'"), ('{"RGG": {"beta": 1}}', "RGG: .*beta")],
)
def test_tuned_settings_are_checked(tmp_path, text, message):
    file = tmp_path / "tuned.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tuned(file)


def test_every_tuned_system_has_the_same_budget():
    kinds = [type(method) for method in candidates()]
    assert {kinds.count(kind) for kind in kinds} == {6} and len(set(kinds)) == 4
    assert len({repr(method) for method in candidates()}) == len(kinds)
    assert torch.tensor([method.needs_rewards for method in candidates()]).all()
