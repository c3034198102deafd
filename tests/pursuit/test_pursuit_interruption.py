"""Progress as it is made, and what an interrupt leaves."""

import logging
import os
import signal
import threading
import time

import numpy as np
import pytest
from test_pursuit_gtp import fan, low_rank

from gradpursuit.pursuit import (
    DenseMatrix,
    GradientTrajectoryPursuit,
    GradMatch,
    MatchingPursuit,
    NonNegativeOMP,
    PursuitStep,
    kkt_violation,
)
from gradpursuit.pursuit import problem as problem_module
from gradpursuit.pursuit.held import HeldColumns

ALL = [GradientTrajectoryPursuit(25), NonNegativeOMP(25), GradMatch(25), MatchingPursuit(25)]
FITTED = [
    "coef_",
    "support_",
    "layers_",
    "path_",
    "residual_path_",
    "objective_path_",
    "steps_",
    "kkt_",
    "n_iter_",
    "stop_reason_",
    "n_features_in_",
]


def stop_after(number, how):
    """A callback that interrupts at the step of this number, and the steps it has seen."""
    seen = []

    def callback(step, support):
        seen.append((step, support))
        if len(seen) == number:
            how()

    return callback, seen


def raise_it():
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """A process that was started in the background may ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signal_it():
    os.kill(os.getpid(), signal.SIGINT)


def assert_usable(found, A, b, best_on_support=True):
    assert all(hasattr(found, name) for name in FITTED)
    S, w = found.support_, found.coef_
    assert (w >= 0).all()
    assert set(np.flatnonzero(w)) == set(S)
    first = S[found.layers_ == 1]
    residual = np.linalg.norm(A[:, first] @ w[first] - b) / np.linalg.norm(b)
    assert found.residual_path_[-1] == pytest.approx(residual, rel=1e-7)
    assert len(found.residual_path_) == len(found.objective_path_) == sum(s.layer == 1 for s in found.steps_)
    np.testing.assert_array_equal(found.path_[len(S) or 1].support, S)
    np.testing.assert_allclose(found.predict(A), A @ w, atol=1e-12)
    if best_on_support:
        assert found.kkt_ < 1e-5


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_every_step_is_told(estimator):
    A, b = low_rank(0)
    X, told = DenseMatrix(A), []
    found = estimator.fit(X, b, lambda step, support: told.append((step, support)))
    steps = [step for step, _ in told]
    assert steps == found.steps_
    assert all(isinstance(step, PursuitStep) for step in steps)
    first = [step for step in steps if step.layer == 1]
    assert [step.iteration for step in first] == list(range(len(first)))
    np.testing.assert_array_equal([step.relative_residual for step in first], found.residual_path_)
    np.testing.assert_array_equal([step.objective for step in first], found.objective_path_)
    for step, support in told:
        assert step.support_size == len(support) == len(set(support))
    assert (np.diff([step.seconds for step in steps]) >= 0).all()
    read = np.diff([step.bytes_read for step in steps])
    column = A.nbytes // A.shape[1]
    assert steps[0].bytes_read == X.nbytes  # the norms
    assert (read >= X.nbytes).all()
    assert (read % column == 0).all()
    if isinstance(estimator, NonNegativeOMP):
        np.testing.assert_array_equal(read, X.nbytes + column)  # a pass, and the atom that was chosen


def test_what_a_callback_does_to_the_support_changes_nothing():
    A, b = low_rank(0)
    found = GradientTrajectoryPursuit(20).fit(A, b, lambda step, support: support.fill(0))
    np.testing.assert_array_equal(found.coef_, GradientTrajectoryPursuit(20).fit(A, b).coef_)


@pytest.mark.parametrize("how", [raise_it, signal_it])
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_an_interrupt_ends_with_the_best_so_far(estimator, number, how, caplog):
    A, b = low_rank(1)
    callback, seen = stop_after(number, how)
    with caplog.at_level(logging.WARNING, logger="gradpursuit"):
        found = estimator.fit(A, b, callback)
    assert [record.message for record in caplog.records] == [
        "interrupted: the pursuit ends with the best support so far"
    ]
    assert found.stop_reason_ == ["interrupted"]
    assert len(seen) == len(found.steps_) == number
    assert set(found.support_) == set(seen[-1][1])
    # Matching pursuit never refits.
    assert_usable(found, A, b, not isinstance(estimator, MatchingPursuit))


@pytest.mark.parametrize("how", [raise_it, signal_it])
def test_an_interrupt_without_a_gram_matrix_still_has_exact_weights(how, monkeypatch):
    monkeypatch.setattr(problem_module, "GRAM_COLUMNS", 0)
    A, b = low_rank(2)
    callback, seen = stop_after(3, how)
    found = GradientTrajectoryPursuit(40).fit(A, b, callback)
    assert found.stop_reason_ == ["interrupted"]
    assert set(found.support_) <= set(seen[-1][1])
    S = found.support_
    assert kkt_violation(A[:, S].T @ A[:, S], A[:, S].T @ b, found.coef_[S], 0.3) < 1e-5
    assert_usable(found, A, b)


def test_an_interrupt_in_a_later_layer_keeps_the_layers_before():
    A = fan([30, 10, 50, 100, 70])
    whole = GradientTrajectoryPursuit(4, alpha=0.0).fit(A, np.array([2.0, 0.0]))
    for number in range(1, 9):
        callback, _ = stop_after(number, raise_it)
        found = GradientTrajectoryPursuit(4, alpha=0.0).fit(A, np.array([2.0, 0.0]), callback)
        count = number // 2
        np.testing.assert_array_equal(found.support_, whole.support_[:count])
        np.testing.assert_array_equal(found.layers_, whole.layers_[:count])
        assert found.stop_reason_[-1] == "interrupted"
        assert len(found.stop_reason_) == (number + 1) // 2
        assert_usable(found, A, np.array([2.0, 0.0]))


@pytest.mark.parametrize("number", [1, 3, 8, 9])
def test_an_interrupt_with_split_targets(number):
    A, b = low_rank(3)
    y = np.stack([b, A[:, :8].mean(axis=1)], axis=1)
    callback, seen = stop_after(number, raise_it)
    found = GradientTrajectoryPursuit(20, targets="split").fit(A, y, callback)
    assert len(seen) == number
    assert found.stop_reason_[-1] == "interrupted"
    assert found.kkt_ < 1e-5
    assert found.group_residuals_.shape == (2,)
    assert all(hasattr(found, name) for name in FITTED)


class Interrupting(DenseMatrix):
    """Interrupts at the pass or the fetch of this number."""

    def __init__(self, X, passes=0, fetches=0):
        super().__init__(X)
        self.passes, self.fetches = passes, fetches

    def correlate(self, r):
        self.passes -= 1
        if self.passes == 0:
            raise KeyboardInterrupt
        return super().correlate(r)

    def columns(self, ids):
        self.fetches -= 1
        if self.fetches == 0:
            raise KeyboardInterrupt
        return super().columns(ids)


@pytest.mark.parametrize("at", [{"passes": 1}, {"passes": 3}, {"fetches": 1}, {"fetches": 3}], ids=str)
@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_an_interrupt_while_the_matrix_is_read(estimator, at):
    A, b = low_rank(4)
    found = estimator.fit(Interrupting(A, **at), b)
    assert found.stop_reason_ == ["interrupted"]
    assert_usable(found, A, b, not isinstance(estimator, MatchingPursuit))


def test_an_interrupt_before_a_warm_start_has_begun():
    A, b = low_rank(5)
    found = GradientTrajectoryPursuit(20, warm_start=True).fit(A, b)
    found.fit(Interrupting(A, fetches=1), b)
    assert found.stop_reason_ == ["interrupted"]
    assert found.support_.size == 0
    assert_usable(found, A, b)
    assert len(found.fit(A, b).support_) == 20


@pytest.mark.parametrize("method", ["keep", "load", "cosines", "atb"])
@pytest.mark.parametrize("gram_columns", [0, 2048])
def test_columns_half_changed_when_interrupted_are_fetched_again(method, gram_columns, monkeypatch):
    """The columns held are in disorder after the interrupt; the weights must not be."""
    monkeypatch.setattr(problem_module, "GRAM_COLUMNS", gram_columns)
    A, b = low_rank(6)
    calls, real = [], getattr(HeldColumns, method)

    def disordered(self, *arguments):
        calls.append(len(self.ids))
        if len(calls) == 8:
            held = self.ids[self.ids >= 0]
            self._slot[held] = np.roll(self._slot[held], 1)
            self._rows[: len(self.ids)] = 7.0
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(HeldColumns, method, disordered)
    found = GradientTrajectoryPursuit(20, max_coherence=0.6, tol=0.0).fit(A, b)
    assert len(calls) >= 8
    assert found.stop_reason_[-1] == "interrupted"
    assert_usable(found, A, b)
    assert found.path_[3].relative_residual < 1 or not found.support_.size


def test_an_interrupt_from_another_thread():
    A, b = low_rank(0)
    waiting = threading.Event()

    def interrupt():
        waiting.wait(30)
        signal_it()

    class Slow(DenseMatrix):
        passes = 0

        def correlate(self, r):
            self.passes += 1
            if self.passes == 3:
                waiting.set()
                for _ in range(3000):  # until the signal comes
                    time.sleep(0.01)
            return super().correlate(r)

    thread = threading.Thread(target=interrupt)
    thread.start()
    found = GradientTrajectoryPursuit(25).fit(Slow(A), b)
    thread.join()
    assert found.stop_reason_ == ["interrupted"]
    assert found.steps_[-1].iteration == 2
    assert_usable(found, A, b)


def test_extend_and_warm_starts_go_on_after_an_interrupt():
    A, b = low_rank(0)
    callback, _ = stop_after(2, raise_it)
    found = GradientTrajectoryPursuit(25, warm_start=True).fit(A[:, :300], b, callback)
    interrupted = found.objective_path_[-1]
    found.extend(A[:, 300:])
    assert found.residual_path_[-1] < 1
    found.fit(A, b)
    assert found.stop_reason_ == ["converged"]
    assert found.objective_path_[-1] < interrupted


def test_other_errors_of_a_callback_are_not_swallowed():
    A, b = low_rank(0)

    def fail(step, support):
        raise ValueError("mine")

    for estimator in ALL:
        with pytest.raises(ValueError, match="mine"):
            estimator.fit(A, b, fail)
