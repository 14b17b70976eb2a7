"""What is wanted of a session, in the order in which it may come: orders to the ranks, without a process."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from cluster.config import LaunchConfig, parse
from cluster.supervision.stopping import PLATFORM_MARGIN, Stopping


class FakeGroup:
    def __init__(self) -> None:
        self.orders: list[Any] = []

    def save_and_end(self) -> None:
        self.orders.append("save")

    def stop(self, reason: str, grace: float) -> None:
        self.orders.append((reason, grace))

    def kill(self) -> None:
        self.orders.append("kill")


@pytest.fixture
def group() -> FakeGroup:
    return FakeGroup()


@pytest.fixture
def stopping(group: FakeGroup) -> Stopping:
    config: LaunchConfig = parse(["--grace", "7", "name=a"])
    made = Stopping(config, lambda *event, **facts: None, lambda text: None)
    made.begin(group)  # type: ignore[arg-type]
    return made


def test_the_platforms_end_counts_also_after_its_signal(stopping: Stopping, group: FakeGroup) -> None:
    """A rank in a long evaluation hears SIGUSR2 and goes on: the end of the job must not find it there."""
    stopping.on_signal(signal.SIGUSR2)
    end = time.time() + 7 + PLATFORM_MARGIN
    stopping.check_time(end + 60)
    assert group.orders == ["save"]
    stopping.check_time(end - 1)
    stopping.check_time(end - 1)
    assert group.orders == ["save", ("out_of_time", 7)] and stopping.reason == "preempted"


def test_a_session_that_stops_is_not_stopped_again_by_the_clock(stopping: Stopping, group: FakeGroup) -> None:
    stopping.on_signal(signal.SIGINT)
    stopping.check_time(time.time())
    assert group.orders == [("interrupted", 7)]
    stopping.on_signal(signal.SIGINT)
    assert group.orders[1:] == ["kill"] and stopping.reason == "interrupted"


def test_a_signal_before_any_ranks_is_kept(stopping: Stopping) -> None:
    stopping.end()
    stopping.preempt(signal.SIGTERM, "node 3")
    assert stopping.wanted and stopping.reason == "preempted"
