# SPDX-License-Identifier: Apache-2.0
"""The pipelines of diffusers that the tests run with objectives, by family; others may run, too."""

from __future__ import annotations

__all__ = ["TESTED"]

#: Names of classes; `tests/families/table.py` has a row for each.
TESTED: dict[str, tuple[str, ...]] = {
    "SDXL": (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableDiffusionXLControlNetPipeline",
    ),
    "SD3": ("StableDiffusion3Pipeline",),
    "FLUX.1": (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxKontextPipeline",
        "FluxControlNetPipeline",
    ),
    "FLUX.2": ("Flux2Pipeline",),
    "Qwen-Image": ("QwenImagePipeline", "QwenImageEditPipeline"),
    "Z-Image": ("ZImagePipeline",),
    "Chroma": ("ChromaPipeline",),
    "Lumina 2": ("Lumina2Pipeline",),
    "Sana": ("SanaPipeline",),
    "AuraFlow": ("AuraFlowPipeline",),
    "CogView4": ("CogView4Pipeline",),
    "PixArt-Sigma": ("PixArtSigmaPipeline",),
    "Wan": ("WanPipeline",),
    "LTX": ("LTXPipeline", "LTXImageToVideoPipeline"),
    "LTX-2": ("LTX2Pipeline",),
    "HunyuanVideo": ("HunyuanVideoPipeline",),
}
