"""Metrics of written text against the libraries that define them, and their intervals against theory."""
import numpy as np
import pytest
from scipy import stats

from fine_tune_llm.audit.generated import (
    RowSums,
    bleu_rows,
    compare_generated,
    compared_sums,
    drawn_values,
    middle,
    perplexity_rows,
    ratio,
    rouge_rows,
)
from fine_tune_llm.core.errors import DataError

WORDS = "the a cat dog bird sat ran flew on under over mat tree house slowly quickly and then it was happy tired again".split()


def corpus(n: int, noise: float, seed: int) -> tuple[list[str], list[str]]:
    "References, and answers in which some words are replaced."
    rng = np.random.default_rng(seed)
    references = [list(rng.choice(WORDS, rng.integers(5, 25))) for _ in range(n)]
    answers = [[str(rng.choice(WORDS)) if rng.random() < noise else w for w in r[:rng.integers(len(r) - 2, len(r) + 1)]] for r in references]
    return [" ".join(r) + "." for r in references], [" ".join(a) + "." for a in answers]


def test_intervals_of_a_ratio_hold_in_simulations() -> None:
    "Perplexity of 80 texts of unequal length: 95 % intervals cover the truth in about 95 of 100 corpora."
    rng, covered = np.random.default_rng(0), 0
    truth = np.exp((1.0 * 10 + 2.0 * 30) / 40)  # half of the texts have 10 tokens of 1 nat, half 30 tokens of 2 nats
    for k in range(200):
        long = rng.random(80) < 0.5
        rows = [-np.maximum(rng.normal(2.0 if x else 1.0, 0.3), 0) * np.ones(30 if x else 10) for x in long]
        m = perplexity_rows(rows)
        e = middle(m.value(m.rows.sum(axis=0)), drawn_values([m], 400, k)[:, 0], 0.95, 80, "")
        covered += e.low <= truth <= e.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_same_draws_for_both_systems() -> None:
    "For a mean the interval of a difference is Student's on the differences, far narrower than that of either system."
    rng = np.random.default_rng(2)
    hard, extra = rng.exponential(1, 500), rng.normal(0.02, 0.1, 500)
    rows = {name: [RowSums("amount", np.column_stack([v, np.ones(500)]), ratio, True)] for name, v in (("a", hard), ("b", hard + extra))}
    gap = compared_sums(rows, "a", 0.95, 4000, 0).rows[1].gap
    assert gap is not None and np.isclose(gap.value, extra.mean())
    assert np.isclose(gap.high - gap.low, 2 * stats.t.isf(0.025, 499) * extra.std(ddof=1) / np.sqrt(500), rtol=0.08)


def test_equal_systems_are_never_better() -> None:
    "With no true difference a table without a verdict is seen in at least 95 of 100 cases."
    rng, found = np.random.default_rng(1), 0
    for k in range(60):
        hard = rng.normal(2, 0.5, (100, 1))
        a, b = (-np.maximum(hard + rng.normal(0, 0.3, (100, 8)), 0) for _ in range(2))
        found += compare_generated(log_probs={"a": a, "b": b}, n_boot=400, seed=k).rows[1].verdict != "not shown"
    assert found <= 8  # 60 at 5 %: 9 or more in less than one of 200 cases


def test_a_loss_of_a_language_model_is_its_perplexity() -> None:
    import torch
    logits, truth = torch.randn(2, 9, 11, generator=torch.Generator().manual_seed(0)), torch.arange(18).reshape(2, 9) % 11
    rows = torch.log_softmax(logits, -1).gather(-1, truth[..., None])[..., 0].numpy()
    m = perplexity_rows(list(rows))
    assert np.isclose(m.value(m.rows.sum(axis=0)), float(torch.nn.functional.cross_entropy(logits.reshape(-1, 11), truth.ravel()).exp()))


@pytest.mark.parametrize("bad", [[0.1], [float("nan")], [float("-inf")]])
def test_probabilities_instead_of_logarithms_are_refused(bad: list[float]) -> None:
    with pytest.raises(DataError, match="log probabilities"): perplexity_rows([[-1.0], bad])


@pytest.mark.peers
def test_bleu_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    for noise in (0.0, 0.2, 0.9):
        references, answers = corpus(60, noise, 3)
        m = bleu_rows(answers, references)
        assert np.isclose(m.value(m.rows.sum(axis=0)), sacrebleu.corpus_bleu(answers, [references]).score, rtol=1e-12)
    several = [[r, a] for r, a in zip(references, answers)]
    m = bleu_rows(answers, several)
    assert np.isclose(m.value(m.rows.sum(axis=0)), 100) and np.isclose(sacrebleu.corpus_bleu(answers, [references, answers]).score, 100)
    empty = bleu_rows(["", "the cat sat on the mat"], ["a dog ran home again", "the cat sat on the mat"])
    assert np.isclose(empty.value(empty.rows.sum(axis=0)), sacrebleu.corpus_bleu(["", "the cat sat on the mat"], [["a dog ran home again", "the cat sat on the mat"]]).score)


@pytest.mark.peers
def test_interval_of_bleu_is_that_of_sacrebleu() -> None:
    "sacrebleu's own bootstrap of a corpus, with other draws: the half widths agree."
    sacrebleu = pytest.importorskip("sacrebleu")
    references, answers = corpus(150, 0.3, 5)
    theirs = sacrebleu.metrics.BLEU(references=[references]).corpus_score(answers, None, n_bootstrap=2000)
    own = compare_generated({"a": answers, "b": answers[:]}, references, metrics=["BLEU"]).rows[0].own
    assert abs((own.high - own.low) / 2 / theirs._ci - 1) < 0.1 and np.isclose(own.value, theirs.score)


@pytest.mark.peers
def test_rouge_is_that_of_rouge_score() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    references, answers = corpus(40, 0.3, 7)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for key, m in zip(("rouge1", "rouge2", "rougeL"), rouge_rows(answers, references)):
        assert np.isclose(m.value(m.rows.sum(axis=0)), np.mean([scorer.score(r, a)[key].fmeasure for r, a in zip(references, answers)]))
    assert rouge_rows(["", "a b"], ["a b", ["x", "a b"]])[0].rows[:, 0].tolist() == [0, 1]


@pytest.mark.peers
def test_a_worse_writer_is_shown() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    references, good = corpus(150, 0.1, 9)
    rng = np.random.default_rng(0)
    bad = [" ".join(w if rng.random() < 0.85 else "again" for w in a.split()) for a in good]
    c = compare_generated({"good": good, "bad": bad}, references)
    assert {r.metric: r.verdict for r in c.rows if r.gap} == dict.fromkeys(("BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"), "worse")
    assert all(r.gap.high < 0 for r in c.rows if r.gap)
