# SPDX-License-Identifier: Apache-2.0
r"""What a transformer block and a resnet do to rows of channels between their matrix products.

    sum_of             s = a + b + bias
    sum_and_norm       s = a + b + bias, and the layer norm of s
    geglu              y = value * gelu(gate), of x = [value, gate]

Each is one pass in one launch, with float32 arithmetic and one rounding per result. A bias in
`sum_of` and `sum_and_norm` is that of the layer that made b: a convolution, to which cuDNN's bias
would be a launch of its own, or a batched product, which would copy it first.

`kernels.raw` declares the raw functions of each backend.
"""
