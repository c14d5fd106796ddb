# SPDX-License-Identifier: Apache-2.0
"""Collect what the pages of the families say: sizes of networks, and arguments of pipelines.

    python benchmarks/family_facts.py

Networks are made on the meta device from the configs of public checkpoints, so nothing is loaded
and nothing is measured: memory is parameters times two bytes. What a pipeline takes is read off the
signature of its call. Writes results/families.json; `benchmarks/report.py` makes the tables of
docs/families/index.md.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import diffusers
import torch
from diffusers.pipelines import auto_pipeline
from peft import LoraConfig
from torch import nn

from benchmarks.contenders.configs import CONFIGS
from benchmarks.tables.results import RESULTS
from msdda_fast.pipelines.stock_call import StockCall

RANK = 32
#: Names of the attention projections in the networks of diffusers, those of the text stream, too.
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
#: Model -> class of its denoiser, and how its config differs from the class's defaults.
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Stable Diffusion 1.5": ("UNet2DConditionModel", CONFIGS["sd15"][0]),
    "SDXL": ("UNet2DConditionModel", CONFIGS["sdxl"][0]),
    "SD 3.5 Medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "dual_attention_layers": tuple(range(13)),
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
        },
    ),
    "SD 3.5 Large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Wan 2.1, 1.3B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    ),
    "Wan 2.1, 14B": ("WanTransformer3DModel", {}),
}
PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"),
    *("FluxPipeline", "Flux2Pipeline", "QwenImagePipeline", "ZImagePipeline", "ChromaPipeline"),
    *("SanaPipeline", "AuraFlowPipeline", "CogView4Pipeline", "Lumina2Pipeline"),
    *("PixArtSigmaPipeline", "WanPipeline", "LTXPipeline", "HunyuanVideoPipeline"),
)


def sizes(kind: str, config: Mapping[str, Any]) -> dict[str, int]:
    """Return how many parameters the denoiser has, and one adapter on its attention."""
    with torch.device("meta"):
        network: Any = getattr(diffusers, kind)(**config)
        base = _count(network)
        network.add_adapter(LoraConfig(r=RANK, target_modules=list(ATTENTION)))
    return {"denoiser": base, "adapter": _count(network) - base}


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def takes(name: str) -> dict[str, Any]:
    """Return what the call of a pipeline takes, and which classes draw from images."""
    kind = getattr(diffusers, name)
    call = StockCall.of(kind)
    negative = call.argument("negative_prompt") is not None
    found = {"guidance": call.guidance, "negative_prompt": negative}
    key = next(
        (k for k, v in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if v is kind), ""
    )
    for task, classes in (
        ("image to image", auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
        ("inpainting", auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING),
    ):
        found[task] = classes[key].__name__ if key in classes else None
    return found


def main() -> None:
    found = {
        "rank": RANK,
        "diffusers": diffusers.__version__,
        "models": {name: sizes(*model) for name, model in MODELS.items()},
        "pipelines": {name: takes(name) for name in PIPELINES},
    }
    (RESULTS / "families.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
