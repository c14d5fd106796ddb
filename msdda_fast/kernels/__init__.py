# SPDX-License-Identifier: Apache-2.0
"""Operators with several backends: they know coefficients, not what the coefficients mean."""
