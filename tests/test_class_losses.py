"""Losses for classes against their definitions: written out in numpy, at the minimum that theory gives, and by measured slopes."""
import numpy as np
import pytest

from fine_tune_llm.core.errors import ConfigurationError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.training.class_losses import CLASS_LOSSES, class_loss, mmce_penalty, split_abstention
from fine_tune_llm.uncertainty.predictions import Predictions

torch = pytest.importorskip("torch")
PLAIN = [n for n, (_, extra) in CLASS_LOSSES.items() if not extra]
ROOM = [n for n, (_, extra) in CLASS_LOSSES.items() if extra]


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def one_row(name: str, row: np.ndarray, k: int, smoothing=0.0, gamma=2.0, power=0.7, payoff=2.2, price=1.0, cost=0.2, **_) -> float:
    "Write each formula out from the probabilities of one row."
    t, b, share, n = row[k], row[-1], row[:-1], len(row)
    match name:
        case "cross-entropy": return -sum(((1 - smoothing) * (j == k) + smoothing / n) * np.log(v) for j, v in enumerate(row))
        case "focal": return -(1 - t) ** ((5 if t < 0.2 else 3) if gamma == "53" else gamma) * np.log(t)
        case "mmce": return -np.log(t)
        case "confidence-weighted": return (1 - t ** power) / power
        case "gambler": return -np.log(t + b / payoff)
        case "abstaining": return -(1 - b) * np.log(share[k] / (1 - b)) - price * np.log(1 - b)
        case "chow": return -np.log(t) - (1 - cost) * np.log(b)
    raise AssertionError(name)


def in_numpy(name: str, z: np.ndarray, y: np.ndarray, weight=2.0, width=0.4, **options) -> np.ndarray:
    "Write a loss out, with the double sum of MMCE."
    p = softmax(z)
    rows = np.array([one_row(name, row, k, **options) for row, k in zip(p, y)])
    if name != "mmce": return rows
    r, c, n = p.max(1), p.argmax(1) == y, len(y)
    return rows + weight * np.sqrt(sum((c[i] - r[i]) * (c[j] - r[j]) * np.exp(-abs(r[i] - r[j]) / width) for i in range(n) for j in range(n))) / n


OPTIONS = [("cross-entropy", {}), ("cross-entropy", {"smoothing": 0.1}), ("focal", {}), ("focal", {"gamma": 0.5}), ("focal", {"gamma": "53"}), ("mmce", {}),
           ("mmce", {"weight": 8, "width": 0.2}), ("confidence-weighted", {"power": 1.0}), ("confidence-weighted", {"power": 0.3}), ("gambler", {"payoff": 1.3}),
           ("abstaining", {"price": 0.3}), ("chow", {"cost": 0.4}), ("chow", {"cost": 0})]


@pytest.mark.parametrize("name,options", OPTIONS)
def test_formula_and_slope(name, options):
    loss = class_loss(name, **options)
    g = torch.Generator().manual_seed(1)
    z = (3 * torch.randn(40, 5 + loss.extra, generator=g, dtype=torch.float64)).requires_grad_()
    y = torch.randint(0, 5, (40,), generator=g)
    np.testing.assert_allclose(loss(z, y).detach().numpy(), in_numpy(name, z.detach().numpy(), y.numpy(), **options), rtol=1e-9, atol=1e-12)
    few = z.detach()[:5].requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(v, y[:5]), few)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_shift_order_and_half_precision(name):
    loss = class_loss(name)
    g = torch.Generator().manual_seed(2)
    z, y = torch.randn(16, 4 + loss.extra, generator=g), torch.randint(0, 4, (16,), generator=g)
    wanted = loss(z, y)
    assert torch.allclose(loss(z - 80.0, y), wanted, atol=1e-4)  # a label's log-likelihood is far below zero
    order = torch.tensor([2, 0, 3, 1, *([4] * loss.extra)])
    assert torch.allclose(loss(z[:, order], order.argsort()[y]), wanted, atol=1e-5)  # names of classes mean nothing
    assert torch.allclose(loss(z.bfloat16(), y), loss(z.bfloat16().float(), y))


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_extremes_stay_finite(name):
    loss = class_loss(name)
    for sign in (1, -1):
        z = torch.zeros(2, 3 + loss.extra)
        z[:, 0], z[:, -1] = 300.0 * sign, -300.0 * sign
        z.requires_grad_()
        value = loss(z, torch.tensor([0, 1])).sum()
        assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()


def minimum(name: str, truth: list[float], **options) -> np.ndarray:
    "Find the best outputs for a row with these true class probabilities."
    loss, eta = class_loss(name, **options), torch.tensor(truth, dtype=torch.float64)
    z = torch.zeros(1, len(truth) + loss.extra, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    def step():
        solver.zero_grad()
        value = sum(p * loss(z, torch.tensor([k]))[0] for k, p in enumerate(eta))
        value.backward()
        return value
    solver.step(step)
    return z.detach().softmax(-1)[0].numpy()


@pytest.mark.parametrize("truth", [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.4, 0.35, 0.25]])
def test_minima_that_theory_gives(truth):
    eta = np.array(truth)
    np.testing.assert_allclose(minimum("cross-entropy", truth), eta, atol=1e-5)
    np.testing.assert_allclose(minimum("cross-entropy", truth, smoothing=0.3), 0.7 * eta + 0.1, atol=1e-5)
    np.testing.assert_allclose(minimum("focal", truth, gamma=0), eta, atol=1e-5)
    flat = minimum("focal", truth, gamma=3)
    assert flat.max() < eta.max() and (flat.argsort() == eta.argsort()).all()  # Mukhoti et al.: less bold, same order
    np.testing.assert_allclose(minimum("chow", truth, cost=0.45), [*(eta / 1.55), 0.55 / 1.55], atol=1e-5)
    dac = minimum("abstaining", truth, price=0.5)  # with entropy h: answer with min(1, price / h)
    h = -(eta * np.log(eta)).sum()
    assert dac[-1] == pytest.approx(max(0, 1 - 0.5 / h), abs=1e-3)
    np.testing.assert_allclose(dac[:-1] / dac[:-1].sum(), eta, atol=1e-3)
    kept = minimum("gambler", truth, payoff=1.6)[-1]  # Kelly: a bet at 1.6 for one pays where a class is likelier than 1 / 1.6
    assert (kept > 0.99) == (eta.max() < 1 / 1.6)


def test_chow_abstains_where_the_rule_says():
    for best in (0.5, 0.7, 0.79, 0.81, 0.95):
        p = minimum("chow", [best, 1 - best], cost=0.2)
        assert (p.argmax() == 2) == (best < 0.8)


def test_mmce_is_calibration():
    g = torch.Generator().manual_seed(3)
    p = 0.5 + 0.5 * torch.rand(4000, generator=g, dtype=torch.float64)
    z = torch.stack([p.log(), (1 - p).log()], 1)
    honest = (torch.rand(4000, generator=g) > p).long()  # right as often as it says
    assert mmce_penalty(z, honest) < 0.02 < 0.2 < mmce_penalty(z, torch.randint(0, 2, (4000,), generator=g))


def test_last_output_becomes_a_score():
    z = np.array([[2.0, 0.0, 1.0, -500.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 900.0]], np.float32)
    classes, abstain = split_abstention(z)
    preds = Predictions(np.array(["a", "b", "c"]), Labels(("x", "y", "z")), logits=classes)
    np.testing.assert_allclose(abstain, [0, 0.25, 1], atol=1e-6)
    np.testing.assert_allclose(preds.probabilities * (1 - abstain[:, None]), softmax(z.astype(float))[:, :3], atol=1e-6)


@pytest.mark.parametrize("name,options,word", [
    ("hinge", {}, "use one of"), ("focal", {"gama": 2}, "use gamma"), ("focal", {"gamma": -1}, "0 or more"), ("focal", {"gamma": "52"}, "'53'"),
    ("gambler", {"payoff": 1}, "above 1"), ("chow", {"cost": 1.0}, "not including"), ("cross-entropy", {"smoothing": float("nan")}, "not including"),
    ("abstaining", {"price": True}, "above 0"), ("focal", {"gamma": None}, "0 or more"), ("chow", {"cost": [0.5]}, "not including"), ("confidence-weighted", {"power": 0}, "above 0")])
def test_refusals(name, options, word):
    with pytest.raises(ConfigurationError, match=word): class_loss(name, **options)
