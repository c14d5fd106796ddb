# SPDX-License-Identifier: Apache-2.0
"""The accelerator learns from the base's own paths, and its run can be continued."""

import json

import pytest
import torch

import msdda_fast as mf
from msdda_fast.assets import resolve
from msdda_fast.emoji import distil, teacher_paths
from msdda_fast.emoji.align import base_policy
from msdda_fast.emoji.render import Renderer
from msdda_fast.errors import ResumeMismatch
from msdda_fast.training.adapter import WEIGHT_NAME
from msdda_fast.training.codec import encode_prompts


@pytest.fixture(scope="module")
def pipe():
    return mf.MSDDAPipeline.from_pretrained(resolve("msdda-fast/emoji"), objectives=base_policy(1))


@pytest.fixture
def small(monkeypatch):
    """Four steps and four paths a file."""
    for name, value in {"SPACING": 250, "SHARD": 4, "ROWS": 3}.items():
        monkeypatch.setattr(teacher_paths, name, value)
    for name, value in {"FROM_NOISE": 4, "FROM_RENDERS": 4, "BATCH": 3}.items():
        monkeypatch.setattr(distil, name, value)


def draw(pipe, work):
    renderer = Renderer(distil.STYLES)
    return teacher_paths.teacher_paths(pipe, renderer, work, from_noise=4, from_renders=4)


@torch.no_grad()
def test_paths_are_ddim_without_noise(pipe, small, tmp_path):
    paths = draw(pipe, tmp_path)
    assert paths.timesteps.tolist() == [[999, 749, 499, 249]] * 8
    assert paths.first[:4].tolist() == [0] * 4 and paths.first[4:].max() > 0
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    empty = encode_prompts(pipe, [""])
    for n in range(8):
        for k, t in enumerate(paths.timesteps[n].tolist()):
            if k < paths.first[n]:
                continue
            x, text = paths.states[n : n + 1, k].float(), paths.embeds[n : n + 1].float()
            u, c = (pipe.unet(x, t, e).sample for e in (empty, text))
            eps = u + teacher_paths.GUIDANCE_SCALE * (c - u)
            made = scheduler.step(eps, t, x, eta=0.0)
            expected = made.prev_sample if t > 250 else made.pred_original_sample
            # states are kept in half precision, and 1 / sqrt(alpha_bar_999) is 15
            torch.testing.assert_close(
                paths.states[n : n + 1, k + 1].float(), expected, rtol=1e-2, atol=3e-2
            )


def test_paths_are_kept_for_their_model(pipe, small, tmp_path, monkeypatch):
    first = draw(pipe, tmp_path)
    monkeypatch.setattr(teacher_paths, "_draw", None)
    assert all(map(torch.equal, draw(pipe, tmp_path), first))
    monkeypatch.setattr(teacher_paths, "SPACING", 500)
    with pytest.raises(ResumeMismatch, match="spacing"):
        draw(pipe, tmp_path)


@pytest.mark.full  # three runs
def test_it_learns_and_resumes(small, tmp_path, monkeypatch):
    monkeypatch.setattr("msdda_fast.emoji.checkpoint.CHECKPOINT_EVERY", 2)
    base = resolve("msdda-fast/emoji")
    whole = distil.distil(base, tmp_path / "whole", steps=3)
    with pytest.raises(ResumeMismatch, match="steps"):
        distil.distil(base, tmp_path / "whole", steps=4)

    class Killed(Exception):
        pass

    done = []

    def dying(*args):
        if len(done) == 2:
            raise Killed
        done.append(1)
        return loss(*args)

    loss = distil.path_loss
    monkeypatch.setattr(distil, "path_loss", dying)
    with pytest.raises(Killed):
        distil.distil(base, tmp_path / "killed", steps=3)
    monkeypatch.setattr(distil, "path_loss", loss)
    again = distil.distil(base, tmp_path / "killed", steps=3)
    assert (again / WEIGHT_NAME).read_bytes() == (whole / WEIGHT_NAME).read_bytes()


def test_a_step_lowers_the_loss(pipe, small, tmp_path):
    paths, network = draw(pipe, tmp_path), pipe.unet.requires_grad_(True)
    alpha_bar = pipe.scheduler.alphas_cumprod

    def loss():
        return distil.path_loss(network, paths, alpha_bar, torch.Generator().manual_seed(0))

    before = loss()
    grads = torch.autograd.grad(before, [*network.parameters()])
    norm = sum(float(g.square().sum()) for g in grads) ** 0.5
    kept = [p.detach().clone() for p in network.parameters()]
    with torch.no_grad():
        for p, g in zip(network.parameters(), grads, strict=True):
            p -= 1e-4 * g / norm
        after = loss()
        for p, k in zip(network.parameters(), kept, strict=True):
            p.copy_(k)
    assert after < before


def test_it_ships_with_an_entry_in_the_manifest(tmp_path):
    model, work = tmp_path / "model", tmp_path / "work"
    (work / "accelerator").mkdir(parents=True)
    (work / "accelerator" / WEIGHT_NAME).write_bytes(b"weights")
    (work / "distil.jsonl").write_text("{}\n")
    model.mkdir()
    (model / "manifest.json").write_text(json.dumps({"id": "x", "sha256": {"z": "0"}}))
    for _ in range(2):  # the same command again changes nothing
        distil.ship(work / "accelerator", work, model)
        manifest = json.loads((model / "manifest.json").read_text())
        assert manifest["accelerator"] == {
            "source": "accelerator",
            "scheduler": distil.SCHEDULER,
            "steps": distil.FEW,
            "guidance_scale": 1.0,
        }
        assert list(manifest["sha256"]) == [f"accelerator/{WEIGHT_NAME}", "z"]
    assert (model / "training" / "accelerator.jsonl").is_file()
