"""How a processor's cores are used: the faster of two ways is found, and found again."""

from __future__ import annotations

from collections.abc import Callable

from gpu_engine.token_engine import Faster


class Clock:
    """A clock that a way of a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def way(self, name: str, seconds: float) -> Callable[[], str]:
        def run() -> str:
            self.now += seconds
            return name

        return run


def test_a_single_text_goes_the_way_that_is_faster_now() -> None:
    clock = Clock()
    faster = Faster(clock)
    free = [clock.way("all threads", 1.0), clock.way("one", 1.5)]
    assert [faster.run(free, 20) for _ in range(30)] == ["all threads", "one", *["all threads"] * 28]
    busy = [clock.way("all threads", 9.0), clock.way("one", 1.6)]
    taken = [faster.run(busy, 20) for _ in range(64)]
    assert taken.count("all threads") <= 4, "few are spent on finding out"
    taken = [faster.run(free, 20) for _ in range(600)]
    assert taken[-31:].count("one") <= 1, "and the way back is found"
