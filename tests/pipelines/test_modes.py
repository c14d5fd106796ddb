# SPDX-License-Identifier: Apache-2.0
"""Approximate modes: exact in their exact limits, labelled with an estimate, and asked for."""

import pytest
import torch
from diffusers import DDIMScheduler

import msdda_fast as mf
from msdda_fast.engine.noise import noise_source
from msdda_fast.errors import InvalidMode, UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion import modes
from msdda_fast.steps.table import coefficient_table
from tests.tiny_model import quiet, small_unet

APPROXIMATE = ["merged", "auto"]
PROMPTS = ["a red dog", "a blue cat"]
STEPS = 12
CALL = dict(num_inference_steps=STEPS, guidance_scale=3.0, seed=0, output_type="latent")


#: Of mode "auto" here: some steps are exact, some merged.
BUDGET = 100


def run(pipe, mode, prompts=PROMPTS, **changes):
    if mode == "auto":
        changes = {"kl_budget": BUDGET, **changes}
    return pipe(prompts, mode=mode, **{**CALL, **changes})


def distance(actual, expected) -> float:
    return float((actual.images - expected.images).norm() / expected.images.norm())


@pytest.mark.sweep(mode=1)  # what all modes share
class TestExactLimits:
    def test_exact_is_the_default_and_estimates_nothing(self, pipe):
        default, named = pipe(PROMPTS, **CALL), run(pipe, "exact")
        assert torch.equal(default.images, named.images)
        assert named.step_kl_estimate is None

    @pytest.mark.parametrize("mode", APPROXIMATE)
    @pytest.mark.parametrize("weights", [(1, 0), (0, 1)], ids=["warm", "cool"])
    def test_one_objective_alone_is_exact_to_the_bit(self, pipe, mode, weights):
        out = run(pipe, mode, weights=weights)
        assert torch.equal(out.images, run(pipe, "exact", weights=weights).images)
        assert not out.step_kl_estimate.any()

    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_an_objective_at_a_time_by_schedule_is_exact(self, pipe, mode):
        schedule = lambda k: (1, 0) if k < STEPS // 2 else (0, 1)  # noqa: E731
        out = run(pipe, mode, weights=schedule)
        assert distance(out, run(pipe, "exact", weights=schedule)) < 1e-5
        assert not out.step_kl_estimate.any()

    def test_a_refresh_in_every_step_is_exact_to_the_bit(self, pipe, monkeypatch):
        monkeypatch.setattr(modes, "REFRESH", 1)
        out = run(pipe, "merged")
        assert torch.equal(out.images, run(pipe, "exact").images)
        assert not out.step_kl_estimate.any()

    def test_auto_without_a_budget_to_spend_is_exact_to_the_bit(self, pipe):
        out = run(pipe, "auto", kl_budget=0)
        assert torch.equal(out.images, run(pipe, "exact").images)
        assert not out.step_kl_estimate.any()

    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_merging_equal_adapters_or_one_hot_samples_changes_nothing(self, tiny, mode):
        twice = {"warm": mf.Objective(), "again": mf.Objective("warm")}
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=twice))
        out = run(pipe, mode)
        assert distance(out, run(pipe, "exact")) < 1e-4
        assert out.step_kl_estimate.max() < 1e-5
        one_hot = torch.eye(2)
        out = run(tiny.shared(), mode, weights=one_hot)
        assert distance(out, run(tiny.shared(), "exact", weights=one_hot)) < 1e-4
        assert out.step_kl_estimate.max() < 1e-5


@pytest.mark.sweep(mode=1)  # likewise
class TestApproximations:
    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_are_close_but_not_exact_and_say_so(self, pipe, mode):
        exact, out = run(pipe, "exact"), run(pipe, mode)
        assert 1e-4 < distance(out, exact) < 0.5
        kl = out.step_kl_estimate
        assert kl.shape == (STEPS, 2) and kl.isfinite().all() and (kl >= 0).all()
        assert (kl.sum(0) > 0).all()
        if mode == "merged":
            assert (kl[0] == 0).all()  # the first step is exact, for its error

    @pytest.mark.full  # likewise
    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_an_image_depends_on_nothing_else_in_its_batch(self, pipe, mode):
        weights = [{"warm": 0.3, "cool": 0.7}, {"warm": 0.9, "cool": 0.1}]
        together = run(pipe, mode, weights=weights, seed=[4, 9])
        for i in range(2):
            alone = run(pipe, mode, [PROMPTS[i]], weights=weights[i], seed=[[4], [9]][i])
            error = (together.images[i] - alone.images[0]).abs().max()
            assert error <= 1e-4 * alone.images.abs().max()
            torch.testing.assert_close(
                together.step_kl_estimate[:, i], alone.step_kl_estimate[:, 0], rtol=0.02, atol=1e-4
            )

    @pytest.mark.full  # likewise
    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_noise_is_that_of_the_exact_run(self, pipe, mode):
        """Another seed moves the image by as much as it does in exact mode, the mode by less."""
        exact = run(pipe, "exact"), run(pipe, "exact", seed=5)
        other = run(pipe, mode, seed=5)
        assert distance(other, exact[1]) < 0.5 * distance(exact[0], exact[1])

    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_a_schedule_of_weights_is_followed(self, pipe, mode):
        schedule = lambda k: (0.8, 0.2) if k % 2 else (0.2, 0.8)  # noqa: E731
        exact = run(pipe, "exact", weights=schedule)
        out = run(pipe, mode, weights=schedule)
        assert distance(out, exact) < 0.5
        assert distance(out, run(pipe, mode, weights=(0.8, 0.2))) > 1e-4

    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_merged_shares_are_those_of_the_step(self, pipe, mode):
        """Samples that are one objective each, and change places: merging is exact."""
        places = torch.eye(2), torch.eye(2).flip(0)
        schedule = lambda k: places[k // 2 % 2]  # noqa: E731
        out = run(pipe, mode, weights=schedule)
        assert distance(out, run(pipe, "exact", weights=schedule)) < 1e-4
        assert distance(out, run(pipe, "exact", weights=places[0])) > 1e-2

    @pytest.mark.full  # of all modes; exact is in test_captured.py
    def test_embeddings_that_a_callback_replaces_are_taken_up(self, pipe):
        def turn(pipe, k, t, tensors):
            return {"prompt_embeds": -tensors["prompt_embeds"]} if k == 0 else {}

        names = ("prompt_embeds",)
        looks = dict(callback_on_step_end=turn, callback_on_step_end_tensor_inputs=names)
        for mode in APPROXIMATE:
            out = run(pipe, mode, **looks)
            assert distance(out, run(pipe, "exact", **looks)) < 0.5
            assert distance(out, run(pipe, mode)) > 1e-3

    @pytest.mark.full  # of all modes; exact is in test_captured.py
    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_an_adapter_that_changed_is_read_again(self, tiny, mode):
        pipe = tiny.load()
        before = run(pipe, mode)
        assert torch.equal(run(pipe, mode).images, before.images)
        with torch.no_grad():
            for name, parameter in pipe.unet.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.5)
        after = run(pipe, mode)
        fresh = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        assert torch.equal(after.images, run(fresh, mode).images)
        assert distance(after, before) > 1e-3

    def test_without_noise_the_estimate_is_infinite(self, pipe):
        kl = run(pipe, "merged", etas=[0.0, 0.0]).step_kl_estimate
        assert (kl[0] == 0).all() and kl[1:8].isinf().all()

    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_an_interrupted_generation_ends_there(self, pipe, mode):
        """With the latents of the step before, and no estimate for what was not run."""
        seen = []

        def stop(pipe, k, t, tensors):
            seen.append(tensors["latents"])
            pipe._interrupt = k == 4
            return {}

        out = run(pipe, mode, callback_on_step_end=stop)
        assert len(seen) == 5 and torch.equal(out.images, seen[-1])
        whole = run(pipe, mode).step_kl_estimate
        assert torch.equal(out.step_kl_estimate[:5], whole[:5]) and whole[3:5].any()
        assert not out.step_kl_estimate[5:].any()


class TestPlans:
    def of(self, num_steps, share=(0.5, 0.5)):
        rows = torch.tensor(share).double().expand(num_steps, 1, -1).clone()
        rows[1] = torch.tensor([1.0] + [0.0] * (len(share) - 1))  # one alone, at step 1
        table = coefficient_table(DDIMScheduler(), num_steps, etas=[1.0] * len(share), weights=rows)
        return modes.merged_plan(table)

    def test_say_which_kind_each_step_is(self):
        plan = self.of(12)
        kinds = ["both", "exact", *["merged"] * 7, "both", "merged", "merged"]
        assert plan.kinds == kinds
        assert plan.exact[:, 0].tolist() == [kind != "merged" for kind in kinds]
        assert self.of(12, share=(1.0, 0.0)) is None

    def test_images_that_differ_have_both_networks(self):
        exact = torch.tensor([[True, True], [True, False], [False, False]])
        weights = torch.tensor([[0.5, 0.5], [0.4, 0.6]])
        table = coefficient_table(DDIMScheduler(), 3, etas=[1.0, 1.0], weights=weights)
        assert modes.StepPlan.of(exact, table).kinds == ["exact", "both", "merged"]


class TestRefusals:
    @pytest.mark.parametrize("mode", ["fast", "Exact", None, ""])
    def test_an_unknown_mode_by_name(self, pipe, calls, mode):
        with pytest.raises(InvalidMode, match="exact, merged, auto"):
            run(pipe, mode)
        assert issubclass(InvalidMode, ValueError) and not calls

    def test_several_processes(self, tiny):
        pipe = tiny.load()
        pipe.enable_parallel(object())
        with pytest.raises(InvalidMode, match="several processes"):
            run(pipe, "merged")

    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_objectives_with_networks_of_their_own(self, tiny, mode):
        objectives = {"warm": mf.Objective(), "own": mf.Objective(unet=small_unet())}
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=objectives))
        with pytest.raises(UnsupportedNetwork, match="share one network"):
            run(pipe, mode)

    @pytest.mark.parametrize("mode", APPROXIMATE)
    def test_networks_in_float64(self, tiny, calls, mode):
        with pytest.raises(InvalidMode, match="float64"):
            run(tiny.shared(torch.float64), mode)
        assert not calls


def test_the_estimate_equals_the_divergence_where_errors_do_not_change(pipe):
    """Merged, at a fixed state: the error of the refresh is that of every later step."""
    sampler = pipe.networks().sampler
    plans = {"exact": None}
    weights = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    table = coefficient_table(pipe.scheduler, 4, etas=[1.0, 0.8], weights=weights)
    table.timesteps.fill_(500)  # the same input in every step
    embeds = torch.randn(1, 1, 2, 5, pipe.unet.config.cross_attention_dim).expand(2, -1, -1, -1, -1)
    x, noise = torch.randn(2, 4, 8, 8), noise_source((2, 4, 8, 8), 4, "cpu", seeds=[1, 2])
    after = {}
    plans["merged"] = modes.merged_plan(table)._replace(shares=table.share)  # in all steps
    for mode, plan in plans.items():
        generation = sampler.begin(table, noise, x, embeds, shares_text=True, plan=plan)
        after[mode] = []
        for k in range(len(table)):
            generation.step(k)
            after[mode].append(generation.x.double())
            generation.replace_x(x)
    assert torch.equal(after["merged"][0], after["exact"][0])
    for k in range(1, 4):
        change = after["merged"][k] - after["exact"][k]
        assert change.any()
        expected = change.square().sum((1, 2, 3)) / (2 * table.std[k].square())
        found = generation.step_kl[k].double()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-7)
