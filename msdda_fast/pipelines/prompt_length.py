# SPDX-License-Identifier: Apache-2.0
"""Prompts that a text encoder reads to the end; diffusers cuts longer ones."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from typing import Any

from msdda_fast.errors import InvalidRequest

__all__ = ["Readers", "check_text"]


class Readers:
    """Copies of a pipeline's tokenizers, for threads that check texts while it is busy.

    Args:
        tokenizers: Those of the pipeline; a text must reach the end of one of them.
        longest: Most tokens that the pipeline gives any text encoder; None: all that it reads.
    """

    def __init__(self, tokenizers: Iterable[Any], longest: int | None = None) -> None:
        self._tokenizers = [copy.deepcopy(one) for one in tokenizers]
        for one in self._tokenizers:
            if longest is not None:
                one.model_max_length = min(longest, one.model_max_length)
        self._reading = threading.Lock()  # tokenizers are not thread-safe

    def check(self, text: Any) -> None:  # noqa: ANN401 - it is what is checked
        """Check that `text` is a text that is read to its end.

        Raises:
            InvalidRequest: It is none, has more tokens, or is not valid Unicode.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"expected text, got {type(text).__name__}")
        refusal = None
        with self._reading:
            for tokenizer in self._tokenizers:
                try:
                    return check_text(tokenizer, text)
                except InvalidRequest as error:
                    refusal = error
        if refusal is not None:
            raise refusal


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
