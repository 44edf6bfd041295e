import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from darkroom.nets.unet import UNet, timestep_embedding


def a64(**changes):
    settings = {
        "image_size": 64,
        "image_channels": 3,
        "num_classes": 0,
        "null_class": False,
        "channels": [64, 128, 256, 512],
        "num_res_blocks": 2,
        "attention_resolutions": [16, 8],
        "head_channels": 64,
        "norm_groups": 32,
    }
    return UNet(**(settings | changes))


CIFAR = {"image_size": 32, "channels": [128, 256, 256, 256], "attention_resolutions": [16]}


@pytest.mark.parametrize(
    ("changes", "millions", "giga_macs"),
    [  # the counts of the recipes as published
        ({}, 63.2, 11.78),
        ({"time_conditioning": "scale_shift"}, 64.6, 11.78),
        (CIFAR, 35.7, 6.22),
    ],
)
def test_recipes_have_their_parameter_and_operation_counts(changes, millions, giga_macs):
    network = a64(**changes)
    size = changes.get("image_size", 64)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size), torch.zeros(1))
    assert round(counter.get_total_flops() / 2e9, 2) == giga_macs


def small(**changes):
    return a64(
        **{
            "image_size": 8,
            "image_channels": 1,
            "channels": [32, 64],
            "attention_resolutions": [4],
            "head_channels": 16,
            "num_classes": 10,
            "null_class": True,
        }
        | changes
    )


def test_a_fresh_network_predicts_zero():
    network = small()
    out = network(torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 10]))
    assert torch.equal(out, torch.zeros(3, 1, 8, 8))


@pytest.mark.parametrize("conditioning", ["additive", "scale_shift"])
def test_time_and_label_reach_the_output(conditioning):
    torch.manual_seed(0)
    network = small(time_conditioning=conditioning)
    for parameter in network.parameters():  # the zero-initialised layers too
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(1, 1, 8, 8)

    def out(t, label):
        return network(x, torch.tensor([t]), torch.tensor([label]))

    assert not torch.allclose(out(10, 3), out(900, 3))
    assert not torch.allclose(out(10, 3), out(10, 4))
    assert not torch.allclose(out(10, 3), out(10, 10))


def test_time_enters_every_residual_block():
    network = small()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    network(x, t, labels).square().sum().backward()
    embeddings = [p for name, p in network.named_parameters() if name.endswith("embed.weight")]
    assert len(embeddings) == 2 * 2 + 2 + 2 * 3  # two levels down, the middle, two levels up
    assert all(float(p.grad.abs().sum()) > 0 for p in embeddings)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (2, 12), (3, 16), (4, 20)])
def test_any_square_image_that_the_levels_divide_passes(channels, size):
    network = small(image_channels=channels, image_size=size, attention_resolutions=[size // 2])
    out = network(torch.randn(2, channels, size, size), torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert out.shape == (2, channels, size, size)


def test_output_is_float32_under_bf16():
    network = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert out.dtype == torch.float32


def test_a_conditional_network_needs_labels():
    with pytest.raises(ValueError, match="needs labels"):
        small()(torch.randn(1, 1, 8, 8), torch.tensor([1]))


def test_timestep_embedding_is_the_transformers():
    t = torch.tensor([0.0, 1.0, 500.0])
    embedding = timestep_embedding(t, 8)
    for row, value in enumerate(t.tolist()):
        for k in range(4):
            angle = torch.tensor(value * 10_000 ** (-k / 4))
            assert torch.isclose(embedding[row, k], angle.cos(), atol=1e-5)
            assert torch.isclose(embedding[row, 4 + k], angle.sin(), atol=1e-5)
