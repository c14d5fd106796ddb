# SPDX-License-Identifier: Apache-2.0
"""`fusion="eps"` in a call: one step of the mixed predictions of the objectives' networks."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.steps.ddim import DDIMRule
from msdda_fast.steps.shares import eps_mixture, fusion_shares
from tests.tiny_model import quiet

PROMPTS, SEEDS, STEPS = ["a red dog", "a blue cat"], [3, 4], 4
WEIGHTS = {"warm": 0.3, "cool": 0.7}
REQUEST = dict(
    prompt=PROMPTS, weights=WEIGHTS, seed=SEEDS, num_inference_steps=STEPS, guidance_scale=3.0,
    output_type="latent",
)  # fmt: skip


def test_it_is_one_ddim_step_of_the_mixture(pipe):
    found = pipe(**REQUEST, fusion="eps").images
    with (
        torch.no_grad(),
        PipelineModel(pipe, PROMPTS, WEIGHTS, SEEDS, num_steps=STEPS, guidance_scale=3.0) as model,
    ):
        eta = torch.tensor([model.etas[name] for name in WEIGHTS], dtype=torch.float64)
        share, eta_w = fusion_shares(torch.tensor([[[*WEIGHTS.values()]]]).double(), eta)
        mixture = eps_mixture(share, DDIMRule(model.grid).eps_scale(eta))[:, 0].tolist()
        x = model.initial()
        for k in range(STEPS):
            eps = sum(
                part * model.eps(x, k, name) for part, name in zip(mixture[k], WEIGHTS, strict=True)
            )
            x = DDIMStep.of(model.grid, k, float(eta_w)).prev(x, eps, model.noise(k))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)
    assert (found - pipe(**REQUEST).images).abs().max() > 1e-2


@pytest.mark.sweep(mode=1)
@pytest.mark.parametrize("mode", ["exact", "merged", "auto"])
def test_modes_run_with_it(pipe, mode):
    """The same as Eq. 7 where etas are equal, and not where they differ."""
    equal = {"etas": {"warm": 0.9, "cool": 0.9}}
    eps, fused = (
        pipe(**REQUEST, **equal, mode=mode, fusion=f).images for f in ("eps", "posterior")
    )
    torch.testing.assert_close(eps, fused, rtol=0, atol=1e-4)
    unequal = [pipe(**REQUEST, mode=mode, fusion=f).images for f in ("eps", "posterior")]
    assert (unequal[0] - unequal[1]).abs().max() > 1e-2


def test_clipping_is_refused_before_any_work(tiny, calls):
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    pipe.scheduler.register_to_config(clip_sample=True)
    with pytest.raises(mf.InvalidSchedule, match="clip_sample=True"):
        pipe(**REQUEST, fusion="eps")
    assert calls == []
