"""Each type on disk: round trips within the stated bounds, for values from tiny to huge."""

from __future__ import annotations

import numpy as np
import pytest

from gradpursuit.store.encoding import DTYPES, Block, encode, misfits

SIZES = [1e-37, 1e-20, 1e-8, 1e-5, 1.0, 3e4, 1e20, 1e38]


def rows(size: float, seed: int = 0) -> np.ndarray:
    """Rows [300, 96] with heavy tails, the largest element of each exactly `size`; zeros among them."""
    values = np.random.default_rng(seed).standard_normal((300, 96)) ** 5
    values[:, ::7] = 0
    return (size * values / np.abs(values).max(axis=1, keepdims=True)).astype(np.float32)


def errors(features: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors, sizes of the elements, and the largest size in each row, all float64."""
    wide, decoded = features.astype(np.float64), np.asarray(encode(features, dtype), dtype=np.float64)
    return np.abs(decoded - wide), np.abs(wide), np.abs(wide).max(axis=1, keepdims=True)


@pytest.mark.parametrize("size", SIZES)
def test_float32_is_kept(size: float) -> None:
    np.testing.assert_array_equal(np.asarray(encode(rows(size), "float32")), rows(size))


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_within_its_bound(size: float) -> None:
    error, x, _ = errors(rows(size), "bfloat16")
    assert (error <= 2.0**-8 * x + 2.0**-134).all()  # the latter: below the smallest normal float32
    assert error.max() > 0


@pytest.mark.parametrize("size", SIZES)
def test_float16_within_its_bound_at_any_size(size: float) -> None:
    error, x, a = errors(rows(size), "float16")
    assert (error <= 2.0**-11 * x + 2.0**-39 * a).all()
    assert error.max() > 0
    block = encode(rows(size), "float16")
    largest = np.abs(block.values.astype(np.float64)).max(axis=1)
    assert block.scale is not None
    assert (np.frexp(block.scale)[0] == 0.5).all()  # powers of two
    if size > 1e-30:
        assert ((largest >= 2**14) & (largest <= 2**15)).all()


def test_float16_alone_would_lose_what_its_scale_keeps() -> None:
    features = rows(1e-5)
    norm = np.linalg.norm(features.astype(np.float64), axis=1)
    bare = np.linalg.norm(features.astype(np.float16).astype(np.float64) - features, axis=1) / norm
    scaled = np.linalg.norm(np.asarray(encode(features, "float16"), np.float64) - features, axis=1) / norm
    assert bare.min() > 1e-3
    assert scaled.max() < 2.0**-11


@pytest.mark.parametrize("size", [s for s in SIZES if s > 1e-36])
def test_int8_within_its_bound(size: float) -> None:
    error, _, a = errors(rows(size), "int8")
    assert (error <= a / 254 + 2.0**-23 * a).all()
    values = encode(rows(size), "int8").values
    assert values.dtype == np.int8
    assert (np.abs(values).max(axis=1) == 127).all()
    assert values.min() == -127


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_is_row_by_row(dtype: str) -> None:
    """A row comes out the same whatever its company: no block of rows shares anything."""
    features = rows(1e-3)
    together = np.asarray(encode(features, dtype))
    for i in (0, 255, 256, 299):
        np.testing.assert_array_equal(np.asarray(encode(features[i : i + 1], dtype))[0], together[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_values_are_kept_when_encoded_again(dtype: str) -> None:
    once = np.asarray(encode(rows(1e-3), dtype))
    np.testing.assert_allclose(np.asarray(encode(once, dtype)), once, rtol=2e-7)


def test_misfits_are_overflow_and_rows_that_vanish() -> None:
    features = np.ones((6, 4), np.float32)
    features[1, 2] = 3.4e38
    features[2] = 1e-45
    features[4] = 0
    assert misfits(encode(features, "bfloat16")).tolist() == [False, True, True, False, True, False]
    assert misfits(encode(features, "float32")).tolist() == [False, False, False, False, True, False]
    assert misfits(encode(features, "float16")).tolist() == [False, False, False, False, True, False]
    assert misfits(encode(features, "int8")).tolist() == [False, False, True, False, True, False]


def test_a_block_is_an_array_of_its_decoded_rows() -> None:
    block = Block(np.array([[1, -127], [3, 0]], np.int8), np.array([0.5, 2], np.float32))
    assert (len(block), block.shape) == (2, (2, 2))
    assert np.asarray(block).dtype == np.float32
    np.testing.assert_array_equal(block, [[0.5, -63.5], [6, 0]])
    assert np.asarray(block, dtype=np.float64).dtype == np.float64
    assert np.concatenate([block, block]).shape == (4, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: str) -> None:
    assert np.asarray(encode(np.empty((0, 5), np.float32), dtype)).shape == (0, 5)
