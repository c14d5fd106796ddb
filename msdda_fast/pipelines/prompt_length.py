# SPDX-License-Identifier: Apache-2.0
"""Prompts that a text encoder reads to the end; diffusers cuts longer ones."""

from __future__ import annotations

import inspect
from typing import Any

from msdda_fast.errors import InvalidRequest

__all__ = ["check_prompt", "check_text"]


def check_prompt(pipe: Any, text: str, what: str = "the text") -> None:  # noqa: ANN401 - any
    """Check that all of `text` reaches one of a pipeline's text encoders.

    Of several, one that reads on where another stops is enough: SD3 and FLUX have CLIP for the
    beginning of a prompt and T5 for all of it.

    Args:
        pipe: A pipeline; its call may read fewer tokens than its tokenizers (max_sequence_length).
        text: A prompt.
        what: What the text is called in the message.

    Raises:
        InvalidRequest: All would cut it, or it is not valid Unicode.
    """
    longest = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    most = longest.default if longest is not None and isinstance(longest.default, int) else None
    refusal = None
    for name, tokenizer in pipe.components.items():
        reader = name.replace("tokenizer", "text_encoder")
        if not name.startswith("tokenizer") or getattr(pipe, reader, None) is None:
            continue
        is_clip = type(getattr(pipe, reader)).__name__.startswith("CLIP")
        try:
            return check_text(tokenizer, text, what, None if is_clip else most)
        except InvalidRequest as error:
            refusal = error
    if refusal is not None:
        raise refusal
    return None


def check_text(
    tokenizer: Any,  # noqa: ANN401 - untyped
    text: str,
    what: str = "the text",
    longest: int | None = None,
) -> None:
    """Check that all of `text` reaches the text encoder.

    Args:
        tokenizer: Of transformers; reads `model_max_length` tokens, start and end included.
        text: A prompt.
        what: What the text is called in the message.
        longest: Most tokens that the pipeline hands on; None: all.

    Raises:
        InvalidRequest: It has more tokens, or is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{what} is not valid Unicode") from None
    count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
    most = tokenizer.model_max_length if longest is None else longest
    if count > most:
        raise InvalidRequest(
            f"{what} has {count} tokens, but the text encoder reads at most {most}"
        )
