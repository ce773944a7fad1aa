"""What judges decisions takes class numbers of the same rows, and nothing that numpy would read as something else."""
import numpy as np
import pytest

from fine_tune_llm.core.errors import DataError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.uncertainty.cascade import Cascade
from fine_tune_llm.uncertainty.costs import row_costs
from fine_tune_llm.uncertainty.predictions import Predictions
from fine_tune_llm.uncertainty.risk import DecisionPolicy

NONE = {"unlabelled": lambda y: np.where(np.arange(len(y)) == 3, -1, y), "names": lambda y: np.array(list("abc"))[y], "beyond": lambda y: y + 1,
        "short": lambda y: y[:-1], "scalar": lambda y: 0, "rates": lambda y: y / 2, "column": lambda y: y[:, None]}


@pytest.fixture(scope="module")
def judged():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 80)
    y = np.array([rng.choice(3, p=q) for q in p])
    def rows(prefix): return Predictions([f"{prefix}{i}" for i in range(80)], Labels(("a", "b", "c")), probs=p, y=y)
    old, new = rows("c"), rows("t")
    policy = DecisionPolicy(abstain_cost=0.4).fit(old).decide(new)
    routed = Cascade([DecisionPolicy(max_risk=0.3), DecisionPolicy(max_risk=0.9)]).fit([old, old]).decide([new, new])
    return {"policy": policy, "cascade": routed}, y


@pytest.mark.parametrize("who", ["policy", "cascade"])
@pytest.mark.parametrize("kind", NONE)
def test_no_number_for_what_is_no_truth(judged, who, kind):
    "A -1 was the last class to a cost matrix, a name a mistake to a risk, and a scalar the truth of all rows."
    found, y = judged
    for judge in (found[who].risk, found[who].mean_cost):
        with pytest.raises(DataError, match="y must hold 80 class numbers 0..2|true classes for 80 decisions"): judge(NONE[kind](y))


@pytest.mark.parametrize("who", ["policy", "cascade"])
def test_lists_and_small_integers_are_truths(judged, who):
    found, y = judged
    for other in (y.tolist(), y.astype(np.int8), y.astype(np.uint16)):
        for judge in (found[who].risk, found[who].mean_cost): assert str(judge(other)) == str(judge(y))


def test_the_bill_by_hand():
    costs = np.array([[0.0, 2.0], [5.0, 0.0]])
    assert row_costs(np.array([0, 1, 0, -1]), [0, 0, 1, 1], costs, 0.5).tolist() == [0, 2, 5, 0.5]
