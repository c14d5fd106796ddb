# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast compare` and `tune`: what they write and say, and how they exit."""

import json
import shutil
from collections import Counter

import pytest
from rich.console import Console
from typer.testing import CliRunner

from msdda_fast.cli import app as cli
from msdda_fast.cli import compare as cli_compare
from msdda_fast.cli import comparison
from msdda_fast.cli import tune as cli_tune
from msdda_fast.cli import values as parse
from msdda_fast.evaluation import tuning
from msdda_fast.evaluation.scores import read_scores
from msdda_fast.methods.rgg import RGG

runner = CliRunner()


@pytest.fixture
def loaded(pipe, monkeypatch):
    """Let commands use the pipeline in memory in place of loading one."""
    for module in (cli_compare, cli_tune):
        monkeypatch.setattr(module, "load", lambda *arguments: pipe)
        monkeypatch.setattr(module, "out", Console(width=200))


def run(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments], terminal_width=200)


def compare_of(folder, *more):
    prompts = folder.with_name("short.txt")  # the paper's are too long for the tiny text encoder
    prompts.write_text("a dog\na cat\n")
    scored = [] if "--reward" in more else ["--reward", "warm=aesthetic"]
    return [
        "compare", "-o", folder, *scored, "--reward", "cool=aesthetic",
        "--weights", "0.5", "--seeds", "0-1", "--search-seeds", "0", "--front", "",
        "--front-seeds", "0", "--steps", 1, "--guidance", 1, "--no-factor-soup", "--prompts",
        prompts, *more,
    ]  # fmt: skip


def test_compare_writes_scores_tables_and_a_page(loaded, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\na cat\n")
    arguments = compare_of(
        tmp_path / "out", "--systems", "SD, MSDDA, RS", "--prompts", tmp_path / "prompts.txt",
        "--toward", "cool", "--judge", "warmth", "--path-kl-seeds", "0",
    )  # fmt: skip
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "cool=0.5 warm=0.5" in done.output and "MSDDA - system" in done.output
    assert "excludes 0" in done.output and "report.html" in done.output
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"scores.csv", "table.md", "report.html", "pareto.png", "work"} <= written
    assert "path_kl.json" in written
    systems = [row.method + row.variant for row in read_scores(tmp_path / "out" / "scores.csv")]
    rows = read_scores(tmp_path / "out" / "scores.csv")
    assert all(set(row.rewards) == {"warm", "cool", "warmth"} for row in rows)
    assert Counter(systems) == {
        "SD": 4, "MSDDA": 4, "RSproduct": 4, "RSre-weighted": 4, "MSDDAeps": 2,
    }  # fmt: skip
    again = run("compare", "-o", tmp_path / "out", "--report-only")
    assert again.exit_code == 0 and "MSDDA - system" in again.output


@pytest.mark.full  # three systems above, each of all in tests/methods
def test_quick_draws_every_system_on_few_prompts(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_compare, "QUICK_STEPS", 2)
    monkeypatch.setattr(cli_compare, "QUICK_PROMPTS", 1)
    done = run(*compare_of(tmp_path / "out", "--quick"))
    assert done.exit_code == 0, done.output
    for name in ("SD", "DB-MPA-LS", "DeRaDiff", "CoDe official", "DAS", "MUDM dependent"):
        assert name in done.output
    rows = read_scores(tmp_path / "out" / "scores.csv")
    assert len({row.prompt for row in rows}) == 1 and {row.steps for row in rows} == {2}


@pytest.mark.full  # a second comparison
def test_tune_writes_what_compare_reads(loaded, tmp_path, monkeypatch):
    methods = [RGG(alpha=a, norm="none") for a in (1.0, 0.1)]
    monkeypatch.setattr(tuning, "candidates", lambda: methods)
    done = run(
        "tune", "-o", tmp_path / "tune", "--reward", "warm=aesthetic", "--reward",
        "cool=aesthetic", "--steps", 1, "--guidance", 1, "--prompts", _one(tmp_path),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "RGG norm=none alpha=1.0" in done.output
    assert list(json.loads((tmp_path / "tune" / "tuned.json").read_text())) == ["RGG"]
    done = run(
        *compare_of(tmp_path / "out", "--systems", "MSDDA,RGG", "--tuned",
        tmp_path / "tune" / "tuned.json", "--prompts", _one(tmp_path)),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "RGG tuned" in done.output


def _one(folder):
    (folder / "one.txt").write_text("a dog\n")
    return folder / "one.txt"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--part", "2/2"], "--part '2/2' must be I/N"),
        (["--seeds", "3-1"], "--seeds '3-1' must be"),
        (["--weights", "0.5,x"], "--weights"),
        (["--weights", "1.5"], "lie in [0, 1]"),
        (["--systems", "SDXL"], "unknown system 'SDXL'"),
        (["--toward", "hot"], "--toward 'hot' is not an objective; known: warm, cool"),
        (["--reward", "hot=aesthetic"], "--reward 'hot' is not an objective"),
        (["--reward", "warm=beauty"], "unknown reward 'beauty'"),
        (["--oracle", "half=x"], "half"),
        (["--tuned", "missing.json"], "missing.json"),
        (["--prompts", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_line_and_no_work(loaded, tmp_path, calls, more, message):
    done = run(*compare_of(tmp_path / "out", *more))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert calls == [] and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_compare, "load", lambda *_: tiny.shared())
        patch.setattr(cli_compare, "QUICK_STEPS", 1)
        for name, more in (("whole", []), ("quick", ["--quick"])):
            prompts = ["--prompts", _one(folder)]
            done = run(*compare_of(folder / name, "--systems", "MSDDA", *prompts, *more))
            assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward", "warm=warmth"], "rewards.warm was 'aesthetic "),
        (["--steps", 2], "num_inference_steps was 1, is 2"),
        (["--guidance", 2], "guidance_scale was 1.0, is 2.0"),
        (["--toward", "cool"], "toward[0] was 'warm', is 'cool'"),
        (["--prompts", "other"], "prompts[0] was 'a dog', is 'a cat'"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    loaded, compared, tmp_path, monkeypatch, calls, more, message, quick
):
    monkeypatch.setattr(cli_compare, "QUICK_STEPS", more[1] if "--steps" in more else 1)
    shutil.copytree(compared / ("quick" if quick else "whole"), tmp_path / "out")
    (tmp_path / "other").write_text("a cat\n")
    given = ["--systems", "MSDDA", *more, *["--quick"] * quick]
    if "--prompts" in more:
        given[given.index("other")] = tmp_path / "other"
    else:
        given += ["--prompts", compared / "one.txt"]
    done = run(*compare_of(tmp_path / "out", *given))
    assert done.exit_code == 2 and calls == []
    assert "ResumeMismatch" in done.output and message in " ".join(done.output.split())


def test_missing_packages_are_named_with_the_way_to_get_them(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "find_spec", lambda name: None if name == "moocore" else name)
    done = run(*compare_of(tmp_path / "out"))
    assert done.exit_code == 2 and "need moocore: pip install 'msdda-fast[eval]'" in done.output


@pytest.mark.parametrize(
    ("text", "expected"), [("0-3", [0, 1, 2, 3]), ("5", [5]), ("0, 2-3,9", [0, 2, 3, 9])]
)
def test_seeds_are_numbers_and_ranges(text, expected):
    assert parse.seeds(text, "--seeds") == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1"])
def test_other_seeds_are_refused(text):
    with pytest.raises(ValueError, match="--seeds"):
        parse.seeds(text, "--seeds")
