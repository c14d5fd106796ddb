# SPDX-License-Identifier: Apache-2.0
"""The runs of the reward-gradient trainer: kills, other runs, and what is refused."""

import contextlib
import shutil
from dataclasses import fields

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from msdda_fast import files
from msdda_fast.errors import BackendUnavailable, InvalidSchedule, InvalidShape
from msdda_fast.steps.ancestral import ancestral_rule
from msdda_fast.steps.ddim import DDIMRule, ddim_grid
from msdda_fast.training import ResumeMismatch, RewardGradientConfig
from msdda_fast.training import curves as curves_module
from msdda_fast.training import reward_gradient as module
from msdda_fast.training.rule_policy import RulePolicy

from .conftest import TinyDenoiser, assert_same_run, die_at_random, log_of, make_embeds
from .test_reward_gradient import PROMPTS, SCHEDULER, SMALL, Brightness, flow_rule, task, train

WEIGHTS = "pytorch_lora_weights.safetensors"


def test_killed_run_resumes_with_the_bits_of_a_straight_one(tmp_path):
    train(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):  # two scores a step: in the fourth
        train(tmp_path / "killed", task(Brightness(die_at=7)))
    assert [row["step"] for row in log_of(tmp_path / "killed")] == [1, 2, 3]
    assert not (tmp_path / "killed" / WEIGHTS).exists()
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "rew')  # a row torn by the kill
    train(tmp_path / "killed")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    train(tmp_path / "parts", steps=3)
    train(tmp_path / "parts")
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    reward = Brightness()
    train(tmp_path / "parts", task(reward))
    assert reward.life.calls == 0


DEADLY = {
    "loss": (module, "checked_score"),
    "adapter": (module, "save_lora"),
    "write": (files.os, "replace"),
    "log": (module.RunLog, "write"),
}


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_again_and_again_it_ends_with_the_files_of_a_straight_run(
    tmp_path, monkeypatch, seed
):
    train(tmp_path / "straight")
    for life in range(3):
        with monkeypatch.context() as patch:
            place = sorted(DEADLY)[(seed + life) % len(DEADLY)]
            die_at_random(patch, DEADLY[place], 10 * seed + life, last=3)
            with contextlib.suppress(KeyboardInterrupt):
                train(tmp_path / "killed")
    train(tmp_path / "killed")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


FREE = {"steps": 5, "checkpoint_every": 1}  # alter no step that was made
CHANGES = {
    "level": 0.8, "kl_weight": 0.2, "timesteps": (0, 500), "guidance_scale": 2.0, "batch_size": 3,
    "scored_steps": 1, "lr": 2e-2, "grad_clip": 2.0, "mixed_precision": "bf16", "seed": 1,
}  # fmt: skip


def other_base():
    network = TinyDenoiser()
    network.text.weight.data[0, 0] += 1
    return network


def test_every_field_of_the_configuration_is_free_or_compared():
    names = {field.name for field in fields(RewardGradientConfig)}
    assert names == FREE.keys() | CHANGES.keys()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    train(folder, steps=2)
    return folder


EMBEDS = {"encoder_hidden_states": 2 * make_embeds()}
NULL = {"encoder_hidden_states": make_embeds()[0]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, {name: value}) for name, value in CHANGES.items()),
        (r"prompts\[0\]", {"work": task(prompts=PROMPTS[::-1])}),
        ("conditions.encoder_hidden_states", {"work": task(conditions=EMBEDS)}),
        ("decode", {"work": task(decode=lambda latents: latents[:, 1:])}),
        ("reward", {"work": task(Brightness(value=torch.ones(4)))}),
        ("grid", {"rule": DDIMRule(ddim_grid(SCHEDULER, 4))}),
        ("rule", {"rule": flow_rule()}),
        ("base", {"network": other_base}),
        ("rank", {"rank": 2}),
        ("weight_dtype", {"dtype": torch.float16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_configuration_network_or_task_is_refused_and_the_run_kept(
    started, tmp_path, name, change
):
    folder = tmp_path / "copy"
    shutil.copytree(started, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change = {key: value() if key == "network" else value for key, value in change.items()}
    if name == "guidance_scale":
        change["work"] = task(null_conditions=NULL)
    with pytest.raises(ResumeMismatch, match=rf"made otherwise: .*{name}.* was .*, is .*"):
        train(folder, **change)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_fewer_steps_than_made_are_refused_and_what_alters_none_may_change(started, tmp_path):
    shutil.copytree(started, tmp_path / "copy")
    with pytest.raises(ValueError, match="has done 2 steps; steps = 1 is fewer"):
        train(tmp_path / "copy", steps=1)
    train(tmp_path / "copy", **FREE)


@pytest.mark.full  # a training with a picture
def test_the_curves_are_a_picture(tmp_path):
    train(tmp_path, curves=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt", "curves.png", "log.jsonl", WEIGHTS, "settings.json",
    }  # fmt: skip
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1000


def test_bfloat16_is_of_the_network_alone(tmp_path):
    network = train(tmp_path, mixed_precision="bf16", steps=1)
    assert network.calls[0].output.dtype == torch.bfloat16
    assert network.calls[0].x_t.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"level": 0.0}, "level must be > 0 and finite, got 0.0"),
        ({"kl_weight": -1.0}, "kl_weight must be >= 0"),
        ({"timesteps": (5, 1)}, r"timesteps must be \(low, high\), 0 <= low <= high"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be no or bf16, got 'fp16'"),
    ],
)
def test_bad_configuration_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        RewardGradientConfig(**SMALL | changes)


def test_bad_task_or_rule_is_named_before_any_work(tmp_path, monkeypatch):
    def refused(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            train(tmp_path, *arguments, **options)
        assert not list(tmp_path.iterdir())

    refused(
        ValueError, "'brightness' is not differentiable", task(Brightness(differentiable=False))
    )
    refused(ValueError, "2 prompts need as many rows", task(prompts=PROMPTS[:2]))
    refused(ValueError, "needs null_conditions", guidance_scale=2.0)
    refused(InvalidShape, "null_conditions must have shapes", task(null_conditions=EMBEDS))
    refused(InvalidSchedule, "level 1.0: no step with a timestep in", timesteps=(2, 300))
    refused(InvalidSchedule, "eta", level=1.5)
    refused(InvalidSchedule, "AncestralRule has no grid", rule=ancestral_rule([2.0, 1.0, 0.0]))
    clipping = DDIMScheduler.from_config(SCHEDULER.config, clip_sample=True)
    refused(InvalidSchedule, "clip_sample", rule=DDIMRule(ddim_grid(clipping, 3)))
    monkeypatch.setattr(curves_module, "find_spec", lambda name: None)
    refused(BackendUnavailable, r"matplotlib: pip install 'msdda-fast\[train\]'", curves=True)


def test_reward_or_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    with pytest.raises(InvalidShape, match=r"must return shape \(4,\)"):
        train(tmp_path, task(Brightness(value=torch.ones(2))))
    with pytest.raises(ValueError, match="not finite for the prompt 'bright"):
        train(tmp_path, task(Brightness(value=torch.full((4,), torch.nan))))
    real = RulePolicy.kl
    monkeypatch.setattr(RulePolicy, "kl", lambda *a: real(*a) * torch.inf)
    with pytest.raises(FloatingPointError, match=r"step 1: gradient norm nan"):
        train(tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
