# SPDX-License-Identifier: Apache-2.0
"""Pairs: the best of a prompt against the worst of the same prompt, once each."""

import pytest
import torch

from msdda_fast.errors import InvalidShape
from msdda_fast.training import PreferencePairs, preference_pairs


def scored(sizes=(9, 2, 7), seed=0):
    """Samples of prompts 0, 10, 20.. in mixed order; a latent is its own row number."""
    generator = torch.Generator().manual_seed(seed)
    prompt_index = torch.cat([torch.full((n,), 10 * i) for i, n in enumerate(sizes)])
    prompt_index = prompt_index[torch.randperm(len(prompt_index), generator=generator)]
    latents = torch.arange(len(prompt_index)).float().reshape(-1, 1, 1, 1)
    # The reward differs more between prompts than within one.
    scores = prompt_index + torch.rand(len(prompt_index), generator=generator)
    return latents, scores, prompt_index


def rows(latents):
    return latents.flatten().long().tolist()


@pytest.mark.parametrize(
    ("top_fraction", "expected"),
    [(1 / 3, {0: 3, 10: 1, 20: 2}), (0.5, {0: 4, 10: 1, 20: 3}), (0.01, {0: 1, 10: 1, 20: 1})],
    ids=["third", "half", "one"],
)
def test_top_fraction_of_each_prompt_meets_its_bottom_fraction_once(top_fraction, expected):
    latents, scores, prompt_index = scored()
    pairs = preference_pairs(latents, scores, prompt_index, top_fraction=top_fraction)
    assert pairs.prompt_index.unique(return_counts=True)[1].tolist() == list(expected.values())
    for prompt, count in expected.items():
        members = [i for i in range(len(scores)) if prompt_index[i] == prompt]
        members.sort(key=lambda i: scores[i])
        of_prompt = pairs.prompt_index == prompt
        assert sorted(rows(pairs.chosen[of_prompt])) == sorted(members[-count:])
        assert sorted(rows(pairs.rejected[of_prompt])) == sorted(members[:count])


@pytest.mark.parametrize(
    ("top_fraction", "size", "count"), [(1 / 3, 3 * 13, 13), (0.29, 100, 29)], ids=["third", ".29"]
)
def test_rounding_of_the_fraction_loses_no_pair(top_fraction, size, count):
    assert len(preference_pairs(*scored((size,)), top_fraction=top_fraction)) == count


def test_matching_is_random_and_decided_by_the_generator():
    data = scored((40,))

    def matched(seed):
        generator = torch.Generator().manual_seed(seed)
        pairs = preference_pairs(*data, top_fraction=0.5, generator=generator)
        return set(zip(rows(pairs.chosen), rows(pairs.rejected), strict=True))

    assert matched(0) == matched(0)
    assert len(matched(0) & matched(1)) < 10  # of 20, where one is expected
    scores = data[1]
    by_rank = sorted(range(40), key=lambda i: scores[i])
    assert matched(0) != set(zip(by_rank[20:], by_rank[:20], strict=True))


def test_without_a_generator_the_matching_is_repeatable():
    one, other = (preference_pairs(*scored((12, 12))) for _ in range(2))
    assert torch.equal(one.chosen, other.chosen)
    assert torch.equal(one.rejected, other.rejected)


def test_equal_scores_state_no_preference():
    latents, scores, prompt_index = scored((6, 6))
    scores[prompt_index == 0] = 1.5
    pairs = preference_pairs(latents, scores, prompt_index)
    assert pairs.prompt_index.tolist() == [10, 10]
    with pytest.raises(ValueError, match="no pairs"):
        preference_pairs(latents, torch.ones(12), prompt_index)


def test_single_sample_of_a_prompt_is_left_out():
    pairs = preference_pairs(*scored((1, 4)))
    assert pairs.prompt_index.tolist() == [10]
    with pytest.raises(ValueError, match="no pairs"):
        preference_pairs(*scored((1, 1)))


def test_bad_input_is_named():
    latents, scores, prompt_index = scored()
    with pytest.raises(InvalidShape, match=r"18 latents.*\(17,\) and \(18,\)"):
        preference_pairs(latents, scores[1:], prompt_index)
    for fraction in (0.0, 0.6):
        with pytest.raises(
            ValueError, match=rf"top_fraction must be in \(0, 0.5\], got {fraction}"
        ):
            preference_pairs(latents, scores, prompt_index, top_fraction=fraction)
    scores[3] = float("nan")
    with pytest.raises(ValueError, match="1 NaN of 18"):
        preference_pairs(latents, scores, prompt_index)
    x, index = torch.zeros(3, 4, 2, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InvalidShape, match=r"\(3, 4, 2, 2\), \(2, 4, 2, 2\)"):
        PreferencePairs(x, x[:2], index)
    with pytest.raises(InvalidShape, match=r"prompt_index must have shape \(3,\), got \(2,\)"):
        PreferencePairs(x, x, index[:2])
    with pytest.raises(ValueError, match=r"int64, got torch\.float32"):
        PreferencePairs(x, x, index.float())
    with pytest.raises(ValueError, match="NaN or infinite"):
        PreferencePairs(x, x / 0, index)
