"""Runs items in batches of one kind; the results come in the order of the items."""

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
        kind_of: items for which this is equal may run together.
        run: returns the results of a list of items of one kind, in their order.
        batch_size: the most items that run together, at least 1.
        max_held: the most items that wait for their results at a time, at least 1, which runs each
            item alone.

    Raises:
        ValueError: if ``run`` returns more or fewer results than it was given items.
        Exception: what ``items``, ``kind_of`` or ``run`` raise. No further item is taken then.
            The results of all items before the one that failed, or before the first of the batch
            that failed, are yielded first.
    """
    error: Exception | None = None
    end: float = math.inf  # number of the first item that has no result because of the error

    def batches() -> Iterator[list[tuple[int, Item]]]:
        """Pairs of number and item, of one kind."""
        nonlocal error
        # Groups by kind. The first group is the one whose first item has waited longest.
        waiting: dict[Hashable, list[tuple[int, Item]]] = {}
        try:
            for number, item in enumerate(items):
                kind = kind_of(item)
                waiting.setdefault(kind, []).append((number, item))
                if len(waiting[kind]) == batch_size:
                    yield waiting.pop(kind)
                if waiting:
                    oldest_kind, oldest = next(iter(waiting.items()))
                    # All items from the oldest waiting one on are held.
                    if number - oldest[0][0] + 1 >= max_held:
                        yield waiting.pop(oldest_kind)
                if error is not None:
                    break
        except Exception as e:
            error = e
        yield from waiting.values()

    finished: dict[int, tuple[Item, Result]] = {}
    next_number = 0
    for whole_batch in batches():
        batch = [(number, item) for number, item in whole_batch if number < end]
        if not batch:
            continue
        try:
            results = list(zip(batch, run([item for _, item in batch]), strict=True))
        except Exception as e:
            error, end = e, batch[0][0]  # an error before was that of a later item
            continue
        for (number, item), result in results:
            finished[number] = item, result
        while next_number in finished:
            yield finished.pop(next_number)
            next_number += 1
    if error is not None:
        raise error
