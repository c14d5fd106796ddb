# SPDX-License-Identifier: Apache-2.0
"""A pipeline on several ranks draws the images of one process.

Networks run one after another here, so that ranks have the forwards of one process; batched and
captured ones are in test_captured.py.
"""

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer

import msdda_fast as mf
from msdda_fast.errors import RanksDiffer
from tests.parallel.ranks import run_ranks, values
from tests.tiny_model import WIDTH, quiet

PROMPTS = ["a red dog", "a blue cat"]
SHORT = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")


def noise(seed):
    return torch.Generator().manual_seed(seed)


#: name -> the request of a rank; what differs between ranks is what rank 0 decides.
REQUESTS = {
    "seeds": lambda rank: dict(seed=3),
    "one seed per image": lambda rank: dict(seed=[9, 4], num_images_per_prompt=1),
    "weights per prompt": lambda rank: dict(seed=0, weights=[(1, 0), (0.3, 0.7)]),
    "strengths": lambda rank: dict(seed=0, strength=[[2.0, 0.5], [0.0, 3.0]]),
    "KL weights": lambda rank: dict(seed=0, kl_weights=(0.05, 0.2), weights=(0.3, 0.7)),
    "one objective": lambda rank: dict(seed=0, weights=(0, 1)),
    "another objective in each step": lambda rank: dict(
        seed=0, weights=lambda k: (1, 0) if k == 0 else (0, 1)
    ),
    "no guidance": lambda rank: dict(seed=0, guidance_scale=1.0),
    "a generator": lambda rank: dict(generator=noise(rank)),
    "a generator per image": lambda rank: dict(generator=[noise(rank), noise(5 + rank)]),
    "torch's generator": lambda rank: dict(),
    "given latents": lambda rank: dict(latents=torch.randn(2, 4, 8, 8, generator=noise(1)), seed=0),
    "deterministic": lambda rank: dict(seed=0, etas=(0.0, 0.0)),
}


@pytest.fixture
def pipe(tiny) -> mf.MSDDAPipeline:
    """One process that runs objectives one after another, as these ranks do."""
    pipe = mf.MSDDAPipeline.from_pipe(tiny.shared())
    pipe.set_forward("sequential")
    return quiet(pipe)


def close(actual, expected):
    """Equal up to float32 rounding: another batch size may sum in another order."""
    return (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def draw(pipe, name, rank):
    torch.manual_seed(rank)
    request = {**SHORT, **REQUESTS[name](rank)}
    images = pipe(PROMPTS, **request).images
    drawn = torch.randn(3)  # where torch's generator stands afterwards
    return images, drawn


def draw_all(parallel, tiny):
    """By request: latents, torch's next numbers, and the (adapter, rows) that this rank ran."""
    pipe = tiny.load()
    pipe.set_forward("sequential")
    pipe.enable_parallel(parallel)
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("msdda_fast.engine.parallel").addHandler(handler)
    pipe.prepare(2, 32, 32, 2)
    ran, forward = [], UNet2DConditionModel.forward

    def noting(network, sample, *args, **kwargs):
        layer = next(m for m in network.modules() if isinstance(m, BaseTunerLayer))
        name = "base" if layer.disable_adapters else layer.active_adapters[0]
        ran.append((name, len(sample)))
        return forward(network, sample, *args, **kwargs)

    UNet2DConditionModel.forward = noting
    found = {}
    for name in REQUESTS:
        ran.clear()
        found[name] = (*draw(pipe, name, parallel.rank), list(ran))
    pipe.disable_parallel()
    found["alone"] = (*draw(pipe, "seeds", parallel.rank), told)
    return found


@pytest.mark.full  # two requests of it are below
@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_whole_objectives_have_the_bits_of_one_process(tiny, pipe, size):
    found = values(run_ranks(size, draw_all, tiny))
    for name in REQUESTS:
        images, drawn = draw(pipe, name, rank=0)
        # one objective on two ranks is split: there is nothing else for the other one to do
        split = name in ("one objective", "another objective in each step")
        for rank in range(size):
            same = close if split else torch.equal
            assert same(found[rank][name][0], images), (name, rank)
        assert torch.equal(found[0][name][1], drawn), name
    assert found[0]["seeds"][2] == [("warm", 4)] * 2
    assert found[1]["seeds"][2] == [("cool", 4)] * 2
    assert found[0]["one objective"][2] == found[1]["one objective"][2] == [("cool", 2)] * 2
    assert found[0]["another objective in each step"][2] == [("warm", 2), ("cool", 2)]
    assert found[0]["no guidance"][2] == [("warm", 2)] * 2
    if size == 3:
        assert all(found[2][name][2] == [] for name in ("seeds", "no guidance"))
        assert found[0]["alone"][2] == ["1 of 3 ranks have nothing to evaluate"]
    for rank in range(size):
        assert torch.equal(found[rank]["alone"][0], found[0]["seeds"][0])
    # all ranks go on from the state of rank 0's generator
    assert torch.equal(found[1]["torch's generator"][1], found[0]["torch's generator"][1])


@pytest.mark.full  # four processes; steps of four ranks are in test_engine.py
def test_four_ranks_split_guidance(tiny, pipe):
    found = values(run_ranks(4, draw_all, tiny))
    for name in REQUESTS:
        images, _ = draw(pipe, name, rank=0)
        for rank in range(4):
            assert torch.equal(found[rank][name][0], found[0][name][0]), (name, rank)
        assert close(found[0][name][0], images), name
    ran = [found[rank]["seeds"][2] for rank in range(4)]
    assert ran == [[(name, 2)] * 2 for name in ("warm", "warm", "cool", "cool")]
    assert found[1]["no guidance"][2] == [("cool", 2)] * 2
    assert found[3]["no guidance"][2] == []


WHOLE = ("seeds", "one objective", "strengths")


def draw_whole(parallel, tiny):
    pipe = tiny.load(dtype=torch.bfloat16)
    pipe.set_forward("sequential")
    pipe.enable_parallel(parallel)
    return [draw(pipe, name, parallel.rank)[0] for name in WHOLE]


def test_without_splitting_all_bits_are_those_of_one_process(tiny):
    found = values(run_ranks(2, draw_whole, tiny, split_guidance=False))
    pipe = mf.MSDDAPipeline.from_pipe(tiny.shared(torch.bfloat16))
    pipe.set_forward("sequential")
    for index, name in enumerate(WHOLE):
        images, _ = draw(quiet(pipe), name, rank=0)
        assert all(torch.equal(found[rank][index], images) for rank in range(2))


RANGED = dict(seed=0, num_inference_steps=3, strength=(1.5, 1.0))


def ranged(tiny):
    """A pipeline whose objectives act at the first two of the timesteps 667, 334 and 1."""
    return tiny.load(objectives=tiny.objectives(timesteps=(300, 999)))


def draw_ranged(parallel, tiny):
    """Latents, and how many rows each forward of this rank had."""
    pipe = ranged(tiny)
    pipe.set_forward("sequential")
    pipe.enable_parallel(parallel)
    rows, forward = [], UNet2DConditionModel.forward

    def noting(network, sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(network, sample, *args, **kwargs)

    UNet2DConditionModel.forward = noting
    return pipe(PROMPTS, **{**SHORT, **RANGED}).images, rows


def test_the_base_is_one_more_objective_to_share(tiny):
    """In ranges of timesteps, where below there is nothing else to do."""
    found = values(run_ranks(2, draw_ranged, tiny, split_guidance=False))
    pipe = ranged(tiny)
    pipe.set_forward("sequential")
    images = pipe(PROMPTS, **{**SHORT, **RANGED}).images
    assert all(torch.equal(drawn, images) for drawn, _ in found)
    # two steps of both objectives and the base, one of the base
    assert sum(len(rows) for _, rows in found) == 3 + 3 + 1
    assert all(rows == [4] * len(rows) and len(rows) > 1 for _, rows in found)


#: name -> (the field that the error names, what rank 1 asks for in place of rank 0's)
DIFFERENCES = {
    "prompt": ("prompts", dict(prompt="a blue dog")),
    "embeddings": ("prompts", dict(prompt=None, prompt_embeds=torch.zeros(1, 24, WIDTH))),
    "negative prompt": ("prompts", dict(negative_prompt="blurry")),
    "weights": ("weights", dict(weights=(0.4, 0.6))),
    "strength": ("strength", dict(strength=2.0)),
    "guidance": ("weights", dict(guidance_scale=4.0)),
    "steps": ("weights", dict(num_inference_steps=3)),
    "etas": ("weights", dict(etas=(0.5, 0.5))),
    "seed": ("seeds", dict(seed=1)),
    "source of noise": ("generators", dict(seed=None)),
    "size": ("size", dict(height=48)),
    "latents": ("latents", dict(latents=torch.zeros(1, 4, 8, 8))),
}


def differ(parallel, tiny):
    """The error of each difference, then an image: the ranks can go on."""
    pipe = tiny.load()
    pipe.set_forward("sequential")
    pipe.enable_parallel(parallel)
    request = dict(prompt="a red dog", seed=0, **SHORT)
    errors = {}
    for name, (_, changes) in DIFFERENCES.items():
        try:
            pipe(**{**request, **(changes if parallel.rank == 1 else {})})
        except RanksDiffer as error:
            errors[name] = str(error)
    return errors, pipe(**request).images


def test_different_requests_are_refused_by_name_on_every_rank(tiny, pipe):
    found = values(run_ranks(2, differ, tiny))
    expected = pipe("a red dog", seed=0, **SHORT).images
    for errors, images in found:
        assert set(errors) == set(DIFFERENCES)
        for name, (field, _) in DIFFERENCES.items():
            assert "rank 1 in " in errors[name] and field in errors[name], errors[name]
        assert torch.equal(images, expected)


def other_objectives(parallel, tiny):
    pipe = tiny.load()
    if parallel.rank == 1:
        objectives = {name: mf.Objective(scale=0.5) for name in ("warm", "cool")}
        pipe = mf.MSDDAPipeline.from_pipe(pipe, objectives=objectives)
    pipe.enable_parallel(parallel)
    pipe("a red dog", seed=0, etas=(1.0, 1.0), **SHORT)


def test_other_objectives(tiny):
    for outcome in run_ranks(2, other_objectives, tiny):
        assert isinstance(outcome.error, RanksDiffer)
        assert "rank 1 in objectives" in str(outcome.error)
