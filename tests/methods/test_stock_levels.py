# SPDX-License-Identifier: Apache-2.0
"""One level and one set of weights in place of several, against the fused steps themselves."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, TCDScheduler

import msdda_fast as mf
from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.methods.stock_levels import common_level, has_common_weights, mixing_weights
from msdda_fast.methods.streams import chances, stream_of

STEPS, W = 12, {"a": 0.3, "b": 0.7}
FLOW = FlowMatchEulerDiscreteScheduler(shift=1.0)


def etas(level):
    return level


@pytest.mark.parametrize("kind", [mf.FlowSDE, mf.DanceSDE, mf.CPS, mf.FlowDDIM, etas])
def test_at_the_common_level_steps_have_the_noise_of_msdda(kind):
    scheduler = DDIMScheduler() if kind is etas else FLOW
    levels = {"a": kind(0.8), "b": kind(0.4)}
    one = common_level(scheduler, W, levels)
    fused, alone = (
        mf.coefficient_table(scheduler, STEPS, levels=own, weights=weights, dtype=torch.float64)
        for own, weights in ((list(levels.values()), list(W.values())), ([one], [1.0]))
    )
    torch.testing.assert_close(fused.std, alone.std, rtol=1e-9, atol=1e-12)
    assert common_level(scheduler, W, dict.fromkeys(W, one)) == one


@pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
def test_predictions_mixed_at_these_weights_are_the_fused_step(w):
    weights, levels = {"a": w, "b": 1 - w}, {"a": mf.FlowSDE(0.7), "b": mf.FlowSDE(0.5)}
    table = mf.coefficient_table(
        FLOW, STEPS, levels=list(levels.values()), weights=list(weights.values()),
        dtype=torch.float64,
    )  # fmt: skip
    counts = table.rows[1:, 0, table[0].layout.cond]  # of the first step, at t = 1, G is another
    wanted = torch.tensor(list(mixing_weights(weights, levels).values()), dtype=torch.float64)
    found = counts / counts.sum(-1, keepdim=True)
    torch.testing.assert_close(found, wanted.expand_as(found), rtol=0, atol=1e-12)


def test_for_ddim_they_are_the_effective_weights():
    what, _ = mf.effective_weights([0.3, 0.7], [0.8, 1.0])
    for kind in (etas, mf.FlowDDIM):
        found = mixing_weights(W, {"a": kind(0.8), "b": kind(1.0)})
        assert list(found.values()) == pytest.approx(what.tolist(), abs=1e-15)


def test_where_there_are_none_is_said():
    same, other = {"a": mf.CPS(0.5), "b": mf.CPS(0.5)}, {"a": mf.CPS(0.5), "b": mf.CPS(0.7)}
    assert mixing_weights(W, same) == W and not has_common_weights(same)
    assert not has_common_weights(other)
    with pytest.raises(mf.InvalidSchedule, match="differ from step to step for CPS"):
        mixing_weights(W, other)
    with pytest.raises(mf.InvalidSchedule, match="of TCDScheduler"):
        common_level(TCDScheduler(), W, {"a": 0.5, "b": 1.0})
    assert common_level(TCDScheduler(), W, {"a": 0.5, "b": 0.5}) == 0.5


def test_choices_are_those_of_the_first_number_of_a_latent():
    """Whatever its shape: a seed means the same in every pipeline."""
    noise = counter_noise([3, 4], (2, 4, 8, 8), step=5, stream=stream_of(1))
    wanted = torch.special.ndtr(noise[:, 0, 0, 0].double())
    assert torch.equal(chances([3, 4], 5, 1), wanted)
