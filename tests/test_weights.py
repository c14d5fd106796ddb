# SPDX-License-Identifier: Apache-2.0
"""Objectives and preference weights: every accepted form, and every refusal by name."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch._subclasses import FakeTensorMode

from msdda_fast import InvalidSchedule, InvalidShape, InvalidWeights, Objective, UnknownObjective
from msdda_fast.weights import normalise_weights, preference_schedule, preference_weights

NAMES = ["aesthetic", "consistency"]


class TestObjective:
    def test_defaults_are_the_base_at_full_noise(self) -> None:
        assert Objective() == Objective.base() == Objective(None, eta=1.0, scale=1.0)
        assert Objective.base(eta=0.8).eta == 0.8

    def test_the_base_is_known(self) -> None:
        assert Objective().is_base
        assert not Objective("some/lora").is_base
        assert not Objective(unet=object()).is_base

    def test_is_frozen_and_keyword_only(self) -> None:
        with pytest.raises(FrozenInstanceError):
            Objective().eta = 0.5  # type: ignore[misc]
        with pytest.raises(TypeError):
            Objective("some/lora", 0.8)  # type: ignore[misc]

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    def test_eta_in_range(self, eta: float) -> None:
        assert Objective(eta=eta).eta == eta

    @pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf])
    def test_eta_out_of_range(self, eta: float) -> None:
        with pytest.raises(InvalidSchedule, match=rf"eta must lie in \[0, 1\], got {eta}"):
            Objective(eta=eta)

    def test_other_fields(self) -> None:
        with pytest.raises(ValueError, match="scale must be finite, got nan"):
            Objective(scale=math.nan)
        with pytest.raises(InvalidSchedule, match="guidance_scale must be finite, got inf"):
            Objective(guidance_scale=math.inf)
        with pytest.raises(ValueError, match="not both"):
            Objective("some/lora", unet=object())


class TestPreferenceWeights:
    @pytest.mark.parametrize(
        "weights",
        [
            {"aesthetic": 0.3, "consistency": 0.7},
            {"consistency": 0.7, "aesthetic": 0.3},
            [{"aesthetic": 0.3, "consistency": 0.7}] * 3,
            [0.3, 0.7],
            (0.3, 0.7),
            [[0.3, 0.7]] * 3,
            torch.tensor([0.3, 0.7], dtype=torch.float64),
            torch.tensor([[0.3, 0.7]], dtype=torch.float64),
            torch.tensor([[0.3, 0.7]] * 3, dtype=torch.float64),
        ],
        ids=repr,
    )
    def test_every_form_means_the_same(self, weights: object) -> None:
        rows = preference_weights(weights, NAMES, 3)
        assert rows.dtype == torch.float64
        assert rows.tolist() == [[0.3, 0.7]] * 3

    def test_none_is_uniform(self) -> None:
        assert preference_weights(None, 4, 2).tolist() == [[0.25] * 4] * 2

    def test_rows_may_differ(self) -> None:
        rows = preference_weights([{"aesthetic": 1, "consistency": 0}, {"aesthetic": 0.5,
                                   "consistency": 0.5}], NAMES, 2)  # fmt: skip
        assert rows.tolist() == [[1.0, 0.0], [0.5, 0.5]]

    def test_a_sum_near_one_is_renormalised_in_float64(self) -> None:
        rows = preference_weights([0.3, 0.7005], 2, 1)
        assert rows.sum().item() == pytest.approx(1, abs=1e-15)
        assert rows[0, 0].item() == pytest.approx(0.3 / 1.0005, rel=1e-15)
        thirds = preference_weights(torch.full((3,), 1 / 3), 3, 1)  # float32
        assert thirds.sum().item() == pytest.approx(1, abs=1e-15)

    @pytest.mark.parametrize("total", [1.0011, 0.9989])
    def test_a_sum_away_from_one_is_refused(self, total: float) -> None:
        with pytest.raises(InvalidWeights, match=rf"sum to {total}.*sum to 1 within 0\.001"):
            preference_weights([0.3, total - 0.3], 2, 1)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("extrapolate", [False, True])
    def test_non_finite_is_refused(self, bad: float, extrapolate: bool) -> None:
        with pytest.raises(InvalidWeights, match=rf"weights at index 1 are \[0.5, {bad}\]"):
            preference_weights([[0.5, 0.5], [0.5, bad]], 2, 2, extrapolate=extrapolate)

    def test_negative_needs_extrapolate(self) -> None:
        with pytest.raises(InvalidWeights, match=r"\[-0.5, 1.5\].*extrapolate=True"):
            preference_weights([-0.5, 1.5], 2, 1)
        assert preference_weights([-0.5, 1.5], 2, 1, extrapolate=True).tolist() == [[-0.5, 1.5]]

    def test_unknown_name(self) -> None:
        with pytest.raises(UnknownObjective) as caught:
            preference_weights({"beauty": 1.0}, NAMES, 1)
        assert str(caught.value) == "unknown objective 'beauty'; known: aesthetic, consistency"
        assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)

    def test_missing_name_is_not_zero(self) -> None:
        with pytest.raises(InvalidWeights, match=r"miss consistency.*aesthetic, consistency"):
            preference_weights({"aesthetic": 1.0}, NAMES, 1)

    def test_names_need_named_objectives(self) -> None:
        with pytest.raises(InvalidWeights, match="named objectives"):
            preference_weights({"aesthetic": 1.0}, 1, 1)
        with pytest.raises(InvalidWeights, match="one mapping per sample"):
            preference_weights([{"aesthetic": 0.3, "consistency": 0.7}, [0.3, 0.7]], NAMES, 2)

    @pytest.mark.parametrize(
        "weights",
        [
            [1.0],
            [0.2, 0.3, 0.5],
            [[0.5, 0.5]] * 2,
            torch.full((3, 2, 1), 0.5),
            torch.tensor(1.0),
            [{"aesthetic": 0.5, "consistency": 0.5}] * 2,
        ],
        ids=["M=1", "M=3", "B=2", "3-d", "0-d", "2 mappings"],
    )
    def test_wrong_shape(self, weights: object) -> None:
        with pytest.raises(InvalidShape, match=r"expected \(2,\) or \(3, 2\)"):
            preference_weights(weights, NAMES, 3)

    @pytest.mark.parametrize(
        "weights",
        [[[0.5, 0.5], [1.0]], ["a", "b"], {"aesthetic": None, "consistency": 1.0}],
        ids=["ragged", "text", "None"],
    )
    def test_not_numbers(self, weights: object) -> None:
        with pytest.raises(InvalidShape, match="rectangular array of numbers"):
            preference_weights(weights, NAMES, 2)

    def test_fake_tensors_are_not_read(self) -> None:
        with FakeTensorMode():
            rows = preference_weights(torch.empty(2), 2, 3)
        assert rows.shape == (3, 2)


class TestPreferenceSchedule:
    def test_constant_is_expanded(self) -> None:
        rows = preference_schedule([0.3, 0.7], 2, 3, 50)
        assert rows.shape == (50, 3, 2)
        assert rows.stride(0) == 0

    def test_callable_gets_the_step_index(self) -> None:
        rows = preference_schedule(lambda k: [k / 4, 1 - k / 4], 2, 1, 5)
        assert rows[:, 0, 0].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]

    def test_callable_may_return_any_form(self) -> None:
        forms = [None, {"aesthetic": 0.5, "consistency": 0.5}, [[0.5, 0.5]] * 2]
        assert preference_schedule(forms[1], NAMES, 2, 3).unique().tolist() == [0.5]
        assert preference_schedule(lambda k: forms[k], NAMES, 2, 3).unique().tolist() == [0.5]

    def test_numbers_per_step(self) -> None:
        given = torch.tensor([[[0.3, 0.7]], [[1.0, 0.0]]], dtype=torch.float64)
        assert preference_schedule(given, 2, 1, 2).equal(given)
        assert preference_schedule(given, 2, 4, 2).equal(given.expand(2, 4, 2))
        assert preference_schedule(given.tolist(), 2, 1, 2).equal(given)

    @pytest.mark.parametrize("shape", [(3, 1, 2), (2, 3, 2), (2, 4, 3)], ids=str)
    def test_wrong_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InvalidShape, match=r"expected \(T, B, M\) = \(2, 4, 2\)"):
            preference_schedule(torch.ones(shape), 2, 4, 2)

    def test_values_are_checked_at_every_step(self) -> None:
        with pytest.raises(InvalidWeights):
            preference_schedule(lambda k: [1.0 + k, 0.0], 2, 1, 2)
        with pytest.raises(InvalidWeights, match=r"index \[1, 0\]"):
            preference_schedule(torch.tensor([[[0.5, 0.5]], [[0.5, 0.6]]]), 2, 1, 2)


class TestNormaliseWeights:
    def test_axis_zero_is_objective_first(self) -> None:
        weights = torch.tensor([[0.3, 1.0], [0.7, 0.0]], dtype=torch.float64)
        assert normalise_weights(weights, axis=0).equal(weights)
        with pytest.raises(InvalidWeights, match=r"index 0 are \[0.3, 1\]"):
            normalise_weights(weights, axis=-1)

    def test_keeps_pixels(self) -> None:
        weights = torch.rand(3, 2, 4, 4).softmax(0)
        normalised = normalise_weights(weights, axis=0)
        assert normalised.shape == weights.shape
        assert (normalised.sum(0) - 1).abs().max() < 1e-15

    @pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
    def test_dtype(self, dtype: torch.dtype) -> None:
        with pytest.raises(InvalidWeights, match=f"dtype {dtype}"):
            normalise_weights(torch.ones(1, dtype=dtype), axis=0)

    def test_compiles_without_reading_values(self) -> None:
        compiled = torch.compile(normalise_weights, fullgraph=True, backend="eager")
        assert compiled(torch.tensor([0.3, 0.6]), axis=0).sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([0.3, 0.7], dtype=torch.complex64), "weights are torch.complex64"),
        (torch.tensor([0.3, 0.7]).to_sparse(), "torch.sparse_coo"),
        (5, "weights have shape"),
    ],
)
def test_what_are_no_numbers_of_objectives_is_refused(weights, message):
    with pytest.raises(InvalidShape, match=message):
        preference_schedule(weights, 2, 1, 3)
