# SPDX-License-Identifier: Apache-2.0
"""Every field of a body is refused by its name: of a wrong type, out of range, unknown."""

import json

import pytest

from msdda_fast.serve.body import GenerationBody

#: A value of each JSON type.
VALUES = {
    "string": "x", "integer": 7, "number": 1.5, "boolean": True, "array": [1], "object": {"x": "y"},
}  # fmt: skip
HUGE = int("9" * 400)
#: Values of the right type that are out of range, for every field that has a range.
OUT_OF_RANGE = {
    "prompt": ["a" * 201, "a " * 150, "\ud800"],
    "negative_prompt": ["a" * 201, "a " * 150, "\ud800"],
    "model": ["dall-e-3", ""],
    "n": [0, -1, 4, HUGE],
    "size": ["33x32", "0x0", "", "32x32 ", "\ud800"],
    "response_format": ["url", ""],
    "output_format": ["jpeg", ""],
    "output_compression": [0, 50, 101],
    "quality": ["high", "hd", ""],
    "background": ["transparent", ""],
    "moderation": ["low", ""],
    "user": ["u" * 257, "\ud800"],
    "safety_identifier": ["u" * 257, "\ud800"],
    "weights": [
        {},
        {"warm": 1.0},
        {"warm": 0.9, "cool": 0.9},
        {"warm": -1, "cool": 2},
        {"500-": {"warm": 1, "cool": 0}},
        {"0-999": 1, "1-2": {}},
        {"0-999": {"warm": 1}},
    ],
    "masks": [{"warm": ""}, {"warm": "!"}, {"warm": "aGk="}, {str(i): "" for i in range(33)}],
    "mask_softness": [-0.1, 1025, 1e300, HUGE],
    "strength": [-0.1, 11, 1e300, {"warm": -1}, {"hot": 1.0}, HUGE],
    "seed": [-1, 2**63, HUGE],
    "steps": [0, -1, 51, HUGE],
    "guidance_scale": [0.99, -1, 101, 1e300, HUGE],
}
#: Both values are right.
WITHOUT_RANGE = {"stream"}


def types(field, described):
    """The JSON types that the schema allows a field."""
    allowed = described["properties"][field]
    return {kind["type"] for kind in allowed.get("anyOf", [allowed]) if "type" in kind}


def wrong_types():
    described = GenerationBody.model_json_schema()
    for field in described["properties"]:
        allowed = types(field, described)
        allowed |= {"integer"} if "number" in allowed else set()
        for kind, value in VALUES.items():
            if kind not in allowed:
                yield pytest.param(field, value, id=f"{field}-{kind}")
        if "null" not in allowed:
            yield pytest.param(field, None, id=f"{field}-null")


def check(answer, param, status=400):
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert error.keys() == {"type", "message", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    # a wrong entry of a list or mapping is named with its place
    assert error["param"] == param or error["param"].split(".")[0] == param


@pytest.mark.parametrize(("field", "value"), [*wrong_types()])
def test_a_wrong_type(served, field, value):
    check(served.draw(**{field: value}), field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, id=f"{field}-{ascii(value)[:20]}")
        for field, values in OUT_OF_RANGE.items()
        for value in values
    ],
)
def test_out_of_range(served, field, value):
    content = json.dumps({"prompt": "a dog", field: value})  # escapes what is not Unicode
    headers = {"content-type": "application/json"}
    answer = served.http.post("/v1/images/generations", content=content, headers=headers)
    check(answer, field, 404 if field == "model" else 400)


def test_every_field_is_here():
    fields = GenerationBody.model_fields.keys()
    assert fields - OUT_OF_RANGE.keys() - WITHOUT_RANGE <= {"partial_images", "progress"}


@pytest.mark.parametrize("name", ["Prompt", "prompts", "__proto__", "height", "lora", "x" * 1000])
def test_unknown_fields(served, name):
    check(served.draw(**{name: 1}), name if len(name) < 60 else f"{'x' * 30}...{'x' * 30}")


def test_a_missing_prompt(served):
    check(served.http.post("/v1/images/generations", json={"n": 1}), "prompt")
