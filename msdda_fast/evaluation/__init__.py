# SPDX-License-Identifier: Apache-2.0
"""Compare preferences side by side: sweeps, image grids, reward tables."""
