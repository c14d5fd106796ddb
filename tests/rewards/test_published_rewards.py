# SPDX-License-Identifier: Apache-2.0
"""ImageReward, HPSv2 and VILA around small networks of the packages' interface; and what is said
when a package is missing."""

import io
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from msdda_fast import errors
from msdda_fast.rewards import KNOWN, REWARDS, load_reward
from msdda_fast.rewards.hps_v2 import HpsV2
from msdda_fast.rewards.image_reward import ImageReward
from msdda_fast.rewards.vila import Vila

PROMPTS = ["a red car", "a much longer text of a dog " * 9]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def pictures(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return [Image.fromarray(p) for p in pixels], images


def to_pixels(image):
    """PIL -> normalised tensor, as ToTensor and Normalize do."""
    pixels = (np.array(image) / 255 - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1).float()[None]


class Tokens(dict):
    __getattr__ = dict.__getitem__

    def to(self, device):
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})


def tokenizer(texts, padding, truncation, max_length, return_tensors):
    """Characters as tokens; one text or a list of them."""
    assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
    texts = [texts] if isinstance(texts, str) else texts
    codes = [[ord(c) % 64 for c in text[:max_length]] for text in texts]
    masks = [[1] * len(c) + [0] * (max_length - len(c)) for c in codes]
    ids = [c + [0] * (max_length - len(c)) for c in codes]
    return Tokens(input_ids=torch.tensor(ids), attention_mask=torch.tensor(masks))


class TextEncoder(nn.Module):
    """One cross-attention of the text to the image, masked on both sides."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(64, 16)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(
        self, ids, attention_mask, encoder_hidden_states, encoder_attention_mask, return_dict
    ):
        words = self.words(ids) * attention_mask[..., None]
        words = words + words.mean(1, keepdim=True)
        unseen = encoder_attention_mask == 0
        seen = self.cross(words, encoder_hidden_states, encoder_hidden_states, unseen)[0]
        return SimpleNamespace(last_hidden_state=words + seen)


class RewardNetwork(nn.Module):
    """The attributes of `ImageReward.ImageReward`."""

    def __init__(self):
        super().__init__()
        patches = nn.Sequential(nn.Conv2d(3, 16, 32, 32), nn.Flatten(2))
        self.blip = nn.ModuleDict({"visual": patches, "text_encoder": TextEncoder()})
        self.blip.visual_encoder = lambda images: patches(images).transpose(1, 2)
        self.blip.tokenizer = tokenizer
        self.mlp = nn.Linear(16, 1)
        self.mean, self.std = 0.16717362830052426, 1.0333394966054072

    @torch.no_grad()
    def score(self, prompt, image):
        """One prompt and one PIL image, as the package scores them."""
        short = min(image.size)
        width, height = (int(224 * side / short) for side in image.size)
        image = image.resize((width, height), Image.BICUBIC)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        pixels = to_pixels(image.crop((left, top, left + 224, top + 224)))
        text = tokenizer(prompt, "max_length", True, 35, "pt")
        seen = self.blip.visual_encoder(pixels)
        out = self.blip["text_encoder"](
            text.input_ids, text.attention_mask, seen,
            torch.ones(seen.shape[:-1], dtype=torch.long), True,
        )  # fmt: skip
        raw = self.mlp(out.last_hidden_state[:, 0, :].float())
        return ((raw - self.mean) / self.std).item()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return RewardNetwork().eval()


# nothing is rounded where nothing is resized
@pytest.mark.parametrize(
    ("size", "atol"), [((224, 224), 1e-5), ((64, 64), 5e-3), ((300, 401), 5e-3)]
)
def test_image_reward_is_the_packages_score(network, size, atol):
    pil, images = pictures(*size)
    wanted = [network.score(prompt, image) for prompt, image in zip(PROMPTS, pil, strict=True)]
    found = ImageReward(network)(images, PROMPTS)
    np.testing.assert_allclose(found.numpy(), wanted, atol=atol)
    assert abs(wanted[0] - wanted[1]) > 0.02


class OpenClip(nn.Module):
    """The part of an open_clip model that the score uses."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 12, 56, 56), nn.Flatten(), nn.Linear(192, 12))
        self.words = nn.EmbeddingBag(64, 12)

    def encode_image(self, pixels):
        return self.visual(pixels)

    def encode_text(self, tokens):
        return self.words(tokens)


def tokenize(texts):
    return torch.tensor([[ord(c) % 64 for c in text[:9].ljust(9)] for text in texts])


@pytest.mark.parametrize(("size", "atol"), [((224, 224), 1e-6), ((64, 48), 5e-3)])
def test_hps_is_the_cosine_of_the_padded_image(size, atol):
    torch.manual_seed(0)
    model = OpenClip()
    pil, images = pictures(*size)
    wanted = []
    for prompt, image in zip(PROMPTS, pil, strict=True):
        scale = 224 / max(image.size)
        width, height = (round(side * scale) for side in image.size)
        board = Image.new("RGB", (224, 224))
        left, top = (224 - width) // 2, (224 - height) // 2
        board.paste(image.resize((width, height), Image.BICUBIC), (left, top))
        seen, told = model.encode_image(to_pixels(board)), model.encode_text(tokenize([prompt]))
        wanted.append(F.cosine_similarity(seen, told).item())
    found = HpsV2(model, tokenize)(images, PROMPTS)
    np.testing.assert_allclose(found.numpy(), wanted, atol=atol)


def test_vila_sees_the_eight_bit_image_and_is_scaled_once():
    pil, images = pictures(20, 30)
    seen = []

    def predict(png):
        seen.append(np.array(Image.open(io.BytesIO(png))))
        return 0.75

    found = Vila(predict)(images + 0.4 / 255, PROMPTS)
    assert found.tolist() == [1.0, 1.0]
    assert np.abs(np.stack(seen).astype(int) - np.stack(pil)).max() == 0
    assert not Vila.differentiable


@pytest.mark.parametrize("kind", ["image_reward", "hps_v2"])
def test_the_gradient_reaches_the_image_and_not_the_weights(kind, network):
    reward = ImageReward(network) if kind == "image_reward" else HpsV2(OpenClip(), tokenize)
    images = pictures(48, 48)[1].requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("image_reward", "ImageReward", "pip install --no-deps image-reward"),
        ("hps_v2", "open_clip", "pip install open-clip-torch"),
        ("vila", "tensorflow", "pip install tensorflow tensorflow-hub"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    monkeypatch, name, module, install
):
    monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    with pytest.raises(errors.RewardUnavailable) as caught:
        load_reward(name)
    assert f"{name!r} needs the package {module!r}" in str(caught.value)
    assert f"install: {install}" in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_every_known_reward_says_its_name_and_whether_it_has_a_gradient():
    assert set(REWARDS) < set(KNOWN)
    judges = [name for name in KNOWN if name.startswith("judge")]
    assert [load_reward(name).name for name in judges] == judges
    for name in set(KNOWN) - set(judges):
        module = import_module(f"msdda_fast.rewards.{name}")
        (reward,) = [c for c in vars(module).values() if getattr(c, "name", None) == name]
        assert isinstance(reward.differentiable, bool)


@pytest.mark.full  # a program
def test_no_package_is_imported_before_its_reward_is_asked_for():
    heavy = {"transformers", "PIL", "tensorflow", "open_clip", "ImageReward", "huggingface_hub"}
    code = (
        "import sys, msdda_fast.rewards\n"
        "from msdda_fast.rewards import clip_score, hps_v2, image_reward, laion_aesthetic, vila\n"
        f"assert not {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
