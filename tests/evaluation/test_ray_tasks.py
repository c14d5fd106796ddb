# SPDX-License-Identifier: Apache-2.0
"""`--ray`: the files of a run on a cluster are those of a run on one machine, and it continues."""

import json
import sys

import pytest
from typer.testing import CliRunner

from msdda_fast.cli import app as cli
from tests.ray_cluster import free_port, nodes  # noqa: F401 - fixtures

runner = CliRunner()


def run(*arguments):
    done = runner.invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output


def contents(folder, pattern):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob(pattern)}


@pytest.mark.full  # a cluster takes half a minute to start
def test_a_sweep_is_that_of_one_machine_and_continues(nodes, tiny, tmp_path):  # noqa: F811
    common = ["--model", tiny.folder, "--device", "cpu", "--steps", 2, "--toward", "cool"]
    sweep = ["sweep", *common, "--weights", "0,0.5", "-p", "a yellow dog", "--reward", "aesthetic"]
    run(*sweep, "--out", tmp_path / "here")
    run(*sweep, "--out", tmp_path / "there", "--ray", nodes)
    here, there = (contents(tmp_path / name, "*.png") for name in ("here", "there"))
    assert here == there and len(here) == 4
    lost = next((tmp_path / "there" / "cells").iterdir())
    kept = {f: f.stat().st_mtime_ns for f in lost.parent.iterdir() if f != lost}
    lost.unlink()
    run(*sweep, "--out", tmp_path / "there")
    assert contents(tmp_path / "there", "*.png") == here
    assert {f: f.stat().st_mtime_ns for f in kept} == kept


@pytest.mark.slow  # likewise, and the sweep above has the same tasks
def test_a_comparison_is_that_of_one_machine(nodes, tiny, tmp_path):  # noqa: F811
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a yellow dog\na red car\n")
    compare = [
        "compare", "--model", tiny.folder, "--device", "cpu", "--steps", 2, "--prompts", prompts,
        "--systems", "SD,MSDDA", "--seeds", "0,1", "--front", "", "--front-seeds", 0, "--weights",
        "0.5", "--no-factor-soup", "--reward", "warm=aesthetic", "--reward", "cool=consistency",
    ]  # fmt: skip
    for name, more in (("here", []), ("there", ["--ray", nodes])):
        run(*compare, "--out", tmp_path / name, *more)
    here, there = (contents(tmp_path / name / "work", "*.png") for name in ("here", "there"))
    assert here == there and len(here) == 5
    rewards = [
        {file: json.loads(text)["rewards"] for file, text in found.items()}
        for found in (contents(tmp_path / name / "work/shards", "*.json") for name in
                      ("here", "there"))
    ]  # fmt: skip
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "nonsense:port"])
def test_no_cluster_is_said_before_any_work(address, tmp_path):
    address = address.format(free_port())
    done = runner.invoke(cli.app, ["sweep", "--ray", address, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "BackendUnavailable" in done.output
    assert address in done.output.replace("\n", "") and not (tmp_path / "out").exists()


def test_missing_ray_is_named_with_what_installs_it(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "msdda_fast.evaluation.ray_tasks", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = runner.invoke(cli.app, ["sweep", "--ray", "auto", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "msdda-fast[ray]" in done.output
