# SPDX-License-Identifier: Apache-2.0
import pytest

from msdda_fast.rewards.grammar import Painted, parse


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("A purple colored dog.", [("dog", "purple")]),
        ("An orange colored sandwich.", [("sandwich", "orange")]),
        ("A green cup and a blue cell phone.", [("cup", "green"), ("cell phone", "blue")]),
        ("A blue book and an orange colored sandwich.", [("book", "blue"), ("sandwich", "orange")]),
        ("a vase", [("vase", None)]),
    ],
)
def test_a_prompt_names_its_objects_left_to_right(prompt, things):
    assert parse(prompt) == tuple(Painted(*thing) for thing in things)


@pytest.mark.parametrize(
    "prompt", ["A dragon.", "", "purple dog", "A red car and a dog and a cat."]
)
def test_other_prompts_are_refused_with_the_words_that_are_known(prompt):
    with pytest.raises(ValueError, match=r"outside the grammar.*purple.*giraffe") as caught:
        parse(prompt)
    assert repr(prompt) in str(caught.value)
