# SPDX-License-Identifier: Apache-2.0
"""Generations on the captured step give the images of one network after another."""

import logging
from collections import Counter

import pytest
import torch

import msdda_fast as mf
from msdda_fast.batched.options import BatchedOptions
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine import graph
from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.dry_run import dry_run
from msdda_fast.engine.step import Step
from msdda_fast.errors import CaptureError, InvalidShape, UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion.merged_network import MergedNetwork
from tests.engine.small_world import TracedGraphs
from tests.tiny_model import quiet, small_unet

PROMPTS = ["a red dog", "a blue cat"]
SHORT = dict(num_inference_steps=3, guidance_scale=3.0, seed=0, output_type="latent")
WEIGHTS = [{"warm": 0.2, "cool": 0.8}, {"warm": 1, "cool": 0}]


def both(pipe, **request):
    """Latents of the same request, run one after another and in one forward."""
    given = {"prompt": PROMPTS, **SHORT, **request}
    pipe.set_forward("sequential")
    apart = pipe(**given).images
    pipe.set_forward("batched")
    return apart, pipe(**given).images


def assert_close(actual, expected):
    # float32, sums in another order, through three steps of guidance of a random network
    assert (actual - expected).norm() < 2e-4 * expected.norm()


@pytest.fixture
def pipe(tiny) -> mf.MSDDAPipeline:
    """Of this test alone: its settings change."""
    return quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))


@pytest.fixture
def graphs(monkeypatch) -> TracedGraphs:
    """Graphs on the CPU, so that capture and replay are what runs."""
    made = TracedGraphs()
    monkeypatch.setattr(graph, "graphs_for", lambda device: made)
    return made


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"weights": WEIGHTS},
        {"weights": lambda k: (1, 0) if k == 0 else (0.5, 0.5)},
        {"guidance_scale": 1.0},
        {"guidance_scale": {"warm": 1, "cool": 4}},
        {"etas": {"warm": 0.0, "cool": 0.0}},
        {"weights": {"warm": 0, "cool": 1}},
        {"num_images_per_prompt": 2},
    ],
    ids=["plain", "per prompt", "schedule", "no cfg", "two scales", "eta 0", "one hot", "images"],
)
def test_latents_are_those_of_one_after_another(pipe, request_):
    apart, together = both(pipe, **request_)
    assert_close(together, apart)


def test_generators_draw_what_they_would(pipe):
    images = []
    for forward in ("sequential", "batched"):
        pipe.set_forward(forward)
        generator = torch.Generator().manual_seed(5)
        images.append(pipe(PROMPTS, **{**SHORT, "seed": None}, generator=generator).images)
        images.append(torch.randn(3, generator=generator))
    assert_close(images[2], images[0])
    assert torch.equal(images[3], images[1])


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
def test_what_a_callback_replaces_is_what_goes_on(pipe, name):
    def halve(pipe, k, t, tensors):
        return {name: tensors[name] * 0.5} if k == 0 else {}

    options = dict(callback_on_step_end=halve, callback_on_step_end_tensor_inputs=[name])
    apart, together = both(pipe, **options)
    assert_close(together, apart)
    _, plain = both(pipe)
    assert (together - plain).norm() > 1e-2 * plain.norm()


def test_an_interrupted_generation_ends_there(pipe):
    def stop(pipe, k, t, tensors):
        pipe._interrupt = k == 1
        return {}

    apart, together = both(pipe, callback_on_step_end=stop)
    assert_close(together, apart)


def test_no_request_of_a_shape_captures_again(pipe, graphs):
    pipe.set_forward("batched", capture="required")
    requests = [
        {}, {"weights": WEIGHTS}, {"seed": 7}, {"prompt": ["a cup", "a car"]},
        {"guidance_scale": 5.0}, {"etas": {"warm": 0.3, "cool": 0.9}}, {"num_inference_steps": 5},
    ]  # fmt: skip
    for request in requests:
        given = {"prompt": PROMPTS, **SHORT, **request}
        captured = pipe(**given).images
        apart = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        apart.set_forward("sequential")
        assert_close(captured, apart(**given).images)
    assert graphs.captures == 1 and graphs.replays == 3 * 6 + 5
    pipe(PROMPTS[:1], **SHORT)
    assert graphs.captures == 2


def test_prepare_captures_every_set_of_objectives_ahead(pipe, graphs):
    pipe.prepare(batch_size=2, num_inference_steps=3)
    assert graphs.captures == 3
    for warm in (0.5, 0.0, 1.0):
        weights = {"warm": warm, "cool": 1 - warm}
        pipe(PROMPTS, weights=weights, **{**SHORT, "guidance_scale": None})
    assert graphs.captures == 3


def test_convolutions_are_laid_out_once_for_all_shapes(tiny):
    """A copy in each batched forward would be 1.2 GB of Stable Diffusion 1, once more per shape."""
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.load()))
    options = BatchedOptions(channels_last=True)
    pipe.set_forward("batched", options=options)
    pipe(PROMPTS, **SHORT)
    own = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    batched = BatchedUNet.of([*pipe.variants.values()], options)
    weights = [
        tensor
        for name, tensor in [*batched.named_parameters(), *batched.named_buffers()]
        if name.endswith("weight") and tensor.ndim == 4
    ]
    assert len(weights) > 5
    assert {weight.untyped_storage().data_ptr() for weight in weights} <= own


def test_an_adapter_that_changed_is_not_run_from_before(pipe):
    pipe.set_forward("batched")
    before = pipe(PROMPTS, **SHORT).images
    warm = [p for name, p in pipe.unet.named_parameters() if ".lora_B.warm" in name]
    for parameter in warm:
        parameter.data.mul_(3.0)
    try:
        apart, together = both(pipe)
    finally:
        for parameter in warm:
            parameter.data.div_(3.0)
    assert_close(together, apart)
    assert (together - before).norm() > 1e-2 * before.norm()


def test_an_image_does_not_depend_on_what_shares_its_batch(pipe):
    pipe.set_forward("batched")
    batch = pipe(PROMPTS, weights=WEIGHTS, **SHORT).images
    alone = pipe(PROMPTS[1], weights=WEIGHTS[1], **{**SHORT, "seed": 1}).images
    assert_close(alone[0], batch[1])


@pytest.mark.sweep(weights=1)
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.4, 0, 0.6), (0, 0, 1)], ids=str)
def test_networks_of_their_own_run_in_the_same_step(tiny, graphs, weights):
    objectives = {
        "warm": mf.Objective(),
        "own": mf.Objective(unet=small_unet()),
        "cool": mf.Objective(),
    }
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=objectives))
    apart, together = both(pipe, weights=weights)
    assert_close(together, apart)
    assert graphs.captures == 1


def test_a_network_without_a_batched_forward_runs_one_after_another(tiny, caplog):
    own = small_unet()
    own.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    objectives = {"warm": mf.Objective(), "own": mf.Objective(unet=own)}
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=objectives))
    with caplog.at_level(logging.INFO, logger="msdda_fast"):
        pipe(PROMPTS, **SHORT)
        pipe(PROMPTS, **SHORT)
    told = [r.message for r in caplog.records if "one after another" in r.message]
    assert len(told) == 1 and "FreeU" in told[0]
    pipe.set_forward("batched")
    with pytest.raises(UnsupportedNetwork, match="FreeU"):
        pipe(PROMPTS, **SHORT)


def test_embeddings_of_one_objective_alone_are_refused(pipe):
    def shift(pipe, k, t, tensors):
        embeds = tensors["prompt_embeds"].clone()
        embeds[0] += 1
        return {"prompt_embeds": embeds}

    pipe.set_forward("batched")
    options = dict(callback_on_step_end=shift, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(InvalidShape, match="sequential"):
        pipe(PROMPTS, **SHORT, **options)


@pytest.mark.parametrize("wrong", [{"forward": "fast"}, {"capture": "maybe"}])
def test_unknown_words_are_refused(pipe, wrong):
    with pytest.raises(ValueError, match="must be one of"):
        pipe.set_forward(**wrong)


def test_required_graphs_on_a_device_without(pipe):
    pipe.set_forward("batched", capture="required")
    with pytest.raises(CaptureError, match="has no graphs"):
        pipe(PROMPTS, **SHORT)


def test_a_folded_build_agrees(pipe):
    pipe.set_forward("sequential")
    apart = pipe(PROMPTS, **SHORT).images
    pipe.set_forward("batched", options=BatchedOptions(design="folded", fuse_qkv=True))
    assert_close(pipe(PROMPTS, **SHORT).images, apart)


def reversed_prompt(pipe, k, t, tensors):
    return {"prompt_embeds": -tensors["prompt_embeds"]} if k == 2 else {}


#: Of one shape; the third turns to one objective alone, the fourth reaches a second refresh.
REQUESTS = [
    {},
    {"weights": WEIGHTS, "prompt": ["a cup", "a car"], "seed": 7},
    {"weights": lambda k: (1, 0) if k == 2 else (0.2 * (k % 2), 1 - 0.2 * (k % 2))},
    {"num_inference_steps": 11, "guidance_scale": 5.0, "etas": {"warm": 0.3, "cool": 0.9}},
    {
        "callback_on_step_end": reversed_prompt,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    },
]


class TestModes:
    @pytest.mark.full  # twelve generations; see tests/engine/test_kinds.py
    def test_each_kind_of_step_is_captured_once_and_has_the_bits_of_the_eager_one(
        self, pipe, graphs
    ):
        eager = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        eager.set_forward(capture="off")
        pipe.set_forward(capture="required")
        requests = [{"mode": "merged", **request} for request in REQUESTS]
        auto = {"mode": "auto", "kl_budget": 100}  # of the same kinds
        requests += [auto, {**auto, "weights": WEIGHTS}]
        steps = 0
        for request in requests:
            given = {"prompt": PROMPTS, **SHORT, "num_inference_steps": 6, **request}
            captured, plain = pipe(**given), eager(**given)
            assert torch.equal(captured.images, plain.images), request
            assert torch.equal(captured.step_kl_estimate, plain.step_kl_estimate), request
            assert captured.step_kl_estimate.any()
            steps += len(captured.step_kl_estimate)
        assert (graphs.captures, graphs.replays) == (3, steps)

    def test_one_objective_alone_takes_the_exact_graph(self, pipe, counted):
        alone = {"weights": {"warm": 0, "cool": 1}}
        images = [pipe(PROMPTS, **SHORT, **alone, mode=mode).images for mode in ("exact", "merged")]
        assert torch.equal(*images) and counted.captures == 1

    @pytest.mark.full  # likewise
    def test_prepare_captures_all_kinds_ahead(self, pipe, counted):
        pipe.prepare(batch_size=2, num_inference_steps=3, mode="merged")
        assert counted.captures == 5  # merged and exact, and exact of each objective alone
        for warm in (0.3, 1.0):
            weights = {"warm": warm, "cool": 1 - warm}
            pipe(PROMPTS, weights=weights, **{**SHORT, "guidance_scale": None}, mode="merged")
        assert counted.captures == 5

    @pytest.mark.full  # likewise
    @pytest.mark.parametrize("clip_range", [None, 1.0], ids=str)
    def test_no_kind_of_step_reads_a_value(self, pipe, clip_range):
        """Without data; on a GPU reading a value would be a sync."""
        key = ShapeKey(
            shape=(2, 4, 8, 8),
            active=(True, True),
            branches=2,
            clip_range=clip_range,
            mode="merged",
        )
        buffers = StepBuffers.allocate(key, "cpu")
        unet = BatchedUNet.of([*pipe.variants.values()])
        network = MergedNetwork({(True, True): unet}, key, buffers)
        embeds = torch.zeros(2, 2, 5, pipe.unet.config.cross_attention_dim)
        network.begin(dict.fromkeys(range(2), embeds), buffers.timesteps, shared=True, k=0)
        counts = {
            kind: Counter(dry_run(Step(predict, key, device="cpu").advance, buffers).operators)
            for kind, predict in network.kinds.items()
        }
        assert list(counts) == ["merged", "exact 0,1", "both 0,1"]
        assert {"errors", "step_kl", "merged_kl"} <= network.storages().keys()
        for count in counts.values():  # two more for the estimate
            assert count["msdda_fast.fused_step_.default"] in (1, 3)

    @pytest.mark.parametrize("forward", ["auto", "sequential"])
    def test_run_batched_whatever_exact_does(self, pipe, calls, forward):
        pipe.set_forward(forward)
        pipe(PROMPTS, **SHORT, mode="merged")
        assert not calls  # of the stock network


@pytest.mark.full  # latents of a smaller model are compared above
def test_images_of_the_shipped_model_are_the_same_pictures():
    pipe = quiet(mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji"))
    request = dict(num_inference_steps=4, seed=3, output_type="np")
    weights = [{"aesthetic": 0.3, "consistency": 0.7}, {"aesthetic": 0.8, "consistency": 0.2}]
    images = []
    for forward in ("sequential", "batched"):
        pipe.set_forward(forward)
        images.append(pipe(["A purple colored dog.", "A cup."], weights=weights, **request).images)
    # a tenth of a level of 255
    assert abs(images[1] - images[0]).max() < 0.1 / 255
    assert images[0].std() > 0.05
