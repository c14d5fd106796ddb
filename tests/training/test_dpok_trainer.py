# SPDX-License-Identifier: Apache-2.0
"""The DPOK trainer: the reward rises, a kill costs nothing, other runs are left alone."""

import contextlib
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from msdda_fast import files
from msdda_fast.errors import BackendUnavailable, InvalidShape
from msdda_fast.training import DPOKConfig, ResumeMismatch, Task, add_lora, train_dpok
from msdda_fast.training import curves as curves_module
from msdda_fast.training import dpok_run as run_module
from msdda_fast.training import dpok_trainer as trainer_module
from msdda_fast.training.rollout import relative_to_prompt

from .conftest import (
    SHAPE,
    TinyDenoiser,
    assert_same_run,
    die_at_random,
    log_of,
    make_embeds,
    make_unet,
)
from .test_alignment import GaussianPolicy

WEIGHTS = "pytorch_lora_weights.safetensors"
PROMPTS = ["bright", "brighter", "brightest"]
SMALL = {
    "loops": 4, "num_steps": 3, "guidance_scale": 1.0, "prompts_per_loop": 2,
    "samples_per_prompt": 2, "rollout_batch_size": 3, "buffer_size": 20, "policy_steps": 2,
    "batch_size": 3, "accumulation_steps": 2, "lr": 1e-2, "value_batches": 2,
    "value_batch_size": 8, "checkpoint_every": 2,
}  # fmt: skip

SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip


class Brightness:
    """Mean of the image; can die in a call, as if the process did."""

    name, differentiable = "brightness", True

    def __init__(self, die_at=None, value=None):
        self.value = value
        self.life = SimpleNamespace(calls=0, die_at=die_at)  # no fingerprint counts what is in here

    def __call__(self, images, prompts):
        self.life.calls += 1
        if self.life.calls == self.life.die_at:
            raise KeyboardInterrupt
        return images.mean(dim=(1, 2, 3)) if self.value is None else self.value


def task(reward=None, **changes):
    made = Task(
        reward=reward or Brightness(),
        decode=lambda latents: latents[:, :3].sigmoid(),
        prompts=PROMPTS,
        prompt_embeds=make_embeds(),
        latent_shape=SHAPE,
    )
    return replace(made, **changes)


def train(
    out_dir, work=None, network=None, curves=False, accelerator=None, rank=4, dtype=torch.float32,
    **config,
):  # fmt: skip
    """Train a fresh network, as a new process would, and return it."""
    network = network or TinyDenoiser()
    add_lora(network, rank=rank)
    train_dpok(
        network, SCHEDULER, work or task(), DPOKConfig(**SMALL | config), out_dir,
        accelerator=accelerator, weight_dtype=dtype, curves=curves, progress=False,
    )  # fmt: skip
    return network


@pytest.fixture
def fresh_accelerate():
    """Its settings belong to the process: let a test have others."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Contrast(Brightness):
    """Brightness less grey, about as wide as the rewards that people use."""

    def __call__(self, images, prompts):
        return 50 * (super().__call__(images, prompts) - 0.5)


@pytest.mark.full  # a training; gradients are in test_dpok.py
@pytest.mark.parametrize("advantage", ["value", "prompt"])
def test_reward_rises(tmp_path, advantage):
    train(
        tmp_path, task(Contrast()), GaussianPolicy(), advantage=advantage, loops=20, num_steps=8,
        trained_steps=6, lr=5e-3, policy_steps=3, prompts_per_loop=3, samples_per_prompt=16,
        rollout_batch_size=48, batch_size=72, buffer_size=288, clip=1e-3,
    )  # fmt: skip
    rewards = torch.tensor([row["reward"] for row in log_of(tmp_path)])
    before, after = rewards[:5], rewards[-5:]
    error = torch.cat([before - before.mean(), after - after.mean()]).square().mean().sqrt()
    assert after.mean() - before.mean() > 5 * error / 5**0.5


@pytest.mark.parametrize("advantage", ["value", "prompt"])
def test_killed_run_resumes_with_the_bits_of_a_straight_one(tmp_path, advantage):
    train(tmp_path / "straight", advantage=advantage)
    with pytest.raises(KeyboardInterrupt):  # two batches a loop: in the fourth
        train(tmp_path / "killed", task(Brightness(die_at=7)), advantage=advantage)
    assert [row["loop"] for row in log_of(tmp_path / "killed")] == [1, 2, 3]
    assert not (tmp_path / "killed" / WEIGHTS).exists()
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"loop": 4, "rew')  # a row torn by the kill
    train(tmp_path / "killed", advantage=advantage)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_killed_in_the_middle_of_an_accumulation_with_an_accelerator_kept(tmp_path, monkeypatch):
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    train(tmp_path / "straight", accelerator=accelerator)
    real, count = run_module.dpok_loss, iter(range(1, 1000))

    def die(*arguments, **options):
        if next(count) == 13:  # the first of two, in the fourth loop
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "dpok_loss", die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", accelerator=accelerator)
    train(tmp_path / "killed", accelerator=accelerator)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_longer_run_continues_and_a_finished_one_is_only_read_back(tmp_path):
    train(tmp_path / "straight")
    train(tmp_path / "parts", loops=3)
    train(tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "loop-000003")  # a checkpoint that the other never made
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    reward = Brightness()
    train(tmp_path / "parts", task(reward))
    assert reward.life.calls == 0
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


DEADLY = {
    "loss": (run_module, "dpok_loss"),
    "adapter": (trainer_module, "save_lora"),
    "write": (files.os, "replace"),
    "log": (trainer_module.RunLog, "write"),
}


@pytest.mark.parametrize("seed", range(4))
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


FREE = {"loops": 5, "checkpoint_every": 1}  # alter no loop that was made
CHANGES = {
    "num_steps": 4, "eta": 0.8, "trained_steps": 2, "guidance_scale": 2.0, "prompts_per_loop": 1,
    "samples_per_prompt": 3, "rollout_batch_size": 2, "buffer_size": 10, "advantage": "prompt",
    "policy_steps": 1, "batch_size": 2, "accumulation_steps": 1, "lr": 2e-2, "reward_weight": 1.0,
    "kl_weight": 0.2, "kl": "exact", "clip": 1e-3, "grad_clip": 1.0, "value_batches": 1,
    "value_batch_size": 4, "value_lr": 1e-3, "mixed_precision": "bf16", "seed": 1,
}  # fmt: skip


def other_base():
    network = TinyDenoiser()
    network.text.weight.data[0, 0] += 1
    return network


def test_every_field_of_the_configuration_is_free_or_compared():
    names = {field.name for field in fields(DPOKConfig)}
    assert names == FREE.keys() | CHANGES.keys()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    train(folder, loops=2)
    return folder


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, {name: value}) for name, value in CHANGES.items()),
        (r"prompts\[0\]", {"work": task(prompts=PROMPTS[::-1])}),
        ("prompt_embeds", {"work": task(prompt_embeds=2 * make_embeds())}),
        ("decode", {"work": task(decode=lambda latents: latents[:, :3].cos().abs())}),
        ("reward", {"work": task(Contrast())}),
        ("reward", {"work": task(Brightness(value=torch.ones(3)))}),
        ("base", {"network": other_base}),
        ("rank", {"rank": 2}),
        ("weight_dtype", {"dtype": torch.float16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_configuration_network_or_task_is_refused_and_the_run_kept(
    started, tmp_path, fresh_accelerate, name, change
):
    folder = tmp_path / "copy"
    shutil.copytree(started, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change = {key: value() if key == "network" else value for key, value in change.items()}
    change.setdefault("work", task(null_embeds=None))
    if name == "guidance_scale":
        change["work"] = task(null_embeds=make_embeds()[0])
    with pytest.raises(
        ResumeMismatch, match=rf"made otherwise: .*{name} was .*, is .*Use the earl"
    ):
        train(folder, **change)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_fewer_loops_than_made_are_refused_and_what_alters_none_may_change(started, tmp_path):
    shutil.copytree(started, tmp_path / "copy")
    with pytest.raises(ValueError, match="has done 2 loops; loops = 1 is fewer"):
        train(tmp_path / "copy", loops=1)
    train(tmp_path / "copy", **FREE)


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is empty or damaged; delete it"):
        train(tmp_path)


def test_first_update_of_a_loop_is_on_policy_and_the_base_model_is_at_no_distance(tmp_path):
    train(tmp_path, network=make_unet(), loops=2, policy_steps=1, buffer_size=12)
    first, second = log_of(tmp_path)
    assert first["kl"] == 0 < second["kl"]
    for row in (first, second):
        assert row["clip_fraction"] == 0
        assert row["ratio_deviation"] < 1e-6  # a batch of another size may round otherwise


def test_every_policy_step_is_one_optimiser_step_of_all_its_batches(tmp_path):
    calls = train(tmp_path, loops=2).calls
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {int(s["step"]) for s in stored["optimizer"]["state"].values()} == {4}
    assert {int(s["step"]) for s in stored["value_optimizer"]["state"].values()} == {2}
    assert len(stored["buffer"]["step"]) == 20  # of 2 x 12 transitions
    sizes = [len(call.x_t) for call in calls]
    rollout, update = [3] * 3 + [1] * 3, [3, 3] * 4  # with and without the adapter
    assert sizes == (rollout + update) * 2


def test_trained_steps_are_the_first_of_a_trajectory(tmp_path):
    train(tmp_path, loops=2, trained_steps=2, buffer_size=100)
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]
    assert stored["step"].tolist() == [0, 1] * 8


@pytest.mark.full  # a training with a picture
def test_checkpoints_are_lora_folders_and_the_curves_a_picture(tmp_path):
    train(tmp_path, loops=3, curves=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "loop-000002", "loop-000003", "checkpoint.pt", "curves.png", "log.jsonl", WEIGHTS,
        "settings.json",
    }  # fmt: skip
    last, final = load_file(tmp_path / "loop-000003" / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(last[key], final[key]) for key in final)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1000


def test_bfloat16_network_and_float32_log_probabilities(tmp_path, fresh_accelerate):
    network = train(tmp_path, mixed_precision="bf16", loops=2)
    assert network.calls[0].output.dtype == torch.bfloat16
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert stored["buffer"]["log_prob"].dtype == stored["buffer"]["x_prev"].dtype == torch.float32


def test_advantage_of_a_prompt_has_mean_zero_within_it_and_one_scale_over_all():
    rewards = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) * 2**0.5
    torch.testing.assert_close(relative_to_prompt(rewards), expected)
    assert relative_to_prompt(torch.ones(2, 2)).abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loops": 0}, "loops must be >= 1, got 0"),
        ({"eta": 0.0}, r"eta must be in \(0, 1\], got 0.0"),
        ({"eta": 1.5}, r"eta must be in \(0, 1\], got 1.5"),
        ({"clip": 0.0}, "clip must be > 0 and finite, got 0.0"),
        ({"kl": "reverse"}, "kl must be eps or exact, got 'reverse'"),
        ({"kl_weight": -1.0}, "kl_weight must be >= 0"),
        ({"advantage": "prompt", "samples_per_prompt": 1}, "samples_per_prompt must be at least 2"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be no or bf16, got 'fp16'"),
        ({"trained_steps": 4}, r"trained_steps must be in \[1, num_steps = 3\] or None, got 4"),
    ],
)
def test_bad_configuration_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DPOKConfig(**SMALL | changes)


def test_presets_are_valid_and_the_defaults_are_the_papers():
    paper, shipped = DPOKConfig(loops=8000), DPOKConfig.shipped(loops=9, eta=0.8)
    assert (paper.lr, paper.clip, paper.reward_weight, paper.kl_weight) == (1e-5, 1e-4, 1000, 0.1)
    assert paper.batch_size * paper.accumulation_steps == 24
    assert (shipped.loops, shipped.eta, shipped.num_steps) == (9, 0.8, 25)


def test_bad_task_is_named_before_any_work(tmp_path, monkeypatch):
    def refused(error, message, *arguments, **options):
        with pytest.raises(error, match=message):
            train(tmp_path, *arguments, **options)
        assert not list(tmp_path.iterdir())

    refused(ValueError, "3 with 2 different", task(prompts=["a", "b", "a"]))
    refused(ValueError, "prompts_per_loop = 4, got 3", prompts_per_loop=4)
    refused(ValueError, "3 prompts need as many", task(prompt_embeds=make_embeds(2)))
    refused(ValueError, "needs null_embeds", guidance_scale=2.0)
    refused(
        ValueError, "accumulation_steps is 1 in the accelerator", accelerator=Accelerator()
    )  # fmt: skip
    with monkeypatch.context() as patch:
        many = Accelerator(gradient_accumulation_steps=2)
        patch.setattr(type(many), "num_processes", property(lambda self: 2))
        refused(ValueError, "one process, but the accelerator has 2", accelerator=many)
    monkeypatch.setattr(curves_module, "find_spec", lambda name: None)
    refused(BackendUnavailable, r"matplotlib: pip install 'msdda-fast\[train\]'", curves=True)
    with pytest.raises(ValueError, match="call add_lora"):
        train_dpok(
            TinyDenoiser(), SCHEDULER, task(), DPOKConfig(**SMALL),
            tmp_path, curves=False,
        )  # fmt: skip


def test_reward_of_the_wrong_shape_or_not_finite_is_named(tmp_path):
    with pytest.raises(InvalidShape, match=r"must return shape \(3,\)"):
        train(tmp_path, task(Brightness(value=torch.ones(2))))
    with pytest.raises(ValueError, match="not finite for the prompt 'bright"):
        train(tmp_path, task(Brightness(value=torch.full((3,), torch.nan))))


def test_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    real = run_module.kl_term
    monkeypatch.setattr(run_module, "kl_term", lambda *a: real(*a) * torch.inf)
    with pytest.raises(FloatingPointError, match=r"loop 1: gradient norm nan"):
        train(tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
