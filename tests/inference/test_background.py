import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fcos_d2.inference.background import in_background


def test_results_come_in_order_while_later_ones_are_worked_on():
    # The first item waits until the third has begun: without threads this never ends.
    third, begun = threading.Event(), []

    def work(item):
        begun.append(item)
        if item == 2:
            third.set()
        assert third.wait(10)
        return item * item

    assert list(in_background(work, range(5), ahead=2, threads=3)) == [0, 1, 4, 9, 16]
    assert sorted(begun) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_items_are_taken_than_allowed(ahead):
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = in_background(str, items(), ahead)
    for i in range(4):
        assert next(results) == str(i)
        assert len(taken) == i + 1 + ahead
    results.close()
    assert len(taken) == 4 + ahead


def test_results_before_an_error_are_not_lost():
    def items():
        yield from (1, 2, 0, 4)
        raise OSError("the source ends")

    results, found = in_background(lambda x: 1 // x, items(), ahead=10), []
    with pytest.raises(ZeroDivisionError):
        found.extend(results)
    results = in_background(lambda x: -x, items(), ahead=10)
    assert [next(results) for _ in range(4)] == [-1, -2, 0, -4]
    with pytest.raises(OSError, match="the source ends"):
        next(results)
    assert found == [1, 0]


def test_what_waits_is_dropped_when_the_caller_stops(monkeypatch):
    second, go, done = threading.Event(), threading.Event(), []

    def work(item):
        if item == 1:
            second.set()
            assert go.wait(10)
        done.append(item)

    shutdown = ThreadPoolExecutor.shutdown

    def drop_then_go(pool, wait=True, cancel_futures=False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        go.set()
        shutdown(pool, wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", drop_then_go)
    results = in_background(work, range(100), ahead=5)
    next(results)
    assert second.wait(10)
    results.close()  # waits for the one that is running
    assert done == [0, 1]
