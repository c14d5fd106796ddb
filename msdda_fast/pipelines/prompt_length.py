# SPDX-License-Identifier: Apache-2.0
"""Prompts that a text encoder reads to the end; diffusers cuts longer ones."""

from __future__ import annotations

from typing import Any

from msdda_fast.errors import InvalidRequest

__all__ = ["check_text"]


def check_text(tokenizer: Any, text: str, what: str = "the text") -> None:  # noqa: ANN401 - untyped
    """Check that all of `text` reaches the text encoder.

    Args:
        tokenizer: Of transformers; reads `model_max_length` tokens, start and end included.
        text: A prompt.
        what: What the text is called in the message.

    Raises:
        InvalidRequest: It has more tokens, or is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{what} is not valid Unicode") from None
    count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
    if count > (most := tokenizer.model_max_length):
        raise InvalidRequest(
            f"{what} has {count} tokens, but the text encoder reads at most {most}"
        )
