# SPDX-License-Identifier: Apache-2.0
"""Odd input to every command: one line that names it, exit code 2, nothing drawn, nothing left."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import msdda_fast as mf
from msdda_fast.cli import app as cli
from msdda_fast.cli import compare as cli_compare
from msdda_fast.cli import generate as cli_generate
from msdda_fast.cli import policy as cli_policy
from msdda_fast.cli import session
from msdda_fast.cli import sweep as cli_sweep
from msdda_fast.cli import tune as cli_tune
from msdda_fast.pipelines.prompt_length import check_text

runner = CliRunner()
LONG = "a red dog " * 8  # 24 words; the tiny text encoder reads 24 tokens, start and end included
WIDE = str(2**64)


def run(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments], terminal_width=200)


@pytest.fixture
def loads(pipe, tiny, monkeypatch):
    """Let commands use a pipeline in memory, and say what was asked for."""
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return pipe

    for module in (cli_generate, cli_sweep, cli_compare, cli_tune, cli_policy):
        monkeypatch.setattr(module, "load", load)
    return asked


@pytest.fixture
def files(tmp_path):
    """Short prompts, a long one, and pairs with a long one."""
    (tmp_path / "short.txt").write_text("a dog\na cat\n")
    (tmp_path / "long.txt").write_text(f"a dog\n{LONG}\n")
    (tmp_path / "pairs").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(tmp_path / "pairs" / f"{name}.png")
    row = {"prompt": LONG, "chosen": "red.png", "rejected": "blue.png"}
    (tmp_path / "pairs" / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def commands(files, out, prompts="short.txt"):
    """Every command that writes, as quick as it can be."""
    text = (files / prompts).read_text().splitlines()[-1]
    rewards = ["--reward", "warm=aesthetic", "--reward", "cool=aesthetic"]
    common = ["--steps", 1, "--guidance", 1]
    listed = ["--prompts", files / prompts]
    return {
        "generate": ["generate", text, "-o", out / "x.png", *common],
        "sweep": ["sweep", "-p", text, "--toward", "cool", "--reward", "aesthetic", "-o", out,
                  *common],
        "compare": ["compare", "-o", out, *rewards, *listed, *common],
        "tune": ["tune", "-o", out, *rewards, *listed, *common],
        "dpok": ["train", "dpok", "--reward", "aesthetic", "-o", out, *listed],
        "step-dpo": ["train", "step-dpo", "--reward", "aesthetic", "-o", out, *listed],
        "reward-gradient": [
            "train", "reward-gradient", "--reward", "aesthetic", "-o", out, *listed
        ],
    }  # fmt: skip


COMMANDS = ("generate", "sweep", "compare", "tune", "dpok", "step-dpo", "reward-gradient")


def assert_refused(done, message, code=2):
    assert done.exit_code == code, done.output
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.output


class TestLongPrompts:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_refuses_what_the_text_encoder_would_cut(
        self, loads, files, calls, command
    ):
        done = run(*commands(files, files / "out", "long.txt")[command])
        assert_refused(done, "has 26 tokens, but the text encoder reads at most 24")
        assert "InvalidRequest: the prompt 'a red dog a red" in done.stderr
        assert calls == [] and not (files / "out").exists()

    def test_so_are_negative_prompts_and_those_of_pairs(self, loads, files, calls):
        for arguments in (
            ["generate", "a dog", "--negative-prompt", LONG, "-o", files / "out" / "x.png"],
            ["train", "step-dpo", "--pairs", files / "pairs", "-o", files / "out"],
        ):
            assert_refused(run(*arguments), "has 26 tokens")
        assert calls == [] and not (files / "out").exists()

    def test_the_longest_prompt_that_is_read_is_accepted(self, pipe):
        check_text(pipe.tokenizer, LONG.removesuffix("red dog ").strip())
        with pytest.raises(mf.InvalidRequest, match="the text has 25 tokens"):
            check_text(pipe.tokenizer, LONG.removesuffix("dog ").strip())

    def test_bytes_that_are_no_text_are_refused(self, loads, tmp_path):
        done = run("generate", "a dog \udcff", "-o", tmp_path / "x.png")
        assert_refused(done, "is not valid Unicode")


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("generate", ["-w", "warm=0.9", "-w", "warm=0.3", "-w", "cool=0.7"], "--weight names"),
        ("generate", ["-w", "warm=0.3", "-w", " warm=0.3"], "--weight names 'warm' twice"),
        ("sweep", ["--reward", "aesthetic"], "--reward names 'aesthetic' twice"),
        ("compare", ["--reward", "warm=warmth"], "--reward names 'warm' twice"),
        ("compare", ["--judge", "warmth", "--judge", "warmth"], "--judge names 'warmth' twice"),
        ("compare", ["--systems", "SD,SD"], "--systems names 'SD' twice"),
        ("compare", ["--oracle", "0.5=.", "--oracle", "0.50=."], "--oracle names 0.5 twice"),
        ("compare", ["--seeds", "0-3,2"], "--seeds names 2 twice"),
        ("tune", ["--reward", "cool=warmth"], "--reward names 'cool' twice"),
        # numbers
        ("generate", ["--seed", WIDE], f"--seed {WIDE}: seeds have 64 bits"),
        ("generate", ["--seed", -(2**63) - 1], "seeds have 64 bits"),
        ("generate", ["--seed", 2**64 - 1, "-n", 2], "seeds have 64 bits"),
        ("sweep", ["--seeds", f"0,{WIDE}"], f"--seeds {WIDE}: seeds have 64 bits"),
        ("compare", ["--seeds", f"0-{WIDE}"], "seeds have 64 bits"),
        ("compare", ["--front-seeds", WIDE], "--front-seeds"),
        ("compare", ["--seeds", "0-999999999"], "names more than 100000 seeds"),
        ("tune", ["--seeds", WIDE], "seeds have 64 bits"),
        ("dpok", ["--seed", WIDE], "seeds have 64 bits"),
        ("step-dpo", ["--seed", WIDE], "seeds have 64 bits"),
        ("reward-gradient", ["--seed", WIDE], "seeds have 64 bits"),
        ("tune", ["--weight", "nan"], "--weight must lie in [0, 1], got nan"),
        ("compare", ["--oracle", "nan=."], "--oracle 'nan=.' must be W=PATH with W in [0, 1]"),
        ("compare", ["--oracle", "0.5=/no"], "no file or folder at /no"),
        ("dpok", ["--lr", "nan"], "lr must be > 0 and finite, got nan"),
        ("dpok", ["--guidance", "inf"], "guidance_scale must be > 0 and finite, got inf"),
        ("reward-gradient", ["--kl-weight", "nan"], "kl_weight must be >= 0 and finite, got nan"),
        ("step-dpo", ["--beta", "inf"], "beta_dpo must be > 0 and finite, got inf"),
        # of the model, before a folder is bound to it
        ("sweep", ["--guidance", "nan"], "guidance_scale must be finite"),
        ("compare", ["--steps", 2000], "num_steps is 2000, expected 1 to 1000"),
        ("step-dpo", ["--denoising-steps", 2000], "num_steps is 2000"),
        ("reward-gradient", ["--denoising-steps", 2000], "num_steps is 2000"),
        ("sweep", ["--toward", "[/red]"], "unknown objective '[/red]'"),
        # files
        ("generate", ["-o", "newdir/"], "is a folder; name a file in it: newdir/out.png"),
        ("generate", ["-o", "x.xyz"], "must end in the suffix of an image format"),
        ("generate", ["-o", "x"], "must end in the suffix of an image format"),
        ("generate", ["-o", "x.wmf"], "must end in the suffix of an image format"),
        ("generate", ["-o", "/dev/null/x.png"], "/dev/null is not a folder"),
        ("compare", ["--tuned", "pairs/pairs.jsonl"], "unknown system 'prompt'"),
        ("compare", ["--tuned", "list.json"], "list.json is not a file of tuned settings in JSON"),
        ("compare", ["--tuned", "pairs/red.png"], "pairs/red.png is not a file of tuned settings"),
        ("tune", ["--prompts", "pairs/red.png"], "pairs/red.png is not a text file in UTF-8"),
    ],
)  # fmt: skip
def test_it_is_named(loads, files, calls, monkeypatch, command, more, message):
    monkeypatch.chdir(files)
    (files / "list.json").write_text("[1]")
    before = set(files.rglob("*"))
    assert_refused(run(*commands(files, files / "out")[command], *more), message)
    assert calls == [] and set(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (name, f"ValueError: --device {name!r} must be cpu, cuda, cuda:1, ... or mps")
        for name in ("", "gpu", "cuda:x", "cuda:-1", "cpu:3", "meta", "CPU", "xpu", "[/red]")
    ]
    + [
        (f"cuda{end}", f"BackendUnavailable: --device cuda{end}: PyTorch finds no CUDA GPU here")
        for end in ("", ":0", ":99")
    ]
    + [("mps", "BackendUnavailable: --device mps: PyTorch finds no Apple GPU here")],
)
def test_a_device_that_is_not_here_is_named(tmp_path, monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    done = run("generate", "a dog", "--device", device, "-o", tmp_path / "x.png")
    assert_refused(done, message)


def test_devices_that_are_here_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert session._device("cuda:1") == torch.device("cuda:1")
    assert session._device("cpu") == session._device("cpu:0") == torch.device("cpu")
    with pytest.raises(mf.BackendUnavailable, match="the last GPU here is cuda:1"):
        session._device("cuda:2")


@pytest.mark.parametrize("text", ["[]", "{", "", '{"_class_name": "StableDiffusionPipeline"}'])
def test_a_damaged_model_is_named(tmp_path, text):
    folder = tmp_path / "[/model]"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(text)
    done = run("generate", "a dog", "-m", folder, "-o", tmp_path / "x.png")
    assert_refused(done, f"{folder / 'model_index.json'} ")


def test_an_objective_given_twice_is_named_before_its_file_is_read(tmp_path):
    twice = ["--objective", "a=/no/file", "--objective", "a=base", "-o", tmp_path / "x.png"]
    assert_refused(run("generate", "a dog", *twice), "--objective names 'a' twice; give it once")


class TestImages:
    @pytest.mark.parametrize(
        ("name", "kind"), [("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.webp", "WEBP")]
    )
    def test_the_suffix_decides_the_format(self, loads, pipe, tmp_path, name, kind):
        file = tmp_path / name
        done = run("generate", "a dog", "--seed", 1, "--steps", 1, "-o", file)
        assert done.exit_code == 0, done.output
        with Image.open(file) as image:
            assert image.format == kind and image.size == (32, 32)

    def test_names_are_printed_as_they_are(self, loads, tmp_path):
        file = tmp_path / "a [/red] [bold]:dog: \N{DOG}.png"
        done = run("generate", "[/b] a dog", "--seed", 1, "--steps", 1, "-o", file)
        assert done.exit_code == 0 and done.stdout == f"{file}  seed 1\n" and file.is_file()

    def test_the_largest_seed_is_itself(self, loads, pipe, tmp_path):
        done = run("generate", "a dog", "--seed", 2**64 - 1, "--steps", 1, "-o", tmp_path / "x.png")
        assert done.exit_code == 0 and f"seed {2**64 - 1}" in done.stdout
        (expected,) = pipe("a dog", seed=2**64 - 1, num_inference_steps=1).images
        with Image.open(tmp_path / "x.png") as image:
            assert image.tobytes() == expected.tobytes()

    def test_every_output_is_checked(self, loads, tmp_path, calls):
        (tmp_path / "x-1.png").symlink_to(tmp_path / "elsewhere")
        done = run("generate", "a dog", "-n", 2, "-o", tmp_path / "x.png")
        assert_refused(done, "x-1.png is a symbolic link")
        assert calls == [] and not (tmp_path / "elsewhere").exists()


class TestDisk:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_full_disk_is_noticed_before_a_model_is_loaded(
        self, loads, files, monkeypatch, command
    ):
        def full(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        arguments = commands(files, files / "out")[command]
        before = set(files.rglob("*"))
        monkeypatch.setattr(Path, "write_bytes", full)
        assert_refused(run(*arguments), f"cannot write in {files}: No space left on device")
        assert loads == [] and set(files.rglob("*")) == before

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_file_or_a_device_is_no_folder(self, loads, files, command):
        for place in (files / "short.txt", Path("/dev/null")):
            assert_refused(run(*commands(files, place)[command]), f"{place} is not a folder")
        assert loads == []

    def test_a_disk_that_fills_up_while_writing_is_a_failure(self, loads, tmp_path, monkeypatch):
        def full(self, file, format=None):
            Path(file).write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        file = tmp_path / "x.png"
        file.write_text("old")
        monkeypatch.setattr(cli_generate.parse, "image_file", lambda text, option: (file, "PNG"))
        monkeypatch.setattr(Image.Image, "save", full)
        done = run("generate", "a dog", "--steps", 1, "-o", file)
        assert_refused(done, f"WriteFailed: cannot write {file}: No space left on device", code=1)
        assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]

    def test_leftovers_of_a_killed_run_go(self, loads, files):
        arguments = commands(files, files / "out")["sweep"]
        assert run(*arguments).exit_code == 0
        for place in ("", "cells"):
            (files / "out" / place / ".grid.png.4711.partial").write_text("half")
        assert run(*arguments).exit_code == 0
        assert not list(files.rglob("*.partial"))


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("out of\nmemory"),
        MemoryError(),
        FloatingPointError("loss nan"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_what_fails_while_it_runs_is_one_line_and_exit_code_1(monkeypatch, tmp_path, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(cli_generate, "load", fail)
    done = run("generate", "a dog", "-o", tmp_path / "x.png")
    assert_refused(done, f"{type(failure).__name__}: {' '.join(str(failure).split())}", code=1)


def test_names_in_tables_are_printed_as_they_are(capsys):
    cli_sweep._print_means([None, 0.5], {"[bold]x[/red]": [1.0, 2.0]}, "SD")
    assert "[bold]x[/red]" in capsys.readouterr().out


def test_the_version():
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"msdda-fast {mf.__version__}\n")


@pytest.mark.parametrize("command", ["tune", "dpok", "step-dpo", "reward-gradient"])
def test_a_family_that_a_command_does_not_run_is_named(loads, files, command):
    (files / "model").mkdir()
    (files / "model/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    done = run(*commands(files, files / "out")[command], "--model", files / "model")
    assert_refused(done, "is a FluxPipeline, and `")
    assert loads == []
