"""The matrices: every operation against the explicit array, and every refusal."""

import numpy as np
import pytest
import torch

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import DenseMatrix, GradientMatrix, TrajectoryMatrix, as_matrix
from gradpursuit.pursuit import matrix as matrix_module


def stacked(blocks, scale):
    parts = [scale[t][:, None] * np.concatenate(shards).astype(np.float64) for t, shards in enumerate(blocks)]
    return np.concatenate(parts, axis=1).T


def trajectory(rng, dtype, widths=(7, 4, 9), rows=(5, 1, 11)):
    blocks = [[rng.standard_normal((n, d)).astype(dtype) for n in rows] for d in widths]
    return blocks, rng.uniform(0.2, 3.0, (len(widths), sum(rows)))


def assert_same_operations(made, A, tol):
    rng = np.random.default_rng(1)
    ids = rng.permutation(A.shape[1])[:9]
    r, x = rng.standard_normal(A.shape[0]), rng.standard_normal(9)
    assert made.shape == A.shape
    np.testing.assert_allclose(made.correlate(r), A.T @ r, atol=tol)
    np.testing.assert_allclose(made.columns(ids), A[:, ids], atol=tol)
    np.testing.assert_allclose(made.combine(ids, x), A[:, ids] @ x, atol=tol)
    np.testing.assert_allclose(made.squared_norms(), (A**2).sum(0), rtol=10 * tol)
    assert made.columns(ids[:0]).shape == (A.shape[0], 0)
    assert not made.combine(ids[:0], x[:0]).any()
    assert made.correlate(r).dtype == made.combine(ids, x).dtype == made.squared_norms().dtype == np.float64


@pytest.mark.parametrize(("dtype", "tol"), [(np.float16, 1e-5), (np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("piece_bytes", [64 * 2**20, 100])
def test_trajectory_matrix_is_the_stacked_matrix(dtype, tol, piece_bytes, monkeypatch):
    monkeypatch.setattr(matrix_module, "_PIECE_BYTES", piece_bytes)
    blocks, scale = trajectory(np.random.default_rng(0), dtype)
    made = TrajectoryMatrix(blocks, scale)
    assert isinstance(made, GradientMatrix)
    assert_same_operations(made, stacked(blocks, scale), tol)
    assert_same_operations(TrajectoryMatrix(blocks), stacked(blocks, np.ones_like(scale)), tol)


def test_checkpoints_may_be_sharded_differently():
    rng = np.random.default_rng(0)
    U = [rng.standard_normal((12, 3)), rng.standard_normal((12, 5))]
    made = TrajectoryMatrix([np.split(U[0], [4, 5]), np.split(U[1], [10])])
    assert_same_operations(made, np.concatenate(U, axis=1).T, 1e-12)


def test_memory_mapped_shards(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 6)).astype(np.float16)
    np.save(tmp_path / "a.npy", values)
    made = TrajectoryMatrix([[np.load(tmp_path / "a.npy", mmap_mode="r")]])
    assert_same_operations(made, values.astype(np.float64).T, 1e-5)


@pytest.mark.parametrize("piece_bytes", [64 * 2**20, 100])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("dtype", "tol"), [(np.float16, 1e-5), (np.float32, 1e-5), (np.float64, 1e-12)])
def test_dense_matrix(dtype, tol, order, piece_bytes, monkeypatch):
    monkeypatch.setattr(matrix_module, "_PIECE_BYTES", piece_bytes)
    A = np.asarray(np.random.default_rng(0).standard_normal((13, 20)).astype(dtype), order=order)
    assert_same_operations(DenseMatrix(A), A.astype(np.float64), tol)


def test_torch_tensors_are_read_without_a_copy():
    features = torch.randn(20, 13, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made = DenseMatrix(features.T)
    assert_same_operations(made, features.detach().numpy().T.astype(np.float64), 1e-5)
    with torch.no_grad():
        features[3] = 5.0
    np.testing.assert_array_equal(made.columns(np.array([3])), np.full((13, 1), 5.0))
    half = torch.randn(20, 13).to(torch.bfloat16)
    assert_same_operations(DenseMatrix(half.T), half.float().numpy().T.astype(np.float64), 1e-5)


def test_as_matrix_keeps_a_matrix():
    made = DenseMatrix(np.ones((2, 3)))
    assert as_matrix(made) is made
    assert isinstance(as_matrix([[1, 2], [3, 4]]), DenseMatrix)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        (np.array([[1.0, np.nan]]), "first is atom 1"),
        (np.array([[np.inf, 1.0]]), "first is atom 0"),
        (np.array([[1j]]), "not real numbers"),
        (np.array([["a"]]), "not real numbers"),
    ],
)
def test_dense_refusals(X, message):
    with pytest.raises(PursuitError, match=message):
        as_matrix(X)


@pytest.mark.parametrize(
    ("blocks", "scale", "message"),
    [
        ([], None, "at least one checkpoint"),
        ([[]], None, "at least one checkpoint"),
        ([[np.ones((3, 2)), np.ones((3, 4))]], None, r"widths \[2, 4\]"),
        ([[np.ones((3, 2))], [np.ones((4, 2))]], None, r"\[3, 4\] rows"),
        ([[np.ones(3)]], None, r"shape \(3,\)"),
        ([[np.ones((3, 2), dtype=np.int8)]], None, "int8"),
        ([[np.ones((0, 2))]], None, "nothing to select"),
        ([[np.ones((3, 2))]], np.ones((2, 3)), r"need \(1, 3\)"),
        ([[np.ones((3, 2))]], np.array([[1.0, np.inf, 1.0]]), r"scale\[0, 1\] is inf"),
    ],
)
def test_trajectory_refusals(blocks, scale, message):
    with pytest.raises(PursuitError, match=message):
        TrajectoryMatrix(blocks, scale)


def test_trajectory_finds_values_that_are_not_finite():
    U = np.ones((5, 2), dtype=np.float16)
    U[3, 1] = np.nan
    with pytest.raises(PursuitError, match="first is atom 3"):
        TrajectoryMatrix([[np.ones((5, 2))], [U[:2], U[2:]]]).squared_norms()


@pytest.mark.parametrize("ids", [[-1], [3]])
def test_ids_outside_the_matrix_are_refused(ids):
    for made in (DenseMatrix(np.ones((2, 3))), TrajectoryMatrix([[np.ones((3, 2))]])):
        with pytest.raises(PursuitError, match=r"0\.\.2"):
            made.columns(np.array(ids))
        with pytest.raises(PursuitError, match=r"0\.\.2"):
            made.combine(np.array(ids), np.ones(1))
