# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast train`: from the command line to a LoRA folder that diffusers loads."""

import json
from itertools import chain

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import msdda_fast as mf
from msdda_fast import training
from msdda_fast.cli import app as cli
from msdda_fast.cli import policy as cli_policy

runner = CliRunner()
WEIGHTS = "pytorch_lora_weights.safetensors"


def run(*arguments):
    return runner.invoke(cli.app, ["train", *map(str, arguments)], terminal_width=200)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red dog\n\na blue cat\n")
    return file


def dpok(tiny, prompts, folder, *more):
    return [
        "dpok", "--model", tiny.folder, "--reward", "aesthetic", "--prompts", prompts, "--out",
        folder, "--loops", 2, "--steps", 2, "--prompts-per-loop", 2, "--guidance", 1,
        "--device", "cpu", "--lr", 0.01, "--preset", "shipped", "--samples-per-prompt", 2,
        "--policy-steps", 1, "--mixed-precision", "no", *more,
    ]  # fmt: skip


@pytest.mark.full  # a training; its parts are in tests/training
def test_dpok_writes_an_adapter_that_diffusers_and_the_command_line_load(tiny, prompts, tmp_path):
    folder = tmp_path / "run"
    done = run(*dpok(tiny, prompts, folder))
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(folder / WEIGHTS)
    assert f"--objective aesthetic={folder}:1" in done.stderr
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["loop"] for row in rows] == [1, 2]
    assert (folder / "curves.png").is_file()
    up = [t for name, t in load_file(folder / WEIGHTS).items() if "lora_B" in name]
    assert up and all(t.abs().max() > 0 for t in up)
    stock = tiny.stock()
    stock.load_lora_weights(folder, adapter_name="trained")
    assert stock.get_list_adapters() == {"unet": ["trained"]}
    stock.unload_lora_weights()
    again = run(*dpok(tiny, prompts, folder, "--loops", 3))
    assert again.exit_code == 0, again.output
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3


def test_reward_gradient_writes_an_adapter_and_its_command_goes_on(tiny, prompts, tmp_path):
    folder = tmp_path / "run"
    command = [
        "reward-gradient", "--model", tiny.folder, "--reward", "aesthetic", "--prompts", prompts,
        "--out", folder, "--denoising-steps", 2, "--guidance", 2, "--eta", 0.8, "--device", "cpu",
        "--batch-size", 2, "--timesteps", 400, 999, "--steps",
    ]  # fmt: skip
    done = run(*command, 2)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(folder / WEIGHTS)
    assert f"--objective aesthetic={folder}:0.8" in done.stderr
    assert (folder / "curves.png").is_file()
    up = [t for name, t in load_file(folder / WEIGHTS).items() if "lora_B" in name]
    assert up and all(t.abs().max() > 0 for t in up)
    assert run(*command, 3).exit_code == 0
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    done = run(*command, 3, "--eta", 1)
    assert done.exit_code == 2 and "ResumeMismatch" in done.stderr and "level" in done.stderr


def test_step_dpo_from_a_folder_of_pairs(tiny, tmp_path):
    folder, data = tmp_path / "run", tmp_path / "pairs"
    data.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (40, 32), name).save(data / f"{name}.png")
    row = {"prompt": "a red dog", "chosen": "red.png", "rejected": "blue.png"}
    (data / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    done = run(
        "step-dpo", "-m", tiny.folder, "--pairs", data, "-o", folder, "--steps", 3,
        "--batch-size", 2, "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {p.name for p in folder.iterdir()} == {
        "latents.safetensors", "log.jsonl", "checkpoint.pt", "curves.png", "step-000003", WEIGHTS,
        "settings.json",
    }  # fmt: skip
    assert {tuple(t.shape) for t in load_file(folder / "latents.safetensors").values()} == {
        (4, 8, 8)
    }
    (data / "pairs.jsonl").write_text('{"prompt": 1}\n')
    done = run("step-dpo", "-m", tiny.folder, "--pairs", data, "-o", folder)
    assert done.exit_code == 2 and "InvalidPairs" in done.stderr and "line 1" in done.stderr


@pytest.mark.full  # the folder of pairs is above
def test_step_dpo_on_the_models_own_samples(tiny, prompts, tmp_path):
    done = run(
        "step-dpo", "-m", tiny.folder, "--reward", "aesthetic", "--prompts", prompts, "-o",
        tmp_path / "run", "--steps", 2, "--batch-size", 2, "--seeds-per-prompt", 3,
        "--denoising-steps", 2, "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / WEIGHTS).is_file()


STEP_DPO = {
    "--model": "tiny", "--reward": "aesthetic", "--prompts": "prompts.txt", "--steps": 2,
    "--seeds-per-prompt": 3, "--denoising-steps": 1, "--guidance": 1, "--eta": 1,
}  # fmt: skip


@pytest.fixture
def ranked(tiny, tiny_kl, prompts, tmp_path, monkeypatch):
    """`step-dpo --reward` up to where the training would begin, on a pipeline in memory."""
    folders = {"tiny": tiny.folder, "other": tiny_kl.folder}
    models = {str(model.folder): model for model in (tiny, tiny_kl)}

    def load(model, objectives, dtype, device):
        eta = float(objectives[0].split(":")[-1])
        base = {"policy": mf.Objective.base(eta=eta)}
        return mf.MSDDAPipeline.from_pipe(models[model].shared(), objectives=base)

    monkeypatch.setattr(cli_policy, "load", load)
    monkeypatch.setattr(training, "add_lora", lambda *_, **__: None)
    trained = []
    monkeypatch.setattr(
        training, "train_step_dpo", lambda *a, **_: trained.append(a[2]) or tmp_path / "x"
    )

    def start(**changes):
        options = STEP_DPO | {"--prompts": prompts} | changes
        options["--model"] = folders[options["--model"]]
        return run("step-dpo", "-o", tmp_path / "run", *chain.from_iterable(options.items()))

    start.trained = trained
    return start


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "other", "was made otherwise: scheduler."),
        ("--reward", "warmth", "rewards.warmth was absent"),
        ("--prompts", "more", "prompts[2] was absent, is 'a blue dog'"),
        ("--seeds-per-prompt", 4, "seeds[3] was absent, is 3"),
        ("--denoising-steps", 2, "num_steps was 1, is 2"),
        ("--guidance", 2, "guidance_scale was 1.0, is 2.0"),
        ("--eta", 0.5, "objectives.policy.eta was 1.0, is 0.5"),
    ],
)
def test_step_dpo_refuses_samples_that_were_drawn_otherwise(
    ranked, prompts, tmp_path, calls, option, value, message
):
    assert ranked().exit_code == 0 and len(ranked.trained) == 1
    calls.clear()
    assert ranked().exit_code == 0 and calls == []  # the kept samples
    if option == "--prompts":
        value = tmp_path / value
        value.write_text(prompts.read_text() + "a blue dog\n")
    done = ranked(**{option: value})
    assert done.exit_code == 2 and calls == [] and len(ranked.trained) == 2
    assert "ResumeMismatch" in done.stderr and message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "beauty"], "unknown reward 'beauty'"),
        (["--eta", "0"], "eta must be in (0, 1], got 0.0"),
        (["--loops", "0"], "loops must be >= 1, got 0"),
        (["--mixed-precision", "fp16"], "mixed_precision must be no or bf16, got 'fp16'"),
        (["--prompts", "/no/file"], "FileNotFoundError"),
        (["--prompts-per-loop", "3"], "prompts_per_loop = 3, got 2"),
        (["--model", "/no/model"], "no file or folder at /no/model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(
    tiny, prompts, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: self)
    done = run(*dpok(tiny, prompts, tmp_path / "run"), *arguments)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert "Traceback" not in done.output and not (tmp_path / "run").exists()


def test_other_bad_input(tiny, prompts, tmp_path):
    for arguments, message in (
        (["step-dpo"], "give either --reward or --pairs"),
        (["step-dpo", "--reward", "aesthetic", "--pairs", tmp_path], "give either"),
        (["step-dpo", "--pairs", tmp_path, "--prompts", prompts], "--prompts goes with --reward"),
        (["step-dpo", "--pairs", tmp_path], "no pairs.jsonl or pairs.csv"),
        (["dpok", "--reward", "aesthetic", "-m", tiny.folder], "--prompts is needed for"),
    ):
        done = run(*arguments, "-o", tmp_path / "run")
        assert done.exit_code == 2 and message in done.stderr, done.output
    prompts.write_text("a\nb\na\n")
    done = run(*dpok(tiny, prompts, tmp_path / "run"))
    assert "line 3 repeats line 1: 'a'" in done.stderr
    prompts.write_text("\n")
    assert "has no prompts" in run(*dpok(tiny, prompts, tmp_path / "run")).stderr


def test_ctrl_c_says_how_to_continue(tiny, prompts, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_policy, "load", interrupted)
    done = run(*dpok(tiny, prompts, tmp_path / "run"))
    assert done.exit_code == 130 and "run the same command again to continue" in done.stderr


@pytest.mark.parametrize("command", [[], ["dpok"], ["step-dpo"]])
def test_help(command):
    done = run(*command, "--help")
    assert done.exit_code == 0 and "Usage" in done.output
