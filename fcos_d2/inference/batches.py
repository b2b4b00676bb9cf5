"""Runs items in batches of one kind, and gives the results in the order of the items."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_batches(
    items: Iterable[Item],
    kind_of: Callable[[Item], Hashable],
    run: Callable[[list[Item]], Iterable[Result]],
    batch_size: int,
    max_held: int,
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in the order of the items.

    An item waits for others of its kind until there are ``batch_size`` of them, the items end,
    or ``max_held`` are held.

    Args:
        items: may be endless.
        kind_of: items of which this is equal may run together.
        run: the results of a list of items of one kind, in their order.
        batch_size: the most items that run together, at least 1.
        max_held: the most items that are taken while their results are not yet yielded, at least
            1, which runs each item alone.

    Raises:
        ValueError: if ``run`` returns more or fewer results than it was given items.
        Exception: what ``items``, ``kind_of`` or ``run`` raise. No further item is taken then.
            The results of all items before the one that failed, or before the first of the batch
            that failed, are yielded first.
    """
    error: Exception | None = None
    end: float = math.inf  # number of the first item that has no result because of the error

    def until_error() -> Iterator[tuple[Hashable, Item]]:
        nonlocal error
        try:
            for item in items:
                yield kind_of(item), item
                if error is not None:
                    return
        except Exception as e:
            error = e

    finished: dict[int, tuple[Item, Result]] = {}
    next_number = 0
    for whole_batch in _batches_of_a_kind(until_error(), batch_size, max_held):
        batch = [(number, item) for number, item in whole_batch if number < end]
        if not batch:
            continue
        try:
            results = list(zip(batch, run([item for _, item in batch]), strict=True))
        except Exception as e:
            # If there was an error before, it was that of a later item.
            error, end = e, batch[0][0]
            continue
        for (number, item), result in results:
            finished[number] = item, result
        while next_number in finished:
            yield finished.pop(next_number)
            next_number += 1
    if error is not None:
        raise error


def _batches_of_a_kind(
    items: Iterable[tuple[Hashable, Item]], batch_size: int, max_held: int
) -> Iterator[list[tuple[int, Item]]]:
    """Groups pairs of kind and item into batches, of one kind, of pairs of number and item."""
    # The groups by kind. The first group is the one whose first item has waited longest.
    waiting: dict[Hashable, list[tuple[int, Item]]] = {}
    for number, (kind, item) in enumerate(items):
        waiting.setdefault(kind, []).append((number, item))
        if len(waiting[kind]) == batch_size:
            yield waiting.pop(kind)
        if waiting:
            oldest_kind, oldest_group = next(iter(waiting.items()))
            # Whoever wants results in order holds all items from the oldest waiting one on.
            if number - oldest_group[0][0] + 1 >= max_held:
                yield waiting.pop(oldest_kind)
    yield from waiting.values()
