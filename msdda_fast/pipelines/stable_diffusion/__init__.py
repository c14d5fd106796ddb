# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x: batched, captured, and in approximate modes."""
