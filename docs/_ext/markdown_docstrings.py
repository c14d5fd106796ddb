# SPDX-License-Identifier: Apache-2.0
"""Docstrings as this project writes them, for Sphinx.

They are plain text with `code` in single backticks and indented formulas; reStructuredText would
read `*S` as emphasis and an indented line as a quotation.
"""

import re

from sphinx.application import Sphinx


def plain(line: str) -> str:
    """Make code of what is in backticks, and text of everything else."""
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(
        f"`{part}`" if part.startswith("`") else re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part)
        for part in parts
    )


def translate(
    app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]
) -> None:
    """Rewrite `lines` in place, before napoleon sees them."""
    result: list[str] = []
    section, formula = False, False
    for line in lines:
        section = section or line in ("Args:", "Attributes:", "Returns:", "Raises:")
        indented = line.startswith("    ") and not section
        if indented and not formula:
            result += ["::", ""]
        formula = indented or (formula and not line)
        result.append(line if indented else plain(line))
    lines[:] = result


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to autodoc, ahead of napoleon."""
    app.connect("autodoc-process-docstring", translate, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
