# SPDX-License-Identifier: Apache-2.0
"""Tables say who leads and by how much; the page stands alone; nothing but scores goes in."""

import csv
import io
import re

import numpy as np
import pytest
from PIL import Image

from msdda_fast.evaluation.report import write_report
from msdda_fast.evaluation.scores import COSTS, Score
from msdda_fast.evaluation.statistics import arms_of
from msdda_fast.evaluation.tables import front_table, preference_table, to_csv, to_markdown

PAIRS = [(f"prompt {p}", seed) for p in range(5) for seed in range(8)]
NOISE = np.random.default_rng(3).normal(0, 1, len(PAIRS))
PREFERENCES = [0.2, 0.8]


def rows(method, variant, w, r1, r2, pairs=PAIRS, third=None):
    weights = "" if w is None else f"r1={w:g} r2={1 - w:g}"
    if third is not None:
        weights = f"r1={w:g} r2={third:g} r3={1 - w - third:g}"
    return [
        Score(
            method, variant, w, weights, 50, prompt, seed,
            {"r1": r1 + noise, "r2": r2 + noise, "r3": noise}, 0.5, dict.fromkeys(COSTS, 3.0),
        )
        for (prompt, seed), noise in zip(pairs, NOISE, strict=False)
    ]  # fmt: skip


def scores():
    found = rows("SD", "", None, 0.0, 0.0)
    for w in PREFERENCES:
        found += rows("MSDDA", "", w, w, 1 - w)
        found += rows("RS", "product", w, w - 0.1, 1 - w)
        found += rows("CoDe", "official", w, w, 1.1 - w, PAIRS[:10])
        found += rows("MSDDA", "eps", w, w, 1 - w)
    return found + rows("DAS", "", 0.2, 0.0, 0.0)


def test_a_table_ranks_by_the_scalarised_reward_and_compares_pairwise():
    table = preference_table(arms_of(scores()), {"r1": 0.2, "r2": 0.8})
    verdicts = {(row.arm.method, row.arm.variant): row.verdict for row in table.rows}
    assert verdicts == {
        ("MSDDA", ""): "",
        ("MSDDA", "eps"): "no difference shown",
        ("RS", "product"): "MSDDA leads",
        ("CoDe", "official"): "MSDDA is behind",
        ("SD", ""): "MSDDA leads",
        ("DAS", ""): "MSDDA leads",
    }
    order = [0.0 if row.gain is None else row.gain.mean for row in table.rows]
    assert order == sorted(order) and table.rows[0].arm.method == "CoDe"  # on 10 of 40 pairs
    gains = {row.arm.method: row.gain for row in table.rows if row.gain}
    assert gains["RS"].mean == pytest.approx(0.2 * 0.1)
    assert gains["CoDe"].mean == pytest.approx(-0.8 * 0.1) and gains["CoDe"].pairs == 10


def test_hypervolumes_are_of_systems_with_every_preference():
    wanted = [{"r1": w, "r2": 1 - w} for w in PREFERENCES]
    fronts = front_table(arms_of(scores()), wanted, {"r1": -3.0, "r2": -3.0})
    assert {front.system[0] for front in fronts} == {"MSDDA", "RS", "CoDe"}
    volumes = {front.system: front.volume.mean for front in fronts}
    offset = NOISE.mean() + 3
    tall, short = offset + 0.8, offset + 0.2
    assert volumes["MSDDA", ""] == pytest.approx(2 * tall * short - short**2)
    assert front_table(arms_of(rows("RS", "", 0.2, 0, 0)), wanted[:1], {"r1": 0, "r2": 0}) == []


def test_the_csv_has_every_interval_and_cost():
    tables = [preference_table(arms_of(scores()), {"r1": 0.2, "r2": 0.8})]
    lines = list(csv.DictReader(io.StringIO(to_csv(tables))))
    ours = next(line for line in lines if (line["method"], line["variant"]) == ("MSDDA", ""))
    assert float(ours["r1"]) == pytest.approx(0.2 + NOISE.mean(), abs=1e-4)
    assert float(ours["r1_low"]) < float(ours["r1"]) < float(ours["r1_high"])
    assert float(ours["r3"]) == pytest.approx(NOISE.mean(), abs=1e-4)  # not weighed, but scored
    assert ours["msdda_minus_system"] == "" and ours["images"] == "40"
    assert ours["unet_forwards"] == "3" and ours["weights"] == "r1=0.2 r2=0.8"


def test_a_reward_that_some_images_lack_is_no_column():
    found = scores()
    del found[0].rewards["r3"]
    table = preference_table(arms_of(found), {"r1": 0.2, "r2": 0.8})
    assert list(table.rows[0].rewards) == ["r1", "r2"]
    assert "r3" not in to_csv([table]) and "r3" not in to_markdown(table)


def test_markdown_marks_ours():
    text = to_markdown(preference_table(arms_of(scores()), {"r1": 0.2, "r2": 0.8}))
    assert "| **MSDDA** | 40 |" in text and "| RS (product) |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_without_msdda_there_is_nothing_to_compare_with():
    with pytest.raises(ValueError, match="no MSDDA at"):
        preference_table(arms_of(scores()), {"r1": 0.3, "r2": 0.7})


def write(folder, scored, objectives=("r1", "r2")):
    return write_report(
        scored,
        folder,
        objectives=objectives,
        preferences=PREFERENCES,
        reference=dict.fromkeys(objectives, -3.0),
        title="A <comparison>",
        setting="5 prompts",
    )


def test_the_page_stands_alone(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    page = write(tmp_path, scores()).read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "A &lt;comparison&gt;" in page
    assert "At w = 0.2, by r_w, MSDDA is behind CoDe (official) (-0.080)." in page
    assert "The hypervolume of MSDDA exceeds that of RS (product)." in page
    names = {"grid.png", "pareto.png", "report.html", "summary.json", "table.csv", "table.md"}
    names |= {"gauge.json", "gauge.png"}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.full  # a figure
def test_three_objectives_have_a_figure_of_their_own(tmp_path):
    triple = [
        row
        for a, b in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.5))
        for row in rows("MSDDA", "", a, a, b, third=b)
    ]
    page = write(tmp_path, scores() + triple, ("r1", "r2", "r3")).read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2 and "Three objectives" in page
    with Image.open(tmp_path / "simplex.png") as image:
        assert image.width > 1000
