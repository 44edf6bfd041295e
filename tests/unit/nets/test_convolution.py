import pytest
import torch
import torch.nn.functional as F
from torch import nn

import darkroom.nets.convolution as convolution
from darkroom.nets.convolution import PackedConv, SiLUConv, UpsampledConv
from tests.unit.nets.networks import distance, randomised


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def _packed(request, monkeypatch):
    """Both with the operators that have no public name and as in a build that lacks them."""
    monkeypatch.setattr(convolution, "_PACKED", convolution._PACKED and request.param)


def _image(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("_packed")
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride"),
    [(1, 16, 3, 1), (3, 64, 3, 1), (32, 3, 3, 1), (16, 16, 3, 2), (48, 96, 1, 1), (512, 64, 1, 1)],
)
def test_packed_convolution_is_the_convolution(oracle, inputs, outputs, kernel, stride):
    conv = randomised(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)).requires_grad_(False)
    packed = PackedConv(conv, torch.float32)
    for n, side in ((1, 8), (3, 8), (2, 12)):
        x = _image(n, inputs, side, side)
        out = packed(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        oracle("packed convolution", "conv2d in float64", distance(out, conv.double()(x.double())), 1e-6)
        conv.float()


@pytest.mark.usefixtures("_packed")
@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_upsampling_within_a_convolution_is_upsampling_before_it(oracle, side):
    conv = randomised(nn.Conv2d(32, 24, 3, padding=1)).requires_grad_(False)
    upsampled = UpsampledConv(conv, torch.float32)
    for n in (1, 3):
        x = _image(n, 32, side, side)
        expected = conv.double()(F.interpolate(x.double(), scale_factor=2.0, mode="nearest"))
        oracle("upsampling within a convolution", "interpolate, conv2d", distance(upsampled(x), expected), 1e-6)
        conv.float()


@pytest.mark.parametrize(
    ("tile", "side", "tolerance"), [(2, 8, 1e-6), (2, 14, 1e-6), (4, 8, 3e-6), (4, 16, 3e-6), (4, 36, 3e-6)]
)
@pytest.mark.parametrize("plus", ["nothing", "per channel", "per pixel"])
def test_winograds_algorithm_is_the_convolution(oracle, monkeypatch, tile, side, tolerance, plus):
    monkeypatch.setattr(convolution, "_winograd_tile", lambda x, weight: tile)
    conv = randomised(nn.Conv2d(64, 128, 3, padding=1)).requires_grad_(False)
    fast = SiLUConv(conv, torch.float32)
    for n in (1, 5):
        x = _image(n, 64, side, side)
        added = {"nothing": None, "per channel": torch.randn(n, 128, 1, 1), "per pixel": _image(n, 128, side, side)}[
            plus
        ]
        expected = conv.double()(F.silu(x.double())) + (0 if added is None else added.double())
        measured = distance(fast(x.clone(memory_format=torch.preserve_format), added), expected)
        oracle(f"Winograd {tile}x{tile}", "silu, conv2d in float64", measured, tolerance)
        conv.float()


@pytest.mark.parametrize("tile", [2, 4])
def test_winograds_matrices_convolve_exactly(oracle, tile):
    BT, G, AT = convolution._toom_cook(tile)
    signal, taps = torch.randn(tile + 2).double(), torch.randn(3).double()
    direct = torch.stack([signal[i : i + 3] @ taps for i in range(tile)])
    oracle(f"F({tile}, 3)", "sum of products", distance(AT @ ((G @ taps) * (BT @ signal)), direct), 1e-14)


def test_winograds_algorithm_is_for_float32_on_a_processor():
    x, weight = torch.zeros(1, 128, 16, 16), torch.zeros(128, 128, 3, 3)
    assert convolution._winograd_tile(x, weight) == 4
    assert convolution._winograd_tile(x[..., :8, :8], weight) == 2
    assert convolution._winograd_tile(x.bfloat16(), weight) is None
    assert convolution._winograd_tile(x.to("meta"), weight) is None
    assert convolution._winograd_tile(x[..., :15, :15], weight) is None


def test_the_choice_of_an_algorithm_does_not_depend_on_the_number_of_images():
    weight = torch.zeros(128, 128, 3, 3)
    for side in (4, 8, 12, 16, 32):
        tiles = {convolution._winograd_tile(torch.zeros(n, 128, side, side), weight) for n in (1, 2, 7, 64)}
        assert len(tiles) == 1
