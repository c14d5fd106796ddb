# SPDX-License-Identifier: Apache-2.0
"""Strength and timestep ranges in pipelines: images, and how many forwards they take."""

from dataclasses import replace

import pytest
import torch

import msdda_fast as mf
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.errors import InvalidShape, InvalidWeights, UnknownObjective
from msdda_fast.pipelines.stable_diffusion.merging import TOLERANCE, merged_shares
from tests.pipelines.test_captured import SHORT, assert_close, both
from tests.tiny_model import WEIGHTS, quiet


@pytest.fixture
def pipe(tiny) -> mf.MSDDAPipeline:
    """Of this test alone: its settings change."""
    return quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))


@pytest.mark.parametrize(
    "request_",
    [
        {"strength": 1.5},
        {"strength": 0},
        {"strength": [{"warm": 2.0}, {"cool": 0.5}], "weights": [[0.2, 0.8], [1, 0]]},
        {"kl_weights": {"warm": 0.05, "cool": 0.2}},
    ],
    ids=["beyond", "the base", "per prompt", "kl"],
)
def test_latents_are_those_of_one_after_another(pipe, request_):
    apart, together = both(pipe, **request_)
    assert_close(together, apart)
    plain = pipe(["a red dog", "a blue cat"], **SHORT).images
    assert (plain - together).norm() > 1e-3 * plain.norm()


def test_of_one_it_changes_no_bit(pipe):
    plain = pipe("a dog", **SHORT).images
    assert pipe("a dog", strength=1.0, **SHORT).images.equal(plain)


def test_of_zero_it_is_the_base_at_the_objectives_noise(pipe, tiny):
    alone = {"warm": 1.0, "cool": 0.0}
    weak = pipe("a dog", strength=0.0, weights=alone, **SHORT).images
    base = quiet(tiny.only(mf.Objective.base(eta=1.0)))("a dog", **SHORT).images
    assert_close(weak, base)


def test_images_of_a_batch_have_strengths_of_their_own(pipe):
    strengths = [0.5, 2.0]
    request = SHORT | {"seed": [3, 3]}
    batch = pipe(["a dog"] * 2, strength=[[s, s] for s in strengths], **request).images
    for image, strength in zip(batch, strengths, strict=True):
        one = pipe("a dog", strength=strength, **SHORT | {"seed": 3}).images
        assert_close(image[None], one)


def with_ranges(pipe, **ranges):
    ranged = {n: replace(o, timesteps=ranges.get(n)) for n, o in pipe.objectives.items()}
    pipe.set_objectives(ranged, pipe.variants)
    return pipe


@pytest.mark.parametrize("forward", ["batched", "sequential"])
def test_below_its_range_only_the_base_runs(pipe, monkeypatch, forward, calls):
    counted = []
    run = BatchedUNet.forward

    def counting(self, *args):
        counted.append(len(self.objectives))
        return run(self, *args)

    monkeypatch.setattr(BatchedUNet, "forward", counting)
    with_ranges(pipe, warm=(500, 999), cool=(500, 999)).set_forward(forward)
    pipe("a dog", **SHORT | {"num_inference_steps": 4})  # at 751, 501, 251 and 1
    if forward == "batched":
        assert counted == [2, 2, 1, 1]
    else:
        assert len(calls) == 2 + 2 + 1 + 1


def test_ranges_in_one_forward_are_those_one_after_another(pipe):
    with_ranges(pipe, warm=(300, 999), cool=(0, 600))
    apart, together = both(pipe, **{"num_inference_steps": 5})
    assert_close(together, apart)


#: Of one set of networks: all three. The shape stays, and so does what steps may read.
STRONG = [
    {"strength": 1.5},
    {"strength": 0.25},
    {"strength": {"warm": 2.0}},
    {"strength": [[0.5, 2.0], [3.0, 1.0]]},
    {"strength": [{"warm": 2.0}, {"cool": 0.0}], "weights": [[0.2, 0.8], [1, 0]]},
    {"kl_weights": {"warm": 0.05, "cool": 0.2}, "weights": [0.7, 0.3], "seed": 9},
]

#: Of one shape: under ranges of timesteps none of them adds a set of networks to another.
RANGED = [
    {},
    {"strength": 1.0},
    {"weights": [[0.2, 0.8], [1, 0]]},
    {"weights": lambda k: (1, 0) if k == 0 else (0.2, 0.8)},
    {"seed": 7, "prompt": ["a cup", "a car"]},
    {"guidance_scale": 5.0, "etas": {"warm": 0.3, "cool": 0.9}, "num_inference_steps": 6},
]


def drawn_again(pipe, requests):
    """Draw each on the captured step; compare with one network after another."""
    apart = quiet(mf.MSDDAPipeline.from_pipe(pipe))
    apart.set_forward("sequential")
    for request in requests:
        given = {"prompt": ["a red dog", "a blue cat"], **SHORT, **request}
        assert_close(pipe(**given).images, apart(**given).images)


def test_no_strength_captures_a_set_of_networks_again(pipe, counted):
    pipe.set_forward(capture="required")
    drawn_again(pipe, STRONG)
    assert counted.captures == 1
    # each captures the set that it leaves: without the base, the base alone, without "warm"
    for request in ({}, {"strength": 0}, {"strength": {"warm": 0}}):
        drawn_again(pipe, [request] * 2)
    assert counted.captures == 4
    drawn_again(pipe, [{"strength": 1.0}, {"strength": {"warm": 1, "cool": 1}}, *STRONG])
    assert counted.captures == 4


def test_in_ranges_each_set_of_networks_is_captured_once(pipe, counted):
    with_ranges(pipe, warm=(500, 999), cool=(200, 999)).set_forward(capture="required")
    drawn_again(pipe, [{"num_inference_steps": 5, **request} for request in RANGED])
    assert counted.captures == 3  # both, "cool" and the base, the base alone


def last_step(pipe, prompts, **request):
    """Latents after the last of three steps, which begins at a state of its own."""
    x = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(4))

    def restart(pipe, k, t, tensors):
        return {"latents": x} if k == 1 else {}

    return pipe(prompts, callback_on_step_end=restart, **SHORT, **request).images


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # stock loading of two
@pytest.mark.parametrize(
    ("weights", "strengths"),
    [((0.0, 1.0), [(1.0, 1.5), (1.0, 0.5)]), ((0.3, 0.7), [(2.0, 0.5), (0.0, 3.0)])],
    ids=["one objective", "two"],
)
def test_merged_are_the_adapters_scaled_by_share_and_strength(pipe, tiny, weights, strengths):
    """W + sum_i c_i s_i B_i A_i, as stock diffusers runs it; c_i is what outputs count."""
    prompts = ["a red dog", "a blue cat"]
    merged = last_step(pipe, prompts, mode="merged", weights=weights, strength=strengths)
    table = mf.coefficient_table(pipe.scheduler, 3, etas=[1.0, 0.8], weights=weights)
    counts = table.rows[-1, 0, table[-1].layout.cond].double()
    strong = mf.coefficient_table(
        pipe.scheduler, 3, etas=[1.0, 0.8], weights=weights, strength=strengths
    )
    shares = merged_shares(strong)[-1, :, :2]
    wanted = counts / counts.sum() * torch.tensor(strengths)
    torch.testing.assert_close(shares, wanted, rtol=0, atol=TOLERANCE)
    stock = tiny.stock.__wrapped__(tiny, "warm")
    stock.load_lora_weights(tiny.cool, weight_name=WEIGHTS, adapter_name="cool")
    for i, scales in enumerate(shares.tolist()):
        stock.set_adapters(["warm", "cool"], scales)
        network = {
            name: mf.Objective(unet=stock.unet, eta=objective.eta)
            for name, objective in pipe.objectives.items()
        }
        alike = quiet(mf.MSDDAPipeline.from_pipe(pipe, objectives=network))
        assert_close(merged[i], last_step(alike, prompts, weights=weights)[i])
    exact = last_step(pipe, prompts, weights=weights, strength=strengths)
    assert (merged - exact).norm() > 1e-3 * exact.norm()  # outputs mixed, not networks


def test_ranges_are_saved(pipe, tmp_path):
    with_ranges(pipe, warm=(500, 999)).save_pretrained(tmp_path)
    again = mf.MSDDAPipeline.from_pretrained(tmp_path)
    assert [o.timesteps for o in again.objectives.values()] == [(500.0, 999.0), None]


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"strength": {"hot": 1.0}}, UnknownObjective, "strength: unknown objective 'hot'"),
        ({"strength": -1.0}, InvalidWeights, "not negative"),
        ({"strength": [1.0, 1.0, 1.0]}, InvalidShape, r"strength has shape \(3,\)"),
        ({"strength": torch.ones(5, 2)}, InvalidShape, r"\(B, M\) = \(1, 2\)"),
        ({"kl_weights": {"warm": 0.1}}, UnknownObjective, "missing: 'cool'"),
        ({"kl_weights": [0.0, 1.0]}, InvalidWeights, "positive"),
    ],
)
def test_refused(pipe, calls, request_, error, message):
    with pytest.raises(error, match=message):
        pipe("a dog", **SHORT, **request_)
    assert not calls
