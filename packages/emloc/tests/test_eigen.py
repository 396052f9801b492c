"""Leading eigenvectors against numpy's dense solver in float64."""

import pytest
import torch

from emloc.linalg.eigen import dense_eigenvectors, leading_eigenvectors

SIZE = 1200


def matrix(values, seed=0):
    torch.manual_seed(seed)
    q = torch.linalg.qr(torch.randn(values.numel(), values.numel(), dtype=torch.float64))[0]
    return (q * values.double()) @ q.T


def captured(a, vectors):
    """Trace on the subspace; vectors need not be perfectly orthonormal."""
    q = torch.linalg.qr(vectors.double())[0]
    return float(((a @ q) * q).sum())


STEPS = torch.arange(1, SIZE + 1)
SPECTRA = {
    "power law": STEPS.pow(-1.0),
    "slow power law": STEPS.pow(-0.5),
    "exponential": torch.exp(-STEPS / 100),
    "huge outliers": torch.cat([torch.tensor([1e6, 3e5]), STEPS[2:].pow(-0.75)]),
    "flat": 1 + 0.01 * torch.rand(SIZE),
    "a plateau wider than a block": torch.cat([torch.ones(150), 0.01 * torch.rand(SIZE - 150)]),
    "singular": torch.cat([torch.rand(90), torch.zeros(SIZE - 90)]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_much_is_captured_as_by_a_dense_solver(name, dtype):
    a, count = matrix(SPECTRA[name]), 200
    values = torch.linalg.eigvalsh(a).flip(0)
    found = leading_eigenvectors(a.to(dtype, copy=True), count)
    tail = float(values[count:].clamp(min=0).sum())
    ours = float(values.sum()) - captured(a, found.vectors)
    noise = 1e-12 if dtype == torch.float64 else 1e-6
    assert ours <= tail * 1.001**2 + noise * float(values.sum())
    assert found.values.shape == (count,)
    assert found.vectors.shape == (SIZE, count)
    eye = found.vectors.double().T @ found.vectors.double()
    assert (eye - torch.eye(count)).abs().max() < 1e-4
    assert float(found.values.sum()) == pytest.approx(captured(a, found.vectors), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 30, 700, SIZE])
def test_any_count(count):
    a = matrix(SPECTRA["slow power law"])
    values = torch.linalg.eigvalsh(a).flip(0)
    found = leading_eigenvectors(a.float(), count)
    assert found.vectors.shape == (SIZE, count)
    tail = float(values[count:].sum())
    assert float(values.sum()) - captured(a, found.vectors) <= tail * 1.002 + 1e-4


def test_small_counts_do_not_need_a_dense_solver(monkeypatch):
    monkeypatch.setattr("emloc.linalg.eigen.dense_eigenvectors", None)
    for name in ("power law", "exponential", "huge outliers"):
        assert leading_eigenvectors(matrix(SPECTRA[name]).float(), 40).excess <= 1e-3


def test_the_same_matrix_gives_the_same_bits():
    a = matrix(SPECTRA["power law"]).float()
    one, two = (leading_eigenvectors(a.clone(), 150) for _ in range(2))
    assert torch.equal(one.vectors, two.vectors)


def test_dense_solver_takes_the_largest():
    found = dense_eigenvectors(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 2)
    assert found.values.tolist() == [5.0, 3.0]
    assert found.excess == 0.0
