# SPDX-License-Identifier: Apache-2.0
"""A request is written as a whole or not at all, and what does not fit is named."""

from dataclasses import fields, replace

import pytest
import torch

from msdda_fast.engine.buffers import ShapeKey, StepBuffers, padded_steps
from msdda_fast.errors import InvalidSchedule, InvalidShape
from tests.engine.small_world import CHANNELS, KEY, SHAPE, Request, drawn


@pytest.mark.parametrize(
    ("num_steps", "length"), [(1, 64), (50, 64), (64, 64), (65, 128), (1000, 1024)]
)
def test_tables_have_room_for_other_numbers_of_steps(num_steps: int, length: int) -> None:
    assert padded_steps(num_steps) == length


def test_their_size_is_known_before_they_are_made() -> None:
    key = replace(KEY, dtype=torch.float16, input_rows=4, noise_table=True)
    state = 2 * 4 * 6 * 6
    counted = 4 * state + 2 * 4 * state + 64 * (4 * 2 * 6 + 8 + 4 * state) + 8 * 2 + 8
    assert StepBuffers.nbytes(key) == counted


@pytest.fixture
def buffers() -> StepBuffers:
    made = StepBuffers.allocate(KEY, "cpu")
    made.conditioning["prompt"] = torch.zeros(2, CHANNELS)
    return made


PROMPT = torch.ones(2, CHANNELS)
REFUSED = {
    "x_T": (dict(x_T=drawn(3, *SHAPE[1:])), InvalidShape, r"x_T has shape \(3, 4, 6, 6\), expect"),
    "x_T-device": (dict(x_T=torch.empty(SHAPE, device="meta")), InvalidShape, "x_T is on meta"),
    "x_T-dtype": (dict(x_T=torch.ones(SHAPE, dtype=torch.int64)), InvalidShape, "torch.int64"),
    "num-seeds": (dict(seeds=(1, 2, 3)), InvalidShape, r"seeds have shape \(3,\)"),
    "seed": (dict(seeds=(1, 2**64)), ValueError, "a seed must be an integer"),
    "no-seeds": (dict(seeds=None), ValueError, "for seeds"),
    "noise": (dict(noise=drawn(5, *SHAPE)), ValueError, "for seeds"),
    "no-prompt": (dict(conditioning=None), ValueError, r"names \[\], expected \['prompt'\]"),
    "name": (dict(conditioning={"prompts": PROMPT}), ValueError, r"names \['prompts'\]"),
    "prompt": (dict(conditioning={"prompt": PROMPT[:1]}), InvalidShape, "prompt has shape"),
    "steps": (dict(table=Request(num_steps=65).table), InvalidSchedule, "65 steps"),
    "batch": (dict(table=Request(weights=((0.3, 0.7),) * 3).table), InvalidShape, "B = 3"),
    "objectives": (
        dict(table=Request(etas=(1.0,), weights=(1.0,)).table),
        InvalidShape,
        "M = 1, expected 1 or 2 and 2",
    ),
    "wide": (dict(table=Request().table.to(dtype=torch.float64)), InvalidShape, "torch.float64"),
    "clipped": (dict(table=replace(Request().table, clip_range=1.0)), InvalidSchedule, "1.0"),
    "guided": (dict(table=Request(guidance=2.0).table), InvalidShape, "needs_uncond=True"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(buffers, change, error, message) -> None:
    given = Request().arguments | {"conditioning": {"prompt": PROMPT}} | change
    with pytest.raises(error, match=message):
        buffers.load(**given)
    written = (buffers.x, buffers.rows, buffers.timesteps, buffers.seeds, buffers.next_input)
    assert not any(tensor.any() for tensor in (*written, *buffers.conditioning.values()))


def test_an_objective_that_the_buffers_leave_out() -> None:
    made = StepBuffers.allocate(replace(KEY, active=(True, False)), "cpu")
    with pytest.raises(InvalidShape, match=r"active=\[True, True\].*active=\[True, False\]"):
        made.load(**Request().arguments)
    made.load(**Request(weights=(1.0, 0.0)).arguments)


@pytest.mark.parametrize(
    ("noise", "seeds", "error", "message"),
    [
        (drawn(4, *SHAPE), None, InvalidShape, r"noise has shape \(4, 2, 4, 6, 6\)"),
        (None, (1, 2), ValueError, "for a noise table"),
        (None, None, ValueError, "for a noise table"),
        (drawn(5, *SHAPE), (1, 2), ValueError, "for a noise table"),
    ],
)
def test_a_noise_table_wants_its_shape_and_no_seeds(noise, seeds, error, message) -> None:
    made = StepBuffers.allocate(replace(KEY, noise_table=True), "cpu")
    with pytest.raises(error, match=message):
        made.load(**Request(noise=noise, seeds=seeds).arguments)


def test_what_is_replaced_between_steps_is_checked(buffers: StepBuffers) -> None:
    with pytest.raises(InvalidShape, match="x has shape"):
        buffers.replace_x(drawn(1, *SHAPE[1:]))
    with pytest.raises(ValueError, match=r"names \['image'\]"):
        buffers.replace_conditioning({"image": PROMPT})
    with pytest.raises(InvalidShape, match="prompt has shape"):
        buffers.replace_conditioning({"prompt": PROMPT[0]})


def test_a_loaded_request_lies_where_it_belongs(buffers: StepBuffers) -> None:
    buffers.counter.fill_(7)
    request = Request(weights=(0.3, 0.7), seeds=(1, 2**64 - 1))
    addresses = [t.data_ptr() for t in (buffers.x, buffers.rows, buffers.seeds, buffers.next_input)]
    buffers.load(**request.arguments | {"conditioning": {"prompt": PROMPT}})
    assert buffers.x.equal(request.start) and buffers.next_input[0].equal(request.start)
    assert all(buffers.rows[:5, b].equal(request.table.rows[:, 0]) for b in range(2))
    assert buffers.timesteps[:5].equal(request.table.timesteps)
    assert buffers.seeds.tolist() == [1, -1] and int(buffers.counter) == 0
    assert buffers.conditioning["prompt"].equal(PROMPT)
    now = [t.data_ptr() for t in (buffers.x, buffers.rows, buffers.seeds, buffers.next_input)]
    assert now == addresses


def test_times_of_flow_models_stay_what_they_are(buffers: StepBuffers) -> None:
    given = Request(weights=(0.3, 0.7), seeds=(1, 2)).arguments | {"conditioning": None}
    table = replace(given["table"], timesteps=torch.linspace(1000, 12.5, 5))
    given["table"] = table
    made = StepBuffers.allocate(replace(KEY, timestep_dtype=torch.float32), "cpu")
    made.load(**given)
    assert made.timesteps[:5].equal(table.timesteps)
    with pytest.raises(InvalidShape, match=r"timesteps has dtype torch.float32, expected .*int64"):
        buffers.load(**given | {"conditioning": {"prompt": PROMPT}})
    with pytest.raises(InvalidSchedule, match="take it scaled"):
        made.load(**given | {"table": replace(table, input_scale=torch.ones(5))})


OTHER = {
    "shape": (9, 9),
    "active": (True, True, True),
    "runs": ((True,),),
    "branches": 2,
    "clip_range": 1.0,
    "dtype": torch.bfloat16,
    "input_rows": 2,
    "channels_last": True,
    "max_steps": 128,
    "timestep_dtype": torch.float32,
    "noise_table": True,
    "context": (1, 2),
    "shared_context": True,
    "pixelwise": 2,
    "mode": "another",
}


def test_every_field_tells_one_captured_step_from_another() -> None:
    key = ShapeKey(shape=(1, 4), active=(True,))
    assert OTHER.keys() == {field.name for field in fields(ShapeKey)}
    for name, value in OTHER.items():
        assert replace(key, **{name: value}) != key, name
