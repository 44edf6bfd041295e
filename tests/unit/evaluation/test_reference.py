import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from darkroom.errors import InputError, StageFailed
from darkroom.evaluation.extraction import extract
from darkroom.evaluation.features import Extractor
from darkroom.evaluation.fitting import fit_extractor, shifted, turned
from darkroom.evaluation.published import PublishedStatistics
from darkroom.evaluation.reference import Reference, write_reference
from darkroom.files import read_json
from darkroom.params import ReferenceParams

PARAMS = ReferenceParams(
    extractor="classifier",
    inception_sha256="0" * 8,
    published_statistics=None,
    max_features=1000,
    channels=[8, 16],
    features=16,
    steps=150,
    batch_size=64,
    learning_rate=5e-3,
    min_accuracy=0.85,
    seed=0,
)
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor((data.images * 255 / 16).round()).to(torch.uint8)[:, None]
    labels = torch.tensor(data.target).long()
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


@pytest.fixture(scope="module")
def fitted(digits, tmp_path_factory):
    directory = tmp_path_factory.mktemp("extractor")
    extractor = fit_extractor(directory, *digits, CLASSES, "d" * 64, PARAMS)
    write_reference(directory, extractor, *digits, seed=0, max_features=1000)
    return directory


def test_the_classifier_reads_digits_it_has_not_seen(digits, fitted):
    extractor = Extractor.load(fitted)
    images, labels = digits[1]
    assert extract(extractor, images).accuracy(labels) == extractor.card.held_out_accuracy > 0.85


def test_fitting_twice_gives_the_same_bytes(digits, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        few = PARAMS.model_copy(update={"steps": 20, "min_accuracy": 0.0})
        fit_extractor(directory, *digits, CLASSES, "d" * 64, few)
    for name in ("classifier.safetensors", "extractor.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_all_images_shape_the_moments_and_the_features_of_some_are_kept(digits, fitted):
    found, extractor = Reference.load(fitted), Extractor.load(fitted)
    images = digits[0][0]
    features = extract(extractor, images).values
    assert found.moments.mean.numpy() == pytest.approx(features.double().mean(0).numpy(), rel=1e-9)
    assert found.moments.covariance.numpy() == pytest.approx(np.cov(features.double().numpy().T), rel=1e-6, abs=1e-9)
    assert len(found.features) == len(set(found.index.tolist())) == 1000
    assert torch.equal(found.features, features[found.index])
    assert torch.equal(found.held_out, extract(extractor, digits[1][0]).values)


def test_published_statistics_replace_those_of_the_reference_in_fid_alone(digits, fitted, tmp_path):
    for path in fitted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = Reference.load(fitted)
    published = PublishedStatistics(mean=own.moments.mean + 1, covariance=own.moments.covariance, sha256="f" * 64)
    extractor = Extractor.load(fitted)
    found = write_reference(tmp_path, extractor, *digits, seed=0, max_features=1000, published=published)
    assert found.published_statistics == "f" * 64
    moved = Reference.load(tmp_path)
    assert moved.distance().fid(own.features) > own.distance().fid(own.features) + 10
    assert moved.distance().kid(own.held_out, 5, 100, 0) == own.distance().kid(own.held_out, 5, 100, 0)
    of_others = PublishedStatistics(mean=torch.zeros(3).double(), covariance=torch.eye(3).double(), sha256="f" * 64)
    with pytest.raises(InputError, match="3 dimensions, the extractor 16"):
        write_reference(tmp_path, extractor, *digits, seed=0, max_features=1000, published=of_others)


def test_the_scale_grows_with_what_is_wrong_with_the_images(fitted):
    statistics = Reference.load(fitted).statistics
    scale = statistics.scale
    assert 0 < scale.noise_0_1 < scale.noise_0_2 < scale.noise_0_4 < scale.pure_noise
    assert statistics.floor_fid < scale.noise_0_4
    assert statistics.floor_num_images == 397


def test_an_extractor_that_cannot_read_the_data_fails_and_writes_nothing(digits, tmp_path):
    train, held_out = digits
    with pytest.raises(StageFailed, match=r"reference\.min_accuracy = 0\.97: scores would mean nothing"):
        fit_extractor(
            tmp_path, train, held_out, CLASSES, "d", PARAMS.model_copy(update={"steps": 1, "min_accuracy": 0.97})
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["classifier.safetensors", "features.safetensors"])
def test_damaged_files_are_refused_by_digest(fitted, tmp_path, name):
    for path in fitted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=rf"{name}: its sha256 is not the one in"):
        (Extractor if name.startswith("classifier") else Reference).load(tmp_path)


def test_missing_files_say_what_makes_them(tmp_path):
    with pytest.raises(InputError, match="`dvc repro reference` makes it"):
        Extractor.load(tmp_path)


def test_shifting_moves_by_one_pixel_at_most_and_continues_the_edge():
    images = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(90, 1, 1, 1)
    padded = torch.nn.functional.pad(images[:1], (1, 1, 1, 1), mode="replicate")[0, 0]
    windows = {tuple(padded[r : r + 8, c : c + 8].flatten().tolist()) for r in range(3) for c in range(3)}
    found = {tuple(image.flatten().tolist()) for image in shifted(images, torch.arange(90), seed=0)}
    assert found == windows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_turning_is_that_of_numpy_by_a_number_that_belongs_to_the_sample(dtype):
    images = torch.arange(40 * 2 * 9).reshape(40, 2, 3, 3).to(dtype)
    samples = torch.arange(1000, 1040)
    found, turns = turned(images, samples, seed=0)
    for image, turn, expected in zip(images, turns.tolist(), found, strict=True):
        assert np.array_equal(np.rot90(image.numpy(), turn, axes=(1, 2)), expected.numpy())
    assert torch.equal(turned(images[7:9], samples[7:9], seed=0)[1], turns[7:9])
    counts = torch.bincount(turned(images[:1].expand(8000, 2, 3, 3), torch.arange(8000), seed=0)[1])
    assert counts.tolist() == pytest.approx([2000] * 4, rel=0.1)


def test_without_classes_the_classifier_tells_turns_of_digits_it_has_not_seen(digits, tmp_path):
    (images, labels), held_out = digits
    extractor = fit_extractor(
        tmp_path, (images, labels), held_out, [], "d", PARAMS.model_copy(update={"steps": 400, "min_accuracy": 0.6})
    )
    assert extractor.card.held_out_accuracy > 0.6  # 0, 1 and 8 look the same upside down
    loaded = Extractor.load(tmp_path)
    assert loaded.card.classes == []
    for turns in range(4):  # the oracle: turned by hand, all of them by the same number
        found = extract(loaded, held_out[0].rot90(turns, (2, 3)))
        assert found.accuracy(torch.full_like(held_out[1], turns)) > 0.5
    zeros = torch.zeros_like(labels), torch.zeros_like(held_out[1])
    statistics = write_reference(
        tmp_path, loaded, (images, zeros[0]), (held_out[0], zeros[1]), seed=0, max_features=1000
    )
    assert read_json(tmp_path / "reference.json")["floor_class_accuracy"] is None
    scale = statistics.scale
    assert 0 < scale.noise_0_1 < scale.noise_0_2 < scale.noise_0_4 < scale.pure_noise
    assert statistics.floor_fid < scale.noise_0_4 < scale.class_means


def test_images_that_look_the_same_when_turned_cannot_be_measured_that_way(tmp_path):
    grey = (torch.full((64, 1, 8, 8), 100, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    with pytest.raises(StageFailed, match=r"of the held-out images' quarter turns right, reference\.min_accuracy"):
        fit_extractor(tmp_path, grey, grey, [], "d", PARAMS.model_copy(update={"steps": 5}))
