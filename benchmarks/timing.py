"""What a piece of work costs: processor time, which other programs disturb little, and time on the wall."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Seconds. cpu: user and system time of this process and of the children that it waited for."""

    cpu: float
    wall: float


def cost(work: Callable[[], object]) -> Cost:
    began, wall = _processor_seconds(), time.perf_counter()
    work()
    return Cost(_processor_seconds() - began, time.perf_counter() - wall)


def cheapest(work: Callable[[], object], repetitions: int) -> Cost:
    """The run of least processor time: what disturbs it can only add."""
    return min((cost(work) for _ in range(repetitions)), key=lambda run: run.cpu)


def _processor_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)
