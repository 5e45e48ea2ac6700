"""Image checks: each looks at a batch of finished pictures and gives a verdict on every one.

`Checks` is the one place that turns a failure of a check into a verdict that blocks: a check that
raises, hangs, answers for too few pictures or gives NaN fails closed.
"""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from safelatent.schema import Check

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0


class ImageCheck(Protocol):
    """One check. `judge` takes uint8 pictures [height, width, 3] of one size."""

    name: str
    version: str

    def judge(self, pictures: Sequence[np.ndarray]) -> list[Check]: ...


class Checks:
    """All checks of a worker, run one after the other, each within `timeout_s`."""

    def __init__(self, checks: Sequence[ImageCheck], timeout_s: float = TIMEOUT_S):
        self.checks = checks
        self.timeout_s = timeout_s

    def judge(self, pictures: Sequence[np.ndarray]) -> list[list[Check]]:
        """Verdicts by picture, then by check."""
        by_check = [self._verdicts(check, pictures) for check in self.checks]
        return [[verdicts[i] for verdicts in by_check] for i in range(len(pictures))]

    def _verdicts(self, check: ImageCheck, pictures: Sequence[np.ndarray]) -> list[Check]:
        try:
            verdicts = _within(self.timeout_s, lambda: check.judge(pictures))
            if len(verdicts) != len(pictures):
                raise ValueError(f"{len(verdicts)} verdicts for {len(pictures)} pictures")
            return [_finite(verdict) for verdict in verdicts]
        except Exception as error:
            said = str(error) or f"{type(error).__name__} after {self.timeout_s:g} s"
            log.exception("check %s failed; its pictures are blocked", check.name)
            return [_failed(check.name, check.version, said) for _ in pictures]


def _within(timeout_s: float, judge: Callable[[], list[Check]]) -> list[Check]:
    """The answer, or TimeoutError.

    In a thread of its own: one that hangs holds up neither the next check nor the process's end.
    """
    answer: Future[list[Check]] = Future()

    def run() -> None:
        try:
            answer.set_result(judge())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="check", daemon=True).start()
    return answer.result(timeout_s)


def _finite(verdict: Check) -> Check:
    numbers = [*verdict.scores.values(), *verdict.thresholds.values()]
    if all(math.isfinite(number) for number in numbers):
        return verdict
    return _failed(verdict.check, verdict.version, "a score is NaN or infinite")


def _failed(check: str, version: str, error: str) -> Check:
    return Check(check=check, version=version, flagged=True, error=error)
