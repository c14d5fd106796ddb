# SPDX-License-Identifier: Apache-2.0
"""Samples of the shipped model are kept with everything that they depend on."""

import json
from dataclasses import replace

import pytest

from msdda_fast.emoji import compare_dpok, evaluate
from msdda_fast.emoji.sampling import GUIDANCE_SCALE, NUM_STEPS
from msdda_fast.errors import ResumeMismatch
from msdda_fast.objective import Objective
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from tests.tiny_model import tiny  # noqa: F401 - fixture


@pytest.fixture
def settings(tiny, monkeypatch):  # noqa: F811 - the fixture
    """The settings that each call of `collect` was given; no call samples."""
    given = []

    def collect(sampler, *_, **__):
        given.append(sampler.settings)
        raise InterruptedError

    for module in (compare_dpok, evaluate):
        monkeypatch.setattr(module, "collect", collect)
    loaded = tiny.shared()

    def load(folder, objectives, dtype):
        known = {n: replace(o, source=o.source and "warm") for n, o in objectives.items()}
        return MSDDAPipeline.from_pipe(loaded, objectives=known)

    monkeypatch.setattr(MSDDAPipeline, "from_pretrained", load)
    return given


def evaluated(eta, tmp_path):
    arm = evaluate.Arm("any", {"base": 1.0}, {"base": Objective.base(eta=eta)})
    evaluate.sample_arm(tmp_path, arm, tmp_path)


def test_samples_of_the_base(settings, tmp_path):
    for eta in (1.0, 0.8):
        with pytest.raises(InterruptedError):
            evaluated(eta, tmp_path)
    one, other = settings
    assert one["objectives"]["base"].pop("eta") == 1.0
    assert other["objectives"]["base"].pop("eta") == 0.8
    assert one == other
    assert (one["num_inference_steps"], one["guidance_scale"]) == (NUM_STEPS, GUIDANCE_SCALE)
    assert one["weights"] == {"base": 1.0}
    assert one["model"].keys() == {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}


def test_samples_of_an_adapter_by_dpok(settings, tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(InterruptedError):
        compare_dpok.sample("aesthetic", tmp_path, 1, tmp_path)
    assert settings[0]["weights"] == {"aesthetic": 1.0}


def test_results_of_another_setting_are_not_mixed(tmp_path):
    stored = {"setting": {"prompts": 25, "dtype": "float16"}, "adapters": {"consistency": {}}}
    (tmp_path / "dpok.json").write_text(json.dumps(stored))
    with pytest.raises(ResumeMismatch, match=r"dpok\.json was made .*dtype was 'float16', is 'b"):
        compare_dpok.main(["aesthetic=x"], seeds=8, work=tmp_path, results=tmp_path)
