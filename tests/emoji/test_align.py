# SPDX-License-Identifier: Apache-2.0
"""Adapters of one reward and of weighted sums of rewards."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from msdda_fast.assets import resolve
from msdda_fast.emoji import align
from msdda_fast.emoji.sampling import score
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.rewards import load_reward
from msdda_fast.training import Collection, ResumeMismatch

EMOJI = resolve("msdda-fast/emoji")
SHORT = align.AlignmentRecipe(
    config=replace(align.ALIGNMENT["aesthetic"].config, steps=1, batch_size=1, scored_steps=1)
)
SAMPLES = Collection(
    torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1]),
    torch.tensor([0, 0]),
    {"aesthetic": torch.tensor([3.0, 1.0])},
)


def test_a_weighted_sum_of_rewards():
    found = align.WeightedSum({"aesthetic": 0.25, "warmth": 2.0})
    images, prompts = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["a"] * 3
    wanted = 0.25 * load_reward("aesthetic")(images, prompts)
    wanted += 2 * load_reward("warmth")(images, prompts)
    torch.testing.assert_close(found(images, prompts), wanted)
    assert found.differentiable and found.name == "0.25 aesthetic + 2 warmth"


@pytest.mark.full  # minutes of loading; what a run is told apart by is in tests/training
def test_another_sum_does_not_continue_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.setattr(align, "PROMPTS", align.PROMPTS[:1])
    done = align.align_sum(EMOJI, {"aesthetic": 1.0}, SHORT, tmp_path)
    weights = load_file(done / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    with pytest.raises(ResumeMismatch, match="reward"):
        align.align_sum(EMOJI, {"aesthetic": 2.0}, SHORT, tmp_path)


@pytest.mark.parametrize(
    ("weights", "message"), [({}, "no rewards"), ({"beauty": 1.0}, "unknown reward 'beauty'")]
)
def test_unknown_rewards_are_named(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        align.align_sum(EMOJI, weights, SHORT, tmp_path)


def test_each_adapter_starts_from_factors_of_its_own():
    seeds = [recipe.config.seed for recipe in align.ALIGNMENT.values()]
    assert len(set(seeds)) == len(seeds)


def test_a_reward_that_was_not_stored_is_that_of_the_decoded_samples():
    pipe = MSDDAPipeline.from_pretrained(EMOJI)
    prompts = ["A red colored car.", "A blue colored dog."]
    stored = score(pipe, SAMPLES, prompts, "aesthetic")
    assert stored is SAMPLES.scores["aesthetic"]
    found = score(pipe, SAMPLES, prompts, "warmth")
    with torch.no_grad():
        images = pipe.vae.decode(SAMPLES.latents / pipe.vae.config.scaling_factor).sample
    wanted = load_reward("warmth")((images / 2 + 0.5).clamp(0, 1), ["A red colored car."] * 2)
    torch.testing.assert_close(found, wanted)
