# SPDX-License-Identifier: Apache-2.0
"""The systems without rewards on a pipeline with a loop of its own: what each of them equals."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.writing import write_adapters
from msdda_fast.errors import AdapterMismatch, UnknownObjective, UnsupportedNetwork
from msdda_fast.methods.best_of_n import BestOfDraws, BestOfN
from msdda_fast.methods.code import CoDe
from msdda_fast.methods.db_kla import DBKLA
from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.db_mpa_ls import DBMPALS
from msdda_fast.methods.deradiff import DeRaDiff
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.path_kl import path_kl
from msdda_fast.methods.rewarded_soup import RewardedSoup
from msdda_fast.methods.sd import SD
from msdda_fast.methods.stock_levels import common_level
from msdda_fast.methods.stock_model import StockModel
from msdda_fast.pipelines.attach_files import networks_of
from tests.families import images as images_of
from tests.families import videos
from tests.methods import stock
from tests.methods.stock import LEVELS, PROMPTS, RUN, SEEDS, STEPS, drawn

HALF, ONLY_A = {"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0}


@pytest.fixture(scope="module")
def networks():
    return stock.stock()


@pytest.fixture
def pipe(networks):
    return stock.attached(networks)


def images(method, pipe, weights=HALF, **more):
    return method(pipe, PROMPTS, weights, SEEDS, **{**RUN, **more}).images


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def one(pipe, source, level, scale=1.0):
    """Images of one objective alone, of a set of adapters, on the same networks."""
    objective = mf.Objective(source, noise=mf.FlowSDE(level), scale=scale)
    return drawn(mf.MSDDAPipeline.from_pipe(pipe.detach(), objectives={"one": objective}), None)


def level_of(weights):
    return common_level(None, weights, {n: mf.FlowSDE(a) for n, a in LEVELS.items()}).level


def test_msdda_is_the_pipeline_with_its_objectives(pipe):
    assert torch.equal(images(MSDDA(), pipe), drawn(pipe, HALF))


def test_all_weight_on_one_objective_is_that_objective_sampled_alone(pipe):
    alone = one(pipe, "a", LEVELS["a"])
    for method in (MSDDA(), DBMPA(), DBMPA(remapped=True), RewardedSoup(), DBMPALS()):
        close(images(method, pipe, ONLY_A), alone)
    close(images(DeRaDiff(objective="a", strength=1.0), pipe), alone)
    close(images(SD(), pipe, ONLY_A), one(pipe, None, LEVELS["a"]))


def test_a_product_merge_is_the_set_of_scaled_adapters(pipe):
    """In text encoders, too; adapters of unequal rank."""
    weights = {"a": 0.3, "b": 0.7}
    merged = images(RewardedSoup(), pipe, weights)
    close(merged, one(pipe, ["a", "b"], level_of(weights), [0.3, 0.7]))
    assert (merged - images(MSDDA(), pipe, weights)).abs().max() > 1e-3


def test_sets_of_adapters_are_merged_as_they_act(networks):
    own = stock.objectives()
    together = {**own, "a": mf.Objective(["a", "c"], scale=[0.5, 1.0], noise=own["a"].noise)}
    pipe = stock.attached(networks, **together)
    wanted = one(pipe, ["a", "c", "b"], level_of(HALF), [0.25, 0.5, 0.5])
    close(images(RewardedSoup(), pipe), wanted)


def test_merged_factors_need_one_rank_and_depend_on_rotations(networks, pipe):
    with pytest.raises(AdapterMismatch, match="equal rank"):
        images(RewardedSoup(merge="factor"), pipe)
    pipe, own = stock.attached(networks, **stock.objectives(names="cd")), {"c": 0.5, "d": 0.5}
    factor, rotated = (
        images(RewardedSoup(merge="factor", rotation=seed), pipe, own) for seed in (None, 0)
    )
    assert (factor - rotated).abs().max() > 1e-3
    assert (factor - images(RewardedSoup(), pipe, own)).abs().max() > 1e-3


def test_at_equal_levels_mixed_predictions_are_msdda(networks):
    own = {name: mf.Objective(name, noise=mf.FlowSDE(0.5)) for name in "ab"}
    pipe = stock.attached(networks, **own)
    ours = images(MSDDA(), pipe)
    for method in (DBMPA(), DBMPA(remapped=True), MSDDA(fusion="eps")):
        close(images(method, pipe), ours)


def test_a_scheduler_without_levels_is_its_own(networks):
    """The probability flow's Euler steps: all that is compared takes them."""
    pipe = stock.attached(networks, a=mf.Objective("a"), b=mf.Objective("b"))
    ours = images(MSDDA(), pipe)
    for method in (DBMPA(), DBMPA(remapped=True)):
        close(images(method, pipe), ours)
    assert not torch.equal(images(SD(), pipe), ours)


def test_switching_takes_one_model_per_step_for_each_image(pipe):
    """With one step that is its image; what shares the batch does not matter."""
    prompts, seeds = PROMPTS * 3, [3, 4, 5, 6, 7, 8]
    run = {**RUN, "num_inference_steps": 1}
    found = DBMPALS()(pipe, prompts, HALF, seeds, **run).images
    level = mf.FlowSDE(level_of(HALF))
    both = [
        pipe(
            prompts, weights=w, levels=[level, level], seed=seeds, output_type="pt", **run
        ).images
        for w in (ONLY_A, {"a": 0.0, "b": 1.0})
    ]  # fmt: skip
    chosen = [
        next(m for m, own in enumerate(both) if (own[i] - image).abs().max() < 2e-5)
        for i, image in enumerate(found)
    ]
    assert set(chosen) == {0, 1}
    alone = DBMPALS()(pipe, prompts[:1], HALF, seeds[:1], **run).images
    close(alone[0], found[0])


def test_strength_interpolates_and_goes_on(pipe):
    level = level_of(HALF)
    base, own = one(pipe, None, level), one(pipe, "a", level)
    close(images(DBKLA(objective="a", strength=0.0), pipe), base)
    close(images(DBKLA(objective="a", strength=1.0), pipe), own)
    beyond = images(DBKLA(objective="a", strength=1.5), pipe)
    assert (beyond - base).abs().mean() > (own - base).abs().mean()
    close(images(DeRaDiff(objective="a", strength=0.0), pipe), base)


def test_an_oracle_is_loaded_and_leaves_nothing(pipe, tmp_path):
    before = {name: adapter_names(network) for name, network in networks_of(pipe).items()}
    write_adapters(networks_of(pipe), (("a", 1.0),), tmp_path)
    oracle = MORLOracle(objective="a", adapters={0.5: tmp_path})
    close(images(oracle, pipe), one(pipe, "a", level_of(HALF)))
    images(RewardedSoup(), pipe)
    assert {n: adapter_names(network) for n, network in networks_of(pipe).items()} == before
    assert torch.equal(images(MSDDA(), pipe), drawn(pipe, HALF))


def test_costs_are_what_ran(networks, pipe):
    """Two branches of guidance; with a range the base's rows run beside."""
    branches = 2 * STEPS * len(PROMPTS)
    for method, rows in ((SD(), 1), (MSDDA(), 2), (RewardedSoup(), 1), (DBMPALS(), 2)):
        cost = method(pipe, PROMPTS, HALF, SEEDS, **RUN).cost
        assert (cost.unet_forwards, cost.decodes) == (rows * branches, len(PROMPTS))
    within = stock.attached(networks, **stock.objectives(timesteps=(500, 1000)))
    cost = MSDDA()(within, PROMPTS, HALF, SEEDS, **RUN).cost
    assert cost.unet_forwards == 3 * branches
    merged = images(RewardedSoup(), within)
    assert (merged - images(RewardedSoup(), pipe)).abs().max() > 1e-3  # it acts within, too


@pytest.mark.parametrize("method", [CoDe(), BestOfN(), BestOfDraws(of=SD())], ids=lambda m: m.name)
def test_what_takes_single_steps_is_refused_by_name(pipe, method):
    with pytest.raises(UnsupportedNetwork, match=f"{method.name} needs single steps .*captured"):
        method(pipe, PROMPTS, HALF, SEEDS, **RUN, rewards={"a": None, "b": None})
    with pytest.raises(UnsupportedNetwork, match="path KL needs single steps"):
        path_kl(SD(), pipe, PROMPTS, HALF, SEEDS)


def test_bad_input_is_named(networks, pipe):
    with pytest.raises(UnknownObjective, match="unknown objective 'hot'"):
        images(MSDDA(), pipe, {"hot": 1.0})
    mixed = stock.attached(
        networks, a=mf.Objective("a", noise=mf.FlowSDE(0.5)), b=mf.Objective("b")
    )
    with pytest.raises(mf.InvalidSchedule, match="'b' was aligned without noise"):
        images(MSDDA(), mixed)
    film = mf.MSDDAPipeline.from_pipe(videos.wan()[0])
    with pytest.raises(UnsupportedNetwork, match="draws video, and rewards score images"):
        StockModel(film, PROMPTS, {"a": 1.0}, SEEDS, num_steps=1)
    started = mf.MSDDAPipeline.from_pipe(images_of.flux_img2img()[0])
    with pytest.raises(UnsupportedNetwork, match="starts from an image"):
        StockModel(started, PROMPTS, {"a": 1.0}, SEEDS, num_steps=1)
    with pytest.raises(AdapterMismatch, match="different timesteps"):
        own = stock.objectives()
        own["a"] = mf.Objective("a", noise=own["a"].noise, timesteps=(500, 1000))
        images(RewardedSoup(), stock.attached(networks, **own))
