# SPDX-License-Identifier: Apache-2.0
"""Sphinx: `make docs` builds these pages into build/docs, offline, with warnings as errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import msdda_fast

project = "msdda_fast"
author = copyright = "The msdda_fast authors"
version = release = msdda_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "markdown_docstrings",
    "mathml",
]
exclude_patterns = ["_ext"]
nitpicky = False  # types of torch and diffusers are not linked: that would need the network

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_typehints = "none"  # shapes say more, and every docstring has them
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"msdda_fast {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": "https://github.com/msdda-fast/msdda_fast/",
    "source_branch": "main",
    "source_directory": "docs/",
}
