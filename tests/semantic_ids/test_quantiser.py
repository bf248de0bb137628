"""RQ-VAE: its gradients against an explicit reference, exact resume, codebooks that learn and come back to life."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tawin_nemo.config.schema import RqVaeConfig
from tawin_nemo.semantic_ids import train_quantiser as training
from tawin_nemo.semantic_ids.clustering import residual_kmeans
from tawin_nemo.semantic_ids.codebooks import Codebooks
from tawin_nemo.semantic_ids.quantiser import Autoencoder, NetworkShape, ResidualQuantiser, choose
from tawin_nemo.semantic_ids.train_quantiser import Plan, train_quantiser
from tawin_nemo.util.errors import DataError
from tests.semantic_ids.vectors import blobs, relative_error

TINY = RqVaeConfig(widths=[16], latent=4, epochs=12, batch_size=32, save_interval=5, lr=1e-2)
PLAN = Plan(levels=2, codes=8, seed=1, kmeans_iterations=10, residual=False)


def error_of(model: Autoencoder, x_ID: np.ndarray) -> float:
    books = Codebooks(model.quantiser.vectors_LKD.detach().numpy())
    with torch.no_grad():
        codes_IL = books.encode(model.encode(torch.from_numpy(x_ID)).numpy())
        return relative_error(x_ID, model.decode(torch.from_numpy(books.decode(codes_IL))).numpy())


# -- gradients -----------------------------------------------------------------------------------------------------
def test_gradients_equal_the_explicit_ones() -> None:
    """Reference: the derivatives written out by hand, row by row, in float64 (no automatic differentiation)."""
    torch.manual_seed(0)
    quantiser = ResidualQuantiser(levels=3, codes=4, dims=2).double()
    with torch.no_grad():
        quantiser.vectors_LKD.copy_(torch.randn(3, 4, 2))
    latent_ND = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    outside_ND = torch.randn(5, 2, dtype=torch.float64)  # the gradient that the decoder would send back
    found = quantiser(latent_ND)
    ((found.latent_ND * outside_ND).sum() + found.codebook_loss + 0.25 * found.commitment_loss).backward()

    vectors = quantiser.vectors_LKD.detach().numpy()
    d_latent = outside_ND.numpy().copy()
    d_vectors, summed, codebook_loss = np.zeros_like(vectors), np.zeros((5, 2)), 0.0
    for row, latent in enumerate(latent_ND.detach().numpy()):
        residual = latent.copy()
        for level in range(3):
            code = int(((residual - vectors[level]) ** 2).sum(axis=1).argmin())
            assert int(found.codes_NL[row, level]) == code
            gap = residual - vectors[level, code]
            codebook_loss += float((gap**2).sum()) / 10
            d_vectors[level, code] -= 2 * gap / 10
            d_latent[row] += 0.25 * 2 * gap / 10
            residual = gap
        summed[row] = latent - residual
    np.testing.assert_allclose(found.latent_ND.detach().numpy(), summed, atol=1e-12)
    assert float(found.codebook_loss.detach()) == pytest.approx(codebook_loss)
    assert latent_ND.grad is not None
    assert quantiser.vectors_LKD.grad is not None
    np.testing.assert_allclose(latent_ND.grad.numpy(), d_latent, atol=1e-12)
    np.testing.assert_allclose(quantiser.vectors_LKD.grad.numpy(), d_vectors, atol=1e-12)


def test_sinkhorn_spreads_a_batch_over_the_codes() -> None:
    torch.manual_seed(0)
    residual_ND, vectors_KD = torch.randn(32, 3) * 0.1 + 2, torch.randn(8, 3)
    near = choose(residual_ND, vectors_KD, 0.0).bincount(minlength=8)
    even = choose(residual_ND, vectors_KD, 0.01).bincount(minlength=8)
    assert int(near.max()) > 16
    assert int(even.max()) <= 8
    assert int((even > 0).sum()) > int((near > 0).sum())


# -- training ------------------------------------------------------------------------------------------------------
def test_training_lowers_the_error_and_equal_seeds_are_equal() -> None:
    x_ID = blobs(200)
    losses: list[float] = []
    model = train_quantiser(x_ID, TINY, PLAN, on_epoch=lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.5 * losses[0]
    again = train_quantiser(x_ID, TINY, PLAN)
    for first, second in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    other = train_quantiser(x_ID, TINY, replace(PLAN, seed=2))
    assert not torch.equal(model.quantiser.vectors_LKD, other.quantiser.vectors_LKD)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path, update: str) -> None:
    x_ID, cfg = blobs(200), replace(TINY, update=update, restart_after=1)
    whole = train_quantiser(x_ID, cfg, PLAN)

    def stop(epoch: int, _: float) -> None:
        if epoch == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_quantiser(x_ID, cfg, PLAN, checkpoint=tmp_path / "state.pt", on_epoch=stop)
    seen: list[int] = []
    residual = train_quantiser(
        x_ID, cfg, PLAN, checkpoint=tmp_path / "state.pt", on_epoch=lambda epoch, _: seen.append(epoch)
    )
    assert seen == [5, 6, 7, 8, 9, 10, 11]  # from the checkpoint behind epoch 4
    for first, second in zip(whole.state_dict().values(), residual.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_a_checkpoint_of_other_vectors_is_not_used(tmp_path: Path) -> None:
    train_quantiser(blobs(200), TINY, PLAN, checkpoint=tmp_path / "state.pt")
    seen: list[int] = []
    x_ID = blobs(200, seed=9)
    model = train_quantiser(
        x_ID, TINY, PLAN, checkpoint=tmp_path / "state.pt", on_epoch=lambda epoch, _: seen.append(epoch)
    )
    assert seen[0] == 0
    assert torch.equal(model.quantiser.vectors_LKD, train_quantiser(x_ID, TINY, PLAN).quantiser.vectors_LKD)


def test_rqkmeans_plus_begins_as_residual_kmeans_and_refines_it() -> None:
    x_ID = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    plan = replace(PLAN, residual=True)
    books, codes_IL = residual_kmeans(x_ID, levels=2, codes=8, iterations=10, seed=1)
    start = train_quantiser(x_ID, replace(TINY, epochs=0), plan)
    assert error_of(start, x_ID) == pytest.approx(relative_error(x_ID, books.decode(codes_IL)), rel=0.02)
    refined = train_quantiser(x_ID, replace(TINY, epochs=40), plan)
    assert error_of(refined, x_ID) < 0.98 * error_of(start, x_ID)


def test_an_idle_code_moves_onto_an_item() -> None:
    run = training._Training(blobs(64), replace(TINY, restart_after=2), PLAN)
    with torch.no_grad():
        run.model.quantiser.vectors_LKD[0, 3] = 1e4  # nothing is near
    run.epoch(0)
    assert int(run.idle_LK[0, 3]) == 1
    assert float(run.model.quantiser.vectors_LKD[0, 3].detach().abs().max()) > 1e3
    run.epoch(1)
    assert int(run.idle_LK[0, 3]) == 0
    assert float(run.model.quantiser.vectors_LKD[0, 3].detach().abs().max()) < 100


def test_moving_averages_follow_the_published_update() -> None:
    run = training._Training(blobs(64), replace(TINY, update="ema", ema_decay=0.9), PLAN)
    before, counts = run.total_LKD.clone(), run.count_LK.clone()
    _, found = run._step(run.x_ID[:32])
    for level in range(2):
        for code in range(8):
            rows = found.residuals_LND[level][found.codes_NL[:, level] == code]
            count = 0.9 * counts[level, code] + 0.1 * len(rows)
            total = 0.9 * before[level, code] + 0.1 * rows.sum(dim=0)
            torch.testing.assert_close(run.count_LK[level, code], count)
            torch.testing.assert_close(
                run.model.quantiser.vectors_LKD[level, code].detach(), total / count, rtol=1e-3, atol=1e-5
            )


def test_too_few_items_are_refused() -> None:
    with pytest.raises(DataError, match=r"5 items cannot fill semantic_ids\.codes=8"):
        train_quantiser(blobs(5), TINY, PLAN)


def test_the_residual_network_begins_as_the_identity() -> None:
    model = Autoencoder(NetworkShape("residual", 6, (16,), 6), levels=2, codes=3)
    x_ID = torch.from_numpy(blobs(10))
    torch.testing.assert_close(model.decode(model.encode(x_ID)), x_ID)
