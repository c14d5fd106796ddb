# SPDX-License-Identifier: Apache-2.0
r"""Group norm of pictures in channels_last, with what surrounds it in a resnet.

    y = act((z - mean_g) / sqrt(var_g + eps) * weight + bias),   z = x + shift,

with mean and variance over the channels of a group and all pixels, a shift per channel, and SiLU or
nothing as act. The result is in channels_last, too, so that its pixels are rows of tokens.

On CUDA torch's own group norm takes NCHW only: for a picture in channels_last this operator is two
launches in place of six. `kernels.raw` declares the raw function of each backend.
"""
