# SPDX-License-Identifier: Apache-2.0
"""mode="auto": a pilot's law of the divergence, a plan within a budget, and a receipt."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

import msdda_fast as mf
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.noise import noise_source
from msdda_fast.errors import InvalidMode
from msdda_fast.pipelines.stable_diffusion import path_kl, pilot
from msdda_fast.pipelines.stable_diffusion.merged_unet import MergedUNet
from msdda_fast.pipelines.stable_diffusion.merging import TOLERANCE, merged_shares, output_counts
from msdda_fast.pipelines.stable_diffusion.modes import StepPlan
from msdda_fast.pipelines.stable_diffusion.path_kl import Pilot, forecast, kl_scale
from msdda_fast.pipelines.stable_diffusion.rounding import WideProducts
from msdda_fast.pipelines.stable_diffusion.step_kl import step_kl
from tests.tiny_model import quiet

PROMPTS = ["a red dog", "a blue cat"]
STEPS = 6
CALL = dict(num_inference_steps=STEPS, guidance_scale=3.0, seed=0, output_type="latent")
AUTO = {**CALL, "mode": "auto", "kl_budget": 60}


class TestTheLaw:
    @pytest.mark.parametrize("weights", [(0.2, 0.8), (0.5, 0.5), (1.5, -0.5)], ids=str)
    def test_is_the_kl_of_a_network_that_is_quadratic_in_its_adapters(self, weights):
        """f(d) = d^2: f(c_1 d_1 + c_2 d_2) - c_1 f(d_1) - c_2 f(d_2) = -c_1 c_2 (d_1 - d_2)^2."""
        table = mf.coefficient_table(
            DDIMScheduler(clip_sample=False), 5, etas=[0.7, 0.7], weights=weights,
            guidance_scale=4.0, extrapolate=True, dtype=torch.float64,
        )  # fmt: skip
        d = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
        c = torch.tensor(weights, dtype=torch.float64).view(2, 1, 1, 1, 1)
        outputs, merged = d.square(), (c * d).sum(0).square().expand(2, 1, 3, 4, 4)
        x, apart = torch.zeros(1, 3, 4, 4, dtype=torch.float64), (d[0] - d[1]).pow(4).sum()
        for k in range(5):
            both = torch.stack([outputs, outputs], 1), torch.stack([merged, merged], 1)
            found = step_kl(x, both[1], both[0], table[k], table.std[k])
            torch.testing.assert_close(found, kl_scale(table)[k] * apart)

    def test_is_nothing_for_one_objective_and_infinite_without_noise(self):
        def scale(etas, weights, **options):
            weights = torch.tensor(weights)
            return kl_scale(
                mf.coefficient_table(DDIMScheduler(), 4, etas=etas, weights=weights, **options)
            )

        found = scale([0.9, 0.9], [[1.0, 0.0], [0.5, 0.5]])
        assert (found[:, 0] == 0).all() and (found[:, 1] > 0).all()
        assert scale([0.0, 0.0], [[0.5, 0.5]]).isinf().all()

    def test_knows_steps_that_clip(self):
        """As where nothing is clipped."""
        table, plain = (
            mf.coefficient_table(
                DDIMScheduler(clip_sample=clips), 4, etas=[0.9, 0.6], weights=[0.5, 0.5]
            )
            for clips in (True, False)
        )
        assert table.clip_range is not None
        torch.testing.assert_close(kl_scale(table), kl_scale(plain), rtol=1e-4, atol=0)


class TestMergedShares:
    @pytest.mark.parametrize("options", [{}, {"guidance_scale": 4.0}, {"strength": 1.5}], ids=str)
    def test_are_right_to_first_order(self, options):
        """f(d) = d: one output at the mixture makes the step of all outputs."""
        weights = torch.tensor([[0.3, 0.7], [0.9, 0.1]])
        table = mf.coefficient_table(
            DDIMScheduler(clip_sample=False), 9, etas=[1.0, 0.5], weights=weights, **options
        )
        d = torch.arange(1.0, 1 + table.num_objectives, dtype=torch.float64)
        counts = output_counts(table)
        right = (counts * d).sum(-1) / counts.sum(-1)
        error = ((merged_shares(table) * d).sum(-1) - right).abs()
        assert error.max() <= TOLERANCE * d.sum() and error[0].max() < 1e-6
        assert ((table.share * d).sum(-1) - right).abs().max() > 2 * error.max()

    def test_change_in_few_steps(self):
        """To merge again takes time; who comes in or leaves is seen at once."""
        table = mf.coefficient_table(
            DDIMScheduler(clip_sample=False),
            25,
            etas=[1.0, 0.8],
            weights=[0.5, 0.5],
            ranges=[(500, 999), None],
        )
        changes = (merged_shares(table).diff(dim=0) != 0).any(-1).any(-1)
        outside = (table.share[:, 0, 0] == 0).int().diff().nonzero()
        assert changes[outside].all() and changes.sum() < 6


class TestForecasts:
    def test_limits_hold_for_the_next_lognormal_number(self):
        """99 of 100, and the deviation of 20000 such counts is 0.07 of 100."""
        torch.manual_seed(0)
        draws = (0.5 * torch.randn(20000, path_kl.PILOTS + 1, dtype=torch.float64) - 1).exp()
        held = draws[:, -1] <= path_kl._limit(draws[:, :-1])
        assert abs(held.double().mean() - path_kl.LIMIT_LEVEL) < 0.003

    @pytest.fixture(autouse=True)
    def scales(self, monkeypatch):
        """`kl_scale` gives the numbers that stand in a table as deviations."""
        monkeypatch.setattr(path_kl, "kl_scale", lambda table: table.std)

    def of(self, scale, budget, ratio=(0.5, 1.0, 2.0) * 4):
        scale = torch.tensor(scale, dtype=torch.float64)
        weights = torch.full((*scale.shape, 2), 0.5)
        table = mf.coefficient_table(DDIMScheduler(), len(scale), etas=[1.0, 1.0], weights=weights)
        ratios = torch.tensor(ratio, dtype=torch.float64).expand(len(scale), -1)
        return forecast(replace(table, std=scale), Pilot(ratios, 1.0, 7), budget)

    def test_merge_the_cheapest_steps_within_the_budget(self):
        found = self.of([[1.0], [8.0], [2.0], [4.0]], None)
        assert found.plan.kinds == ["exact"] * 4  # what bfloat16 costs is 1: below any limit
        one = float(self.of([[1.0]], 1e9).path_kl(1).upper)
        found = self.of([[1.0], [8.0], [2.0], [4.0]], 3.01 * one)
        assert found.plan.kinds == ["merged", "exact", "merged", "exact"]
        receipt = found.path_kl(4)
        assert float(receipt.upper) == pytest.approx(3 * one) and receipt.budget == 3.01 * one
        assert float(receipt.estimate) == pytest.approx(3 * 7 / 6)  # the mean of the ratios is 7/6
        assert found.step_kl[:, 0].tolist() == pytest.approx([7 / 6, 0, 7 / 3, 0])
        assert float(found.path_kl(2).upper) == pytest.approx(one) and receipt.pilot_forwards == 7

    def test_images_do_not_matter_to_each_other(self):
        budget = 4 * float(self.of([[1.0]], 1e9).path_kl(1).upper)
        together = self.of([[1.0, 3.0], [8.0, 0.1], [2.0, 2.0]], budget)
        assert together.plan.kinds == ["both", "both", "merged"]
        for b, alone in enumerate(([[1.0], [8.0], [2.0]], [[3.0], [0.1], [2.0]])):
            assert torch.equal(together.plan.exact[:, b], self.of(alone, budget).plan.exact[:, 0])

    def test_steps_without_noise_are_exact_and_free_ones_merged(self):
        inf = float("inf")
        found = self.of([[inf], [0.0], [1.0]], inf)
        assert found.plan.kinds[1:] == ["merged", "merged"]
        found = self.of([[inf], [0.0], [1.0]], 0)
        assert found.plan.kinds == ["exact", "merged", "exact"]


def test_both_networks_run_where_images_differ(pipe):
    """Each image goes on with its own, and the divergence of the merged one is measured."""
    sampler, shape = pipe.networks().sampler, (2, 4, 8, 8)
    table = mf.coefficient_table(
        pipe.scheduler, 3, etas=[1.0, 0.8], weights=torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    )
    embeds = torch.randn(1, 1, 2, 5, pipe.unet.config.cross_attention_dim).expand(2, -1, -1, -1, -1)
    x, noise = torch.randn(shape), noise_source(shape, 3, "cpu", seeds=[1, 2])
    own = torch.tensor([[True, False], [False, True], [False, False]])
    plans = {
        "exact": None,
        "merged": StepPlan(["merged"] * 3, torch.zeros_like(own), table.share),
        "both": StepPlan(["both"] * 3, own, table.share),
    }
    after = {name: [] for name in plans}
    for name, plan in plans.items():
        generation = sampler.begin(table, noise, x, embeds, shares_text=True, plan=plan)
        for k in range(3):
            generation.step(k)
            after[name].append(generation.x.double())
            generation.replace_x(x)
        assert generation.forwards == {"exact": 6, "merged": 3, "both": 9}[name]
    for k in range(3):
        apart = (after["merged"][k] - after["exact"][k]).square().sum((1, 2, 3))
        expected = apart / (2 * table.std[k].square())
        torch.testing.assert_close(generation.merged_kl[k].double(), expected, rtol=2e-3, atol=1e-7)
        for b in range(2):
            right = "exact" if own[k, b] else "merged"
            torch.testing.assert_close(after["both"][k][b], after[right][k][b])
            assert bool(generation.step_kl[k, b] == 0) == bool(own[k, b])


class TestPilots:
    def test_one_serves_all_weights_prompts_seeds_and_batches(self, tiny, monkeypatch):
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
        ran, measure = [], pilot._measure
        monkeypatch.setattr(pilot, "_measure", lambda *a: ran.append(1) or measure(*a))
        pipe.prepare(batch_size=1, num_inference_steps=STEPS, mode="auto")
        given = {**AUTO, "guidance_scale": None}
        for request in (
            {}, {"weights": (0.2, 0.8)}, {"seed": 9}, {"num_images_per_prompt": 2},
            {"weights": lambda k: (1, 0) if k < 2 else (0.3, 0.7)},
        ):  # fmt: skip
            pipe(PROMPTS, **{**given, **request})
        assert len(ran) == 1
        pipe(PROMPTS, **{**given, "etas": [0.5, 0.5]})
        assert len(ran) == 2

    def test_weights_are_on_the_simplex_of_those_that_take_part(self):
        weights = pilot.pilot_weights([True, False, True])
        assert (weights[:, 1] == 0).all() and (weights.sum(1) - 1).abs().max() < 1e-12
        low, high = weights[:, 0].min(), weights[:, 0].max()
        assert low < 0.2 and high > 0.8 and (weights >= 0).all()

    def test_measure_the_divergence_of_merging(self, tiny):
        """Foretold for its own images is what merging costs them, step by step."""
        pipe = tiny.shared()
        pipe(PROMPTS, **AUTO)
        [(_, found)] = [
            item for item in pipe.networks().sampler.pilots.items() if len(item[0][1]) == STEPS
        ]
        assert found.ratio.shape == (STEPS, path_kl.PILOTS) and (found.ratio > 0).all()
        weights, prompts = pilot.pilot_weights([True, True])[:2], list(pilot.PROMPTS[:2])
        table = mf.coefficient_table(
            pipe.scheduler, STEPS, etas=[1.0, 0.8], weights=weights, guidance_scale=3.0
        )
        states, shares = [], merged_shares(table)

        def look(pipe, k, t, tensors):
            states.append(tensors["latents"])
            return {}

        own = {"seed": pilot.FIRST_SEED, "weights": weights, "callback_on_step_end": look}
        pipe(prompts, **{**CALL, **own})
        exact = BatchedUNet.of(list(pipe.variants.values()))
        merged = MergedUNet(exact.adapters)
        cond, uncond = pipe.encode_prompt(prompts, "cpu", 1, True)
        for k in (1, STEPS - 1):
            at, x = torch.tensor(k), states[k - 1]
            merged.mix(shares[k])
            for network in (exact, merged):
                network.begin(torch.stack([uncond, cond])[None], table.timesteps)
            both = merged(x, at).expand(2, -1, -1, -1, -1, -1), exact(x, at)
            kl = step_kl(x, *both, table[k], table.std[k]).double()
            torch.testing.assert_close(
                kl, (kl_scale(table) * found.ratio[:, :2])[k], rtol=1e-3, atol=0
            )

    def test_narrow_networks_are_measured_in_float32(self, tiny):
        """Adapters so small that rounding is most of what two narrow networks differ by."""
        objectives = tiny.objectives(scale=0.03)
        wide, narrow = (
            tiny.load(objectives=objectives, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        found, expected = (pipe(PROMPTS, **AUTO).path_kl for pipe in (narrow, wide))
        assert (expected.upper > 0).all() and (expected.upper < 0.05).all()
        assert found.estimate.tolist() == pytest.approx(expected.estimate.tolist(), rel=0.1)
        assert narrow.unet.dtype == torch.bfloat16

    def test_the_default_budget_is_what_bfloat16_costs(self, pipe):
        out = pipe(PROMPTS, **{**AUTO, "kl_budget": None})
        variants = list(pipe.variants.values())
        assert 0.01 < out.path_kl.budget < 20
        assert (out.path_kl.upper <= out.path_kl.budget).all()
        bf16 = pilot._cast(pipe.networks(), torch.bfloat16)
        native, emulated, exact = (
            BatchedUNet.of(given) for given in (*[list(bf16.values())] * 2, variants)
        )
        embeds = torch.randn(1, 1, 2, 5, pipe.unet.config.cross_attention_dim)
        x, k, t = torch.randn(2, 4, 8, 8), torch.tensor(0), torch.tensor([500])
        native.begin(embeds, t)
        exact.begin(embeds, t)
        with WideProducts():
            emulated.begin(embeds, t)
            found = emulated(x, k)
        truth = exact(x, k)
        error = [(out.float() - truth).norm().item() for out in (native(x, k), found)]
        assert found.dtype == torch.bfloat16 and error[1] == pytest.approx(error[0], rel=0.3)


class TestReceipts:
    def test_count_networks(self, pipe):
        assert pipe(PROMPTS, **CALL).forwards == 2 * STEPS
        assert pipe(PROMPTS, **CALL, weights=(0, 1)).forwards == STEPS
        assert pipe(PROMPTS, **CALL, mode="merged").forwards == 3 + STEPS - 1
        out = pipe(PROMPTS, **AUTO)
        merged = int((out.step_kl_estimate[:, 0] > 0).sum())
        assert 0 < merged < STEPS and out.forwards == 2 * STEPS - merged
        assert torch.allclose(out.path_kl.estimate, out.step_kl_estimate.sum(0).double())

    def test_count_networks_that_run_one_after_another(self, tiny):
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
        pipe.set_forward("sequential")
        assert pipe(PROMPTS, **CALL).forwards == 2 * STEPS

    def test_end_where_the_generation_ended(self, pipe):
        def stop(pipe, k, t, tensors):
            pipe._interrupt = k == 2
            return {}

        whole, out = pipe(PROMPTS, **AUTO), pipe(PROMPTS, **AUTO, callback_on_step_end=stop)
        assert out.forwards < whole.forwards
        kept = whole.step_kl_estimate[:3].sum(0).double()
        assert torch.allclose(out.path_kl.estimate, kept)


class TestWhatIsExact:
    @pytest.mark.parametrize(
        "request_",
        [
            {"strength": [{"warm": 2.0}, {"warm": 0.5}]},
            {"weights": (1.2, -0.2), "extrapolate": True, "etas": [0.8, 0.8]},
            {"etas": [0.0, 0.0]},
            {"weights": (0, 1)},
        ],
        ids=["strength per image", "negative", "no noise", "one alone"],
    )
    def test_what_a_pilot_does_not_stand_for(self, pipe, request_):
        out = pipe(PROMPTS, **{**AUTO, **request_})
        assert torch.equal(out.images, pipe(PROMPTS, **CALL, **request_).images)
        assert not out.path_kl.upper.any() and out.path_kl.budget is None

    @pytest.mark.parametrize("request_", [{"strength": 1.5}, {"kl_weights": [1.0, 2.0]}], ids=str)
    def test_a_shared_strength_is_foretold(self, pipe, request_):
        out = pipe(PROMPTS, **{**AUTO, **request_})
        assert (out.path_kl.upper > 0).all()
        assert out.forwards < pipe(PROMPTS, **CALL, **request_).forwards

    def test_timesteps_are_followed(self, tiny):
        given = tiny.shared().objectives
        objectives = {"warm": replace(given["warm"], timesteps=(500, 999)), "cool": given["cool"]}
        objectives = {k: replace(v, source=k) for k, v in objectives.items()}
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=objectives))
        out = pipe(PROMPTS, **{**AUTO, "kl_budget": 1e9})
        assert out.forwards == STEPS and (out.step_kl_estimate > 0).all()
        exact = pipe(PROMPTS, **CALL)
        assert pipe(PROMPTS, **{**AUTO, "kl_budget": 0}).forwards == exact.forwards == 2 * STEPS


class TestRefusals:
    @pytest.mark.parametrize("budget", [-1, float("nan"), "1"], ids=str)
    def test_what_is_no_budget(self, pipe, calls, budget):
        with pytest.raises(InvalidMode, match="at least 0 nats"):
            pipe(PROMPTS, **{**AUTO, "kl_budget": budget})
        assert not calls

    @pytest.mark.parametrize("mode", ["exact", "merged"])
    def test_a_budget_of_another_mode(self, pipe, mode):
        with pytest.raises(InvalidMode, match='mode="auto"'):
            pipe(PROMPTS, **{**AUTO, "mode": mode})
