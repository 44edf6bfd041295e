import math

import numpy as np
import pytest
import torch

from darkroom.evaluation import neighbours
from darkroom.evaluation.neighbours import Manifold, nearest, precision_recall


def features(n, mean, seed, dimensions=5):
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn((n, dimensions), dtype=torch.float64, generator=generator)


@pytest.fixture(params=[(2048, 4096), (7, 5), (3, 16)], ids=["one block", "odd blocks", "wide blocks"])
def blocks(request, monkeypatch):
    """Blocks that are larger than the sets, and some that fit them badly."""
    monkeypatch.setattr(neighbours, "QUERIES", request.param[0])
    monkeypatch.setattr(neighbours, "REFERENCES", request.param[1])


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))


def brute_force_radii(points, k):
    return [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]


def brute_force_coverage(manifold, points, k):
    """Kynkäänniemi 2019, eq. 1 and 2, by loops."""
    radii = brute_force_radii(manifold, k)
    inside = [any(distance(p, m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points]
    return sum(inside) / len(inside)


@pytest.mark.usefixtures("blocks")
def test_nearest_is_brute_force():
    queries, references = features(23, 0.0, 0), features(31, 0.5, 1)
    found, index = nearest(queries, references)
    all_distances = [[distance(q, r) for r in references] for q in queries]
    assert index.tolist() == [row.index(min(row)) for row in all_distances]
    assert found.tolist() == pytest.approx([min(row) for row in all_distances], rel=1e-12)
    assert (found.dtype, index.dtype) == (torch.float64, torch.int64)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("k", [1, 3, 16])
def test_precision_and_recall_are_brute_force(k):
    real, generated = features(29, 0.0, 0), features(17, 1.0, 1)
    manifold = Manifold(real, k)
    assert manifold.radii.tolist() == pytest.approx(brute_force_radii(real, k), rel=1e-12)
    expected = brute_force_coverage(real, generated, k), brute_force_coverage(generated, real, k)
    assert precision_recall(manifold, generated) == expected
    if k == 1:
        assert 0 < expected[0] < 1
        assert 0 < expected[1] < 1


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("seed", range(5))
def test_ties_on_a_grid_count_as_inside(seed):
    """Whole coordinates: copies and points right on the surface of a ball are the rule."""
    generator = torch.Generator().manual_seed(seed)
    real, generated = (torch.randint(0, 6, (n, 2), generator=generator).double() for n in (14, 11))
    for k in (1, 2, 3):
        expected = brute_force_coverage(real, generated, k), brute_force_coverage(generated, real, k)
        assert precision_recall(Manifold(real, k), generated) == expected


@pytest.mark.usefixtures("blocks")
def test_one_manifold_serves_many_sets_and_each_as_if_alone():
    real = features(30, 0.0, 0)
    manifold, first, second = Manifold(real), features(20, 0.5, 1), features(25, 1.5, 2)
    both = precision_recall(manifold, first), precision_recall(manifold, second)
    assert both == (precision_recall(Manifold(real), first), precision_recall(Manifold(real), second))


@pytest.mark.usefixtures("blocks")
def test_equal_sets_cover_each_other_and_distant_sets_do_not():
    real = features(30, 0.0, 0)
    assert precision_recall(Manifold(real), real.flip(0)) == (1.0, 1.0)
    assert precision_recall(Manifold(real), real + 1000) == (0.0, 0.0)


def test_a_narrow_generator_has_precision_and_a_wide_one_recall():
    real = features(500, 0.0, 0)
    precision, recall = precision_recall(Manifold(real), 0.3 * features(500, 0.0, 1))
    assert precision > 0.95
    assert recall < 0.2
    precision, recall = precision_recall(Manifold(real), 3 * features(500, 0.0, 1))
    assert precision < 0.2
    assert recall > 0.95


@pytest.mark.usefixtures("blocks")
def test_an_image_is_not_its_own_neighbour_but_its_copies_are():
    one = torch.tensor([[0.0], [0.0], [0.0], [5.0], [9.0]], dtype=torch.float64)
    assert Manifold(one, 1).radii.tolist() == [0, 0, 0, 4, 4]
    assert Manifold(one, 2).radii.tolist() == [0, 0, 0, 5, 9]
    assert Manifold(one, 3).radii.tolist() == [5, 5, 5, 5, 9]


@pytest.mark.usefixtures("blocks")
def test_images_that_are_all_the_same_cover_themselves_only():
    same = torch.full((40, 5), 0.1, dtype=torch.float64)
    manifold = Manifold(same)
    assert manifold.radii.tolist() == [0.0] * 40
    assert precision_recall(manifold, same[:10]) == (1.0, 1.0)
    assert precision_recall(manifold, same[:10] + 1e-9) == (0.0, 0.0)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_copies_are_at_distance_zero_and_near_copies_right_to_1e_6(offset):
    references = features(60, offset, 0, dimensions=64)
    copies, index = nearest(references[10:40], references)
    assert copies.tolist() == [0.0] * 30
    assert index.tolist() == list(range(10, 40))
    step = features(60, 0.0, 1, dimensions=64)
    for size in (1e-3, 1e-6):
        near = references + size * step
        expected = np.linalg.norm((near - references).numpy(), axis=1)
        assert np.all(expected > 0)
        found, index = nearest(near, references)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert index.tolist() == list(range(60))


def test_what_lies_just_outside_a_ball_is_outside_however_far_from_the_origin():
    """Two groups of copies have balls of radius 0; rounding of |a|² is larger than these distances."""
    groups = torch.tensor([[1e3] * 8, [-1e3] * 8], dtype=torch.float64).repeat_interleave(5, dim=0)
    manifold = Manifold(groups)
    assert manifold.contains(groups).all()
    assert not manifold.contains(groups + 1e-7).any()


def test_float32_features_are_measured_in_float64():
    queries, references = features(50, 100.0, 0).float(), features(80, 100.0, 1).float()
    found, index = nearest(queries, references)
    exact, exact_index = nearest(queries.double(), references.double())
    assert torch.equal(found, exact)
    assert torch.equal(index, exact_index)


@pytest.mark.parametrize(("n", "k"), [(3, 3), (3, 4), (1, 1), (5, 0), (0, 3)])
def test_too_few_images_for_k_are_refused(n, k):
    with pytest.raises(ValueError, match=f"at least k \\+ 1 = {k + 1} images .* got {n} images"):
        Manifold(features(n, 0.0, 0), k)
    if n == 3:
        with pytest.raises(ValueError, match="got 3 images"):
            precision_recall(Manifold(features(9, 0.0, 0), k), features(3, 0.0, 0))


def test_empty_mismatched_and_not_finite_features_are_refused():
    a = features(4, 0.0, 0)
    for queries, references in ((a[:0], a), (a, a[:0]), (a[:, :2], a), (a[0], a)):
        with pytest.raises(ValueError, match="expected features"):
            nearest(queries, references)
    bad = a.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(ValueError, match="features of the queries are not all finite"):
        nearest(bad, a)
    with pytest.raises(ValueError, match="features of the references are not all finite"):
        nearest(a, bad / 0)
    with pytest.raises(ValueError, match="not all finite"):
        Manifold(bad, 1)
    with pytest.raises(ValueError, match="not all finite"):
        precision_recall(Manifold(a, 1), bad)
