# SPDX-License-Identifier: Apache-2.0
"""Tiny text encoders for the pipelines of the other modules, and a tokenizer for all of them."""

import inspect
from typing import ClassVar

import torch
import transformers

from tests.families.parts import adapt, normal, seeded

WORDS = 100


class Tokenizer:
    """Turns each text into ids that depend on it alone."""

    model_max_length = 12
    added_tokens_encoder: ClassVar = {}

    def __call__(self, text, max_length=None, **_):
        texts = [text] if isinstance(text, str) else text
        length = min(max_length or 12, 12)
        ids = torch.stack([self._ids(one, length) for one in texts])
        entries = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return transformers.BatchEncoding(entries)

    def _ids(self, text: str, length: int) -> torch.Tensor:
        ids = (normal(length, seed=sum(map(ord, text))).abs() * 40).long() % (WORDS - 10) + 3
        ids[-1] = 2  # the end of the text
        return ids

    def batch_decode(self, *_, **__):
        return [""]

    def tokenize(self, text):
        return text.split()


def clip(*, projected: bool = False):
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    settings = transformers.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=32,
        max_position_embeddings=16,
    )
    network = seeded(getattr(transformers, kind), settings)
    return adapt(network, "q_proj", "k_proj", "v_proj", "out_proj", "fc1")


def t5():
    settings = transformers.T5Config(
        vocab_size=WORDS, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return seeded(transformers.T5EncoderModel, settings)


def with_encoders(make, batch: int = 2):
    """A pipeline of another module with text encoders, and the call with prompts."""
    pipe, call = make(batch)
    parts = dict(pipe.components)
    names = [name for name in parts if name.startswith("text_encoder")]
    for name in names:
        parts[name.replace("text_encoder", "tokenizer")] = Tokenizer()
    first, *others = names
    if others == ["text_encoder_2", "text_encoder_3"]:  # Stable Diffusion 3
        made = (clip(projected=True), clip(projected=True), t5())
    elif not others:  # Wan
        made = (t5(),)
    elif "unet" in parts:  # XL
        made = (clip(), clip(projected=True))
    else:  # FLUX
        made = (clip(), t5())
    parts |= dict(zip([first, *others], made, strict=True))
    taken = inspect.signature(type(pipe).__init__).parameters
    pipe = type(pipe)(**{name: part for name, part in parts.items() if name in taken})
    call = {name: value for name, value in call.items() if "embeds" not in name}
    call["prompt"] = ["a red dog", "a blue cat"][:batch]
    if "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
        call["max_sequence_length"] = 12
    return pipe, call
