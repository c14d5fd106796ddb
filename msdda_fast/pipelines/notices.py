# SPDX-License-Identifier: Apache-2.0
"""Silences log messages and progress bars of diffusers and transformers."""

from __future__ import annotations

__all__ = ["quieten"]


def quieten() -> None:
    """Show only errors of both libraries. Call this before the first pipeline is imported."""
    import transformers

    # transformers speaks while diffusers is being imported, so it comes first
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
