# SPDX-License-Identifier: Apache-2.0
"""What the texts of options mean."""

import pytest

import msdda_fast as mf
from msdda_fast.assets import resolve
from msdda_fast.cli import objectives
from msdda_fast.cli import values as parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=base:0.9", mf.Objective.base(eta=0.9)),
        ("x=owner/name", mf.Objective("owner/name")),
        ("x=owner/name:0.8", mf.Objective("owner/name", eta=0.8)),
        ("x=msdda-fast/emoji/warmth", mf.Objective("msdda-fast/emoji", subfolder="warmth")),
        ("x=owner/name/a/b:0.5", mf.Objective("owner/name", subfolder="a/b", eta=0.5)),
        ("x=/not/here/at/all", mf.Objective("/not/here/at/all")),
        ("x=./not/here", mf.Objective("./not/here")),
        ("x=a/b:flow-sde=0.7", mf.Objective("a/b", noise=mf.FlowSDE(0.7))),
        (
            "x=a/b:dance=0.3@300-999",
            mf.Objective("a/b", noise=mf.DanceSDE(0.3), timesteps=(300, 999)),
        ),
        ("x=a/b:cps=.8", mf.Objective("a/b", noise=mf.CPS(0.8))),
        ("x=base:flow-ddim=0.5", mf.Objective(noise=mf.FlowDDIM(0.5))),
        ("x=a/b@0-499.5", mf.Objective("a/b", timesteps=(0, 499.5))),
        ("x=a/b + ./c:0.5", mf.Objective(["a/b", "./c"], eta=0.5)),
    ],
)
def test_objectives(text, expected):
    assert objectives.objective(text) == ("x", expected)


def test_a_folder_that_is_here_is_no_hub_repository(tmp_path, monkeypatch):
    (tmp_path / "runs" / "lora" / "best").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert objectives.objective("x=runs/lora/best:1")[1] == mf.Objective("runs/lora/best", eta=1.0)


def test_a_path_with_a_plus_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "a + b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert objectives.objective("x=a + b")[1] == mf.Objective("a + b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x=a:sde=0.7", "noise 'sde' is none of flow-sde, dance, cps, flow-ddim"),
        ("x=a:cps=1.5", "a must lie in"),
        ("x=a:1.2.3", "must be NAME=PATH"),
        ("x=a@999-300", "timesteps must be"),
        ("x=a:flow-sde=nan", "a must lie in .* got nan"),
        ("x=a:flow-sde=", "must be NAME=PATH"),
        ("x=a + base", "base is the model without adapters, and joins none"),
        ("x=a/b + owner/name/folder", "'owner/name/folder' is a folder inside a repository"),
    ],
)
def test_objectives_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        objectives.objective(text)


def test_folders_of_the_shipped_model_act_together():
    _, found = objectives.objective("x=my/turbo + msdda-fast/emoji-flow/aesthetic")
    assert found.sources == ("my/turbo", str(resolve("msdda-fast/emoji-flow") / "aesthetic"))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], None),
        (["a=0.3", "b=0.7"], {"a": 0.3, "b": 0.7}),
        (["500-999:a=1", "0-499:a=0.5"], {(500, 999): {"a": 1}, (0, 499): {"a": 0.5}}),
        (["1-2=0.3"], {"1-2": 0.3}),
    ],
)
def test_weights(texts, expected):
    assert parse.weights(texts) == expected


@pytest.mark.parametrize("texts", [["a=1", "0-9:a=1"], ["0-9:a=1", "0-9:a=0"], ["0-9:a"]])
def test_weights_that_are_none(texts):
    with pytest.raises(ValueError, match="--weight"):
        parse.weights(texts)
