# SPDX-License-Identifier: Apache-2.0
"""`/docs`: the API as one HTML page made of its own description, without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from msdda_fast.serve.web_page import HEADERS

__all__ = ["add_docs"]


def add_docs(app: FastAPI) -> None:
    """Serve `/docs`, a page about every route that `/openapi.json` describes."""

    async def docs() -> Response:
        return Response(_page(app.openapi()), media_type="text/html", headers=HEADERS)

    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)


def _page(described: Mapping[str, Any]) -> str:
    title = escape(described["info"]["title"])
    routes = "".join(
        _route(described, method, path, operation)
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="page.css">'
        f'</head><body><main><h1>{title}</h1><p><a href="openapi.json">openapi.json</a></p>'
        f"{routes}</main></body></html>"
    )


def _route(
    described: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> str:
    parts = [f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"]
    parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
    for media in operation.get("requestBody", {}).get("content", {}).values():
        schema = _resolved(described, media["schema"])
        rows = "".join(_field(name, field, schema) for name, field in schema["properties"].items())
        parts.append(f"<table><tr><th>Field<th>Type<th>Default<th></tr>{rows}</table>")
    statuses = ", ".join(map(escape, operation["responses"]))
    parts.append(f"<p>Answers: {statuses}</p>")
    return "".join(parts)


def _field(name: str, field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if name in schema.get("required", ()):
        default = "required"
    else:
        default = "" if field.get("default") is None else str(field["default"])
    cells = (name, " or ".join(_types(field)), default, field.get("description", ""))
    return "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells) + "</tr>"


def _types(field: Mapping[str, Any]) -> Iterator[str]:
    for kind in field.get("anyOf", [field]):
        if "oneOf" in kind:
            yield from _types({"anyOf": kind["oneOf"]})
        elif "const" in kind or "enum" in kind:
            yield from (str(value) for value in kind.get("enum", [kind.get("const")]))
        else:
            bounds = [f"{sign} {kind[name]:g}" for name, sign in _BOUNDS.items() if name in kind]
            yield " ".join([kind.get("type", "any"), *bounds])


#: What a schema calls its bounds, and their signs.
_BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "maxLength": "up to",
}


def _resolved(described: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = described
    for part in schema["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return found
