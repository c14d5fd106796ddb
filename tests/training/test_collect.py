# SPDX-License-Identifier: Apache-2.0
"""Collecting: every prompt with every seed, scored; a kill costs the shard in work."""

from pathlib import Path

import pytest
import torch

from msdda_fast.errors import InvalidShape
from msdda_fast.training import ResumeMismatch, Sampler, collect, load_collection

from .conftest import SHAPE

PROMPTS = ["a red dog", "a blue apple", "a green cat"]
SEEDS = [5, 6, 7]


class Policy:
    """Samples that are a function of prompt and seed; counts calls and can die in one."""

    def __init__(self, die_at=None):
        self.calls, self.die_at = 0, die_at

    def __call__(self, prompts, seeds):
        self.calls += 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        draws = [
            torch.Generator().manual_seed(seed + 100 * PROMPTS.index(prompt))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        latents = torch.stack([torch.randn(SHAPE, generator=g) for g in draws])
        return latents, latents[:, :3].sigmoid()


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def words(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


REWARDS = {"brightness": brightness, "words": words}


def run(
    out_dir, policy=None, rewards=REWARDS, prompts=PROMPTS, seeds=SEEDS, batch_size=2, settings=None
):
    draw = policy or Policy()
    return collect(
        draw if settings is None else Sampler(draw, settings), rewards, prompts, seeds, out_dir,
        batch_size=batch_size, progress=False,
    )  # fmt: skip


def same(one, other):
    assert one.scores.keys() == other.scores.keys()
    for a, b in (
        (one.latents, other.latents),
        (one.prompt_index, other.prompt_index),
        (one.seeds, other.seeds),
        *((one.scores[name], other.scores[name]) for name in one.scores),
    ):
        assert torch.equal(a, b)


def test_every_prompt_meets_every_seed_and_every_reward(tmp_path):
    found = run(tmp_path)
    assert found.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.seeds.tolist() == SEEDS * 3
    latents, images = Policy()([PROMPTS[1]], [SEEDS[2]])
    assert torch.equal(found.latents[5], latents[0])
    assert found.scores["brightness"][5] == brightness(images, None)[0]
    assert found.scores["words"].tolist() == [float(len(p)) for p in PROMPTS for _ in SEEDS]
    same(found, load_collection(tmp_path))


def test_batch_size_does_not_change_the_samples(tmp_path):
    same(run(tmp_path / "two"), run(tmp_path / "nine", batch_size=9))


def test_after_a_kill_only_the_missing_shards_are_sampled(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Policy(die_at=3))
    with pytest.raises(FileNotFoundError):
        load_collection(tmp_path)
    policy = Policy()
    resumed = run(tmp_path, policy)
    assert policy.calls == 3  # of 5 shards
    same(resumed, run(tmp_path / "straight"))
    again = Policy()
    same(run(tmp_path, again), resumed)
    assert again.calls == 0


def test_kill_while_writing_a_shard_leaves_no_shard(tmp_path, monkeypatch):
    real = Path.write_bytes

    def write_half(path, data):
        real(path, data[:50])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    same(run(tmp_path), run(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (r"prompts\[2\] was 'a green cat', is absent", {"prompts": PROMPTS[:2]}),
        (r"seeds\[2\] was 7, is absent", {"seeds": [5, 6]}),
        (r"rewards.brightness was 'brightness \w+', is absent", {"rewards": {"words": words}}),
        (r"words was 'words \w+', is 'brightness", {"rewards": REWARDS | {"words": brightness}}),
        ("batch_size was 2, is 3", {"batch_size": 3}),
        (r"model\.unet was '1a', is '2b'", {"settings": {"model": {"unet": "2b"}}}),
    ],
)
@pytest.mark.parametrize("record", [True, False], ids=["", "record-lost"])
def test_another_collection_is_refused(tmp_path, text, change, record):
    settings = {"model": {"unet": "1a"}}
    run(tmp_path, settings=settings)
    if not record:
        (tmp_path / "collection.json").unlink()
    kept = {file: file.read_bytes() for file in tmp_path.iterdir()}
    policy = Policy()
    with pytest.raises(ResumeMismatch, match=text):
        run(tmp_path, policy, **{"settings": settings} | change)
    assert policy.calls == 0
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == kept


def test_a_damaged_shard_is_named(tmp_path):
    run(tmp_path)
    (tmp_path / "shard-00001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged .*; delete it"):
        run(tmp_path)


def test_bad_input_is_named(tmp_path):
    def returning(latents=None, images=None):
        def sample(prompts, seeds):
            x, y = Policy()(prompts, seeds)
            return (x if latents is None else latents(x)), (y if images is None else images(y))

        return sample

    bad = iter(str(tmp_path / f"{number}") for number in range(100))
    with pytest.raises(
        InvalidShape, match=r"latents \(b, C, H, W\) with b = 2, got \(1, 4, 8, 8\)"
    ):
        run(next(bad), returning(latents=lambda x: x[:1]))
    with pytest.raises(InvalidShape, match=r"images .* got \(2, 3, 8\)"):
        run(next(bad), returning(images=lambda y: y[..., 0]))
    with pytest.raises(ValueError, match="latents with NaN"):
        run(next(bad), returning(latents=lambda x: x * float("nan")))
    with pytest.raises(ValueError, match=r"images in \[0, 1\], got values in \[-1"):
        run(next(bad), returning(images=lambda y: 2 * y.round() - 1))
    with pytest.raises(InvalidShape, match=r"'flat' must return shape \(2,\), got \(2, 1\)"):
        run(next(bad), rewards={"flat": lambda images, prompts: torch.zeros(2, 1)})
    with pytest.raises(ValueError, match="'nan' is not finite for the prompt 'a red dog'"):
        run(next(bad), rewards={"nan": lambda images, prompts: torch.full((2,), torch.nan)})
    for name, change in (
        ("prompts", {"prompts": ["a", "a"]}),
        ("seeds", {"seeds": []}),
        ("rewards", {"rewards": {}}),
        ("batch_size", {"batch_size": 0}),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            run(next(bad), **change)
    with pytest.raises(FileNotFoundError):
        load_collection(tmp_path / "nothing")
