"""Our UNet beside diffusers' `UNet2DModel` of equal architecture, with our weights in it."""

import pytest
import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from darkroom.nets.unet import UNet
from tests.unit.nets.networks import A64, CIFAR, SMALL, distance, network

_BLOCK = {"conv1": "conv1", "conv2": "conv2", "norm1": "norm1", "norm2": "norm2", "time_emb_proj": "embed"}


def _their_network(settings):
    channels, size = settings["channels"], settings["image_size"]
    attends = [size // 2**level in settings["attention_resolutions"] for level in range(len(channels))]
    return UNet2DModel(
        sample_size=size,
        in_channels=settings["image_channels"],
        out_channels=settings["image_channels"],
        layers_per_block=settings["num_res_blocks"],
        block_out_channels=channels,
        down_block_types=["AttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        up_block_types=["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)],
        attention_head_dim=settings["head_channels"],
        norm_num_groups=settings["norm_groups"],
        attn_norm_num_groups=settings["norm_groups"],  # else the middle has no norm with scale_shift
        num_class_embeds=settings["num_classes"] + settings["null_class"] or None,
        resnet_time_scale_shift="scale_shift" if settings.get("time_conditioning") == "scale_shift" else "default",
    )


def _counts(network, size):
    """Parameters and multiplications of one evaluation of one image."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size), torch.zeros(1))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "settings", "millions", "giga_macs"),
    [
        ("64x64 additive", A64, 63.2, 11.78),
        ("64x64 scale/shift", A64 | {"time_conditioning": "scale_shift"}, 64.6, 11.78),
        ("CIFAR", CIFAR, 35.7, 6.22),
    ],
)
def test_recipes_have_their_parameter_and_operation_counts(oracle, name, settings, millions, giga_macs):
    with torch.device("meta"):
        parameters, macs = _counts(UNet(**settings), settings["image_size"])
        theirs = _counts(_their_network(settings), settings["image_size"])
    assert (round(parameters / 1e6, 1), round(macs / 1e9, 2)) == (millions, giga_macs)
    oracle(f"{parameters:,} parameters, {name}", "diffusers UNet2DModel", abs(parameters - theirs[0]), 0)
    oracle(f"{macs:,} MAC, {name}", "diffusers UNet2DModel", abs(macs - theirs[1]), 0)


def _with_weights_of(ours, settings):
    """diffusers' network, with the weights of ours, in float64."""
    theirs = _their_network(settings)

    def copy(layer, source):
        layer.weight.data.copy_(source.weight.reshape(layer.weight.shape))
        layer.bias.data.copy_(source.bias)

    def copy_block(block, source):
        for their_name, our_name in _BLOCK.items():
            copy(getattr(block, their_name), getattr(source, our_name))
        if block.conv_shortcut is not None:
            copy(block.conv_shortcut, source.skip)

    def copy_attention(attention, source):
        copy(attention.group_norm, source.norm)
        copy(attention.to_out[0], source.out)
        weights, biases = source.qkv.weight.chunk(3), source.qkv.bias.chunk(3)
        for layer, weight, bias in zip((attention.to_q, attention.to_k, attention.to_v), weights, biases, strict=True):
            layer.weight.data.copy_(weight[:, :, 0, 0])
            layer.bias.data.copy_(bias)

    def copy_levels(blocks, sources):
        for block in blocks:
            for number, resnet in enumerate(block.resnets):
                level = next(sources)
                copy_block(resnet, level.block)
                if hasattr(block, "attentions"):
                    copy_attention(block.attentions[number], level.attention)
            for sampler in getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or []:
                source = next(sources)
                copy(sampler.conv, getattr(source, "conv", source))

    copy(theirs.conv_in, ours.stem)
    copy(theirs.time_embedding.linear_1, ours.time_mlp[0])
    copy(theirs.time_embedding.linear_2, ours.time_mlp[2])
    if ours.label_embedding is not None:
        theirs.class_embedding.weight.data.copy_(ours.label_embedding.weight)
    copy_levels(theirs.down_blocks, iter(ours.down))
    copy_block(theirs.mid_block.resnets[0], ours.middle_in)
    copy_attention(theirs.mid_block.attentions[0], ours.middle_attention)
    copy_block(theirs.mid_block.resnets[1], ours.middle_out)
    copy_levels(theirs.up_blocks, iter(ours.up))
    copy(theirs.conv_norm_out, ours.norm_out)
    copy(theirs.conv_out, ours.conv_out)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    return theirs.double().eval().requires_grad_(False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"time_conditioning": "scale_shift"},
        {"num_res_blocks": 1, "image_channels": 3, "image_size": 16, "channels": [32, 64, 96], "norm_groups": 16},
        {"num_classes": 0, "null_class": False, "attention_resolutions": [8, 4], "head_channels": 32},
    ],
    ids=["additive", "scale_shift", "three-levels", "unconditional"],
)
def test_the_network_is_that_of_diffusers(oracle, changes):
    settings = SMALL | changes
    ours = network(settings)
    size = settings["image_size"]
    x, t = torch.randn(4, settings["image_channels"], size, size), torch.tensor([0, 3, 500, 999])
    labels = torch.tensor([0, 4, 9, 10]) if settings["num_classes"] else None
    expected = _with_weights_of(ours, settings)(x.double(), t, class_labels=labels).sample
    oracle("UNet in float32", "diffusers UNet2DModel in float64", distance(ours(x, t, labels), expected), 2e-6)
