# SPDX-License-Identifier: Apache-2.0
"""The sampling loop and what it needs: torch only, no model zoo, no text, no images."""
