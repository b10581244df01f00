"""Distances between sets of features against torch-fidelity, pytorch-fid and scikit-learn, and in cases with a known
value."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import pairwise_distances

from palindrome.pipeline.images.distances import (
    Labels,
    Moments,
    frechet_distance,
    kernel_distance,
    neighbours,
    softmax,
)


@pytest.fixture(scope="module")
def sets():
    """Two sets of features [N, D], float32, as the last pooling of a network has them: of 0 or more, correlated."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(24, 24))
    return tuple(
        np.maximum(random.normal(size=(n, 24)) @ mix + s, 0).astype(np.float32) for n, s in ((300, 1), (260, 2))
    )


def of(features):
    found = Moments.of(features)
    return found.mean, found.covariance


def test_moments_are_numpy_s(sets):
    mean, covariance = of(sets[0])
    np.testing.assert_allclose(mean, sets[0].astype(float).mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(sets[0].astype(float), rowvar=False), rtol=1e-11, atol=1e-13)


@given(arrays(np.float32, (12, 3), elements=st.floats(-1e3, 1e3, width=32)), st.lists(st.integers(0, 12), max_size=4))
def test_moments_of_parts_merge_to_those_of_all(features, cuts):
    parts = np.split(features, sorted(cuts))
    merged = Moments.none(3)
    for part in parts:
        merged = merged.merge(Moments.of(part))
    whole = Moments.of(features)
    assert merged.count == 12
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-10, atol=1e-8)
    assert np.array_equal(merged.scatter, merged.scatter.T)


def test_a_mean_far_from_zero_costs_no_digits(sets):
    far = sets[0].astype(np.float64) + 1e7
    halves = Moments.of(far[:100]).merge(Moments.of(far[100:]))
    np.testing.assert_allclose(halves.covariance, np.cov(sets[0].astype(float), rowvar=False), rtol=1e-6, atol=1e-7)


def test_one_image_has_no_covariance(sets):
    with pytest.raises(ValueError, match="two images, and there are 1"):
        _ = Moments.of(sets[0][:1]).covariance


def test_frechet_distance_is_that_of_pytorch_fid_and_torch_fidelity(sets, torch_fidelity):
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    found = frechet_distance(*of(sets[0]), *of(sets[1]))
    assert found == pytest.approx(calculate_frechet_distance(*of(sets[0]), *of(sets[1])), rel=1e-9)
    theirs = [fid_features_to_statistics(torch.from_numpy(features).double()) for features in sets]
    assert found == pytest.approx(fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"], rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_0(sets):
    assert frechet_distance(*of(sets[0]), *of(sets[0])) == 0
    shuffled = of(sets[0][np.random.default_rng(1).permutation(len(sets[0]))])
    assert abs(frechet_distance(*of(sets[0]), *shuffled)) < 1e-10 * np.trace(shuffled[1])


def test_frechet_distance_is_symmetric(sets):
    forth, back = frechet_distance(*of(sets[0]), *of(sets[1])), frechet_distance(*of(sets[1]), *of(sets[0]))
    assert forth == pytest.approx(back, rel=1e-12)


@pytest.mark.parametrize("rank", [3, 24])
def test_frechet_distance_of_covariances_that_commute(rank):
    """With common axes it is |m1 - m2|^2 + sum (s1 - s2)^2, also where most deviations are 0."""
    random = np.random.default_rng(rank)
    axes, _ = np.linalg.qr(random.normal(size=(24, 24)))
    s1, s2 = (np.where(np.arange(24) < rank, random.uniform(0.5, 2, 24), 0) for _ in range(2))
    m1, m2 = random.normal(size=(2, 24))
    found = frechet_distance(m1, (axes * s1**2) @ axes.T, m2, (axes * s2**2) @ axes.T)
    assert found == pytest.approx(np.square(m1 - m2).sum() + np.square(s1 - s2).sum(), rel=1e-12)


def test_frechet_distance_of_fewer_images_than_features():
    """Two Gaussians of two points each, on axes at a right angle: S1 S2 = 0, and the traces add up."""
    first, second = np.zeros((2, 9)), np.zeros((2, 9))
    first[:, 0], second[:, 1] = (1, -1), (2, -2)
    assert frechet_distance(*of(first), *of(second)) == pytest.approx(2 + 8, rel=1e-14)


def test_values_that_are_not_finite_have_no_distance(sets):
    mean, covariance = of(sets[0])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.full_like(mean, np.nan), covariance, mean, covariance)


@pytest.mark.parametrize("size", [50, 1000])
def test_kernel_distance_is_torch_fidelity_s(sets, torch_fidelity, size):
    from torch_fidelity.metric_kid import kid_features_to_metric

    mine = kernel_distance(*sets, subsets=7, size=size)
    size = min(size, *map(len, sets))
    how = {"kid_subsets": 7, "kid_subset_size": size, "kid_kernel": "poly", "rng_seed": 2020, "verbose": False}
    theirs = kid_features_to_metric(*(torch.from_numpy(features).double() for features in sets), **how)
    assert mine[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert mine[1] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)


def test_precision_and_recall_are_torch_fidelity_s(sets, torch_fidelity):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, generated = sets
    found = neighbours(real, generated, 3)
    theirs = calculate_precision_recall_full(*(torch.from_numpy(s).double() for s in (generated, real)), 3)
    assert (found.precision, found.recall) == pytest.approx(theirs, abs=1e-7)
    assert 0 < found.precision < 1 and 0 < found.recall < 1


def test_the_nearest_are_those_of_all_pairs(sets, monkeypatch):
    monkeypatch.setattr("palindrome.pipeline.images.distances.ROWS", 64)
    real, generated = sets
    every = pairwise_distances(generated.astype(float), real.astype(float))
    found = neighbours(real, generated, 3)
    assert np.array_equal(found.nearest, every.argmin(1))
    np.testing.assert_allclose(found.distance, every.min(1), rtol=1e-9)


def test_a_set_covers_itself(sets):
    found = neighbours(sets[0], sets[0], 1)
    assert (found.precision, found.recall) == (1, 1)
    assert np.array_equal(found.nearest, np.arange(len(sets[0])))


def test_too_few_images_have_no_neighbours(sets):
    with pytest.raises(ValueError, match="more than 3 images"):
        neighbours(sets[0][:3], sets[1], 3)


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(2).normal(size=(400, 10)).astype(np.float32) * 3


def test_inception_score_is_torch_fidelity_s(logits, torch_fidelity):
    from torch_fidelity.metric_isc import isc_features_to_metric

    split = np.arange(400) * 5 // 400
    found, theirs = Labels.of(logits, split, 5), torch.from_numpy(logits)
    scores, expected = found.scores(), isc_features_to_metric(theirs, 5, shuffle=False)
    assert scores.mean() == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert scores.std() == pytest.approx(expected["inception_score_std"], rel=1e-9)
    assert found.whole() == pytest.approx(isc_features_to_metric(theirs, 1)["inception_score_mean"], rel=1e-12)


def test_labels_of_parts_merge_to_those_of_all(logits):
    split = np.random.default_rng(3).integers(0, 4, 400)
    parts = [Labels.of(logits[part], split[part], 4) for part in np.split(np.arange(400), [13, 200])]
    merged = parts[2].merge(parts[0]).merge(parts[1])
    np.testing.assert_allclose(merged.scores(), Labels.of(logits, split, 4).scores(), rtol=1e-12)


def test_an_empty_split_has_no_score(logits):
    assert len(Labels.of(logits[:3], np.array([0, 0, 2]), 4).scores()) == 2


def test_certain_and_balanced_classes_score_their_number():
    logits = np.where(np.eye(10, dtype=bool), 200.0, -200.0)
    assert Labels.of(logits, np.zeros(10, int), 1).whole() == pytest.approx(10)


def test_softmax_is_torch_s(logits):
    p, log_p = softmax(logits)
    expected = torch.from_numpy(logits).double()
    np.testing.assert_allclose(p, expected.softmax(1).numpy(), rtol=1e-13)
    np.testing.assert_allclose(log_p, expected.log_softmax(1).numpy(), rtol=1e-12)
