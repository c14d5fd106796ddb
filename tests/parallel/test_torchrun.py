# SPDX-License-Identifier: Apache-2.0
"""`torchrun -m msdda_fast ...`: the files and the words of one process, from several."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from msdda_fast.cli import app as cli
from msdda_fast.cli import generate as cli_generate


def torchrun(size, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.run(
        [sys.executable, *command, "-m", "msdda_fast", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def alone(*arguments):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done


def generate(model, file, *more):
    return ["generate", "a red dog", "-m", model, "-o", file, "--steps", 2, "-n", 2, *more]


def assert_same_picture(*files):
    """One process runs all rows in one forward and ranks some: a level of 255 by rounding."""
    one, other = (np.asarray(Image.open(file)).astype(int) for file in files)
    assert abs(one - other).max() <= 1


@pytest.mark.full  # two programs; their engine is in test_engine.py
def test_two_ranks_write_the_images_of_one_process(tiny, tmp_path):
    alone(*generate(tiny.folder, tmp_path / "one.png", "--seed", 5))
    done = torchrun(2, *generate(tiny.folder, tmp_path / "two.png", "--seed", 5))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two-0.png") == done.stdout.count("two-1.png") == 1
    for index in range(2):
        assert_same_picture(*(tmp_path / f"{name}-{index}.png" for name in ("one", "two")))
    assert len(list(tmp_path.iterdir())) == 4
    assert "not been destroyed" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.full  # two programs, twice; the pipeline is in test_stock.py
@pytest.mark.parametrize("model", ["msdda-fast/emoji", "msdda-fast/emoji-flow"])
def test_from_a_text_and_from_an_image(tmp_path, model):
    def drawn(name, *more):
        request = ["generate", "A red car.", "-m", model, "--steps", 2]
        return [*request, "-o", tmp_path / name, "--seed", 5, *more]

    for name, more in {"text": (), "image": ("--image", tmp_path / "text-one.png")}.items():
        alone(*drawn(f"{name}-one.png", *more))
        done = torchrun(2, *drawn(f"{name}-two.png", *more))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("-two.png") == 1
        assert_same_picture(*(tmp_path / f"{name}-{count}.png" for count in ("one", "two")))


def test_other_ranks_neither_write_nor_speak(tiny, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_generate, "load", lambda *_: pipe)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = alone(*generate(tiny.folder, tmp_path / "x.png"))
    assert done.output == "" and not list(tmp_path.iterdir())
    bad = CliRunner().invoke(cli.app, ["generate", "a red dog", "-w", "hot=1"])
    assert bad.exit_code == 2 and bad.stderr.startswith("rank 1: UnknownObjective: ")


@pytest.mark.slow
def test_four_ranks_and_a_random_seed(tiny, tmp_path):
    done = torchrun(4, *generate(tiny.folder, tmp_path / "four.png"))
    assert done.returncode == 0, done.stderr
    seed = done.stdout.split("seed ")[1].split()[0]
    alone(*generate(tiny.folder, tmp_path / "one.png", "--seed", seed))
    for index in range(2):
        assert_same_picture(*(tmp_path / f"{name}-{index}.png" for name in ("one", "four")))


@pytest.mark.slow
def test_bad_input_names_the_rank_and_ends_all(tiny, tmp_path):
    start = time.monotonic()
    done = torchrun(2, *generate(tiny.folder, tmp_path / "x.png", "-w", "hot=1"))
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert "UnknownObjective: unknown objective 'hot'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_is_written_once_and_continues(tiny, tmp_path):
    def sweep(folder, weights):
        return [
            "sweep", "-m", tiny.folder, "--toward", "cool", "--reward", "aesthetic", "--steps", 2,
            "-p", "a red dog", "--weights", weights, "-o", folder,
        ]  # fmt: skip

    for weights in ("0.5", "0.5,1"):
        alone(*sweep(tmp_path / "one", weights))
        done = torchrun(2, *sweep(tmp_path / "two", weights))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("grid.png") == 1
    rewards = [
        json.loads((tmp_path / name / "rewards.json").read_text()) for name in ("one", "two")
    ]
    assert rewards[0]["columns"] == rewards[1]["columns"] == [None, 0.5, 1.0]
    cells = [{p.name: p for p in (tmp_path / name / "cells").iterdir()} for name in ("one", "two")]
    assert set(cells[0]) == set(cells[1]) and len(cells[0]) == 3
    for name in cells[0]:
        one, two = (np.asarray(Image.open(files[name])).astype(int) for files in cells)
        assert abs(one - two).max() <= 1, name
