# SPDX-License-Identifier: Apache-2.0
"""The command: what its options become, and that its processes come, go and are replaced."""

import os
import re
import signal
import subprocess
import sys
import threading

import httpx2
import pytest
from typer.testing import CliRunner

from msdda_fast.cli import app as cli
from msdda_fast.serve.process import Process
from tests.serve.conftest import until

runner = CliRunner()
LOADED = 120  # seconds; a process imports and loads


def run(*arguments, **environment):
    return runner.invoke(cli.app, ["serve", *map(str, arguments)], env=environment)


class TestOptions:
    @pytest.fixture
    def started(self, monkeypatch):
        made = []
        monkeypatch.setattr(Process, "run", lambda self: made.append((self, 1)))
        monkeypatch.setattr(Process, "run_many", lambda self, count: made.append((self, count)))
        return made

    def test_they_reach_the_service(self, started):
        done = run(
            "--port", 1234, "--max-batch", 3, "--max-wait-ms", 5, "--queue-limit", 9, "--workers",
            2, "--size", "64x32", "--steps", 7, "--objective", "a=b:0.5", "--grace", 1,
            MSDDA_API_KEY="key",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        ((process, count),) = started
        assert count == 2 and (process.port, process.host, process.grace_s) == (
            1234,
            "127.0.0.1",
            1,
        )
        assert process.engine == {
            "max_batch": 3,
            "max_wait_ms": 5.0,
            "queue_limit": 9,
            "client_limit": 8,
        }
        settings = process.settings
        assert (settings.sizes, settings.steps, settings.api_key) == (("64x32",), 7, "key")
        assert process.load.args[:2] == ("msdda-fast/emoji", ["a=b:0.5"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--size", "big"], "size 'big' must be WIDTHxHEIGHT"),
            (["--steps", "99"], "more than max_steps=64"),
            (["--timeout", "0"], "timeout_s must be positive"),
        ],
    )
    def test_bad_ones_are_one_line_and_exit_code_2(self, started, arguments, message):
        done = run(*arguments)
        assert done.exit_code == 2 and message in done.output and not started

    @pytest.mark.parametrize(("more", "steps"), [((), 4), (("--steps", 6), 6)])
    def test_an_accelerator_needs_few_steps(self, started, more, steps):
        assert run("--accelerator", "own", *more).exit_code == 0
        ((process, _),) = started
        assert process.settings.steps == steps and process.load.args[-1] == "own"

    @pytest.mark.parametrize(("model", "scale"), [("emoji", None), ("emoji-flow", 1.0)])
    def test_the_guidance_is_that_of_training(self, started, model, scale):
        """As that of `msdda-fast generate`."""
        assert run("--model", f"msdda-fast/{model}").exit_code == 0
        ((process, _),) = started
        assert process.settings.guidance_scale == scale

    def test_models_of_videos_are_refused_before_they_are_loaded(self, started, tmp_path):
        (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
        done = run("--model", tmp_path)
        assert done.exit_code == 2 and "WanPipeline makes videos" in done.output and not started

    def test_an_empty_key_is_no_open_door(self, started):
        assert run(MSDDA_API_KEY="").exit_code == 2 and not started

    def test_a_missing_package_is_named_with_what_installs_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "msdda_fast.serve.process", None)
        monkeypatch.delitem(sys.modules, "msdda_fast.serve.process")
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        done = run()
        assert done.exit_code == 2 and "msdda-fast[serve]" in done.output


class Command:
    """`msdda-fast serve` in a process of its own, on a free port that its log names."""

    def __init__(self, model, *arguments):
        command = [sys.executable, "-m", "msdda_fast", "serve", "--port", "0", "--steps", "2"]
        self.process = subprocess.Popen(
            [*command, "--model", str(model), "--device", "cpu", *arguments],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.log = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        self.log += iter(self.process.stderr.readline, "")

    def url(self):
        found = re.search(r"http://127.0.0.1:\d+", "".join(self.log))
        return found and found[0]

    def is_ready(self):
        try:
            return self.url() and httpx2.get(f"{self.url()}/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def draw(self, **body):
        body = {"prompt": "a dog", **body}
        return httpx2.post(f"{self.url()}/v1/images/generations", json=body, timeout=60)

    def stop(self):
        if self.process.poll() is not None:
            return self.process.returncode
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join(10)
        self.process.stderr.close()
        return code


@pytest.fixture
def command(tiny):
    started = []

    def start(*arguments):
        started.append(Command(tiny.folder, *arguments))
        until(started[-1].is_ready, LOADED)
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.mark.slow
def test_sigterm_under_load_answers_every_request(command):
    command = command("--max-batch", "2")
    answers = []

    def ask(seed):
        answers.append(command.draw(seed=seed, n=4, steps=60).status_code)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: "msdda_drawing_images 2.0" in httpx2.get(f"{command.url()}/metrics").text)
    command.stop()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 4 and set(answers) <= {200, 503}
    assert 200 in answers


@pytest.mark.slow
def test_a_killed_process_is_replaced(command):
    command = command("--workers", "2", "--max-batch", "1")
    until(lambda: "".join(command.log).count('"event": "ready"') == 2, LOADED)
    children = re.findall(r"Started server process \[(\d+)\]", "".join(command.log))
    os.kill(int(children[0]), signal.SIGKILL)
    until(lambda: "".join(command.log).count('"event": "ready"') == 3, LOADED)
    assert command.draw().status_code == 200
    assert command.stop() == 0
