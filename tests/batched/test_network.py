# SPDX-License-Identifier: Apache-2.0
"""What the batched forward shares, leaves alone, does once, and never does."""

import gc
import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.adapters.variant import Variant
from msdda_fast.batched import ops, unet
from msdda_fast.batched.ops import FusedOps
from msdda_fast.batched.options import BatchedOptions, Sharing, saves_launches
from msdda_fast.batched.unet import BatchedUNet
from tests.batched.cases import (
    ATTENTION,
    EVERYTHING,
    KINDS,
    UP_BLOCKS,
    add_adapter,
    inputs,
    network,
    relative,
)

EXACT = 1e-10
BUILDS = {
    "separate": BatchedOptions(),
    "folded": BatchedOptions(design="folded"),
    "fused": BatchedOptions(fuse_qkv=True),
    "nhwc": BatchedOptions(channels_last=True),
}


def pair(kind="sd15", targets=ATTENTION, dtype=torch.float64, count=2):
    unet = network(kind, dtype)
    for m in range(count):
        add_adapter(unet, f"objective {m}", targets, seed=m)
    return [Variant(unet, f"objective {m}") for m in range(count)]


class Operators(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def operators(case, options):
    batched = BatchedUNet.of(case.variants, options)
    batched.begin(case.prompts, case.timesteps, case.added)
    with Operators() as seen:
        batched(case.x, torch.tensor(1))
    return seen.names


def storages(*modules):
    """Bytes of every storage behind the modules' tensors, by its identity."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.sweep(options=1)
@pytest.mark.parametrize("options", BUILDS.values(), ids=BUILDS)
def test_the_stock_network_is_left_as_it_was(options):
    case = inputs(pair(targets=EVERYTHING))
    unet = case.unet.train()
    for layer in unet.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("objective 0", 7.0)

    def state():
        modules = dict(unet.named_modules())
        tensors = {name: (id(t), t.data_ptr(), t.stride()) for name, t in unet.named_parameters()}
        flags = {name: (type(m), m.training) for name, m in modules.items()}
        scales = {name: dict(m.scaling) for name, m in modules.items() if hasattr(m, "scaling")}
        grads = {name: t.requires_grad for name, t in unet.named_parameters()}
        return tensors, flags, scales, grads

    before, expected = state(), case.stock()
    case.batched(options)
    assert state() == before
    assert torch.equal(case.stock(), expected)


def test_no_weight_is_copied():
    variants = pair(count=4)
    stock = storages(variants[0].network)
    batched = BatchedUNet.of(variants)
    factors = sum(t.nbytes for name, t in batched.named_buffers() if name.endswith(("down", "up")))
    own = {key: size for key, size in storages(batched).items() if key not in stock}
    assert sum(own.values()) == factors


@pytest.mark.full  # likewise, of a larger network
def test_memory_at_four_objectives_of_stable_diffusion_15():
    """Its proportions at a quarter of the width; attention is 11 % of the weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_num_groups=16
        )
    unet.to_empty(device="cpu")
    size = sum(storages(unet).values())
    for m in range(4):
        add_adapter(unet, f"{m}", rank=1, seed=m)
    weights = nn.ParameterList(p for name, p in unet.named_parameters() if ".lora_" not in name)
    for options in BUILDS["separate"], BUILDS["folded"], BUILDS["fused"]:
        batched = BatchedUNet.of([Variant(unet, f"{m}") for m in range(4)], options)
        total = sum(storages(batched, weights).values())
        print(f"{options.design}, fuse_qkv={options.fuse_qkv}: {total / size:.4f} of one model")
        assert total <= 1.1 * size


@pytest.mark.sweep(kind=1, options=1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", BUILDS.values(), ids=BUILDS)
def test_two_objectives_take_hardly_more_operators_than_one(kind, options):
    variants = pair(kind, dtype=torch.float32)
    one, two = (operators(inputs(variants[:m], dtype=torch.float32), options) for m in (1, 2))
    print(f"{kind}: {len(one)} operators for M = 1, {len(two)} for M = 2")
    assert len(two) <= 1.05 * len(one)


def test_each_sharing_saves_operators():
    case = inputs(pair(dtype=torch.float32), dtype=torch.float32)
    count = {
        name: len(operators(case, BatchedOptions(sharing=Sharing(**{name: False}))))
        for name in ("prompt_cache", "time_table")
    }
    shared = len(operators(case, BatchedOptions()))
    assert shared < count["prompt_cache"] and shared < count["time_table"]


@pytest.fixture
def few(monkeypatch):
    """Options that are None are as on CUDA in half precision."""
    for module in (ops, unet):
        monkeypatch.setattr(module, "saves_launches", lambda dtype, device: True)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.float16, True),
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.float16, False),
    ],
)
def test_launches_are_saved_on_cuda_in_half_precision(device, dtype, expected):
    assert saves_launches(dtype, torch.device(device)) is expected


@pytest.mark.usefixtures("few")
def test_the_default_that_saves_launches_is_stock_too():
    case = inputs(pair())
    batched = BatchedUNet.of(case.variants)
    layers = [type(layer).__name__ for layer in batched.modules()]
    assert "MergedLinear" in layers and isinstance(batched.body.ops, FusedOps)
    assert len(batched.body.mid_block.attentions[0].blocks[0].attn1.to_qkv) == 1
    assert relative(case.run(batched), case.stock()) < EXACT


@pytest.mark.usefixtures("few")
def test_an_adapter_that_rounding_would_lose_is_not_merged():
    network_, tiny = network("sd15", torch.float32), "tiny"
    add_adapter(network_, "large", seed=1)
    add_adapter(network_, tiny, seed=2, size=1e-4)
    case = inputs([Variant(network_, "large"), Variant(network_, tiny)], dtype=torch.float32)
    layers = {type(layer).__name__ for layer in BatchedUNet.of(case.variants).body.modules()}
    assert "FactoredLinear" in layers and "MergedLinear" not in layers


def test_forwards_of_the_same_adapters_share_their_sites():
    adapters = LoadedAdapters(pair(targets=EVERYTHING))
    one, other = (BatchedUNet(adapters, BatchedOptions(design="merged")) for _ in range(2))
    part = BatchedUNet(adapters, BatchedOptions(design="merged"), objectives=[1])
    block = "body.mid_block.attentions.0.blocks.0.attn1.to_out"
    assert one.get_submodule(block) is other.get_submodule(block)
    assert one.get_submodule(block) is not part.get_submodule(block)
    sizes = len(adapters.sites)
    del other, part
    gc.collect()
    assert len(adapters.sites) < sizes


def test_nothing_is_divided_by_one():
    names = operators(inputs(pair(dtype=torch.float32), dtype=torch.float32), BatchedOptions())
    assert "div" not in names and names.count("_scaled_dot_product_flash_attention_for_cpu") > 0


@pytest.mark.parametrize(
    ("targets", "shared_prompt", "rows"),
    [
        (ATTENTION, False, {"conv_in": 2, "mid": 8, "out": 8}),
        (UP_BLOCKS, False, {"conv_in": 2, "mid": 8, "out": 8}),
        (UP_BLOCKS, True, {"conv_in": 2, "mid": 4, "out": 8}),
        (["conv_in"], True, {"conv_in": 4, "mid": 8, "out": 8}),
    ],
    ids=["attention", "up blocks", "up blocks, one prompt", "conv_in"],
)
def test_rows_are_parted_only_where_they_differ(targets, shared_prompt, rows):
    case = inputs(pair(targets=targets), shared_prompt=shared_prompt)
    if shared_prompt:
        case.prompts = case.prompts[:1]
    batched = BatchedUNet.of(case.variants)
    body, seen = batched.body, {}
    layers = {"conv_in": body.conv_in, "mid": body.mid_block.resnets[0].conv1, "out": body.conv_out}
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: len(x[0])}))
        for name, layer in layers.items()
    ]
    case.run(batched)
    for hook in hooks:
        hook.remove()
    assert seen == rows  # M = K = B = 2


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING, UP_BLOCKS], ids=["few", "all", "up"])
def test_every_convolution_reads_and_writes_channels_last(kind, targets):
    case = inputs(pair(kind, targets))
    batched = BatchedUNet.of(case.variants, BatchedOptions(channels_last=True))
    outside = []

    def check(layer, args, output):
        for x in (args[0], output):
            if not x.is_contiguous(memory_format=torch.channels_last):
                outside.append((layer, x.shape, x.stride()))

    hooks = [
        layer.register_forward_hook(check)
        for layer in batched.body.modules()
        if type(layer).__name__ in ("Conv2d", "FoldedConv2d")
    ]
    case.run(batched)
    for hook in hooks:
        hook.remove()
    assert len(hooks) > 10 and outside == []


@pytest.mark.sweep(kind=1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
def test_no_sync_and_no_branch_on_data(kind, shared):
    case = inputs(pair(kind, EVERYTHING, torch.float32), dtype=torch.float32)
    sharing = Sharing(prompt_cache=shared, time_table=shared, prefix=shared)
    batched = BatchedUNet.of(case.variants, BatchedOptions(sharing=sharing))
    batched.begin(case.prompts, case.timesteps, case.added)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = batched(mode.from_tensor(case.x), mode.from_tensor(torch.tensor(1)))
    assert out.shape == (2, 2, 2, *case.x.shape[1:])


@pytest.mark.slow
def test_compiles_whole_and_once():
    case = inputs(pair(dtype=torch.float32), dtype=torch.float32)
    batched = BatchedUNet.of(case.variants)
    compiled = torch.compile(batched, backend="eager", fullgraph=True)
    batched.begin(case.prompts, case.timesteps)
    compiled(case.x, torch.tensor(0))
    batched.begin(-case.prompts, case.timesteps + 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        for k in range(3):
            expected = batched(case.x, torch.tensor(k))
            assert relative(compiled(case.x, torch.tensor(k)), expected) < 1e-5
    torch.compiler.reset()


def test_the_same_batched_network_twice_gives_the_same_bits():
    case = inputs(pair(dtype=torch.float32), dtype=torch.float32)
    batched = BatchedUNet.of(case.variants)
    first, second = case.run(batched), case.run(batched)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_half_precision_keeps_its_dtype():
    case = inputs(pair(dtype=torch.bfloat16), dtype=torch.float32)
    out = case.batched(BatchedOptions())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_attention_runs_on_the_reported_backend():
    case = inputs(pair(dtype=torch.float32), dtype=torch.float32)
    found = {}
    for name in ("auto", "math"):
        options = BatchedOptions(attention=name)
        flash = any("flash" in operator for operator in operators(case, options))
        found[BatchedUNet.of(case.variants, options).attention_backend] = flash
    assert found == {"flash": True, "math": False}


def test_every_row_axis_in_every_order():
    """Rows (M, K, B): each output depends on its own image and prompt, and on no other."""
    case = inputs(pair(), b=3)
    batched = BatchedUNet.of(case.variants)
    before = case.run(batched)
    for m, k, b in itertools.product(range(2), range(2), range(3)):
        prompts = case.prompts.clone()
        prompts[m, k, b] += 1
        batched.begin(prompts, case.timesteps)
        changed = (batched(case.x, torch.tensor(1)) - before).abs().amax((3, 4, 5)) > EXACT
        assert changed.nonzero().tolist() == [[m, k, b]]
