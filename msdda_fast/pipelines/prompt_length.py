# SPDX-License-Identifier: Apache-2.0
"""Whether text encoders read a prompt to its end."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any, Self

from msdda_fast.errors import InvalidRequest

__all__ = ["Readers", "check_text"]


class Readers:
    """Copies of a pipeline's tokenizers, for threads that check texts while it is busy.

    Of several, one that reads on where another stops is enough: SD3 and FLUX have CLIP for the
    beginning of a prompt and T5 for all of it.

    Args:
        tokenizers: With each, the most tokens that its text encoder is given; None: all it reads.
    """

    def __init__(self, *tokenizers: tuple[Any, int | None]) -> None:
        self._tokenizers = [(copy.deepcopy(one), longest) for one, longest in tokenizers]
        self._reading = threading.Lock()  # tokenizers are not thread-safe

    @classmethod
    def of(cls, pipe: Any) -> Self:  # noqa: ANN401 - any pipeline
        """Return those of the text encoders that a pipeline has.

        Its call may give all but CLIP fewer tokens than they read (max_sequence_length).
        """
        longest = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
        most = longest.default if longest is not None and isinstance(longest.default, int) else None
        found = []
        for name, part in pipe.components.items():
            reader = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
            if name.startswith("tokenizer") and None not in (part, reader):
                if hasattr(part, "model_max_length"):
                    is_clip = type(reader).__name__.startswith("CLIP")
                    found.append((part, None if is_clip else most))
        return cls(*found)

    def check(self, text: Any, what: str = "the text") -> None:  # noqa: ANN401 - what is checked
        """Check that `text` is a text that is read to its end.

        Args:
            text: A prompt.
            what: What it is called in the message.

        Raises:
            InvalidRequest: It is none, has more tokens, or is not valid Unicode.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"expected text, got {type(text).__name__}")
        refusal = None
        with self._reading:
            for tokenizer, longest in self._tokenizers:
                try:
                    return check_text(tokenizer, text, what, longest)
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
