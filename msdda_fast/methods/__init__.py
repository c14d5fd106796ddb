# SPDX-License-Identifier: Apache-2.0
"""Every system of the paper's comparison: `method(pipe, prompts, weights, seeds) -> Drawn`."""
