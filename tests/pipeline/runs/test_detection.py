"""Judging scores against scikit-learn and scipy, and in cases with a known value."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler

from palindrome.pipeline.base.errors import SettingError
from palindrome.pipeline.runs.detection import Scores, measured, mixture_scores, separation, told_by_files


def scores(values, **files):
    count = len(next(iter(values.values()))) if values else len(next(iter(files.values())))
    run = SimpleNamespace(uri="a run")
    return Scores(run, None, [str(i) for i in range(count)], ["s"] * count, values, files)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40))
def test_measures_are_scikit_learn_s_also_of_ties(rows):
    label, values = (np.array(part) for part in zip(*rows, strict=True))
    if len(set(label)) < 2:
        return
    found = measured(label.astype(int), values.astype(float))
    assert found["auroc"] == pytest.approx(roc_auc_score(label, values), abs=1e-12)
    assert found["ap"] == pytest.approx(average_precision_score(label, values), abs=1e-12)
    thresholds = [*values, values.max() + 1]
    rates = [((values[label] >= t).mean(), (values[~label] >= t).mean()) for t in thresholds]
    assert found["tpr_at_5"] == pytest.approx(max(tpr for tpr, fpr in rates if fpr <= 0.05))
    assert found["asr"] == pytest.approx(max((tpr + 1 - fpr) / 2 for tpr, fpr in rates))


def test_weights_count_images_several_times():
    random = np.random.default_rng(0)
    label, values, weights = random.integers(0, 2, 60), random.normal(size=60).round(1), random.integers(0, 4, 60)
    again = np.repeat(np.arange(60), weights)
    assert measured(label, values, weights.astype(float)) == pytest.approx(measured(label[again], values[again]))


def test_two_gaussians_have_the_auroc_of_theory_within_the_interval():
    """Phi(d / sqrt 2) for means a distance d apart; 19 of 20 intervals should hold it: of ten, at least eight."""
    held, widths = 0, []
    for seed in range(10):
        random = np.random.default_rng(seed)
        positive, negative = random.normal(1, 1, 200), random.normal(0, 1, 300)
        found = separation("x", positive, negative, 1, "", 200, seed)
        u = mannwhitneyu(positive, negative).statistic
        assert found.measures["auroc"] == pytest.approx(u / (200 * 300))
        low, high = found.intervals["auroc"]
        assert low < found.measures["auroc"] < high
        held += low <= norm.cdf(1 / np.sqrt(2)) <= high
        widths.append(high - low)
    assert held >= 8
    # The standard error by Hanley and McNeil (1982), at a = 0.76.
    a = norm.cdf(1 / np.sqrt(2))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    se = np.sqrt((a * (1 - a) + 199 * (q1 - a * a) + 299 * (q2 - a * a)) / (200 * 300))
    assert np.mean(widths) == pytest.approx(2 * 1.96 * se, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    random = np.random.default_rng(1)
    pair = random.normal(size=50), random.normal(size=40)
    assert separation("x", *pair, 1, "", 20, 3) == separation("x", *pair, 1, "", 20, 3)
    assert separation("x", *pair, 1, "", 20, 3) != separation("x", *pair, 1, "", 20, 4)


def test_lower_is_the_other_way_round():
    random = np.random.default_rng(2)
    pair = random.normal(size=50), random.normal(1, size=40)
    higher, lower = (separation("x", *pair, sign, "", 5, 0).measures["auroc"] for sign in (1, -1))
    assert higher + lower == pytest.approx(1) and lower > 0.5


def test_values_that_are_not_finite_are_counted_and_left_out():
    positive, negative = np.array([1, 2, np.nan, np.inf]), np.array([0.0, 1.5, np.nan])
    found = separation("x", positive, negative, 1, "", 5, 0)
    assert (found.positives, found.negatives, found.missing) == (2, 2, 3)
    assert found.measures["auroc"] == 0.75
    with pytest.raises(ValueError, match="x has no finite value in the negative run"):
        separation("x", positive, np.full(3, np.nan), 1, "", 5, 0)


def test_the_mixture_is_scikit_learn_s():
    random = np.random.default_rng(3)
    columns = ("a", "b")
    drawn = [
        dict(zip(columns, random.normal(shift, size=(2, count)), strict=True)) for shift, count in [(0, 90), (3, 20)]
    ]
    fit, other = map(scores, drawn)
    other.values["a"][4] = np.nan
    [found], chosen = mixture_scores(fit, [other], columns, [1, 2], 3, 0)
    assert chosen["n_components"] == 1 and chosen["rows"] == 90
    x = np.column_stack([fit.values[name] for name in columns])
    scaler = StandardScaler().fit(x)
    mixture = GaussianMixture(1, covariance_type=chosen["covariance_type"], random_state=0).fit(scaler.transform(x))
    there = np.arange(20) != 4
    expected = -mixture.score_samples(scaler.transform(np.column_stack([other.values[c] for c in columns])[there]))
    np.testing.assert_allclose(found[there], expected, rtol=1e-9)
    assert np.isnan(found[4])
    with pytest.raises(SettingError, match="61 are more than the 60 rows"):
        mixture_scores(fit, [other], columns, [61], 3, 0)


def test_what_files_are_like_can_tell_alone():
    jpeg = scores({}, container=["JPEG"] * 30, jpeg_quality=[75] * 30, width=[32] * 30, height=[32] * 30)
    png = scores({}, container=["PNG"] * 20, jpeg_quality=[None] * 20, width=[32] * 20, height=[32] * 20)
    assert told_by_files(jpeg, png) == {"container": 1, "jpeg_quality": 1, "pixels": 0.5}
    assert told_by_files(jpeg, jpeg) == {"container": 0.5, "jpeg_quality": 0.5, "pixels": 0.5}
    larger = scores({}, width=[64] * 10 + [32] * 10, height=[32] * 20)
    assert told_by_files(jpeg, larger) == {"pixels": 0.75}
