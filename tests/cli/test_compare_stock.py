# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast compare` on a pipeline with a loop of its own."""

import pytest
from rich.console import Console
from typer.testing import CliRunner

from msdda_fast.cli import app as cli
from msdda_fast.cli import compare as cli_compare
from msdda_fast.evaluation.scores import read_scores
from tests.methods import stock


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """The pipeline that commands get in place of loading one."""
    pipe = stock.attached()
    monkeypatch.setattr(cli_compare, "load", lambda *arguments: pipe)
    monkeypatch.setattr(cli_compare, "out", Console(width=200))


def compare(folder, *more):
    prompts = folder.with_name("prompts.txt")
    prompts.write_text("a dog\na cat\n")
    arguments = [
        "compare", "-o", folder, "--reward", "a=aesthetic", "--reward", "b=warmth",
        "--weights", "0.5", "--seeds", "0", "--front", "", "--front-seeds", "0", "--steps", 1,
        "--guidance", 1, "--no-factor-soup", "--prompts", prompts, *more,
    ]  # fmt: skip
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], terminal_width=200)


@pytest.mark.full  # tests/evaluation has it without the command line
def test_compare_writes_scores_tables_and_a_page(tmp_path):
    done = compare(tmp_path / "out", "--systems", "SD,MSDDA,RS")
    assert done.exit_code == 0, done.output
    assert "RS re-weighted" in done.output and "report.html" in done.output
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"scores.csv", "table.md", "report.html", "pareto.png", "work"} <= written
    rows = read_scores(tmp_path / "out" / "scores.csv")
    assert {row.method for row in rows} == {"SD", "MSDDA", "RS"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--systems", "MSDDA,CoDe"], "systems: CoDe needs single steps of the networks"),
        (["--systems", "SDXL"], "unknown system 'SDXL'"),
        (["--path-kl-seeds", "0"], "path_kl_seeds needs single steps"),
    ],
)
def test_what_the_family_cannot_do_is_one_line_and_no_work(tmp_path, more, message):
    done = compare(tmp_path / "out", *more)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
