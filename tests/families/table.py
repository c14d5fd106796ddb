# SPDX-License-Identifier: Apache-2.0
"""The families that the tests run: one row each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.families import images, more_images, videos, xl


class Family(NamedTuple):
    """A kind of pipeline.

    Attributes:
        make: (pipeline, arguments of its call for 2 prompts unless told), the same each time.
        mechanism: What none of the rows above needs; such a row is in `make test`.
        levels: Noise levels of two objectives that differ, or None.
    """

    make: Callable[..., tuple[Any, dict]]
    mechanism: str = ""
    levels: str | None = "flow"


FAMILIES = {
    "SDXL": Family(xl.text, "rescaled guidance; convolutions", "ancestral"),
    "SDXL img2img": Family(xl.img2img, levels="ancestral"),
    "SDXL inpaint": Family(xl.inpaint, "latents mixed in after the step", "ancestral"),
    "SDXL inpaint, 9 channels": Family(xl.inpaint_9_channels, levels="ancestral"),
    "SDXL InstructPix2Pix": Family(xl.instruct_pix2pix, levels="ancestral"),
    "SDXL ControlNet": Family(xl.controlnet, "a second network, shared", "ancestral"),
    "SDXL IP-Adapter": Family(xl.ip_adapter, "processors with weights", "ancestral"),
    "SD3": Family(images.sd3, "flow matching"),
    "SD3, skipped layers": Family(images.sd3_skip_layers),
    "FLUX": Family(images.flux, "tensors without rows; shifts that depend on the size"),
    "FLUX, as many tokens as rows": Family(images.flux_as_many_tokens_as_rows),
    "FLUX, true guidance": Family(images.flux_true_guidance),
    "FLUX img2img": Family(images.flux_img2img),
    "FLUX Kontext": Family(images.flux_kontext),
    "FLUX ControlNet": Family(images.flux_controlnet),
    "FLUX.2": Family(images.flux2),
    "Qwen-Image": Family(images.qwen, "lists with an entry per row"),
    "Qwen-Image-Edit": Family(more_images.qwen_edit),
    "Z-Image": Family(images.z_image, "lists of rows, in and out"),
    "Wan 2.1": Family(videos.wan),
    "Wan 2.2": Family(videos.wan_two_transformers, "two denoisers"),
    "Wan 2.2 TI2V": Family(videos.wan_timesteps_per_token),
    "Wan, UniPC": Family(videos.wan_multistep, "a solver with a history", None),
    "LTX": Family(videos.ltx),
    "LTX image to video": Family(videos.ltx_image_to_video),
    "LTX-2": Family(videos.ltx2, "two schedulers"),
    "HunyuanVideo": Family(videos.hunyuan_video),
    "Chroma": Family(more_images.chroma),
    "Lumina 2": Family(more_images.lumina2),
    "Sana": Family(more_images.sana),
    "AuraFlow": Family(more_images.aura_flow),
    "CogView4": Family(more_images.cogview4),
    "PixArt-Sigma": Family(more_images.pixart_sigma, levels="ancestral"),
}
