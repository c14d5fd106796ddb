# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast certify`: what it writes and says, and that finished seeds are kept."""

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from msdda_fast.cli import app as cli
from msdda_fast.cli import certify as cli_certify
from msdda_fast.evaluation import certify as certification

runner = CliRunner()


@pytest.fixture
def arguments(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(cli_certify, "load", lambda *arguments: pipe)
    monkeypatch.setattr(cli_certify, "out", Console(width=200))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red dog\na blue cat\n")
    return [
        "certify", "-o", tmp_path / "made" / "c.json", "--prompts", prompts, "--paths", 2,
        "--reward", "warm=aesthetic", "--reward", "cool=warmth", "--steps", 2, "--guidance", 1,
    ]  # fmt: skip


def run(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments], terminal_width=200)


def test_it_writes_certificates_and_continues_with_more_seeds(arguments, tmp_path, monkeypatch):
    done = run(*arguments, "--seeds", "0")
    assert done.exit_code == 0, done.output
    assert "lambda" in done.output and "R^2" in done.output
    whole = run(*arguments, "--seeds", "0-1", "-o", tmp_path / "whole.json")
    drawn, real = [], certification._draw

    def counted(*given):
        drawn.append(given[-1])
        return real(*given)

    monkeypatch.setattr(certification, "_draw", counted)
    assert run(*arguments, "--seeds", "0-1").exit_code == whole.exit_code == 0
    assert set(drawn) == {1}
    made = json.loads((tmp_path / "made" / "c.json").read_text())
    assert made == json.loads((tmp_path / "whole.json").read_text())
    assert made["setting"]["seeds"] == 2
    assert made["objectives"].keys() == {"warm", "cool"}
    assert made["objectives"]["warm"]["warm"]["kl"] > 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--paths", 1, "2"), ("--reward", "hot=aesthetic", "hot"), ("--seeds", "3-1", "--seeds")],
)
def test_bad_input_is_one_line_before_any_work(arguments, option, value, words):
    done = run(*arguments, option, value)
    assert done.exit_code == 2
    assert words in done.output


def test_other_settings_do_not_continue(arguments):
    assert run(*arguments, "--seeds", "0").exit_code == 0
    done = run(*arguments, "--seeds", "0", "--paths", 3)
    assert done.exit_code == 2 and "paths was 2, is 3" in done.output
