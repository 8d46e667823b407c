import time

from longreach.core.clock import ManualClock, SystemClock


def test_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(start_s=100.0)
    assert (clock.monotonic_s(), clock.wall_s()) == (100.0, 100.0)
    clock.advance(2.5)
    clock.advance(0.0)
    assert (clock.monotonic_s(), clock.wall_s()) == (102.5, 102.5)


def test_system_clock_is_the_machines_own() -> None:
    clock = SystemClock()
    before = time.monotonic()
    first, second = clock.monotonic_s(), clock.monotonic_s()
    assert before <= first <= second <= time.monotonic()
    # wall time is for records, not for deadlines: it must be the epoch's, not the machine's uptime
    assert abs(clock.wall_s() - time.time()) < 5.0
