# SPDX-License-Identifier: Apache-2.0
"""What to draw: prompts as text or as embeddings, and how many images of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.integers import as_integer

__all__ = ["Prompts"]


@dataclass(frozen=True, slots=True)
class Prompts:
    """P prompts, as text or as embeddings (P, L, D), each for N images: B = P N."""

    prompt: list[str] | None
    negative_prompt: list[str] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    count: int
    images_per_prompt: int

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self.count * self.images_per_prompt

    def needs_encoder(self, *, negative: bool) -> bool:
        """Whether text is to be encoded; `negative`: whether negative prompts are read."""
        return self.prompt is not None or (negative and self.negative_prompt_embeds is None)

    @classmethod
    def check(
        cls,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        *,
        images_per_prompt: int,
        embed_width: int,
    ) -> Prompts:
        """Check diffusers' four prompt arguments together.

        Args:
            prompt, negative_prompt: Text; one negative prompt may serve all prompts.
            prompt_embeds, negative_prompt_embeds: (P, L, D) from the text encoder, instead of text.
            images_per_prompt: N >= 1.
            embed_width: D, the width of the UNet's cross-attention.

        Raises:
            ValueError: Neither or both of text and embeddings are given, or counts disagree.
            InvalidShape: Embeddings are not of shape (P, L, D).
        """
        copies = as_integer(images_per_prompt)
        if copies is None:
            raise ValueError(f"num_images_per_prompt must be an int, got {images_per_prompt!r}")
        if copies < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {copies}")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, not both")
        if prompt_embeds is not None:
            _check_embeds("prompt_embeds", prompt_embeds, (None, None, embed_width))
            count, texts = prompt_embeds.shape[0], None
        else:
            texts = _texts("prompt", prompt)
            count = len(texts)
        if negative_prompt_embeds is not None:
            length = None if prompt_embeds is None else prompt_embeds.shape[1]
            expected = (count, length, embed_width)
            _check_embeds("negative_prompt_embeds", negative_prompt_embeds, expected)
        negatives = None
        if negative_prompt is not None:
            negatives = _texts("negative_prompt", negative_prompt)
            if isinstance(negative_prompt, str):
                negatives *= count
            if len(negatives) != count:
                raise ValueError(f"{len(negatives)} negative prompts for {count} prompts")
        return cls(texts, negatives, prompt_embeds, negative_prompt_embeds, count, copies)


def _texts(name: str, text: str | Sequence[str] | None) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(item, str) for item in texts):
        raise ValueError(f"{name} must be a str or a list of str, got {text!r}")
    if not texts:
        raise ValueError(f"{name} is an empty list; give at least one")
    return list(texts)


def _check_embeds(name: str, embeds: Tensor, expected: tuple[int | None, ...]) -> None:
    agrees = isinstance(embeds, Tensor) and embeds.ndim == 3 and embeds.is_floating_point()
    if not agrees or any(e not in (None, n) for e, n in zip(expected, embeds.shape, strict=True)):
        got = (
            f"{embeds.dtype} {tuple(embeds.shape)}" if isinstance(embeds, Tensor) else repr(embeds)
        )
        wanted = ", ".join(
            letter if e is None else str(e) for letter, e in zip("PLD", expected, strict=True)
        )
        raise InvalidShape(f"{name} must be a float tensor (P, L, D) = ({wanted}), got {got}")
