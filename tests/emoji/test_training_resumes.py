# SPDX-License-Identifier: Apache-2.0
"""A killed training run goes on where it was and ends with the bits of an uninterrupted one."""

import json

import pytest
import torch

from msdda_fast.emoji import architectures, checkpoint, train_base, train_scorer, train_vae
from msdda_fast.emoji.render import Renderer
from msdda_fast.errors import ResumeMismatch
from tests.tiny_model import WIDTH, small_unet


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def checkpoint_every_second_step(monkeypatch):
    monkeypatch.setattr(checkpoint, "CHECKPOINT_EVERY", 2)


def kill_at(monkeypatch, module, name, call):
    """Let the `call`-th call of a function of the training loop raise."""
    function, calls = getattr(module, name), []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, killed)


def train_networks(work):
    torch.manual_seed(0)
    vae = architectures.small_vae()
    train_vae.train_vae(vae, Renderer(("noto",)), work, steps=4, batch=2)
    scorer = train_scorer.train_scorer(train_scorer.JUDGE, vae, work, steps=4, batch=4)
    return [*vae.state_dict().values(), *scorer.state_dict().values()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train_networks(tmp_path_factory.mktemp("straight"))


@pytest.mark.full  # a minute of training; the denoiser below resumes by the same checkpoints
@pytest.mark.parametrize("module", [train_vae, train_scorer], ids=["vae", "scorer"])
def test_vae_and_scorer(straight, tmp_path, monkeypatch, module):
    with monkeypatch.context() as patch:
        kill_at(patch, module, "random_scenes", 4)
        with pytest.raises(Killed):
            train_networks(tmp_path / "killed")
    resumed = train_networks(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_denoiser_and_text_encoder(tmp_path, monkeypatch):
    tokenizer = architectures.word_tokenizer({"a", "red", "car"})

    def train(work):
        torch.manual_seed(0)
        unet, text = small_unet(16), architectures.small_text_encoder(tokenizer, WIDTH)
        latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
        ids = train_base.tokenize(tokenizer, ["a red car"] * 6)
        empty = train_base.tokenize(tokenizer, [""])[0]
        scheduler = architectures.sd15_scheduler()
        train_base.train_base(unet, text, scheduler, latents, ids, empty, work, steps=4, batch=2)
        return [*unet.state_dict().values(), *text.state_dict().values()]

    straight = train(tmp_path / "straight")
    with monkeypatch.context() as patch:
        kill_at(patch, train_base.F, "mse_loss", 4)
        with pytest.raises(Killed):
            train(tmp_path / "killed")
    resumed = train(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    checkpoints = [(tmp_path / name / "base.pt").read_bytes() for name in ("straight", "killed")]
    assert checkpoints[0] == checkpoints[1]


def test_the_log_has_each_step_once_after_a_kill(tmp_path):
    log = checkpoint.TrainingLog(tmp_path / "log.jsonl", every=2)
    for step in range(6):
        log.add(step, loss=float(step))
    again = checkpoint.TrainingLog(tmp_path / "log.jsonl", start=4, every=2)
    for step in range(4, 8):
        again.add(step, loss=float(step))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["loss"] for row in rows] == [0.5, 2.5, 4.5, 6.5]


def test_a_row_that_a_kill_has_torn_is_left_out(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 2, "seconds": 1.0}\n{"step": 4, "sec')
    checkpoint.TrainingLog(file, start=4, every=2).add(5, loss=1.0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 6] and rows[1]["seconds"] >= 1.0


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    def part(settings):
        return checkpoint.Checkpoint(tmp_path / "part.pt", settings, layer=torch.nn.Linear(1, 1))

    part({"steps": 2, "styles": ("noto",)}).save_when_due(2, of=2)
    assert part({"steps": 2, "styles": ["noto"]}).restore() == 2
    with pytest.raises(ResumeMismatch, match=r"part\.pt was made otherwise: steps was 2, is 3"):
        part({"steps": 3, "styles": ("noto",)}).restore()
    state = torch.load(tmp_path / "part.pt", weights_only=True)
    del state["settings"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ResumeMismatch, match=r"part\.pt has no fingerprint"):
        part({"steps": 2}).restore()


@pytest.mark.full  # renders and encodes
def test_latents_of_another_autoencoder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train_base, "NUM_SCENES", 2)
    words = {"a", "an", "and", "red"}
    tokenizer, renderer = architectures.word_tokenizer(words), Renderer(("noto",))
    vae = architectures.small_vae()
    latents, _ = train_base.cache_latents(vae, tokenizer, renderer, tmp_path)
    again, _ = train_base.cache_latents(vae, tokenizer, renderer, tmp_path)
    assert torch.equal(latents, again)
    other = architectures.small_vae()
    with pytest.raises(ResumeMismatch, match="autoencoder was"):
        train_base.cache_latents(other, tokenizer, renderer, tmp_path)
    with pytest.raises(ResumeMismatch, match="words was"):
        train_base.cache_latents(
            vae, architectures.word_tokenizer({*words, "blue"}), renderer, tmp_path
        )


def test_the_tokenizer_keeps_words_whole_and_survives_saving(tmp_path):
    words = ["table", "black", "blue", "banana", "an", "and", "apple"]
    tokenizer = architectures.word_tokenizer(words)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    for word in words:
        assert len(loaded(word).input_ids) == 3  # start, word, end
    ids = {tuple(loaded(text).input_ids) for text in ("a table", "a banana", "", "zebra, odd!")}
    assert len(ids) == 4
