# SPDX-License-Identifier: Apache-2.0
"""CLIPScore, PickScore and the LAION head on a small random CLIP: the published computation, by
transformers' own processor and forward on 8-bit images, against ours."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from msdda_fast.emoji.architectures import word_tokenizer
from msdda_fast.errors import RewardUnavailable
from msdda_fast.rewards import load_reward
from msdda_fast.rewards.clip import ClipTowers
from msdda_fast.rewards.clip_score import ClipScore
from msdda_fast.rewards.laion_aesthetic import LaionAesthetic, build_head
from msdda_fast.rewards.pick_score import PickScore

PROMPTS = ["a red car", "a dog", "a red dog and a red car and a dog and a car and a dog and a car"]
SIDE = 32  # of the model's images


@pytest.fixture(scope="module")
def clip():
    """A model whose two towers see something: random weights, larger than CLIP's initial ones."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    tokenizer = word_tokenizer({"a", "red", "car", "dog", "and"})
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            **layers, num_attention_heads=2, vocab_size=len(tokenizer), max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            **layers, num_attention_heads=2, image_size=SIDE, patch_size=8
        ).to_dict(),
        projection_dim=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    return model, tokenizer


def pictures(side, count=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return [Image.fromarray(p) for p in pixels], images


@torch.no_grad()
def published(clip, pictures, texts):
    """Image and text embeddings, unit rows, and the matrix of logits, as transformers has them."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = clip
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    pixels = CLIPImageProcessorPil(**size)(pictures, return_tensors="pt").pixel_values
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    out = model(pixel_values=pixels, **tokens)
    return out.image_embeds, out.text_embeds, out.logits_per_image


# without a resize there is nothing to round; with one, up to a grey level (see test_preprocess)
@pytest.mark.parametrize(("side", "atol"), [(SIDE, 2e-6), (80, 5e-3)], ids=["exact", "resized"])
def test_clip_score(clip, side, atol):
    pil, images = pictures(side)
    seen, told, _ = published(clip, pil, ["A photo depicts " + p for p in PROMPTS])
    wanted = 2.5 * np.clip((seen * told).sum(1).numpy(), 0, None)
    found = ClipScore(ClipTowers(*clip))(images, PROMPTS)
    assert wanted.max() > 0.1
    np.testing.assert_allclose(found.numpy(), wanted, atol=2.5 * atol)


@pytest.mark.parametrize(("side", "atol"), [(SIDE, 2e-6), (80, 5e-3)], ids=["exact", "resized"])
def test_pick_score(clip, side, atol):
    pil, images = pictures(side)
    wanted = published(clip, pil, PROMPTS)[2].diagonal()
    found = PickScore(ClipTowers(*clip, floor=True))(images, PROMPTS)
    scale = clip[0].logit_scale.exp().item()
    torch.testing.assert_close(found, wanted, atol=scale * atol, rtol=0)


class Mlp(nn.Module):
    """The published predictor: layers.0, .2, .4, .6 and .7 are linear, the others dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(24, 20), nn.Dropout(0.2), nn.Linear(20, 16), nn.Dropout(0.2),
            nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("head", [Mlp(), nn.Linear(24, 1)], ids=["mlp", "first-linear"])
def test_laion_aesthetic(clip, head):
    pil, images = pictures(SIDE)
    seen = published(clip, pil, PROMPTS)[0]
    wanted = head.eval()(seen).squeeze(1).detach()
    found = LaionAesthetic(ClipTowers(*clip), build_head(head.state_dict()))(images, PROMPTS)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_head_of_ten_layers_keeps_their_order():
    layers = nn.Sequential(*(nn.Linear(n + 2, n + 1) for n in reversed(range(11))))
    x = torch.randn(2, 12)
    torch.testing.assert_close(build_head(layers.state_dict())(x), layers(x))


def test_a_head_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"no linear layer.*scale"):
        build_head({"scale": torch.ones(1)})


@pytest.mark.parametrize("build", [ClipScore, PickScore], ids=["clip_score", "pick_score"])
def test_the_gradient_reaches_the_image_and_not_the_weights(clip, build):
    images = pictures(48)[1].requires_grad_()
    build(ClipTowers(*clip))(images, PROMPTS).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0
    assert all(weight.grad is None for weight in clip[0].parameters())


def test_a_folder_is_a_checkpoint(clip, tmp_path):
    model, tokenizer = clip
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    images = pictures(SIDE)[1]
    towers = ClipTowers.load("clip_score", str(tmp_path), str(tmp_path))
    torch.testing.assert_close(towers.images(images), ClipTowers(*clip).images(images))
    torch.testing.assert_close(towers.texts(PROMPTS), ClipTowers(*clip).texts(PROMPTS))


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "laion_aesthetic"])
def test_a_missing_checkpoint_is_named_with_the_command_that_fetches_it(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(f"msdda_fast.rewards.{name}.MODEL", str(tmp_path / "absent"))
    with pytest.raises(RewardUnavailable, match=f"'{name}' needs the checkpoint .*absent.*hf down"):
        load_reward(name)
