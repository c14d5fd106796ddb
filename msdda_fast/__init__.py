# SPDX-License-Identifier: Apache-2.0
"""Balance several aligned diffusion models at inference time: the exact fused reverse step."""
