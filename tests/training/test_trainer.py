# SPDX-License-Identifier: Apache-2.0
"""The trainer: learns a preference, survives a kill bit for bit, refuses to mix runs."""

import contextlib
import dataclasses
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from msdda_fast import files
from msdda_fast.training import (
    PreferencePairs,
    ResumeMismatch,
    StepDPOConfig,
    add_lora,
    train_step_dpo,
)
from msdda_fast.training import log as log_module
from msdda_fast.training import trainer as trainer_module
from msdda_fast.training.adapter import lora_state
from msdda_fast.training.noising import NoisedPairs

from .conftest import (
    SHAPE,
    TinyDenoiser,
    assert_same_run,
    die_at_random,
    log_of,
    make_embeds,
    make_pairs,
    make_scheduler,
    make_unet,
)

WEIGHTS = "pytorch_lora_weights.safetensors"


def train(out_dir, network=None, pairs=None, curves=False, rank=4, dtype=torch.float32, **config):
    """Train a fresh network, as a new process would, and return it."""
    if network is None:
        network = TinyDenoiser()
    add_lora(network, rank=rank)
    config = StepDPOConfig(**({"steps": 6, "batch_size": 4, "lr": 1e-2} | config))
    null = torch.zeros_like(make_embeds()[0])
    train_step_dpo(
        network, make_scheduler(), pairs or make_pairs(), make_embeds(), config, out_dir,
        null_embeds=null, weight_dtype=dtype, curves=curves, progress=False,
    )  # fmt: skip
    return network


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
    shutil.rmtree(tmp_path / "parts" / "step-000003")  # a checkpoint that the other never made
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


DEADLY = {
    "step": (NoisedPairs, "loss"),
    "adapter": (trainer_module, "save_lora"),
    "write": (files.os, "replace"),
    "log": (log_module.RunLog, "write"),
}


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_again_and_again_it_ends_with_the_files_of_a_straight_run(
    tmp_path, monkeypatch, seed
):
    options = {"steps": 7, "checkpoint_every": 2, "prompt_dropout": 0.3, "ema_decay": 0.9}
    train(tmp_path / "straight", **options)
    for life in range(3):
        with monkeypatch.context() as patch:
            place = sorted(DEADLY)[(seed + life) % len(DEADLY)]
            die_at_random(patch, DEADLY[place], 10 * seed + life, last=4)
            with contextlib.suppress(KeyboardInterrupt):
                train(tmp_path / "killed", **options)
    train(tmp_path / "killed", **options)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_curves_are_those_of_a_straight_run_though_the_last_checkpoint_was_all_there_was(
    tmp_path, monkeypatch
):
    train(tmp_path / "straight", steps=2, curves=True)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.LiveCurves, "refresh", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "killed", steps=2, curves=True, checkpoint_every=1)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "killed", steps=2, curves=True)
    train(tmp_path / "killed", steps=2, curves=True)
    shutil.rmtree(tmp_path / "killed" / "step-000001")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_ended_by_sigkill_resumes_with_the_same_files(tmp_path, monkeypatch):
    options = {"steps": 60, "checkpoint_every": 7}
    train(tmp_path / "straight", **options)
    if (child := os.fork()) == 0:
        real = NoisedPairs.loss
        NoisedPairs.loss = lambda *args: (time.sleep(0.01), real(*args))[1]
        train(tmp_path / "killed", **options)
        os._exit(0)
    log = tmp_path / "killed" / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 17:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "killed" / WEIGHTS).exists()
    train(tmp_path / "killed", **options)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_finished_run_is_only_read_back(tmp_path, monkeypatch):
    train(tmp_path)
    before = log_of(tmp_path)
    kill_at(monkeypatch, step=1)
    train(tmp_path)
    assert log_of(tmp_path) == before


def other_base():
    network = TinyDenoiser()
    network.text.weight.data[0, 0] += 1
    return network


FREE = {"steps": 4, "log_every": 2, "checkpoint_every": 3}  # alter no step that was made
CHANGES = {
    "lr": 2e-2, "batch_size": 5, "beta_dpo": 1.0, "gamma": 0.0, "shared_noise": False,
    "snr_weighting": "exact", "eta": 0.5, "min_timestep": 1, "prompt_dropout": 0.1,
    "warmup_steps": 1, "grad_clip": 2.0, "ema_decay": 0.5, "bf16": True, "seed": 1,
}  # fmt: skip


def test_every_field_of_the_configuration_is_free_or_compared():
    names = {field.name for field in dataclasses.fields(StepDPOConfig)}
    assert names == FREE.keys() | CHANGES.keys()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    train(folder, steps=2)
    return folder


@pytest.mark.parametrize("kept", ["all", "checkpoint.pt", "settings.json"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, {name: value}) for name, value in CHANGES.items()),
        ("pairs", {"pairs": make_pairs(10)}),
        ("base", {"network": other_base}),
        ("rank", {"rank": 2}),
        ("weight_dtype", {"dtype": torch.float16}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_configuration_network_or_other_data_is_refused(
    started, tmp_path, name, change, kept
):
    """Also when only the checkpoint is there, or only the record of the settings."""
    folder = tmp_path / "copy"
    shutil.copytree(started, folder)
    for file in ("checkpoint.pt", "settings.json"):
        if kept not in ("all", file):
            (folder / file).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change = {key: value() if callable(value) else value for key, value in change.items()}
    with pytest.raises(ResumeMismatch, match=rf"made otherwise: {name} was .*, is .*Use the earl"):
        train(folder, **{"steps": 4} | change)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", FREE)
def test_what_alters_no_step_may_change(started, tmp_path, name):
    shutil.copytree(started, tmp_path / "copy")
    train(tmp_path / "copy", **{"steps": 3} | {name: FREE[name]})


def test_a_checkpoint_of_an_earlier_version_is_refused(started, tmp_path):
    shutil.copytree(started, tmp_path / "copy")
    state = torch.load(tmp_path / "copy" / "checkpoint.pt", weights_only=True)
    del state["identity"]["format"]
    torch.save(state, tmp_path / "copy" / "checkpoint.pt")
    with pytest.raises(
        ResumeMismatch, match=r"checkpoint\.pt was made otherwise: format was absent"
    ):
        train(tmp_path / "copy")


def test_a_run_that_failed_before_its_first_step_leaves_the_folder_to_others(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, step=1)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, lr=1.0)
    assert not list(tmp_path.iterdir())
    train(tmp_path, steps=2)


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
