import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from darkroom.nets.unet import ResidualBlock, SelfAttention, UNet, timestep_embedding
from tests.unit.nets.networks import SMALL, distance, network, randomised


def _norm(x, norm):
    """GroupNorm by its definition, float64 (Wu & He 2018)."""
    n, c, h, w = x.shape
    groups = x.reshape(n, norm.num_groups, -1)
    deviation = groups - groups.mean(2, keepdim=True)
    normal = deviation / (deviation.square().mean(2, keepdim=True) + norm.eps).sqrt()
    return normal.reshape(n, c, h, w) * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("outputs", [32, 48])
@pytest.mark.parametrize("conditioning", ["additive", "scale_shift"])
def test_residual_block_is_its_formula(oracle, conditioning, outputs):
    block = randomised(ResidualBlock(32, outputs, 24, 8, 0.0, conditioning)).double()
    x, embedding = torch.randn(3, 32, 5, 5).double(), torch.randn(3, 24).double()

    def conv(x, layer):  # a sum over shifted images
        padded = F.pad(x, (1, 1, 1, 1)) if layer.weight.shape[-1] == 3 else x
        taps = layer.weight.shape[-1]
        shifted = (
            torch.einsum("oc,nchw->nohw", layer.weight[:, :, i, j], padded[:, :, i : i + 5, j : j + 5])
            for i in range(taps)
            for j in range(taps)
        )
        return sum(shifted) + layer.bias[:, None, None]

    def silu(x):
        return x / (1 + torch.exp(-x))

    h = conv(silu(_norm(x, block.norm1)), block.conv1)
    condition = (embedding @ block.embed.weight.T + block.embed.bias)[:, :, None, None]
    if conditioning == "additive":
        h = _norm(h + condition, block.norm2)
    else:
        h = _norm(h, block.norm2) * (1 + condition[:, :outputs]) + condition[:, outputs:]
    expected = conv(silu(h), block.conv2) + (x if outputs == 32 else conv(x, block.skip))
    oracle(f"residual block, {conditioning}", "its formula", distance(block(x, embedding), expected), 1e-14)


@pytest.mark.parametrize("head_channels", [8, 16, 32])
@pytest.mark.parametrize("side", [3, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_is_a_softmax_over_all_positions(oracle, head_channels, side, layout):
    attention = randomised(SelfAttention(32, head_channels, 8)).double()
    x = torch.randn(2, 32, side, side).double().to(memory_format=layout)
    h = _norm(x, attention.norm)
    q, k, v = torch.einsum("oc,nchw->nohw", attention.qkv.weight[:, :, 0, 0], h).add(
        attention.qkv.bias[:, None, None]
    ).reshape(2, 3, 32, side * side).unbind(1)  # fmt: skip
    heads = []
    for first in range(0, 32, head_channels):
        here = slice(first, first + head_channels)
        scores = torch.einsum("ncp,ncq->npq", q[:, here], k[:, here]) / math.sqrt(head_channels)
        weights = scores.exp() / scores.exp().sum(2, keepdim=True)
        heads.append(torch.einsum("npq,ncq->ncp", weights, v[:, here]))
    mixed = torch.cat(heads, dim=1).reshape(2, 32, side, side)
    expected = x + torch.einsum("oc,nchw->nohw", attention.out.weight[:, :, 0, 0], mixed)
    expected += attention.out.bias[:, None, None]
    oracle("attention", "brute-force softmax", distance(attention(x), expected), 1e-14)


@pytest.mark.parametrize("place", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_is_laid_out_for_the_fused_kernels(place, layout, request):
    device = request.getfixturevalue("gpu") if place == "gpu" else "cpu"
    attention = SelfAttention(64, 32, 8).to(device, torch.bfloat16)
    x = torch.randn(2, 64, 8, 8, device=device, dtype=torch.bfloat16).to(memory_format=layout).requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it cannot be used
        attention(x).sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("width", [8, 48, 65, 128])
def test_timestep_embedding_is_that_of_diffusers(oracle, width):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 17, 500, 999])
    expected = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    difference = (timestep_embedding(t, width) - expected).abs().max()
    oracle("timestep embedding", "diffusers get_timestep_embedding", difference, 1e-6)


def test_a_fresh_network_predicts_zero():
    network = UNet(**SMALL)
    out = network(torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 10]))
    assert torch.equal(out, torch.zeros(3, 1, 8, 8))


@pytest.mark.parametrize("conditioning", ["additive", "scale_shift"])
def test_every_residual_branch_starts_at_zero(conditioning):
    x, embedding = torch.randn(2, 32, 4, 4), torch.randn(2, 24)
    assert torch.equal(ResidualBlock(32, 32, 24, 8, 0.0, conditioning)(x, embedding), x)
    assert torch.equal(SelfAttention(32, 16, 8)(x), x)


@pytest.mark.parametrize("conditioning", ["additive", "scale_shift"])
def test_time_and_label_reach_the_output(conditioning):
    trained = network(SMALL, time_conditioning=conditioning)
    x = torch.randn(1, 1, 8, 8)

    def out(t, label):
        return trained(x, torch.tensor([t]), torch.tensor([label]))

    assert not torch.allclose(out(10, 3), out(900, 3))
    assert not torch.allclose(out(10, 3), out(10, 4))
    assert not torch.allclose(out(10, 3), out(10, 10))


def test_time_enters_every_residual_block():
    trained = network(SMALL, num_res_blocks=2).requires_grad_(True)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    trained(x, t, labels).square().sum().backward()
    embeddings = [p for name, p in trained.named_parameters() if name.endswith("embed.weight")]
    assert len(embeddings) == 2 * 2 + 2 + 2 * 3  # two levels down, the middle, two levels up
    assert all(float(p.grad.abs().sum()) > 0 for p in embeddings)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (2, 12), (3, 16), (4, 20)])
def test_any_square_image_that_the_levels_divide_passes(channels, size):
    trained = network(SMALL, image_channels=channels, image_size=size, attention_resolutions=[size // 2])
    out = trained(torch.randn(2, channels, size, size), torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert out.shape == (2, channels, size, size)


def test_an_unconditional_network_has_no_label_embedding_and_needs_no_labels():
    trained = network(SMALL, num_classes=0, null_class=False)
    assert trained.label_embedding is None
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.equal(trained(x, t), trained(x, t, torch.tensor([3, 4])))


def test_the_null_class_is_one_row_more():
    assert UNet(**SMALL).label_embedding.num_embeddings == 11
    assert UNet(**SMALL | {"null_class": False}).label_embedding.num_embeddings == 10


def test_a_conditional_network_needs_labels():
    with pytest.raises(ValueError, match="needs labels"):
        UNet(**SMALL)(torch.randn(1, 1, 8, 8), torch.tensor([1]))


def test_dropout_acts_in_training_only():
    trained = network(SMALL, dropout=0.5)
    arguments = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    assert torch.equal(trained(*arguments), trained(*arguments))
    trained.train()
    assert not torch.equal(trained(*arguments), trained(*arguments))


def test_output_is_float32_under_bf16():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(SMALL)(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert out.dtype == torch.float32


def test_group_norm_has_float32_statistics_under_bf16(oracle):
    """With a mean of 30 deviations, sums in bf16 would leave nothing of the variance."""
    norm = ResidualBlock(64, 64, 8, 32, 0.0, "additive").norm1
    x = (30 + torch.randn(4, 64, 16, 16)).bfloat16()  # what the norm gets under autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = norm(x)
    oracle("GroupNorm of bf16", "float64", distance(measured, _norm(x.double(), norm.double())), 2**-8)
