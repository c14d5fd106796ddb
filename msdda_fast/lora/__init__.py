# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: one file checked against one base network. Torch only."""
