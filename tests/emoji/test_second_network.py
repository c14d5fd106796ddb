# SPDX-License-Identifier: Apache-2.0
"""Distillation into another network: its loss falls, it resumes, and the shapes are others."""

import pytest
import torch

from msdda_fast.emoji import architectures, checkpoint, second_network
from msdda_fast.emoji.second_network import RangedTeacher, aligned_teacher, distil, half_unet
from msdda_fast.errors import ResumeMismatch
from msdda_fast.training.log import read_rows
from tests.tiny_model import WIDTH, quiet, small_unet, tiny  # noqa: F401 - fixture

TOKENIZER = architectures.word_tokenizer({"a", "red", "car"})


def run(work, steps=4, channels=8):
    torch.manual_seed(0)
    teacher = RangedTeacher(small_unet(), small_unet(), 300, 999)
    student = small_unet(channels=channels)
    text = architectures.small_text_encoder(TOKENIZER, WIDTH).eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 4, 8, 8, generator=generator).half()
    ids = torch.randint(len(TOKENIZER), (8, 6), generator=generator)
    before = [parameter.clone() for parameter in teacher.parameters()]
    distil(
        student, teacher, text, architectures.sd15_scheduler(), latents, ids, work,
        steps=steps, batch=4,
    )  # fmt: skip
    assert all(map(torch.equal, before, teacher.parameters()))
    return student.state_dict()


def test_the_student_comes_to_predict_what_the_teacher_does(tmp_path):
    run(tmp_path, steps=40)
    losses = [row["loss"] for row in read_rows(tmp_path / second_network.LOG_NAME)]
    assert losses[-1] < 0.75 * losses[0]
    assert losses[-1] < 0.2  # of its noise it would be 1


def test_a_killed_run_resumes_to_the_bits_of_a_straight_one(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "CHECKPOINT_EVERY", 2)
    straight = run(tmp_path / "straight")
    add = checkpoint.TrainingLog.add

    def stop(self, step, **values):
        if step == 3:
            raise KeyboardInterrupt
        add(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.TrainingLog, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    resumed = run(tmp_path / "killed")
    assert all(resumed[name].equal(value) for name, value in straight.items())
    with pytest.raises(ResumeMismatch, match="start"):
        run(tmp_path / "killed", channels=16)


def test_the_student_has_other_shapes_than_the_shipped_network():
    shipped = {name: p.shape for name, p in architectures.small_unet().named_parameters()}
    student = {name: p.shape for name, p in half_unet().named_parameters()}
    assert shipped.keys() - student.keys()
    shared = shipped.keys() & student.keys()
    assert sum(shipped[name] == student[name] for name in shared) < 0.05 * len(shared)


@torch.no_grad()
def test_the_teacher_is_the_aligned_model_in_its_timesteps_and_the_base_in_others(tiny):  # noqa: F811
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    pipe, teacher = aligned_teacher(tiny.folder, "warm")
    quiet(pipe)
    t = torch.tensor([300, 999, 299])
    ours = teacher(x, t, context)
    aligned = tiny.stock("warm").unet(x, t, context).sample
    base = tiny.stock().unet(x, t, context).sample
    torch.testing.assert_close(ours[:2], aligned[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[2:], base[2:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(aligned, base, atol=1e-3)
    assert not any("lora" in name for name, _ in teacher.named_parameters())
