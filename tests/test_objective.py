# SPDX-License-Identifier: Apache-2.0
"""`Objective`: numbers of any library become Python's; what names nothing is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import msdda_fast as mf
from msdda_fast.pipelines.manifest import check_names, dump_objectives, parse_objectives


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, lambda n: np.array(n)])
def test_numbers_of_any_library_can_be_saved(number):
    given = mf.Objective("a", eta=number(0.5), scale=number(2.0), guidance_scale=number(3.0))
    assert given == mf.Objective("a", eta=0.5, scale=2.0, guidance_scale=3.0)
    entry = json.loads(dump_objectives({"x": given}, {"x": "a"}))["x"]
    assert entry == {"eta": 0.5, "source": "a", "scale": 2.0, "guidance_scale": 3.0}


@pytest.mark.parametrize("scales", [[1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1.0, 2.0])])
def test_one_scale_per_source(scales):
    assert mf.Objective(["a", Path("b")], scale=scales).scales == (1.0, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"scale": scale}, "scale must be finite")
            for scale in ("1", None, 10**400, [[1]], [None], {}, 1j, float("nan"))
        ),
        *(
            ({"guidance_scale": scale}, "guidance_scale must be finite")
            for scale in ("7", [7], 10**400, {})
        ),
        *(
            ({"source": source}, "source must be a file")
            for source in (5, b"x", "", {"a": 1}, ["a", None], [1], [""])
        ),
        ({"source": []}, "empty list"),
        ({"source": "a", "scale": np.array([])}, "0 scales for 1 sources"),
        ({"source": "a", "weight_name": 5}, "weight_name must be a text"),
        ({"source": "a", "subfolder": ["b"]}, "subfolder must be a text"),
    ],
)
def test_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^Objective: .*{message}") as raised:
        mf.Objective(**options)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("objectives", [["warm"], "warm", {"warm"}, 5])
def test_objectives_are_a_mapping(objectives):
    with pytest.raises(ValueError, match="objectives must map names to Objectives"):
        check_names(objectives)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"source": "x"}, "a": {"source": "y"}}', "'a' is there twice"),
        ('{"a": {"eta": 1, "eta": 0}}', "'eta' is there twice"),
        ('{"a": {"noise": {"kind": ["x"], "level": 1}}}', "is none of FlowSDE"),
        ('{"a": {"noise": {"kind": "FlowSDE", "level": 1, "sigma_max": "x"}}}', "sigma_max"),
        ('{"a": {"noise": {"kind": "CPS", "level": 1, "last_step": "no"}}}', "last_step must be"),
        ('{"a": {"source": "x", "scale": 1' + "0" * 400 + "}}", "scale must be finite"),
        ('{"a": {"source": ""}}', "source must be a file"),
    ],
)
def test_objectives_json_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=f"^objectives.json of owner/name.*{message}"):
        parse_objectives(text, "owner/name")
