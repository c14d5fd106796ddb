# SPDX-License-Identifier: Apache-2.0
"""Any stock pipeline on several ranks draws the latents of one process."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast.batching.stock_drawing import StockDrawer
from msdda_fast.pipelines.tasks import for_task
from tests.families.lockstep import draw, quiet
from tests.families.table import FAMILIES
from tests.parallel.ranks import run_ranks, values

W = {"a": 0.3, "b": 0.7}

REQUESTS = {
    "seeds": dict(seed=3, weights=W),
    "a generator": dict(weights=W),
    "one objective": dict(seed=3, weights={"a": 0.0, "b": 1.0}),
    "the base is one more": dict(seed=3, weights=W, objective_strength=1.5),
}
EVERY = list(REQUESTS)
LEFT = (torch.arange(16) < 8).double().expand(16, 16)  # of an image of SD3 here
REQUESTS["masks"] = dict(seed=3, masks={"a": LEFT}, mask_softness=0)


def attached(family):
    pipe, call = FAMILIES[family].make()
    return quiet(mf.MSDDAPipeline.from_pipe(pipe)), call


def draw_all(parallel, family, names):
    """Latents by request; then in how many rows the denoisers ran."""
    pipe, call = attached(family)
    pipe.enable_parallel(parallel)
    # what differs between ranks is what rank 0 decides
    found = {name: draw(pipe, call, seeds=[7 + parallel.rank], **REQUESTS[name]) for name in names}
    sets = []
    for hook in pipe._hooks.values():
        sets += hook._sets
    return found, sets


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
@pytest.mark.parametrize(
    "size, family, names",
    [
        (2, "SD3", ["a generator"]),
        pytest.param(2, "SD3", list(REQUESTS), marks=pytest.mark.full),
        *(
            # processes, and a model in each
            pytest.param(size, family, EVERY, marks=pytest.mark.full)
            for size, family in [
                (3, "FLUX, true guidance"),
                (2, "Z-Image"),
                (2, "SDXL"),
                (2, "Wan 2.2"),
                (4, "Qwen-Image"),
                (2, "LTX-2"),
            ]
        ),
    ],
)
def test_ranks_draw_the_latents_of_one_process(size, family, names):
    found = values(run_ranks(size, draw_all, family, names))
    pipe, call = attached(family)
    for name in names:
        expected = draw(pipe, call, **REQUESTS[name])
        for latents, _ in found:
            assert torch.equal(latents[name], found[0][0][name]), name
        worst = (found[0][0][name] - expected).abs().max()
        assert worst <= 5e-6 * expected.abs().max(), name
    # forwards of one objective each, or with the base and two ranks of two
    assert all(set(sets) <= ({1, 2} if size == 2 else {1}) for _, sets in found)


def stray(pipe, k, t, tensors):
    return {"latents": tensors["latents"] + 1} if k == 1 else {}


def fail(pipe, k, t, tensors):
    raise ZeroDivisionError("no such colour")


#: what rank 1 asks for in place of rank 0's
CHANGES = {
    "weights": dict(weights={"a": 0.4, "b": 0.6}),
    "seeds": dict(seed=4),
    "levels": dict(levels=[mf.FlowSDE(0.3)] * 2),
    "arguments": dict(num_inference_steps=4),
    "latents": dict(callback_on_step_end=stray),
    "failure": dict(callback_on_step_end=fail),
}


def changes(parallel):
    """What becomes of calls of which rank 1 has another, and of one after them."""
    pipe, call = attached("SD3")
    pipe.enable_parallel(parallel)
    said = {}
    for name, own in CHANGES.items():
        asked = {"seed": 3, "weights": W, **(own if parallel.rank == 1 else {})}
        try:
            draw(pipe, call, **asked)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said, draw(pipe, call, seed=3, weights=W)


def test_ranks_that_differ_say_so_and_go_on():
    found = values(run_ranks(2, changes))
    pipe, call = attached("SD3")
    expected = draw(pipe, call, seed=3, weights=W)
    for rank, (said, latents) in enumerate(found):
        for name in ("weights", "seeds", "levels", "arguments"):
            assert "RanksDiffer" in said[name] and f"rank 1 in {name}" in said[name], said[name]
        assert said["latents"].startswith("RanksDiffer") and "latents" in said["latents"]
        assert "no such colour" in said["failure"]
        assert said["failure"].startswith(
            "ZeroDivisionError" if rank else "RankLost: rank 0 stopped"
        )
        assert (latents - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_which_pipelines_run_in_the_same_processes():
    pipe, _ = attached("SD3")
    pipe.enable_parallel(object())
    with pytest.raises(ValueError, match="disable_parallel"):
        StockDrawer(pipe)
    assert for_task(pipe, "image-to-image").parallel is pipe.parallel
    assert mf.MSDDAPipeline.from_pipe(pipe).parallel is None
    assert not hasattr(pipe.detach(), "_parallel")
