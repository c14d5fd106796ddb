# SPDX-License-Identifier: Apache-2.0
"""A comparison on a pipeline with a loop of its own: what is drawn, kept and refused."""

import json

import pytest

import msdda_fast as mf
from msdda_fast.errors import ResumeMismatch, UnsupportedNetwork
from msdda_fast.evaluation.compare import compare
from msdda_fast.evaluation.plan import plan_for
from msdda_fast.evaluation.runs import Comparison, draw_shard, run_comparison
from msdda_fast.evaluation.scores import read_scores
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.rgg import RGG
from tests.evaluation.test_compare import Channel
from tests.methods import stock
from tests.methods.stock import PROMPTS

COMPARISON = Comparison(
    prompts=PROMPTS,
    rewards={"a": Channel("a", 0), "b": Channel("b", 2)},
    num_inference_steps=2,
    guidance_scale=1.0,
)
SMALL = {
    "objectives": ["a", "b"], "preferences": (0.5,), "seeds": (0,), "front": (),
    "front_seeds": (0,), "factor_soup": False,  # the adapters differ in rank
}  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    return stock.stock()


@pytest.fixture
def pipe(networks):
    return stock.attached(networks)


def test_the_plan_has_the_systems_without_rewards(pipe):
    systems = {(entry.method.name, entry.variant) for entry in plan_for(pipe, **SMALL).entries()}
    assert systems == {
        ("SD", ""), ("MSDDA", ""), ("MSDDA", "eps"), ("RS", "product"), ("RS", "re-weighted"),
        ("DB-MPA", "equal noise"), ("DB-MPA", "re-weighted"), ("DB-MPA-LS", ""),
        *(
            (name, f"{objective}, lambda 1.5")
            for name in ("DB-KLA", "DeRaDiff") for objective in "ab"
        ),
    }  # fmt: skip


def test_systems_are_drawn_and_kept(networks, pipe, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    plan = plan_for(pipe, **SMALL, systems=["SD", "MSDDA", "RS"])
    page = compare(pipe, COMPARISON, plan, work, out, title="Tiny")
    rows = read_scores(out / "scores.csv")
    assert {row.method for row in rows} == {"SD", "MSDDA", "RS"}
    assert {row.costs["unet_forwards"] for row in rows if row.method == "MSDDA"} == {4}
    assert page.is_file() and (out / "pareto.png").is_file()
    setting = json.loads((out / "protocol.json").read_text())["setting"]
    assert "Scheduler, levels of the aligned models: a FlowSDE(0.7), b FlowSDE(0.4)" in setting
    kept = {file: file.stat().st_mtime_ns for file in work.rglob("*.json")}
    run_comparison(pipe, COMPARISON, plan.entries(), work)
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*.json")} == kept
    louder = {name: mf.Objective(name, noise=mf.FlowSDE(0.9)) for name in "ab"}
    with pytest.raises(ResumeMismatch, match="level"):
        run_comparison(stock.attached(networks, **louder), COMPARISON, plan.entries(), work)


def test_a_run_that_continues_draws_the_same_bits(tmp_path):
    """On networks that have drawn nothing, what others draw after merges."""
    images = []
    for systems in (["MSDDA"], ["RS", "DB-MPA", "MSDDA"]):
        pipe = stock.attached()
        entries = plan_for(pipe, **SMALL, systems=systems).entries()
        entries.sort(key=lambda entry: systems.index(entry.method.name))
        shards = [draw_shard(pipe, COMPARISON, entry, 0) for entry in entries]
        images.append(shards[[entry.method for entry in entries].index(MSDDA())].strip)
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("asked", "culprit"),
    [
        ({"systems": ["MSDDA", "CoDe"]}, "systems: CoDe"),
        ({"systems": ["TFG"]}, "systems: TFG"),
        ({"tuned": {("RGG", "tuned"): RGG()}}, "tuned"),
        ({"path_kl_seeds": (0,)}, "path_kl_seeds"),
    ],
)
def test_what_takes_single_steps_is_refused_by_name(pipe, asked, culprit):
    with pytest.raises(UnsupportedNetwork, match=f"^{culprit} needs single steps"):
        plan_for(pipe, **SMALL, **asked)


def test_re_mapped_weights_only_where_there_are_some(networks):
    same = {name: mf.Objective(name, noise=mf.FlowSDE(0.7)) for name in "ab"}
    for pipe in (
        stock.attached(networks, **same),
        stock.attached(networks, **stock.objectives(mf.CPS)),
    ):
        variants = {entry.variant for entry in plan_for(pipe, **SMALL).entries()}
        assert "re-weighted" not in variants and "equal noise" in variants
