# SPDX-License-Identifier: Apache-2.0
"""The network of the small flow model, and its pipeline, of stock diffusers classes.

Stock `StableDiffusion3Pipeline` reads no folder that lacks a T5, so there is one, whose weights are
zero: it says the `T5_TOKENS` zero tokens that the pipeline appends where T5 is None. Here they cost
more than text and image together; `shorten` takes one for all, to the same result.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from msdda_fast.assets import resolve
from msdda_fast.emoji.packaging import finish_pipeline

#: Tokens of T5, by default.
T5_TOKENS = 256
_EMOJI = "msdda-fast/emoji"


def small_transformer(text_width: int) -> SD3Transformer2DModel:
    """Build the untrained network, of 7.8 M parameters; two text encoders of width `text_width`."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=192,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


class OneForMany:
    """Attention where one zero token stands for the `T5_TOKENS` equal ones.

    Tokens of the text have no positions, so that equal ones stay equal through all blocks: n of
    them are one whose logits are greater by log n.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend over image and text; the last token of the text is the one of many."""

        def heads(x: Tensor, project: nn.Module, norm: nn.Module | None = None) -> Tensor:
            split: Tensor = project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        image, text = hidden_states, encoder_hidden_states
        query = (
            heads(image, attn.to_q, attn.norm_q),
            heads(text, attn.add_q_proj, attn.norm_added_q),
        )
        key = heads(image, attn.to_k, attn.norm_k), heads(text, attn.add_k_proj, attn.norm_added_k)
        value = heads(image, attn.to_v), heads(text, attn.add_v_proj)
        q, k, v = torch.cat(query, 2), torch.cat(key, 2), torch.cat(value, 2)
        bias = q.new_zeros(k.shape[2])
        bias[-1] = math.log(T5_TOKENS)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(1, 1, q.shape[2], -1))
        out = out.transpose(1, 2).flatten(2)
        own, its = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return attn.to_out[0](own), its if attn.context_pre_only else attn.to_add_out(its)


def shorten(pipe: StableDiffusion3Pipeline) -> dict[str, Any]:
    """Let one zero token stand for all of T5's; return the arguments that calls then need.

    Changes the network's attention and drops T5, in place; `encode_prompt` needs the arguments,
    too. Images are the same up to rounding.
    """
    pipe.text_encoder_3 = None
    pipe.transformer.set_attn_processor(OneForMany())
    return {"max_sequence_length": 1}


def shorten_calls(pipe: StableDiffusion3Pipeline) -> None:
    """As `shorten`, for calls without other arguments, which have `T5_TOKENS` tokens."""
    shorten(pipe)
    pipe.transformer.register_forward_pre_hook(_one_of_many, with_kwargs=True)


def _one_of_many(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Leave out all but the first of T5's tokens, which are the last of a text."""
    text = kwargs["encoder_hidden_states"]
    return args, {**kwargs, "encoder_hidden_states": text[:, : text.shape[1] - T5_TOKENS + 1]}


def assemble_flow(transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """Return the pipeline of a network, with autoencoder and text encoder of `msdda-fast/emoji`.

    The text encoder is in both of CLIP's places, and T5 is silent. The network's attention becomes
    the stock one.
    """
    folder = resolve(_EMOJI)
    transformer.set_attn_processor(JointAttnProcessor2_0())
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderTiny.from_pretrained(folder / "vae"),
        text_encoder=_with_projection(encoder),
        tokenizer=tokenizer,
        text_encoder_2=_with_projection(encoder),
        tokenizer_2=tokenizer,
        text_encoder_3=_silent_t5(len(tokenizer), transformer.config.joint_attention_dim),
        tokenizer_3=tokenizer,
    )


def save_flow(transformer: SD3Transformer2DModel, folder: Path) -> None:
    """Write the pipeline of a network in half precision; whoever loads it gets float32."""
    assemble_flow(transformer).to(torch.float16).save_pretrained(folder)
    for tokenizer in folder.glob("tokenizer*"):  # not what the installed transformers adds to it
        shutil.copytree(resolve(_EMOJI) / "tokenizer", tokenizer, dirs_exist_ok=True)
    finish_pipeline(folder)


def _with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return a copy of the class that Stable Diffusion 3 takes; it projects by the identity."""
    made = CLIPTextModelWithProjection(encoder.config).eval()
    inner = getattr(encoder, "text_model", encoder)  # transformers 4; 5
    made.text_model.load_state_dict(inner.state_dict())
    with torch.no_grad():
        made.text_projection.weight.copy_(torch.eye(encoder.config.hidden_size))
    return made


def _silent_t5(vocabulary: int, width: int) -> T5EncoderModel:
    """Return an encoder that gives (n, L, `width`) zeros for ids (n, L) below `vocabulary`."""
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1
    )
    made = T5EncoderModel(config).eval()
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made
