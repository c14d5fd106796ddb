# SPDX-License-Identifier: Apache-2.0
"""What the texts of options mean."""

import pytest

import msdda_fast as mf
from msdda_fast.cli import objectives


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
    ],
)
def test_objectives(text, expected):
    assert objectives.objective(text) == ("x", expected)


def test_a_folder_that_is_here_is_no_hub_repository(tmp_path, monkeypatch):
    (tmp_path / "runs" / "lora" / "best").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert objectives.objective("x=runs/lora/best:1")[1] == mf.Objective("runs/lora/best", eta=1.0)
