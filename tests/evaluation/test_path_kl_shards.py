# SPDX-License-Identifier: Apache-2.0
"""The path KL of a comparison is kept shard by shard, and only grows."""

import json

import pytest

from msdda_fast.errors import ResumeMismatch
from msdda_fast.evaluation import path_kl as module
from msdda_fast.evaluation.path_kl import measure_path_kl, path_kl_file, read_path_kl
from msdda_fast.evaluation.plan import Plan
from tests.evaluation.test_compare import COMPARISON, PROMPTS, SMALL


@pytest.fixture
def measure(pipe, tmp_path, monkeypatch):
    """Measure some systems, and return which were not known."""
    done, original = [], module.path_kl

    def counted(method, *args, **options):
        done.append(method.name)
        return original(method, *args, **options)

    monkeypatch.setattr(module, "path_kl", counted)

    def run(systems, seeds, comparison=COMPARISON):
        done.clear()
        entries = Plan(**SMALL, systems=systems).entries()
        measure_path_kl(pipe, comparison, entries, seeds, tmp_path / "work", tmp_path)
        return sorted(set(done))

    return run


def test_what_was_measured_is_kept_and_more_is_added(measure, tmp_path):
    assert measure(["SD", "MSDDA", "Best-of-N"], [0]) == ["MSDDA", "SD"]
    first = json.loads(path_kl_file(tmp_path).read_text())
    assert measure(["SD", "MSDDA"], [0]) == []
    assert json.loads(path_kl_file(tmp_path).read_text()) == first
    assert measure(["SD", "RS"], [0, 1]) == ["RS", "SD"]
    found = json.loads(path_kl_file(tmp_path).read_text())
    assert found["MSDDA warm=0.5 cool=0.5"] == first["MSDDA warm=0.5 cool=0.5"]
    assert {name: list(row["nats"]) for name, row in found.items() if row["method"] == "SD"} == {
        "SD": ["0", "1"]
    }
    means = read_path_kl(tmp_path)
    assert means["SD", "", ""] == 0 < means["MSDDA", "", "warm=0.5 cool=0.5"]
    assert all(len(v) == len(PROMPTS) for row in found.values() for v in row["nats"].values())


def test_other_settings_are_not_mixed(measure):
    measure(["MSDDA"], [0])
    other = type(COMPARISON)(
        prompts=PROMPTS, rewards=COMPARISON.rewards, num_inference_steps=3, guidance_scale=1.0
    )
    with pytest.raises(ResumeMismatch, match="num_inference_steps"):
        measure(["MSDDA"], [0], other)


def test_a_damaged_file_is_named(tmp_path):
    assert read_path_kl(tmp_path) == {}
    path_kl_file(tmp_path).write_text("[1]")
    with pytest.raises(ValueError, match=r"path_kl\.json is not the path KL"):
        read_path_kl(tmp_path)
