# SPDX-License-Identifier: Apache-2.0
"""One Gaussian reverse step of each sampler, and the coefficients of its fusion."""
