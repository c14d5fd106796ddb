# SPDX-License-Identifier: Apache-2.0
"""Networks that do less than all objectives ask for are exact where nothing is left out."""

import pytest
import torch
from diffusers import DDIMScheduler

import msdda_fast as mf
from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.errors import InvalidShape
from msdda_fast.pipelines.stable_diffusion.exact import step_kind
from msdda_fast.pipelines.stable_diffusion.merged_network import MergedNetwork
from msdda_fast.pipelines.stable_diffusion.merged_unet import MergedUNet
from msdda_fast.pipelines.stable_diffusion.step_kl import step_kl
from tests.batched.cases import (
    ATTENTION,
    EVERYTHING,
    KINDS,
    add_adapter,
    inputs,
    network,
    relative,
)

EXACT = 1e-10
STEP = torch.tensor(1)


def objectives(kind="sd15", targets=ATTENTION, size=0.2):
    """Two adapters of different rank, and the base."""
    unet = add_adapter(network(kind), "a", targets, rank=2, seed=1, size=size)
    add_adapter(unet, "b", targets, rank=3, seed=2, size=size)
    return [Variant(unet, "a"), Variant(unet, "b", 0.5), Variant(unet, None)]


def merged_of(case, shares, prompts=None):
    merged = MergedUNet(LoadedAdapters(case.variants))
    merged.mix(shares)
    merged.begin(case.prompts[:1] if prompts is None else prompts, case.timesteps)
    return merged


class TestMerged:
    @pytest.mark.sweep(1)
    @pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
    @pytest.mark.parametrize("kind", ["sd15", "sd21"])
    def test_one_hot_samples_are_their_own_objectives(self, kind, targets):
        case = inputs(objectives(kind, targets), b=3, shared_prompt=True)
        merged = merged_of(case, torch.eye(3))(case.x, STEP)[0]
        expected = case.stock()
        assert relative(expected[0], expected[1]) > 0.01  # the adapters matter
        for m in range(3):
            assert relative(merged[:, m], expected[m, :, m]) < EXACT

    @pytest.mark.sweep(shares=1)
    @pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.9), (1.5, -0.5)])
    def test_equal_adapters_are_the_adapter_at_any_share(self, shares):
        unet = add_adapter(network(), "a", EVERYTHING, seed=1)
        case = inputs([Variant(unet, "a"), Variant(unet, "a")], shared_prompt=True)
        merged = merged_of(case, torch.tensor([shares, (0.5, 0.5)], dtype=torch.float64))(
            case.x, STEP
        )[0]
        assert relative(merged, case.stock()[0]) < EXACT

    def test_half_of_one_adapter_is_its_scale(self):
        unet = add_adapter(network(), "a", EVERYTHING, seed=1)
        case = inputs([Variant(unet, "a"), Variant(unet, None)], shared_prompt=True)
        half = inputs([Variant(unet, "a", 0.5)], shared_prompt=True)
        merged = merged_of(case, torch.full((2, 2), 0.5))(case.x, STEP)
        half.x, half.prompts = case.x, case.prompts[:1]
        assert relative(merged, half.stock()) < EXACT

    def test_is_first_order_in_the_adapters(self):
        """A tenth of the adapters has a hundredth of the error."""
        shares, errors = torch.tensor([[0.3, 0.3, 0.4], [0.6, 0.1, 0.3]]).double(), []
        for size in (0.1, 0.1 / 10**0.5):  # of A and of B
            case = inputs(objectives(size=size), shared_prompt=True)
            fused = (shares.T[:, None, :, None, None, None] * case.stock()).sum(0)
            errors.append(float((merged_of(case, shares)(case.x, STEP)[0] - fused).norm()))
        assert errors[1] == pytest.approx(errors[0] / 100, rel=0.3)

    def test_new_shares_leave_nothing_of_the_old(self):
        case = inputs(objectives(targets=EVERYTHING), shared_prompt=True)
        first, second = torch.eye(3)[:2], torch.eye(3)[1:]
        merged = merged_of(case, first)
        merged(case.x, STEP)
        kept = [site.scales.data_ptr() for site in merged._sites]
        merged.mix(second)
        with pytest.raises(InvalidShape, match="begin"):
            merged(case.x, STEP)
        merged.begin(case.prompts[:1], case.timesteps)
        assert torch.equal(merged(case.x, STEP), merged_of(case, second)(case.x, STEP))
        assert kept == [site.scales.data_ptr() for site in merged._sites]

    def test_shares_of_other_objectives_are_refused(self):
        with pytest.raises(InvalidShape, match=r"\(2, 2\).*\(B, 3\)"):
            MergedUNet(LoadedAdapters(objectives())).mix(torch.ones(2, 2))

    @pytest.mark.full  # conditions are told apart in tests/batched
    def test_xl_conditions(self):
        assert "sdxl" in KINDS
        case = inputs(objectives("sdxl", EVERYTHING), b=3, shared_prompt=True)
        case.added.text_embeds[1:] = case.added.text_embeds[:1]
        merged = MergedUNet(LoadedAdapters(case.variants))
        merged.mix(torch.eye(3))
        added = type(case.added)(case.added.text_embeds[:1], case.added.time_ids[:1])
        merged.begin(case.prompts[:1], case.timesteps, added)
        out = merged(case.x, STEP)[0]
        for m in range(3):
            assert relative(out[:, m], case.stock()[m, :, m]) < EXACT


def merged_network(case, shares):
    """Over all objectives of a case, begun with its prompts at step 0; shares (T, B, M)."""
    count, branches, *_ = case.prompts.shape
    key = ShapeKey(
        shape=tuple(case.x.shape), active=(True,) * count, branches=branches, dtype=case.x.dtype
    )
    buffers = StepBuffers.allocate(key, "cpu")
    network = MergedNetwork({key.active: BatchedUNet.of(case.variants)}, key, buffers)
    buffers.conditioning["share"][: len(shares)] = shares
    network.begin(dict(enumerate(case.prompts)), case.timesteps, shared=False, k=0)
    return network


class TestMergedNetwork:
    def test_errors_are_those_of_the_last_refresh(self):
        case = inputs(objectives())
        shares = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])[None]
        network = merged_network(case, shares)
        right = BatchedUNet.of(case.variants)
        right.begin(case.prompts, case.timesteps)
        expected = right(case.x, STEP)
        both, exact = (step_kind(kind, (True,) * 3) for kind in ("both", "exact"))
        network._is_exact[STEP] = torch.tensor([True, False])
        outputs = torch.stack(network.kinds[both](case.x[None], STEP))
        assert torch.equal(outputs[:, :, 0], expected[:, :, 0])  # this image goes on with the exact
        assert relative(outputs[:, :, 1], expected[:, :, 1]) > 1e-3
        assert torch.equal(torch.stack(network.kinds[exact](case.x[None], STEP)), expected)
        for _ in range(3):
            outputs = torch.stack(network.kinds["merged"](case.x[None], STEP))
            # errors are kept in float32, the dtype of the state
            assert relative(outputs + network.storages()["errors"], expected) < 1e-6
            assert relative(outputs, expected) > 1e-3

    def test_follows_the_shares_of_a_step_in_place(self):
        case = inputs(objectives())
        shares = torch.tensor([[[0.2, 0.3, 0.5]] * 2, [[0.6, 0.4, 0.0]] * 2])
        network = merged_network(case, shares)
        kept = {name: tensor.data_ptr() for name, tensor in network.storages().items()}
        network.mix(1)
        outputs = network.kinds["merged"](case.x[None], STEP)
        weight = shares[1].T[:, None, :, None, None].to(case.prompts)
        prompts = (weight * case.prompts).sum(0, keepdim=True)
        assert torch.equal(outputs[0], merged_of(case, shares[1], prompts)(case.x, STEP)[0])
        assert kept == {name: tensor.data_ptr() for name, tensor in network.storages().items()}


class TestStepKL:
    def table(self, **options):
        scheduler = DDIMScheduler(clip_sample=False, **options)
        weights = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
        return mf.coefficient_table(
            scheduler, 10, etas=[1.0, 0.8], weights=weights, guidance_scale=3.0, dtype=torch.float64
        )

    def test_equals_the_closed_form(self):
        table = self.table()
        x, outputs = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 2, 2, 4, 8, 8).double()
        others = outputs.clone()
        others[1, 1] += 0.01  # the conditional half of objective 1, in every pixel
        for k in (0, 5, 9):
            moved = 0.01 * table.rows[k][:, 4]  # (x_scale, uncond 2, cond 2, noise_scale)
            expected = 4 * 8 * 8 * moved**2 / (2 * table.std[k] ** 2)
            torch.testing.assert_close(
                step_kl(x, outputs, others, table[k], table.std[k]), expected
            )

    def test_is_zero_for_the_same_outputs_and_infinite_without_noise(self):
        table = self.table(set_alpha_to_one=True)
        x, outputs = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 2, 2, 4, 8, 8).double()
        last = len(table) - 1
        assert not table.std[last].any()
        assert step_kl(x, outputs, outputs, table[last], table.std[last]).tolist() == [0, 0]
        kl = step_kl(x, outputs, outputs + 1, table[last], table.std[last])
        assert kl.isinf().all()

    def test_counts_clipping(self):
        table = mf.coefficient_table(
            DDIMScheduler(clip_sample=True), 10, etas=[1.0], weights=None, dtype=torch.float64
        )
        linear = mf.coefficient_table(
            DDIMScheduler(clip_sample=False), 10, etas=[1.0], weights=None, dtype=torch.float64
        )
        x = torch.full((1, 4, 8, 8), 1e3).double()
        outputs = torch.zeros(1, 1, *x.shape).double()
        clipped, free = (
            step_kl(x, outputs, outputs + 0.1, t[5], t.std[5]) for t in (table, linear)
        )
        assert 0 < float(clipped) < float(free)
