import math

import pytest
import torch

from darkroom.errors import InputError
from darkroom.training.ema import DEFAULT_WIDTHS, PowerEMA, gamma_of, power_decay, width_name
from tests.unit.training.trajectory import average, flat, make_network, relative, walk


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_has_the_values_of_the_paper(width, gamma):
    assert gamma_of(width) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("width", [0.005, 0.05, 0.1, 0.25])
def test_the_width_is_the_standard_deviation_of_the_profile(width, oracle):
    gamma = gamma_of(width)
    tau = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    profile = tau**gamma / (tau**gamma).sum()
    mean = float(profile @ tau)
    deviation = math.sqrt(float(profile @ (tau - mean) ** 2))
    oracle("width of a power-function EMA", "standard deviation in a sum, relative", abs(deviation / width - 1), 1e-6)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.26, math.nan, math.inf])
def test_a_width_that_no_average_has_is_refused(width):
    with pytest.raises(InputError, match=f"EMA width {width}: expected more than 0 and at most 0.25"):
        PowerEMA(make_network(), [0.05, width])


def test_a_width_given_twice_is_refused():
    with pytest.raises(InputError, match=r"EMA widths 0.050, 0.100, 0.050: expected each once"):
        PowerEMA(make_network(), [0.05, 0.1, 0.05])


def test_the_decay_starts_at_zero_and_nears_one():
    assert power_decay(1, gamma_of(0.05)) == 0
    assert power_decay(10, 1.0) == pytest.approx(0.81)
    assert 0.9999 < power_decay(1_000_000, gamma_of(0.05)) < 1


def test_power_ema_is_the_brute_force_average_of_the_trajectory(oracle):
    network = make_network()
    ema = PowerEMA(network, [0.02, 0.05, 0.10, 0.25])
    trajectory = walk(network, ema, 400)
    for width in ema.widths:
        difference = relative(flat(ema.networks[width].state_dict()), average(trajectory, width))
        oracle("power-function EMA, 400 steps", "brute-force average, relative", difference, 1e-6)


def test_at_step_1_the_average_is_the_weights_of_step_1():
    network = make_network()
    ema = PowerEMA(network)
    walk(network, ema, 1)
    for width in DEFAULT_WIDTHS:
        for name, tensor in ema.networks[width].state_dict().items():
            assert torch.equal(tensor, network.state_dict()[name]), name


def test_buffers_are_copied():
    network = make_network()
    ema = PowerEMA(network)
    walk(network, ema, 7)
    for average_network in ema.networks.values():
        assert torch.equal(average_network[1].running_mean, torch.full((10,), 7.0))
        assert int(average_network[1].num_batches_tracked) == 7


def test_averages_need_no_gradient_and_stay_float32():
    ema = PowerEMA(make_network())
    for network in ema.networks.values():
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(parameter.dtype is torch.float32 for parameter in network.parameters())


def test_the_state_is_flat_and_named_by_width():
    ema = PowerEMA(make_network(), [0.05, 0.1255])
    names = [f"power.{width}.{name}" for width in ("0.050", "0.1255") for name in make_network().state_dict()]
    assert list(ema.tensors()) == names
    assert [width_name(width) for width in (0.05, 0.1, 0.08, 0.125, 0.0805)] == [
        "0.050",
        "0.100",
        "0.080",
        "0.125",
        "0.0805",
    ]


def test_a_resumed_average_is_bitwise_equal():
    network, whole = make_network(), PowerEMA(make_network())
    walk(network, whole, 20)
    network, first = make_network(), PowerEMA(make_network())
    walk(network, first, 9)
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    resumed = PowerEMA(make_network())
    resumed.load(kept | {"raw.0.weight": torch.zeros(1)})
    walk(network, resumed, 20, first=10)
    for name, tensor in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name


def test_a_state_that_lacks_a_tensor_is_refused():
    ema = PowerEMA(make_network())
    kept = ema.tensors()
    del kept["power.0.100.1.bias"]
    with pytest.raises(RuntimeError, match=r"1\.bias"):
        ema.load(kept)


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_gpu(gpu, never_waiting):
    network = make_network().to(gpu)
    ema = PowerEMA(network)
    ema.update(network, 1)
    with never_waiting():
        ema.update(network, 2)


@pytest.mark.gpu
def test_on_a_gpu_power_ema_is_the_brute_force_average_too(oracle, gpu):
    network = make_network().to(gpu)
    ema = PowerEMA(network)
    trajectory = walk(network, ema, 200)
    for width in ema.widths:
        difference = relative(flat(ema.networks[width].state_dict()), average(trajectory, width))
        oracle("power-function EMA on a GPU, 200 steps", "brute-force average, relative", difference, 1e-6)
