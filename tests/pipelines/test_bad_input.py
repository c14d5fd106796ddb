# SPDX-License-Identifier: Apache-2.0
"""Bad input gets a named error, with the offending value, before any network runs."""

import pytest
import torch

import msdda_fast as mf
from tests.tiny_model import quiet, small_unet

GOOD = dict(prompt=["a red dog", "a blue cat"], num_inference_steps=2, output_type="latent")

CASES = {
    "unknown objective": (dict(weights={"warm": 1, "hot": 0}), mf.UnknownObjective, "'hot'.*warm"),
    "missing objective": (dict(weights={"warm": 1.0}), mf.InvalidWeights, "cool"),
    "weights off the simplex": (dict(weights=(0.6, 0.6)), mf.InvalidWeights, r"1\.2"),
    "negative weights": (dict(weights=(-0.5, 1.5)), mf.InvalidWeights, r"-0\.5"),
    "NaN weights": (dict(weights=(float("nan"), 1.0)), mf.InvalidWeights, "nan"),
    "M mismatch": (dict(weights=(0.2, 0.3, 0.5)), mf.InvalidShape, r"\(3,\).*\(2,\)"),
    "B mismatch": (dict(weights=torch.full((3, 2), 0.5)), mf.InvalidShape, r"\(3, 2\).*\(2, 2\)"),
    "bad schedule": (dict(weights=lambda k: (1, 0, 0)), mf.InvalidShape, r"\(3,\)"),
    "T above training": (dict(num_inference_steps=1001), mf.InvalidSchedule, "1001.*1000"),
    "T of zero": (dict(num_inference_steps=0), mf.InvalidSchedule, "0"),
    "T not an integer": (dict(num_inference_steps=2.5), mf.InvalidSchedule, r"2\.5"),
    "eta above 1": (dict(etas={"warm": 1.5}), mf.InvalidSchedule, r"'warm'.*\[0, 1\].*1\.5"),
    "eta below 0": (dict(etas=(-0.1, 1.0)), mf.InvalidSchedule, r"-0\.1"),
    "eta NaN": (dict(etas=(float("nan"), 1.0)), mf.InvalidSchedule, "nan"),
    "eta of an unknown objective": (dict(etas={"hot": 1}), mf.UnknownObjective, "'hot'"),
    "too many etas": (dict(etas=(1, 1, 1)), mf.InvalidShape, r"\(3,\).*\(2,\)"),
    "mixed zero variance": (dict(etas=(0, 1)), mf.ZeroVariance, "dominate"),
    "zero-variance policy": (dict(zero_variance="ignore"), ValueError, "'ignore'.*dominate"),
    "guidance below 1": (dict(guidance_scale=0.5), mf.InvalidSchedule, r"at least 1.*0\.5"),
    "guidance infinite": (dict(guidance_scale=float("inf")), mf.InvalidSchedule, "inf"),
    "guidance by unknown name": (dict(guidance_scale={"hot": 2}), mf.UnknownObjective, "'hot'"),
    "height": (dict(height=30), mf.InvalidShape, "height.*8.*30"),
    "width": (dict(width=-8), mf.InvalidShape, "width.*-8"),
    "latents shape": (dict(latents=torch.zeros(2, 4, 8, 9)), mf.InvalidShape, r"8, 8\).*8, 9\)"),
    "latents dtype": (
        dict(latents=torch.zeros(2, 4, 8, 8, dtype=torch.int64)), mf.InvalidShape, "int64",
    ),
    "latents no tensor": (dict(latents=[1.0]), mf.InvalidShape, r"\[1\.0\]"),
    "seed and generator": (
        dict(seed=1, generator=torch.Generator()), ValueError, "seeds and generator",
    ),
    "number of seeds": (dict(seed=[1, 2, 3]), mf.InvalidShape, "3.*2"),
    "seed not an integer": (dict(seed=1.5), ValueError, r"1\.5"),
    "number of generators": (dict(generator=[torch.Generator()]), mf.InvalidShape, "1.*2"),
    "no prompt": (dict(prompt=None), ValueError, "prompt_embeds"),
    "empty prompts": (dict(prompt=[]), ValueError, "empty"),
    "prompt type": (dict(prompt=[1]), ValueError, r"\[1\]"),
    "prompt twice": (dict(prompt_embeds=torch.zeros(2, 24, 16)), ValueError, "prompt_embeds"),
    "embeds width": (
        dict(prompt=None, prompt_embeds=torch.zeros(2, 24, 8)), mf.InvalidShape, r"16\).*8\)",
    ),
    "embeds dimension": (
        dict(prompt=None, prompt_embeds=torch.zeros(24, 16)), mf.InvalidShape, r"\(24, 16\)",
    ),
    "negative embeds": (
        dict(negative_prompt_embeds=torch.zeros(3, 24, 16)), mf.InvalidShape, r"\(2, L.*\(3, 24",
    ),
    "negative prompts": (dict(negative_prompt=["a", "b", "c"]), ValueError, "3.*2"),
    "negative prompt twice": (
        dict(negative_prompt="a", negative_prompt_embeds=torch.zeros(2, 24, 16)),
        ValueError,
        "both",
    ),
    "images per prompt": (dict(num_images_per_prompt=0), ValueError, "0"),
    "images per prompt type": (dict(num_images_per_prompt=1.5), ValueError, r"1\.5"),
    "output type": (dict(output_type="gif"), ValueError, "'gif'.*latent"),
    "callback tensors": (
        dict(callback_on_step_end_tensor_inputs=["noise"]), ValueError, "'noise'.*latents",
    ),
    "eta by stock name": (dict(eta=0.5), ValueError, "eta= .*etas"),
    "timesteps": (dict(timesteps=[1]), ValueError, "timesteps= .*num_inference_steps"),
    "guidance rescale": (dict(guidance_rescale=0.7), ValueError, "guidance_rescale="),
    "unknown argument": (dict(wieghts=(1, 0)), TypeError, "wieghts"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_call_is_refused_before_any_network_runs(pipe, calls, monkeypatch, case):
    change, error, message = CASES[case]
    encoded = []
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *a, **k: encoded.append(1))
    with pytest.raises(error, match=message):
        pipe(**{**GOOD, **change})
    assert calls == [] and encoded == []


def test_a_run_that_ends_in_nan_is_an_error_and_no_picture(tiny):
    broken = small_unet()
    with torch.no_grad():
        broken.conv_out.bias[0] = torch.nan
    objectives = {"own": mf.Objective(unet=broken), "plain": mf.Objective.base()}
    pipe = tiny.load(objectives=objectives)
    for output_type in ("pil", "latent"):
        with pytest.raises(mf.NotFinite, match=r"2 of 2 samples"):
            pipe(["a red dog", "a blue cat"], num_inference_steps=2, output_type=output_type)
    assert pipe(**GOOD, weights=(0, 1)).images.isfinite().all()  # it is not evaluated
    alone = quiet(mf.MSDDAPipeline.from_pipe(pipe, unet=broken, objectives={"x": mf.Objective()}))
    with pytest.raises(mf.NotFinite):  # one forward for all objectives
        alone("a red dog", num_inference_steps=2)
    with mf.Engine(alone) as engine:
        future = engine.submit(mf.ImageRequest("a red dog", num_inference_steps=2, seed=0))
        error = future.exception(30)
    assert isinstance(error, mf.EngineFailed) and isinstance(error.__cause__, mf.NotFinite)
