# SPDX-License-Identifier: Apache-2.0
"""The command line: what it writes, what it says, and how it exits."""

import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from typer.testing import CliRunner

from msdda_fast.cli import app as cli
from msdda_fast.cli import generate as cli_generate
from msdda_fast.cli import sweep as cli_sweep
from msdda_fast.cli.session import SHIPPED
from msdda_fast.evaluation import sweep as sweeps
from msdda_fast.pipelines.stable_diffusion.modes import MODES

runner = CliRunner()


@pytest.fixture
def loaded(pipe, monkeypatch):
    """Let commands use the pipeline in memory in place of loading one."""
    for module in (cli_generate, cli_sweep):
        monkeypatch.setattr(module, "load", lambda *arguments: pipe)


def run(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments], terminal_width=200)


def sweep_of(model, folder, *more):
    return [
        "sweep", "--model", model, "--toward", "cool", "--reward", "aesthetic", "--steps", 2,
        "--guidance", 2, "-p", "a red dog", "-p", "a blue cat", "--weights", "0,1", "-o", folder,
        *more,
    ]  # fmt: skip


class TestGenerate:
    def test_loads_draws_and_writes(self, tiny, tmp_path):
        out = tmp_path / "new" / "dog.png"
        done = run(
            "generate", "a red dog", "-w", "warm=0.3", "-w", "cool=0.7", "--seed", 5, "-o", out,
            "-s", "warm=2",
            "--model", tiny.folder, "--steps", 2, "--guidance", 3, "--device", "cpu",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "seed 5" in done.output
        expected = tiny.load()(
            "a red dog",
            weights={"warm": 0.3, "cool": 0.7},
            strength={"warm": 2.0},
            seed=5,
            num_inference_steps=2,
            guidance_scale=3.0,
        ).images[0]
        with Image.open(out) as image:
            assert image.tobytes() == expected.tobytes()

    def test_auto_gives_a_receipt(self, loaded, tmp_path):
        options = ["--steps", 2, "--guidance", 3, "--device", "cpu", "-o", tmp_path / "x.png"]
        done = run("generate", "a red dog", "--mode", "auto", "--kl-budget", 1e6, *options)
        assert done.exit_code == 0, done.output
        assert "path KL" in done.output and "nats, 2 forwards" in done.output
        assert "path KL" not in run("generate", "a red dog", *options).output
        assert tuple(cli_generate.ModeName) == MODES

    def test_several_images_and_objectives_by_path(self, tiny, tmp_path):
        done = run(
            "generate", "a red dog", "--objective", f"hot={tiny.warm}:0.9", "--objective",
            "plain=base", "-n", 2, "-o", tmp_path / "x.png", "-m", tiny.folder, "--steps", 1,
            "--negative-prompt", "blurry", "--dtype", "bfloat16",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x-0.png", "x-1.png"]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["-w", "hot=1"], "UnknownObjective: unknown objective 'hot'; known: warm, cool"),
            (["-w", "warm=0.5", "-w", "cool=0.9"], "InvalidWeights: weights"),
            (["-s", "much"], "--strength 'much' must be a number or NAME=NUMBER"),
            (["-s", "1", "-s", "warm=2"], "--strength '1' must be a number, or NAME=NUMBER once"),
            (["-s", "hot=2"], "strength: unknown objective 'hot'"),
            (["-s", "-1"], "InvalidWeights: strength"),
            (["--kl-budget", "1"], "InvalidMode: kl_budget is what mode="),
            (["-w", "warm"], "--weight 'warm' must be NAME=VALUE"),
            (["-w", "warm=much"], "--weight 'warm=much' must be NAME=VALUE"),
            (["--steps", "2000"], "InvalidSchedule: "),
            (["--guidance", "0"], "guidance_scale"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(
        self,
        loaded,
        calls,
        tmp_path,
        arguments,
        message,
    ):
        done = run("generate", "a red dog", "-o", tmp_path / "x.png", *arguments)
        assert done.exit_code == 2
        assert message in done.stderr and done.stderr.count("\n") == 1
        assert "Traceback" not in done.output
        assert calls == [] and not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["-m", "/no/model"], "FileNotFoundError: no file or folder at /no/model"),
            (["--objective", "x=/no/lora"], "no file or folder at /no/lora"),
            (["--objective", "x=base:1.5"], "eta must lie in [0, 1], got 1.5"),
            (["--objective", "x"], "--objective 'x' must be NAME=PATH"),
            (["--device", "gpu"], "--device 'gpu' must be cpu, cuda"),
        ],
    )
    def test_bad_models(self, tiny, arguments, message):
        done = run("generate", "a red dog", "-m", tiny.folder, *arguments)
        assert done.exit_code == 2 and message in done.stderr


class TestSweep:
    def test_grid_rewards_and_table(self, loaded, tmp_path):
        done = run(*sweep_of(SHIPPED, tmp_path))
        assert done.exit_code == 0, done.output
        assert {p.name for p in tmp_path.iterdir()} == {
            "cells", "grid.png", "rewards.json", "settings.json",
        }  # fmt: skip
        for text in ("SD", "w = 0", "w = 1", "aesthetic", "grid.png", "rewards.json"):
            assert text in done.stdout

    def test_strength_is_that_of_generate(self, loaded, monkeypatch, tmp_path):
        plans = []

        def noted(pipe, plan, folder, **options):
            plans.append(plan)
            return sweeps.SweepResult(folder, folder, {})

        monkeypatch.setattr(sweeps, "run_sweep", noted)
        for given in (["-s", 1.5], ["-s", "cool=2"], []):
            assert run(*sweep_of(SHIPPED, tmp_path), *given).exit_code == 0
        assert [plan.strength for plan in plans] == [1.5, {"cool": 2.0}, None]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--strength", "much"], "--strength 'much' must be a number or NAME=NUMBER"),
            (["--strength", "hot=2"], "UnknownObjective: strength: unknown objective 'hot'"),
            (["--weights", "0,x"], "--weights '0,x' must be comma-separated numbers"),
            (["--weights", "2"], "InvalidWeights"),
            (["--seeds", "0.5"], "--seeds '0.5' must be comma-separated numbers"),
            (["--toward", "hot"], "UnknownObjective"),
            (["--reward", "beauty"], "'beauty'"),
        ],
    )
    def test_bad_input(self, loaded, calls, tmp_path, arguments, message):
        done = run(*sweep_of(SHIPPED, tmp_path), *arguments)
        assert done.exit_code == 2 and message in done.stderr and calls == []

    def test_other_settings_in_the_same_folder(self, loaded, tmp_path):
        assert run(*sweep_of(SHIPPED, tmp_path)).exit_code == 0
        done = run(*sweep_of(SHIPPED, tmp_path), "--steps", 3)
        assert done.exit_code == 2
        assert "ResumeMismatch" in done.stderr and "num_inference_steps was 2, is 3" in done.stderr

    @pytest.mark.full  # the exit is tested below, resuming in tests/evaluation
    def test_ctrl_c_keeps_finished_cells_and_says_how_to_resume(self, tiny, loaded, tmp_path):
        arguments = [str(a) for a in sweep_of(tiny.folder, tmp_path, "--batch-size", 1)]
        arguments[arguments.index("--steps") + 1] = "40"  # long enough to be caught in the act
        # a test run in the background hands down an ignored SIGINT, which Python then leaves alone
        start = (
            "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "runpy.run_module('msdda_fast', run_name='__main__', alter_sys=True)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while not list(tmp_path.glob("cells/*.png")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert process.returncode == 130, stderr
        assert f"finished cells are in {tmp_path}" in stderr and "same command again" in stderr
        assert "Traceback" not in stderr and not list(tmp_path.rglob("*.partial"))
        kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cells/*.png")}
        assert 1 <= len(kept) < 6
        done = run(*arguments)
        assert done.exit_code == 0, done.stderr
        assert len(list(tmp_path.glob("cells/*.png"))) == 6
        assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_ctrl_c_while_generating(loaded, monkeypatch, pipe):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe), "__call__", interrupted)
    done = run("generate", "a red dog")
    assert done.exit_code == 130 and "Stopped" in done.stderr


def test_doctor_reports_and_never_fails(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    done = run("doctor")
    assert done.exit_code == 0
    for text in ("torch", "diffusers", "eager", "native", "C++ compiler", "msdda-fast/emoji-flow",
                 "WanPipeline", "TCDScheduler", "UniPCMultistepScheduler"):  # fmt: skip
        assert text in done.output
    assert "none of c++" in done.output


@pytest.mark.parametrize("command", [[], ["generate"], ["sweep"], ["doctor"]])
def test_help(command):
    done = run(*command, "--help")
    assert done.exit_code == 0 and "Usage" in done.output


def test_usage_errors():
    assert run("generate").exit_code == 2
    assert run("paint").exit_code == 2


def test_help_does_not_wait_for_diffusers():
    code = (
        "import sys\n"
        "from msdda_fast.cli.app import main\n"
        "sys.argv = ['msdda-fast', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('diffusers', 'transformers', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
