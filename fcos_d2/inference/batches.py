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
    # By kind, with their numbers. The first group is the one whose first item has waited longest.
    waiting: dict[Hashable, list[tuple[int, Item]]] = {}
    finished: dict[int, tuple[Item, Result]] = {}
    next_number = 0
    error: Exception | None = None
    end: float = math.inf  # number of the first item that has no result because of the error

    def run_waiting(kind: Hashable) -> Iterator[tuple[Item, Result]]:
        """Run the items of a kind, and yield all results whose turn it is then."""
        nonlocal next_number, error, end
        batch = [(number, item) for number, item in waiting.pop(kind) if number < end]
        try:
            results = run([item for _, item in batch]) if batch else []
            pairs = list(zip(batch, results, strict=True))
            finished.update({number: (item, result) for (number, item), result in pairs})
        except Exception as e:
            error, end = e, batch[0][0]  # an error before was that of a later item
        while next_number in finished:
            yield finished.pop(next_number)
            next_number += 1

    try:
        for number, item in enumerate(items):
            kind = kind_of(item)
            waiting.setdefault(kind, []).append((number, item))
            if len(waiting[kind]) == batch_size:
                yield from run_waiting(kind)
            oldest_kind = next(iter(waiting), None)
            # All items from the oldest waiting one on are held.
            if waiting and number - waiting[oldest_kind][0][0] + 1 >= max_held:
                yield from run_waiting(oldest_kind)
            if error is not None:
                break
    except Exception as e:
        error = e
    for kind in list(waiting):
        yield from run_waiting(kind)
    if error is not None:
        raise error
