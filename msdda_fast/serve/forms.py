# SPDX-License-Identifier: Apache-2.0
"""The form of `POST /v1/images/edits`: its parts, bounded, as an `EditBody` and files.

OpenAI's clients send what is no text as text, and an entry of a mapping as a field of its own:
`weights[aesthetic]=0.3`. Other clients may send a mapping as JSON.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import IO, Any, NamedTuple

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header

from msdda_fast.batching.request import ImageRequest
from msdda_fast.serve.body import EditBody
from msdda_fast.serve.refusals import Refusal
from msdda_fast.serve.settings import ServeSettings
from msdda_fast.serve.uploads import fitted, repainted, start_image

__all__ = ["FORM", "EditForm", "edit_form"]

#: Most files of a form: OpenAI takes 16 images, and a mask; here more than one is refused by name.
MOST_FILES = 17
#: Most other fields; `weights` in many ranges may have one for each of their entries.
MOST_FIELDS = 256

#: A field, and the way to an entry of it: `weights[500-999][aesthetic]`.
NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)", re.DOTALL)

FILES = {
    "image": "The image to start from: PNG, JPEG or WebP. Of another shape than the drawn one, its "
    "middle is taken; without `size` its own size is drawn, if it is served.",
    "mask": "A PNG of the same size, transparent where the image is to be edited.",
}


class EditForm(NamedTuple):
    """The fields of a form, and its files, which are open as long as the form."""

    body: EditBody
    image: IO[bytes]
    mask: IO[bytes] | None

    def checked(self, settings: ServeSettings, sizes: Sequence[str]) -> ImageRequest:
        """Return the request with its images, decoded, checked against the limits of the service.

        Args:
            settings: The limits.
            sizes: The served sizes, "WIDTHxHEIGHT", the default first.

        Raises:
            Refusal: A field exceeds a limit, or a file is wrong; the refusal names the field.
        """
        image = start_image(self.image, settings.max_image_pixels)
        mask = None if self.mask is None else repainted(self.mask, image.size)
        request = self.body.checked(settings, sizes, "{}x{}".format(*image.size))
        assert request.width is not None and request.height is not None
        size = request.width, request.height
        return replace(
            request,
            image=fitted(image, size),
            mask_image=None if mask is None else fitted(mask, size),
        )


@asynccontextmanager
async def edit_form(connection: Request, settings: ServeSettings) -> AsyncIterator[EditForm]:
    """Read a form to its end.

    Args:
        connection: The request, whose length is bounded already.
        settings: The longest field.

    Raises:
        Refusal: It is no form, or a field is wrong; the refusal names the field.
        RequestValidationError: A field has no valid value.
        HTTPException: It has too many parts, too long a field, or does not end.
    """
    kind, options = parse_options_header(connection.headers.get("content-type"))
    # Python has encodings that take the square of the length
    if kind != b"multipart/form-data" or options.get(b"charset", b"utf-8").lower() != b"utf-8":
        message = "the body must be multipart/form-data, in UTF-8"
        raise Refusal(400, message, code="invalid_value")
    async with connection.form(
        max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=settings.max_body_bytes
    ) as form:
        parts = form.multi_items()
        files = _files((name, part.file) for name, part in parts if not isinstance(part, str))
        fields = _fields((name, part) for name, part in parts if isinstance(part, str))
        try:
            body = EditBody.model_validate(fields)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        if "image" not in files:
            raise Refusal.of_field("image", "Field required")
        yield EditForm(body, files["image"], files.get("mask"))


def _files(items: Iterable[tuple[str, IO[bytes]]]) -> dict[str, IO[bytes]]:
    found: dict[str, IO[bytes]] = {}
    for name, file in items:
        field = name.removesuffix("[]")  # of a list, as OpenAI's client sends several
        if field not in FILES:
            raise Refusal.of_field(field, f"no file is expected here, only {' and '.join(FILES)}")
        if field in found:
            raise Refusal.of_field(field, "one file is taken, not several")
        found[field] = file
    return found


def _fields(items: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Put fields together: entries into mappings, and what is no text into values of JSON."""
    found: dict[str, Any] = {}
    whole = set()
    for name, text in items:
        if (field := name.removesuffix("[]")) in FILES:
            raise Refusal.of_field(field, "expected a file, with its name")
        if (parts := NAME.fullmatch(name)) is None or not parts[2]:
            if name in found:
                raise Refusal.of_field(name, "given more than once")
            found[name] = text if name in TEXTS else _value(text)
            whole.add(name)
            continue
        first, *between, last = [parts[1], *re.findall(r"\[([^\[\]]*)\]", parts[2])]
        if first in whole:
            raise Refusal.of_field(first, "given at once, and by entry")
        place = found
        for key in (first, *between):
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise Refusal.of_field(first, f"{key!r} is given at once, and by entry")
        if last in place:
            raise Refusal.of_field(first, f"{last!r} is given more than once")
        place[last] = text if first in TEXTS_BY_NAME else _value(text)
    return found


def _value(text: str) -> Any:  # noqa: ANN401 - whatever JSON it is
    try:
        return from_json(text)
    except ValueError:
        return text  # of the wrong type, which the validation says by name


def _has_text(field: Mapping[str, Any]) -> bool:
    return any(kind.get("type") == "string" for kind in field.get("anyOf", [field]))


_SCHEMA = EditBody.model_json_schema()
#: Fields that are text, and those whose entries are.
TEXTS = {name for name, field in _SCHEMA["properties"].items() if _has_text(field)}
TEXTS_BY_NAME = {"masks"}

#: The form, for the documentation.
FORM: dict[str, Any] = {
    "content": {
        "multipart/form-data": {
            "schema": {
                **_SCHEMA,
                "properties": {
                    **{
                        name: {"type": "string", "format": "binary", "description": text}
                        for name, text in FILES.items()
                    },
                    **_SCHEMA["properties"],
                },
                "required": ["image", *_SCHEMA["required"]],
            }
        }
    },
    "required": True,
}
