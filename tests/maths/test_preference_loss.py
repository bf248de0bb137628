"""Preference losses against loops over the papers' equations in float64: values, gradients, identities, edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tawin_nemo.maths.preference_loss import (
    alpha_dpo_loss,
    dpo_loss,
    napo_loss,
    normalised_margins,
    rosepo_loss,
    sdpo_loss,
    simpo_loss,
)

B, N = 6, 5
GAMMA, ALPHA = 0.7, 0.3
EXACT = {"rtol": 0.0, "atol": 1e-12}


def problem(seed: int) -> dict[str, Tensor]:
    """Rewards of B rows with 1 to N rejected answers, an epsilon and a normalised margin for every pair."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count_B = torch.randint(1, N + 1, (B,), generator=generator)
    return {
        "h_pos_B": 3 * normal(B),
        "h_neg_BN": 3 * normal(B, N),
        "mask_BN": torch.arange(N) < count_B.unsqueeze(1),
        "epsilon_BN": 0.5 * torch.rand(B, N, generator=generator, dtype=torch.float64),
        "margin_BN": normal(B, N),
    }


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


# -- The equations, one row at a time: ``pos`` a number, ``negs`` a list, ``eps`` and ``margins`` beside it.
def dpo(pos, negs, eps, margins):
    return sum(-torch.log(sigmoid(pos - neg)) for neg in negs) / len(negs)


def simpo(pos, negs, eps, margins):
    return sum(-torch.log(sigmoid(pos - neg - GAMMA)) for neg in negs) / len(negs)


def sdpo(pos, negs, eps, margins):
    return -torch.log(sigmoid(-torch.log(sum(torch.exp(neg - pos) for neg in negs))))


def napo(pos, negs, eps, margins):
    return -torch.log(sigmoid(-torch.log(sum(torch.exp(neg - pos) for neg in negs)) - GAMMA))


def rosepo(pos, negs, eps, margins):
    pairs = zip(negs, eps, strict=True)
    losses = [-(1 - e) * torch.log(sigmoid(pos - neg)) - e * torch.log(sigmoid(neg - pos)) for neg, e in pairs]
    return sum(losses) / len(losses)


def alpha_dpo(pos, negs, eps, margins):
    pairs = zip(negs, margins, strict=True)
    return sum(-torch.log(sigmoid(pos - neg - (GAMMA + ALPHA * float(m)))) for neg, m in pairs) / len(negs)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dpo": (lambda p, h, n: dpo_loss(h, n, p["mask_BN"]), dpo),
    "simpo": (lambda p, h, n: simpo_loss(h, n, p["mask_BN"], GAMMA), simpo),
    "sdpo": (lambda p, h, n: sdpo_loss(h, n, p["mask_BN"]), sdpo),
    "napo": (lambda p, h, n: napo_loss(h, n, p["mask_BN"], GAMMA), napo),
    "rosepo": (lambda p, h, n: rosepo_loss(h, n, p["mask_BN"], p["epsilon_BN"]), rosepo),
    "alpha_dpo": (lambda p, h, n: alpha_dpo_loss(h, n, p["mask_BN"], p["margin_BN"], GAMMA, ALPHA), alpha_dpo),
}


def looped(equation: Callable[..., Tensor], p: dict[str, Tensor], h_pos_B: Tensor, h_neg_BN: Tensor) -> Tensor:
    rows = []
    for b in range(B):
        kept = p["mask_BN"][b].nonzero().flatten().tolist()
        of_row = ([values[b, n] for n in kept] for values in (h_neg_BN, p["epsilon_BN"], p["margin_BN"]))
        rows.append(equation(h_pos_B[b], *of_row))
    return torch.stack(rows)


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor], p: dict[str, Tensor]) -> list[Tensor]:
    """The losses of the rows, and the gradients of a sum in which every row has another weight."""
    h_pos_B, h_neg_BN = p["h_pos_B"].clone().requires_grad_(), p["h_neg_BN"].clone().requires_grad_()
    loss_B = loss(h_pos_B, h_neg_BN)
    weights_B = torch.arange(1, B + 1, dtype=loss_B.dtype)
    return [loss_B.detach(), *torch.autograd.grad((loss_B * weights_B).sum(), [h_pos_B, h_neg_BN])]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_equations(name, seed):
    fast, equation = CASES[name]
    p = problem(seed)
    ours = with_gradients(lambda h, n: fast(p, h, n), p)
    expected = with_gradients(lambda h, n: looped(equation, p, h, n), p)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    p = problem(11)
    inputs = p["h_pos_B"].clone().requires_grad_(), p["h_neg_BN"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, n: CASES[name][0](p, h, n), inputs)


def one_negative(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return p["h_pos_B"], p["h_neg_BN"][:, :1], torch.ones(B, 1, dtype=torch.bool)


def test_identities():
    p = problem(3)
    h, n, mask = p["h_pos_B"], p["h_neg_BN"], p["mask_BN"]
    one, zeros = one_negative(p), torch.zeros_like(n)
    same = [
        (sdpo_loss(*one), dpo_loss(*one)),  # one rejected answer
        (napo_loss(*one, GAMMA), simpo_loss(*one, GAMMA)),
        (napo_loss(h, n, mask, 0.0), sdpo_loss(h, n, mask)),  # SimS-DPO: S-DPO's form on H without a reference
        (alpha_dpo_loss(h, n, mask, p["margin_BN"], GAMMA, 0.0), simpo_loss(h, n, mask, GAMMA)),
        (alpha_dpo_loss(h, n, mask, zeros, GAMMA, ALPHA), simpo_loss(h, n, mask, GAMMA)),
        (simpo_loss(h, n, mask, 0.0), dpo_loss(h, n, mask)),
        (rosepo_loss(h, n, mask, zeros), dpo_loss(h, n, mask)),
    ]
    for left, right in same:
        torch.testing.assert_close(left, right, **EXACT)
    # epsilon 1/2: no label is believed, so that swapping the answers changes nothing
    swapped = rosepo_loss(one[1][:, 0], h.unsqueeze(1), one[2], torch.full((B, 1), 0.5, dtype=h.dtype))
    torch.testing.assert_close(rosepo_loss(*one, torch.full((B, 1), 0.5, dtype=h.dtype)), swapped, **EXACT)


def test_a_copied_negative_raises_only_the_losses_of_all_negatives_at_once():
    """S-DPO and NAPO sum over rejected answers, pairwise objectives take their mean."""
    p = problem(4)
    h, n, mask = one_negative(p)
    twice = (h, torch.cat([n, n], dim=1), torch.ones(B, 2, dtype=torch.bool))
    torch.testing.assert_close(dpo_loss(*twice), dpo_loss(h, n, mask), **EXACT)
    torch.testing.assert_close(sdpo_loss(*twice), napo_loss(h, n, mask, math.log(2)), **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_masked_answers_and_rows_without_answers_have_no_part(name):
    p = problem(5)
    p["mask_BN"][2] = False
    p["h_neg_BN"] = torch.where(p["mask_BN"], p["h_neg_BN"], torch.inf)  # whatever stands there
    loss_B, pos_B, neg_BN = with_gradients(lambda h, n: CASES[name][0](p, h, n), p)
    assert loss_B[2] == 0.0
    assert pos_B[2] == 0.0
    kept = torch.arange(B) != 2
    assert bool((loss_B[kept] > 0).all())
    assert bool(torch.isfinite(pos_B).all())
    assert bool((neg_BN[~p["mask_BN"]] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_extreme_rewards_stay_finite(name, dtype):
    extreme = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4, 0.0], dtype=dtype)
    p = {key: value.to(dtype) if value.is_floating_point() else value for key, value in problem(6).items()}
    p["h_pos_B"], p["h_neg_BN"] = extreme, -extreme.unsqueeze(1).repeat(1, N)
    for tensor in with_gradients(lambda h, n: CASES[name][0](p, h, n), p):
        assert bool(torch.isfinite(tensor).all())


def test_normalised_margins_are_z_scores():
    margin_BN = problem(7)["margin_BN"]
    mean, std = float(margin_BN.mean()), float(margin_BN.std(correction=0))
    found = normalised_margins(margin_BN, mean, std)
    assert abs(float(found.mean())) < 1e-12
    assert abs(float(found.square().mean()) - 1) < 1e-12
    assert bool((normalised_margins(margin_BN, mean, 0.0) == 0).all())


def test_the_margin_of_alpha_dpo_has_no_gradient():
    p = problem(8)
    margin_BN = p["margin_BN"].clone().requires_grad_()
    h_pos_B = p["h_pos_B"].clone().requires_grad_()
    loss = alpha_dpo_loss(h_pos_B, p["h_neg_BN"], p["mask_BN"], margin_BN, GAMMA, ALPHA).sum()
    assert torch.autograd.grad(loss, [h_pos_B, margin_BN], allow_unused=True)[1] is None


def test_trl_agrees_on_dpo_and_simpo():
    """A second opinion: ``CPOTrainer.cpo_loss`` on the same log-probs. Its sigmoid loss of ratios to a reference is
    that of DPO, which TRL's DPOTrainer has inside a whole step only."""
    pytest.importorskip("trl")
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer

    p, beta = problem(9), 0.4
    logp, ref = p["h_pos_B"] / beta, p["margin_BN"][:, 0]
    other, other_ref = p["h_neg_BN"][:, 0] / beta, p["margin_BN"][:, 1]
    mask = torch.ones(B, 1, dtype=torch.bool)

    def theirs(kind, chosen, rejected):
        settings = {"beta": beta, "label_smoothing": 0.0, "loss_type": kind, "simpo_gamma": GAMMA, "alpha": 0.0}
        trainer = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
        return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]

    ours = dpo_loss(beta * (logp - ref), beta * (other - other_ref).unsqueeze(1), mask)
    torch.testing.assert_close(ours, theirs("sigmoid", logp - ref, other - other_ref), **EXACT)
    ours = simpo_loss(beta * logp, beta * other.unsqueeze(1), mask, GAMMA)
    torch.testing.assert_close(ours, theirs("simpo", logp, other), **EXACT)
