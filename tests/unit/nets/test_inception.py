"""InceptionV3 against torch-fidelity's network with equal weights, and against what TensorFlow says of its resize.

torch-fidelity needs torchvision, which this project does without. `inception_oracle.json` holds what its network gave
for the weights and images that `weights` and `images` make. The tests that run it live are skipped without it; to run
them, and with `python tests/unit/nets/test_inception.py` to write the file anew, have both packages on PYTHONPATH.
"""

import copy
import importlib.util
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from darkroom.errors import InputError
from darkroom.files import digest_json, read_json, write_json
from darkroom.nets.inception import (
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
    InceptionV3,
    average_pool,
    load_inception,
    max_pool,
    resize,
    save_inception,
)
from darkroom.randomness import Purpose, random_words, uniform

ORACLE = Path(__file__).with_name("inception_oracle.json")
STORED = 23  # every 23rd feature is in the file
CASES = {32: 2, 64: 2, 299: 1, 350: 1}  # images of each size

live = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch_fidelity", "torchvision"))),
    reason="needs torch-fidelity and torchvision",
)


def weights() -> dict[str, Tensor]:
    """Weights under which activations stay between 0.1 and 10 through the depth; the same bits on every machine."""
    pool = uniform(0, Purpose.SUBSET, torch.zeros(1, dtype=torch.int64), (1_000_003,))[0].repeat(4)
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    made = {}
    for number, name in enumerate(sorted(state)):
        shape = state[name].shape
        u = pool[1009 * number :][: math.prod(shape)].reshape(shape)
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(0)
        elif len(shape) > 1:
            made[name] = ((u - 0.5) * math.sqrt(24 / math.prod(shape[1:]))).float()  # variance 2 / fan-in
        else:
            made[name] = (u + 0.5 if name.endswith(("running_var", "bn.weight")) else u - 0.5).float()
    return made


def images(size: int, count: int) -> Tensor:
    """uint8 (count, 3, size, size): sixteen patches of colour under noise."""
    index = torch.arange(count)
    patches = (random_words(size, Purpose.SUBSET, index, 48) & 255).reshape(count, 3, 4, 4)
    block = -(-size // 4)
    patches = patches.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :size, :size]
    noise = (random_words(size, Purpose.SUBSET, index, 3 * size * size, step=1) & 63).reshape(patches.shape)
    return (patches * 3 // 4 + noise).to(torch.uint8)


def names_digest(state: dict[str, Tensor]) -> str:
    return digest_json({name: list(tensor.shape) for name, tensor in state.items()})


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return weights()


@pytest.fixture(scope="module")
def network(state: dict[str, Tensor]) -> InceptionV3:
    model = InceptionV3()
    model.load_state_dict(state)
    return model


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the root mean square of what is expected."""
    return ((found - expected).abs().max() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("size", CASES)
def test_features_are_torch_fidelitys(network, oracle, size):
    stored = read_json(ORACLE)
    found = network.features(images(size, CASES[size]))
    assert (found.shape, found.dtype) == ((CASES[size], 2048), torch.float32)
    expected = torch.tensor(stored["features"][str(size)])
    oracle("InceptionV3 features", "torch-fidelity 0.4, stored", difference(found[:, ::STORED], expected), 2e-5)


def test_tensors_have_the_public_names_and_shapes():
    model = InceptionV3()
    state = model.state_dict()
    assert len(state) == 566
    assert names_digest(state) == read_json(ORACLE)["names_and_shapes"]
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["fc.bias"].shape == (1008,)
    # torchvision's has 27,161,264 with 3,326,696 of them in a second read-out, and 1,000 classes.
    assert sum(p.numel() for p in model.parameters()) == 27_161_264 - 3_326_696 + 8 * 2049


def theirs(state: dict[str, Tensor], directory: Path) -> torch.nn.Module:
    """torch-fidelity's network with these weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(state, directory / "weights.pth")
    return FeatureExtractorInceptionV3("fid", ["2048"], str(directory / "weights.pth")).eval()


@live
@pytest.mark.parametrize("size", CASES)
def test_all_features_are_those_of_torch_fidelity_today(network, state, oracle, tmp_path, size):
    pixels = images(size, CASES[size])
    (expected,) = theirs(state, tmp_path)(pixels)
    oracle("InceptionV3 features", "torch-fidelity, live", difference(network.features(pixels), expected), 2e-5)
    stored = torch.tensor(read_json(ORACLE)["features"][str(size)])
    oracle("stored features", "torch-fidelity, live", difference(stored, expected[:, ::STORED]), 2e-5)


@live
@pytest.mark.slow
def test_fid_is_that_of_torchmetrics_with_its_own_network(network, state, oracle, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    # Its default, antialias=True, resizes otherwise than published FIDs do.
    own = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(tmp_path / "weights.pth"), antialias=False)
    ours = FrechetInceptionDistance(copy.deepcopy(network))
    for fid in (own, ours):
        fid.set_dtype(torch.float64)  # of its network too
        fid.update(images(32, 10), real=True)
        fid.update(images(33, 10), real=False)
    expected = own.compute().item()
    oracle("FID through InceptionV3", "torchmetrics, live", abs(ours.compute().item() / expected - 1), 1e-6)


@pytest.mark.slow
def test_torchmetrics_takes_the_network_as_its_own(network, oracle):
    real, drawn = images(32, 10), images(33, 12)
    fid = FrechetInceptionDistance(network)
    fid.update(real, real=True)
    fid.update(drawn, real=False)
    a, b = network.features(real).double(), network.features(drawn).double()
    u, v = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    # Of covariances u'u and v'v: the trace of the root of their product is the sum of the singular values of uv'.
    cross = torch.linalg.svdvals(u @ v.T).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + u.square().sum() + v.square().sum() - 2 * cross
    found = fid.compute().item()
    # Its eigenvalues of a singular product of 2,048 x 2,048 round to about 3e-6.
    oracle("FID through InceptionV3", "low-rank closed form", abs(found / expected.item() - 1), 1e-5)


def slow_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's `resize_bilinear` (resize_bilinear_op.cc) as loops over float32 scalars."""
    height, width = image.shape
    out = np.empty((size, size), dtype=np.float32)
    y_scale, x_scale = np.float32(height) / np.float32(size), np.float32(width) / np.float32(size)
    for i in range(size):
        y = np.float32(i) * y_scale
        y0 = int(y)
        y1 = min(y0 + 1, height - 1)
        for j in range(size):
            x = np.float32(j) * x_scale
            x0 = int(x)
            x1 = min(x0 + 1, width - 1)
            top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * (x - np.float32(x0))
            bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * (x - np.float32(x0))
            out[i, j] = top + (bottom - top) * (y - np.float32(y0))
    return out


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 299), (1, 1, 5), (5, 7, 13), (7, 5, 3), (40, 17, 29), (29, 29, 29)]
)
def test_resize_is_tensorflows_bit_for_bit(height, width, size):
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width)).astype(np.float32)
    found = resize(torch.from_numpy(pixels)[None], size)[0]
    for channel in range(2):
        assert np.array_equal(found[channel].numpy(), slow_resize(pixels[channel], size))


def test_resize_has_no_half_pixel_centres():
    # 0, 8 doubled: samples at 0, 1/2, 1, 3/2, the last two at or beyond the last pixel.
    row = torch.tensor([[[[0.0, 8.0], [0.0, 8.0]]]])
    assert resize(row, 4)[0, 0].tolist() == [[0.0, 4.0, 8.0, 8.0]] * 4


def test_images_at_the_networks_size_keep_their_pixels():
    pixels = images(299, 1).float()
    assert torch.equal(resize(pixels, 299), pixels)


@pytest.mark.parametrize(
    ("block", "inputs", "outputs"),
    [
        (InceptionA(192, pool_features=32), (192, 35), (256, 35)),
        (InceptionA(288, pool_features=64), (288, 35), (288, 35)),
        (InceptionB(288), (288, 35), (768, 17)),
        (InceptionC(768, channels_7x7=160), (768, 17), (768, 17)),
        (InceptionD(768), (768, 17), (1280, 8)),
        (InceptionE(1280, pool=average_pool), (1280, 8), (2048, 8)),
        (InceptionE(2048, pool=max_pool), (2048, 8), (2048, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_shapes_of_blocks(block, inputs, outputs):
    (channels, side), (out_channels, out_side) = inputs, outputs
    found = block.eval()(torch.rand(1, channels, side, side))
    assert found.shape == (1, out_channels, out_side, out_side)


def test_pools_do_not_count_what_lies_outside():
    x = torch.tensor([[1.0, 2.0], [3.0, -10.0]])[None, None]
    assert average_pool(x).tolist() == [[[[-1.0, -1.0], [-1.0, -1.0]]]]
    assert max_pool(-x.abs()).tolist() == [[[[-1.0, -1.0], [-1.0, -1.0]]]]


def test_one_channel_is_grey(network):
    grey = images(32, 2)[:, :1]
    assert torch.equal(network.features(grey), network.features(grey.repeat(1, 3, 1, 1)))


def test_in_float64_the_features_are_the_same_but_for_rounding(network):
    pixels = images(32, 2)
    exact = copy.deepcopy(network).double().features(pixels)
    assert exact.dtype == torch.float64
    assert 0 < difference(network.features(pixels).double(), exact) < 1e-5


def test_features_of_an_image_do_not_depend_on_its_batch(network):
    pixels = images(40, 3)
    together = network.features(pixels)
    alone = torch.cat([network.features(pixel[None]) for pixel in pixels])
    assert difference(together, alone) < 1e-5
    assert network.features(pixels[:0]).shape == (0, 2048)


def test_images_may_be_oblong(network):
    assert network.features(images(64, 1)[..., :40]).isfinite().all()


def test_nothing_around_it_changes_the_features(network):
    pixels = images(32, 1)
    expected = network.features(pixels)
    around = torch.nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = around(pixels)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    "wrong",
    [images(8, 1).float(), images(8, 1)[0], images(8, 1)[:, :2], images(8, 1).repeat(1, 2, 1, 1)],
    ids=["float", "no batch", "two channels", "six channels"],
)
def test_images_of_another_form_are_refused(network, wrong):
    with pytest.raises(ValueError, match="expected uint8"):
        network.features(wrong)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old form"])
def test_weights_come_back_from_every_form_of_file(network, state, tmp_path, zipped):
    torch.save(state, tmp_path / "public.pth", _use_new_zipfile_serialization=zipped)
    first = load_inception(tmp_path / "public.pth")
    save_inception(first, tmp_path / "ours.safetensors")
    second = load_inception(tmp_path / "ours.safetensors")
    pixels = images(32, 1)
    for model in (first, second):
        assert torch.equal(model.features(pixels), network.features(pixels))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    save_inception(second, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
    assert {name: tensor.dtype for name, tensor in load_file(tmp_path / "ours.safetensors").items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }


def small_state() -> dict[str, Tensor]:
    """Zeros of the right names and shapes that take no room in a .pth."""
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_inception(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Mixed_6c.branch7x7_2.conv.weight": None}, "holds no tensor 'Mixed_6c.branch7x7_2.conv.weight'"),
        (
            {"fc.weight": torch.zeros(1000, 2048)},
            "fc.weight is float32 (1000, 2048), FID's InceptionV3 has float32 (1008",
        ),
        ({"fc.bias": torch.zeros(1008, dtype=torch.float16)}, "fc.bias is float16 (1008,)"),
        ({"fc.bias": torch.full((1008,), math.nan)}, "fc.bias is not finite everywhere"),
        ({"fc.bias": "text"}, "holds no tensor 'fc.bias'"),
        ({"AuxLogits.fc.bias": torch.zeros(3)}, "holds 'AuxLogits.fc.bias', which FID's InceptionV3 does not have"),
    ],
)
def test_first_difference_is_named(tmp_path, change, message):
    changed = {name: value for name, value in (small_state() | change).items() if value is not None}
    torch.save(changed, tmp_path / "weights.pth")
    assert refusal(tmp_path / "weights.pth").startswith(message)


def test_other_weights_are_refused_as_safetensors_too(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    assert refusal(tmp_path / "weights.safetensors").startswith("holds no tensor 'Conv2d_1a_3x3.conv.weight'")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", b"PK\x03\x04" + bytes(60), bytes(100)])
def test_garbage_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_file_and_a_directory_are_one_line(tmp_path, suffix):
    assert refusal(tmp_path / f"absent{suffix}").startswith("cannot be read: ")
    (tmp_path / f"directory{suffix}").mkdir()
    refusal(tmp_path / f"directory{suffix}")


def test_half_a_file_is_one_line(tmp_path):
    torch.save(small_state(), tmp_path / "weights.pth")
    whole = (tmp_path / "weights.pth").read_bytes()
    (tmp_path / "weights.pth").write_bytes(whole[: len(whole) // 2])
    refusal(tmp_path / "weights.pth")


class Writes:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_what_a_file_would_run_is_not_run(tmp_path, save):
    save({"fc.bias": Writes(tmp_path / "written")}, tmp_path / "weights.pth")
    refusal(tmp_path / "weights.pth")
    assert not (tmp_path / "written").exists()


def test_a_file_with_something_else_says_so(tmp_path):
    torch.save([1, 2], tmp_path / "weights.pth")
    assert refusal(tmp_path / "weights.pth") == "holds list, expected tensors by name"


if __name__ == "__main__":
    import tempfile
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as scratch:
        extractor = theirs(weights(), Path(scratch))
        found = {size: extractor(images(size, count))[0][:, ::STORED] for size, count in CASES.items()}
        content = {
            "torch_fidelity": version("torch-fidelity"),
            "names_and_shapes": names_digest(extractor.state_dict()),
            "features": {
                str(size): [[float(f"{x:.8g}") for x in row] for row in found[size].tolist()] for size in found
            },
        }
        write_json(ORACLE, content)
