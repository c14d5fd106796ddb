# SPDX-License-Identifier: Apache-2.0
"""The UNet forward of all objectives at once."""
