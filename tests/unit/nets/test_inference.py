"""The network as it is prepared for drawing: the same function, and an image is the same in any company."""

import itertools
from functools import partial

import pytest
import torch

import darkroom.nets.inference as inference
from darkroom.nets.inference import InferenceUNet
from tests.unit.nets.networks import SMALL, WIDE, distance, network

DIGITS = SMALL | {
    "channels": [48, 96],
    "num_res_blocks": 1,
    "head_channels": 16,
    "norm_groups": 16,
    "time_conditioning": "scale_shift",
}
# Distance to the network in fp32, relative. bf16 has 8 bits: what its rounding of the weights alone makes, and what
# arithmetic in it makes.
FP32, BF16_WEIGHTS, BF16 = 5e-6, 0.02, 0.04


def _inputs(settings, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = settings["image_size"]
    x = torch.randn(rows, settings["image_channels"], size, size, generator=generator)
    return x, torch.randint(settings["num_classes"] + 1, (rows,), generator=generator)


# Packed bf16 weights need instructions that AVX2 alone has not; there the probe never chooses bf16.
NATIVE = ["bf16-native"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []


@pytest.fixture(params=["fp32", "bf16", *NATIVE])
def precision(request, monkeypatch):
    """Both ways to compute in bf16 where there are two, whichever this processor would choose."""
    fast = request.param == "bf16-native"
    monkeypatch.setattr(inference, "precision_on", lambda device, asked: asked if fast else "fp32")
    return request.param


@pytest.mark.parametrize(
    ("settings", "conditioning"),
    [*itertools.product([DIGITS, SMALL], ["additive", "scale_shift"]), (WIDE, "scale_shift")],
)
def test_it_is_the_network(oracle, precision, settings, conditioning):
    settings = settings | {"time_conditioning": conditioning}
    unet = network(settings)
    x, labels = _inputs(settings, 5)
    evaluate = InferenceUNet(unet, precision[:4]).plan([999, 500, 0], labels)
    tolerance = {"fp32": FP32, "bf16": BF16_WEIGHTS, "bf16-native": BF16}[precision]
    for t in (999, 500, 0):
        out = evaluate(x, t, labels)
        assert out.dtype == torch.float32
        oracle(f"InferenceUNet, {precision}", "UNet", distance(out, unet(x, torch.full((5,), t), labels)), tolerance)


@pytest.mark.parametrize("precision", ["fp32", *NATIVE], indirect=True)  # elsewhere bf16 computes as fp32 does
@pytest.mark.parametrize("conditioning", ["additive", "scale_shift"])
def test_an_image_is_bitwise_the_same_in_any_batch(precision, conditioning):
    settings = DIGITS | {"time_conditioning": conditioning}
    x, labels = _inputs(settings, 200)
    prepared = InferenceUNet(network(settings), precision[:4])
    together = prepared.plan([700], labels)(x, 700, labels)
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 2, 3, 7, 33, 64, 65, 128, 199):
        chosen = torch.randperm(200, generator=generator)[:rows]
        plan = prepared.plan([999, 700, 3][:rows], labels[chosen])  # what else is planned is no matter either
        assert torch.equal(plan(x[chosen], 700, labels[chosen]), together[chosen])


@pytest.mark.parametrize("precision", ["fp32", *NATIVE], indirect=True)  # elsewhere bf16 computes as fp32 does
def test_a_large_image_is_bitwise_the_same_in_any_batch(precision):
    x, labels = _inputs(WIDE, 19)
    prepared = InferenceUNet(network(WIDE), precision[:4])
    together = prepared.plan([700], labels)(x, 700, labels)
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 2, 3, 5, 17):
        chosen = torch.randperm(19, generator=generator)[:rows]
        plan = prepared.plan([700], labels[chosen])
        assert torch.equal(plan(x[chosen], 700, labels[chosen]), together[chosen])


def test_an_image_is_bitwise_the_same_from_another_instance():
    x, labels = _inputs(DIGITS, 70)
    unet = network(DIGITS)
    first, second = (InferenceUNet(unet).plan([9], labels) for _ in range(2))
    first(x[:1], 9, labels[:1])  # they meet the numbers of rows in another order
    assert torch.equal(first(x, 9, labels)[:7], second(x[:7], 9, labels[:7]))


class _Uneven:
    """A network whose rows come out differently for some numbers of rows, as a library's kernels may."""

    def __init__(self, odd_ones):
        self.odd_ones, self.seen = odd_ones, []

    def __call__(self, x, conditions):
        self.seen.append(len(x))
        return x.float() + (1e-7 if len(x) in self.odd_ones else 0.0)


@pytest.mark.parametrize("odd_ones", [set(), {1}, {1, 2, 3, 4}, {5, 7, 33}, set(range(64))])
def test_numbers_of_rows_that_round_differently_are_not_used(odd_ones):
    prepared = InferenceUNet(network(DIGITS))
    prepared._denoise = _Uneven(odd_ones)
    x, labels = _inputs(DIGITS, 100)
    evaluate = prepared.plan([1], labels)
    together = evaluate(x, 1, labels)
    assert torch.equal(together, x)
    for rows in (1, 2, 3, 5, 7, 33, 64, 99):
        evaluate(x[:rows], 1, labels[:rows])  # the first time, it tries
        prepared._denoise.seen.clear()
        assert torch.equal(evaluate(x[:rows], 1, labels[:rows]), x[:rows])
        assert not odd_ones & set(prepared._denoise.seen)


def test_a_position_that_rounds_differently_makes_pieces_smaller():
    class LastRowDiffers:
        def __call__(self, x, conditions):
            return x.float() + torch.tensor(1e-3) * (torch.arange(len(x)) >= 8)[:, None, None, None]

    prepared = InferenceUNet(network(DIGITS))
    prepared._denoise = LastRowDiffers()
    x, labels = _inputs(DIGITS, 20)
    assert torch.equal(prepared.plan([1], labels)(x, 1, labels), x)


def test_a_network_that_is_not_finite_says_so_in_its_output():
    unet = network(DIGITS)
    unet.stem.weight.data.fill_(float("nan"))
    x, labels = _inputs(DIGITS, 3)
    assert bool(InferenceUNet(unet).plan([1], labels)(x, 1, labels).isnan().all())


def test_later_changes_of_the_network_and_its_mode_are_no_matter():
    unet = network(DIGITS, dropout=0.5).train()
    x, labels = _inputs(DIGITS, 3)
    evaluate = InferenceUNet(unet).plan([1], labels)
    before = evaluate(x, 1, labels)
    assert unet.training
    for parameter in unet.parameters():
        parameter.data.zero_()
    assert torch.equal(evaluate(x, 1, labels), before)


def test_many_classes_and_steps_are_planned_as_few_are(monkeypatch):
    unet = network(DIGITS, num_classes=100)
    x, _ = _inputs(DIGITS, 4)
    labels = torch.tensor([0, 17, 63, 100])
    few = InferenceUNet(unet).plan([5], labels)(x, 5, labels)
    monkeypatch.setattr(inference, "_TABLE_BYTES", 0)  # nothing is kept
    many = InferenceUNet(unet).plan(range(20), torch.arange(101))
    for t in (19, 5, 0, 5):
        out = many(x, t, labels)
        assert torch.equal(out, few) == (t == 5)


def test_unconditional():
    settings = SMALL | {"num_classes": 0, "null_class": False}
    unet = network(settings)
    x, _ = _inputs(settings, 3)
    evaluate = InferenceUNet(unet).plan([500])
    expected = unet(x, torch.full((3,), 500))
    assert distance(evaluate(x, 500), expected) < FP32
    assert torch.equal(evaluate(x, 500, torch.tensor([0, 0, 0])), evaluate(x, 500))


def test_a_conditional_network_needs_labels_that_it_has():
    prepared = InferenceUNet(network(SMALL))
    with pytest.raises(ValueError, match="needs labels"):
        prepared.plan([1])
    with pytest.raises(ValueError, match="label 11: expected 0 to 10"):
        prepared.plan([1], torch.tensor([3, 11]))
    with pytest.raises(ValueError, match="label -1: expected 0 to 10"):
        prepared.plan([1], torch.tensor([-1]))
    with pytest.raises(ValueError, match="needs labels"):
        prepared.plan([1], torch.tensor([1]))(torch.zeros(1, 1, 8, 8), 1)


@pytest.mark.soak  # compiling takes a minute on a busy machine
def test_compiled_it_is_the_network(oracle, monkeypatch):
    """Here without the compiler behind: that takes a minute. What it gets is the same, in few numbers of rows."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    unet = network(DIGITS)
    x, labels = _inputs(DIGITS, 3)
    evaluate = InferenceUNet(unet, compile=True).plan([500], labels)
    out = evaluate(x, 500, labels)
    oracle("InferenceUNet, compiled", "UNet", distance(out, unet(x, torch.full((3,), 500), labels)), FP32)
    assert torch.equal(evaluate(x[:1], 500, labels[:1]), out[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [DIGITS, WIDE], ids=["digits", "wide"])
def test_on_a_gpu_it_is_the_network_and_an_image_is_the_same_in_any_batch(oracle, settings, precision, gpu):
    unet = network(settings)
    x, labels = _inputs(settings, 150)
    expected = unet(x[:9], torch.full((9,), 700), labels[:9])
    x, labels = x.to(gpu), labels.to(gpu)
    prepared = InferenceUNet(unet.to(gpu), precision)
    together = prepared.plan([700], labels)(x, 700, labels)
    tolerance = FP32 if precision == "fp32" else BF16
    oracle(f"InferenceUNet on a GPU, {precision}", "UNet on the CPU", distance(together[:9].cpu(), expected), tolerance)
    for rows in (1, 2, 3, 7, 64, 128):
        assert torch.equal(prepared.plan([700], labels[:rows])(x[:rows], 700, labels[:rows]), together[:rows])


@pytest.mark.gpu
def test_a_graph_gives_what_the_network_gives_and_each_result_is_kept(gpu):
    prepared = InferenceUNet(network(DIGITS).to(gpu), "bf16")
    x, labels = (tensor.to(gpu) for tensor in _inputs(DIGITS, 24))
    evaluate = prepared.plan([700, 20], labels)
    first, second = evaluate(x[:8], 700, labels[:8]), evaluate(x[8:16], 20, labels[8:16])
    if gpu.type == "cuda":
        assert isinstance(prepared._denoise, inference._Graphs)
        assert len(prepared._denoise._captured) > 0
        prepared._denoise = prepared._denoise._function  # no graphs
    assert torch.equal(evaluate(x[:8], 700, labels[:8]), first)
    assert torch.equal(evaluate(x[8:16], 20, labels[8:16]), second)
