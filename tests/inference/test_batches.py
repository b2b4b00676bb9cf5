"""run_in_batches beside what it shall equal: each item run alone, one after the other."""

import itertools
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fcos_d2.inference import run_in_batches

# An item is a pair of its number and its kind.
KINDS = st.lists(st.integers(0, 3), max_size=40)
BATCH_SIZES = st.integers(1, 5)
MAX_HELD = st.integers(1, 20)


class Failure(Exception):
    pass


def run_alone(item):
    return f"result of {item}"


class Recorder:
    """Runs items as ``run_in_batches`` asks for them, and keeps account of it."""

    def __init__(self, bad_numbers=()):
        self.bad_numbers = set(bad_numbers)
        self.taken = self.yielded = self.most_held = 0
        self.batches, self.failed_batches = [], []

    def take(self, items):
        for item in items:
            assert not self.failed_batches, "an item was taken after a batch had failed"
            self.taken += 1
            self.most_held = max(self.most_held, self.taken - self.yielded)
            yield item

    def run(self, batch):
        self.batches.append(batch)
        if self.bad_numbers & {number for number, _ in batch}:
            self.failed_batches.append(batch)
            raise Failure(f"batch from {batch[0][0]}")
        return [run_alone(item) for item in batch]

    def results(self, items, batch_size, max_held):
        pairs = run_in_batches(
            self.take(items), lambda item: item[1], self.run, batch_size, max_held
        )
        for pair in pairs:
            yield pair
            self.yielded += 1


def check_batches(recorder, batch_size, max_held):
    for batch in recorder.batches:
        assert 1 <= len(batch) <= batch_size
        assert len({kind for _, kind in batch}) == 1
        assert batch == sorted(batch)
    run_count = Counter(itertools.chain.from_iterable(recorder.batches))
    assert set(run_count.values()) <= {1}
    assert recorder.most_held <= max_held


@settings(max_examples=200)
@given(KINDS, BATCH_SIZES, MAX_HELD)
@example([0, 1, 2, 1, 2], 2, 4)  # two batches fill up while the first item waits
def test_equals_running_each_item_alone(kinds, batch_size, max_held):
    items, recorder = list(enumerate(kinds)), Recorder()
    results = list(recorder.results(items, batch_size, max_held))
    assert results == [(item, run_alone(item)) for item in items]
    check_batches(recorder, batch_size, max_held)
    assert sum(len(batch) for batch in recorder.batches) == len(items)


@given(KINDS, BATCH_SIZES)
def test_batches_are_as_full_as_can_be_if_all_items_may_be_held(kinds, batch_size):
    recorder = Recorder()
    list(recorder.results(enumerate(kinds), batch_size, max_held=1000))
    for kind, count in Counter(kinds).items():
        sizes = [len(batch) for batch in recorder.batches if batch[0][1] == kind]
        full, rest = divmod(count, batch_size)
        assert sizes == [batch_size] * full + [rest] * (rest > 0)


@settings(max_examples=300)
@given(KINDS, BATCH_SIZES, MAX_HELD, st.booleans(), st.sets(st.integers(0, 39), max_size=3))
def test_results_before_an_error_come_first(kinds, batch_size, max_held, ends_badly, bad_numbers):
    items, recorder = list(enumerate(kinds)), Recorder(bad_numbers)

    def source():
        yield from items
        if ends_badly:
            raise Failure("no more items")

    results, message = [], None
    try:
        for pair in recorder.results(source(), batch_size, max_held):
            results.append(pair)
    except Failure as error:
        message = str(error)
    check_batches(recorder, batch_size, max_held)
    if recorder.failed_batches:
        end = min(batch[0][0] for batch in recorder.failed_batches)
        assert message == f"batch from {end}"
    else:
        end = len(items)
        assert message == ("no more items" if ends_badly else None)
    assert results == [(item, run_alone(item)) for item in items[:end]]


@given(st.integers(1, 6), BATCH_SIZES, MAX_HELD, st.integers(0, 30))
def test_endless_items(kind_count, batch_size, max_held, wanted):
    # The items of kind 0 are rare: the first of them must not hold back the others for ever.
    items = ((n, n % kind_count if n % 17 else 0) for n in itertools.count())
    recorder = Recorder()
    results = list(itertools.islice(recorder.results(items, batch_size, max_held), wanted))
    assert [number for (number, _), _ in results] == list(range(wanted))
    assert recorder.taken <= wanted + max_held
    check_batches(recorder, batch_size, max_held)


def test_nothing_is_taken_before_a_result_is_asked_for():
    recorder = Recorder()
    results = recorder.results([(0, 0), (1, 0)], 1, 1)
    assert recorder.taken == 0
    next(results)
    assert recorder.taken == 1


def test_error_of_kind_of():
    results = run_in_batches([1, 2, 0, 4], lambda x: 6 // x, lambda batch: batch, 4, 8)
    assert [next(results), next(results)] == [(1, 1), (2, 2)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_wrong_number_of_results():
    def run(batch):
        return batch if batch == ["a"] else [*batch, "one more"]

    results = run_in_batches("abb", lambda x: x, run, 2, 8)
    assert next(results) == ("a", "a")
    with pytest.raises(ValueError, match=r"zip\(\)"):
        next(results)
