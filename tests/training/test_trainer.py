# SPDX-License-Identifier: Apache-2.0
"""The trainer: learns a preference, survives a kill bit for bit, refuses to mix runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from msdda_fast.training import (
    PreferencePairs,
    ResumeMismatch,
    StepDPOConfig,
    add_lora,
    train_step_dpo,
)
from msdda_fast.training import trainer as trainer_module
from msdda_fast.training.adapter import lora_state
from msdda_fast.training.noising import NoisedPairs

from .conftest import SHAPE, TinyDenoiser, make_embeds, make_pairs, make_scheduler, make_unet


def train(out_dir, network=None, pairs=None, **config):
    """Train a fresh network, as a new process would, and return it."""
    if network is None:
        network = TinyDenoiser()
    add_lora(network)
    config = StepDPOConfig(**({"steps": 6, "batch_size": 4, "lr": 1e-2} | config))
    null = torch.zeros_like(make_embeds()[0])
    train_step_dpo(
        network, make_scheduler(), pairs or make_pairs(), make_embeds(), config, out_dir,
        null_embeds=null, curves=False, progress=False,
    )  # fmt: skip
    return network


def log_of(out_dir):
    """The rows of the log without the time they took."""
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_run(one, other):
    name = "pytorch_lora_weights.safetensors"
    a, b = load_file(one / name), load_file(other / name)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert log_of(one) == log_of(other)


def kill_at(monkeypatch, step):
    """Make the batch of `step` raise, as if the process died in it."""
    real, count = NoisedPairs.loss, iter(range(1, 1000))

    def loss(self, unet, generator):
        if next(count) == step:
            raise KeyboardInterrupt
        return real(self, unet, generator)

    monkeypatch.setattr(NoisedPairs, "loss", loss)


@pytest.mark.full  # a training; one of two layers is above
def test_a_tiny_preference_is_learnt_by_a_unet(tmp_path):
    bright = torch.ones(1, *SHAPE)
    pairs = PreferencePairs(bright, -bright, torch.tensor([0]))
    train(tmp_path, make_unet(), pairs, steps=30, batch_size=8, lr=3e-2, beta_dpo=100.0)
    rows = log_of(tmp_path)
    assert rows[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)

    def mean(key, part):
        return sum(row[key] for row in part) / len(part)

    assert mean("accuracy", rows[-10:]) > 0.8 > mean("accuracy", rows[:10])
    assert mean("loss", rows[-10:]) < 0.5
    assert rows[0]["drift_chosen"] == 0 < rows[-1]["drift_chosen"]


@pytest.mark.parametrize("ema_decay", [0.0, 0.9], ids=["plain", "ema"])
def test_continued_run_ends_with_the_bits_of_a_straight_one(tmp_path, ema_decay):
    options = {"warmup_steps": 5, "prompt_dropout": 0.3, "ema_decay": ema_decay}
    train(tmp_path / "straight", **options)
    train(tmp_path / "parts", steps=3, **options)
    train(tmp_path / "parts", steps=6, **options)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_killed_run_resumes_from_its_checkpoint_with_the_same_bits(tmp_path, monkeypatch):
    train(tmp_path / "straight", checkpoint_every=3)
    with monkeypatch.context() as patch:
        kill_at(patch, step=6)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", checkpoint_every=3)
    assert [row["step"] for row in log_of(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "killed" / "pytorch_lora_weights.safetensors").exists()
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # a row torn by the kill
    train(tmp_path / "killed", checkpoint_every=3)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_kill_while_writing_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    train(tmp_path / "straight", checkpoint_every=2)
    real = torch.save

    def save_half(state, path):
        real(state, path)
        if state["step"] == 4:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.torch, "save", save_half)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", checkpoint_every=2)
    train(tmp_path / "killed", checkpoint_every=2)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_finished_run_is_only_read_back(tmp_path, monkeypatch):
    train(tmp_path)
    before = log_of(tmp_path)
    kill_at(monkeypatch, step=1)
    train(tmp_path)
    assert log_of(tmp_path) == before


@pytest.mark.parametrize(
    "change", [{"lr": 2e-2}, {"gamma": 0.0}, {"seed": 1}, {"pairs": make_pairs(10)}], ids=str
)
def test_another_configuration_or_other_data_is_refused(tmp_path, change):
    train(tmp_path, steps=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    (name,) = change
    with pytest.raises(ResumeMismatch, match=rf"holds another run: {name} is .* there and .* here"):
        train(tmp_path, steps=4, **change)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"half", None], ids=["empty", "half", "of another"])
def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, content):
    file = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"step": 3}, file)
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"{file} is .*; delete it to start this run again"):
        train(tmp_path)
    assert file.read_bytes() == before


def test_fewer_steps_than_made_are_refused(tmp_path):
    train(tmp_path, steps=3)
    with pytest.raises(ValueError, match="has done 3 steps; steps = 2 is fewer"):
        train(tmp_path, steps=2)


def test_every_checkpoint_is_a_lora_folder(tmp_path):
    network = train(tmp_path, steps=5, checkpoint_every=2)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["step-000002", "step-000004", "step-000005"]
    files = [load_file(tmp_path / f / "pytorch_lora_weights.safetensors") for f in folders]
    up = "unet.to_q.lora_B.weight"
    assert not torch.equal(files[0][up], files[1][up])
    assert torch.equal(files[2][up], lora_state(network)["to_q.lora_B.weight"])


def test_saved_adapter_is_the_moving_average(tmp_path):
    raw = lora_state(train(tmp_path / "raw", steps=2, lr=1e-2))
    first = lora_state(train(tmp_path / "one", steps=1, lr=1e-2))
    initial = TinyDenoiser()
    add_lora(initial)
    saved = lora_state(train(tmp_path / "ema", steps=2, lr=1e-2, ema_decay=0.9))
    stored = torch.load(tmp_path / "ema" / "checkpoint.pt", weights_only=True)["adapter"]
    for name, start in lora_state(initial).items():
        assert torch.equal(stored[name], raw[name])
        average = start
        for step, value in ((1, first[name]), (2, raw[name])):
            keep = min(0.9, step / (step + 10))
            average = keep * average + (1 - keep) * value
        torch.testing.assert_close(saved[name], average, rtol=1e-5, atol=1e-7)
    name = "pytorch_lora_weights.safetensors"
    checkpoint = load_file(tmp_path / "ema" / "step-000002" / name)
    final = load_file(tmp_path / "ema" / name)
    assert all(torch.equal(checkpoint[key], final[key]) for key in final)


def test_learning_rate_rises_linearly_and_log_interval_keeps_the_last_row(tmp_path):
    train(tmp_path, steps=5, warmup_steps=4, lr=0.04, log_every=2)
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["lr"] for row in rows] == pytest.approx([0.02, 0.04, 0.04])


def test_frozen_weights_stay_and_dropout_is_off(tmp_path):
    network = train(tmp_path)
    base = TinyDenoiser()
    assert torch.equal(network.to_q.base_layer.weight, base.to_q.weight)
    assert torch.equal(network.text.weight, base.text.weight)
    reference, trained = network.calls[:2]  # before the first step the adapter does nothing
    assert torch.equal(reference.output, trained.output)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    pairs = make_pairs()
    with pytest.raises(FloatingPointError, match=r"step 1: .*beta_dpo"):
        network = TinyDenoiser()
        network.text.weight.data.fill_(float("inf"))
        train(tmp_path, network, pairs)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_network_without_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="call add_lora"):
        train_step_dpo(
            TinyDenoiser(), make_scheduler(), make_pairs(), make_embeds(), StepDPOConfig(steps=1),
            tmp_path, curves=False,
        )  # fmt: skip
