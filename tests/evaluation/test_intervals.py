"""Intervals and tests against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from mmft.evaluation.intervals import bootstrap_interval, mcnemar, paired_bootstrap, resampled_sums
from mmft.evaluation.metrics import METRICS

EXACT, F1, BLEU = METRICS["exact_match"], METRICS["token_f1"], METRICS["bleu"]


def column(values) -> np.ndarray:
    return np.asarray(values, dtype=float).reshape(-1, 1)


def test_share_equals_the_binomial_quantiles():
    # Resampling a 0/1 column draws Binomial(n, p): the percentile interval is known in closed form.
    stats = column([1] * 140 + [0] * 260)
    found = bootstrap_interval(EXACT, stats, resamples=40_000, seed=1)
    expected = scipy.stats.binom.ppf([0.025, 0.975], 400, 0.35) / 400
    assert (found.value, found.n) == (0.35, 400)
    assert [found.low, found.high] == pytest.approx(list(expected), abs=1.01 / 400)


def test_mean_equals_scipy():
    values = np.random.default_rng(0).beta(0.4, 0.7, size=250)
    found = bootstrap_interval(F1, column(values), resamples=20_000, seed=2)
    oracle = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=3)
    expected = oracle.confidence_interval
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=1.5e-3)


def test_corpus_metric_equals_recomputing_on_resampled_rows():
    texts = ["the cat sat on the mat", "a dog runs", "", "red car on the road now"]
    references = [["the cat sat on a mat"], ["a dog runs fast", "dog runs"], ["nothing"], ["red car on road now"]]
    stats = BLEU.rows(texts, references)
    rows, resamples = len(stats), 50
    picks = np.random.default_rng(9).integers(0, rows, size=(resamples, rows))
    slow = [BLEU.aggregate(BLEU.rows([texts[i] for i in pick], [references[i] for i in pick])) for pick in picks]
    sums = resampled_sums(stats, resamples=resamples, seed=9)
    assert BLEU.finish(sums, rows) == pytest.approx(slow, abs=1e-12)


def test_chunks_do_not_change_the_draws(monkeypatch):
    stats = np.random.default_rng(0).random((30, 3))
    whole = resampled_sums(stats, resamples=100, seed=4)
    monkeypatch.setattr("mmft.evaluation.intervals._CHUNK", 200)
    assert np.allclose(resampled_sums(stats, resamples=100, seed=4), whole)
    assert not np.allclose(resampled_sums(stats, resamples=100, seed=5), whole)


def test_one_row_and_constant_rows_have_no_width():
    one = bootstrap_interval(EXACT, column([1]), resamples=10, seed=0)
    assert (one.value, one.low, one.high, one.n) == (1.0, 1.0, 1.0, 1)
    zero = bootstrap_interval(F1, column([0] * 5), resamples=10, seed=0)
    assert (zero.low, zero.high) == (0.0, 0.0)


def test_mcnemar_equals_the_exact_binomial_test():
    for wins, losses in [(0, 0), (5, 0), (3, 3), (12, 4), (40, 61), (600, 500)]:
        first = np.asarray([1.0] * wins + [0.0] * losses + [1.0] * 7)
        second = np.asarray([0.0] * wins + [1.0] * losses + [1.0] * 7)
        expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_paired_difference_uses_the_pairing():
    # Each row of `first` is exactly 0.1 above: the paired difference has no spread, whatever the rows do.
    second = np.random.default_rng(1).random(80)
    found = paired_bootstrap(F1, column(second + 0.1), column(second), resamples=999, seed=0)
    assert [found.difference, found.low, found.high] == pytest.approx([0.1] * 3, abs=1e-9)
    assert found.p == pytest.approx(2 / 1000)
    assert found.mcnemar_p is None


def test_paired_interval_equals_scipy_on_the_differences():
    draw = np.random.default_rng(2)
    second = draw.random(150)
    first = np.clip(second + draw.normal(0.03, 0.2, size=150), 0, 1)
    found = paired_bootstrap(F1, column(first), column(second), resamples=20_000, seed=0)
    oracle = scipy.stats.bootstrap((first - second,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    expected = oracle.confidence_interval
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=1.5e-3)


def test_same_answers_have_no_difference():
    stats = column([1, 0, 1, 1])
    found = paired_bootstrap(EXACT, stats, stats.copy(), resamples=100, seed=0)
    assert (found.difference, found.low, found.high, found.p, found.mcnemar_p) == (0.0, 0.0, 0.0, 1.0, 1.0)


def test_p_values_are_uniform_without_a_difference():
    draw = np.random.default_rng(3)
    ps = []
    for seed in range(300):
        first, second = (draw.integers(0, 2, size=120).astype(float) for _ in range(2))
        ps.append(paired_bootstrap(EXACT, column(first), column(second), resamples=300, seed=seed).p)
    # Share of false alarms at 5 %: binomial standard error 1.3 %, and the bootstrap test is slightly liberal.
    assert 0.01 <= np.mean(np.asarray(ps) < 0.05) <= 0.10


def test_different_rows_cannot_be_paired():
    with pytest.raises(ValueError, match="one shape"):
        paired_bootstrap(EXACT, column([1, 0]), column([1]), resamples=10, seed=0)
