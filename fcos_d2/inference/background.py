"""Work that goes on in threads while the network runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_background(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, threads: int = 1
) -> Iterator[Result]:
    """``function(item)`` for each item, in the order of the items.

    Up to ``ahead`` results are worked on, or wait, while the caller uses another one. Threads are
    enough for images: PIL and OpenCV do not hold Python's lock while they read, resize or write.

    Raises:
        Exception: what ``items`` or ``function`` raise, after the results of all items before.
    """
    waiting: deque[Future[Result]] = deque()
    error: Exception | None = None
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                try:
                    waiting.append(pool.submit(function, next(items)))
                except StopIteration:
                    break
                except Exception as e:
                    error = e
                    break
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    if error is not None:
        raise error
