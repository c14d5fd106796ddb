# SPDX-License-Identifier: Apache-2.0
"""A tiny random Stable Diffusion on disk, with two random adapters; built once per session.

The fixtures are imported by the conftest of every folder that needs them.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

import msdda_fast as mf
from msdda_fast.emoji.architectures import small_text_encoder, word_tokenizer

WIDTH = 16
WEIGHTS = "pytorch_lora_weights.safetensors"
SD15_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@dataclass(frozen=True)
class TinyModel:
    """Paths of a model folder and its adapters; images are 32 x 32, latents 4 x 8 x 8."""

    folder: Path
    warm: Path
    cool: Path

    @classmethod
    def at(cls, root: Path) -> "TinyModel":
        folder = root / "model"
        return cls(folder, folder / "warm", folder / "cool")

    def objectives(self, **changes) -> dict[str, mf.Objective]:
        return {
            "warm": mf.Objective(self.warm, eta=1.0, **changes),
            "cool": mf.Objective(self.cool, eta=0.8, **changes),
        }

    def load(self, **options) -> mf.MSDDAPipeline:
        """A pipeline of the caller's own."""
        options.setdefault("objectives", self.objectives())
        return quiet(mf.MSDDAPipeline.from_pretrained(self.folder, **options))

    @cache  # noqa: B019 - lives as long as the session
    def shared(self, dtype=torch.float32) -> mf.MSDDAPipeline:
        """One for all tests that only call it: a call leaves a pipeline as it was."""
        return self.load(dtype=dtype)

    def only(self, objective: mf.Objective, dtype=torch.float32) -> mf.MSDDAPipeline:
        """The shared pipeline with one objective, whose source is "warm" or "cool" if any."""
        pipe = self.shared(dtype)
        return quiet(mf.MSDDAPipeline.from_pipe(pipe, objectives={"only": objective}))

    @cache  # noqa: B019 - lives as long as the session
    def stock(self, adapter: str | None = None, dtype=torch.float32) -> StableDiffusionPipeline:
        """The stock pipeline on modules of its own, with one adapter loaded or none; shared too."""
        pipe = StableDiffusionPipeline.from_pretrained(self.folder, dtype=dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        if adapter is not None:
            pipe.load_lora_weights(
                getattr(self, adapter), weight_name=WEIGHTS, adapter_name=adapter
            )
        return quiet(pipe)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_unet(sample_size: int = 8, width: int = WIDTH, channels: int = 16):
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(channels, 2 * channels),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


def build(folder: Path, scheduler, vae) -> None:
    tokenizer = word_tokenizer(["a", "red", "blue", "dog", "cat", "blurry"])
    StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=small_text_encoder(tokenizer, WIDTH).eval(),
        tokenizer=tokenizer,
        unet=small_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_adapter(folder: Path, unet, *, rank: int = 2, lora_alpha: int = 6, text_encoder=None):
    """Save random factors (B is not zero) on the attention projections of throw-away networks."""

    def factors(network, targets):
        config = LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=targets)
        inject_adapter_in_model(config, network, adapter_name="made")
        state = get_peft_model_state_dict(network, adapter_name="made")
        return {
            key: 0.3 * torch.randn_like(value) for key, value in state.items()
        }, config.to_dict()

    layers, metadata = factors(unet, ["to_q", "to_k", "to_v", "to_out.0"])
    text = {}
    if text_encoder is not None:
        state, config = factors(text_encoder, ["q_proj", "v_proj"])
        text = {
            "text_encoder_lora_layers": state,
            "text_encoder_lora_adapter_metadata": config,
        }
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata, **text
    )
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Layers this small lose to thread start-up, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(made_once) -> TinyModel:
    """DDIM scheduler and AutoencoderTiny, as the shipped model has them; with objectives.json."""
    return TinyModel.at(made_once("tiny", make_tiny))


def make_tiny(root: Path) -> None:
    model = TinyModel.at(root)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
        build(model.folder, DDIMScheduler(**SD15_NOISE, clip_sample=False), vae)
        write_adapter(model.warm, small_unet())
        write_adapter(model.cool, small_unet(), rank=3, lora_alpha=3)
    entries = {"warm": {"source": "warm"}, "cool": {"source": "cool", "eta": 0.8}}
    (model.folder / "objectives.json").write_text(json.dumps(entries))


@pytest.fixture(scope="session")
def tiny_kl(made_once, tiny) -> TinyModel:
    """PNDM scheduler and AutoencoderKL, as Stable Diffusion 1.5 has them; the same adapters."""
    return TinyModel(made_once("tiny_kl", make_tiny_kl) / "model", tiny.warm, tiny.cool)


def make_tiny_kl(root: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            sample_size=32,
        )
        scheduler = PNDMScheduler(**SD15_NOISE, skip_prk_steps=True)
        build(root / "model", scheduler, vae)


@pytest.fixture(scope="session")
def pipe(tiny) -> mf.MSDDAPipeline:
    return tiny.shared()


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, ...]]:
    """What ran: one entry per forward of any UNet, with the adapters active in it."""
    ran: list[tuple[str, ...]] = []
    forward = UNet2DConditionModel.forward

    def counting(self, *args, **kwargs):
        layers = [m for m in self.modules() if hasattr(m, "active_adapters")]
        enabled = [m for m in layers if not m.disable_adapters]
        ran.append(tuple(enabled[0].active_adapters) if enabled else ())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    return ran
