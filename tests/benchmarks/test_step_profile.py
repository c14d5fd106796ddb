# SPDX-License-Identifier: Apache-2.0
"""Kernels are told apart by their names."""

from importlib import import_module

import pytest

from benchmarks.step_profile import kind

NAMES = {
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT": "matrix product",
    "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n": "matrix product",
    "sm80_xmma_fprop_implicit_gemm_f16f16_nhwc": "convolution",
    "pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": "attention",
    "void msdda::(anonymous namespace)::linear_kernel<float, 8, false>": "fused step",
    "void at::native::vectorized_elementwise_kernel<4, GeluCUDA>": "pointwise",
    "void at::native::vectorized_layer_norm_kernel<c10::Half>": "norm",
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_names_of_libraries(name, expected):
    assert kind(name) == expected


@pytest.mark.parametrize(
    ("module", "names", "expected"),
    [
        ("fused_step._triton_linear", ["linear_step"], "fused step"),
        ("fused_step._triton_moments", ["moments_step"], "fused step"),
        ("counter_noise._triton", ["noise_fill"], "fused step"),
        ("grouped_lora._triton", ["grouped_lora_layer"], "grouped LoRA"),
        ("group_norm._triton", ["group_norm_moments", "group_norm_apply"], "norm"),
        ("rowwise._triton", ["summed_and_normed"], "norm"),
        ("rowwise._triton", ["summed", "gated"], "pointwise"),
    ],
)
def test_our_own_kernels_are_found(module, names, expected):
    pytest.importorskip("triton")
    kernels = import_module(f"msdda_fast.kernels.{module}")
    for name in names:
        assert kind(getattr(kernels, name).fn.__name__) == expected
