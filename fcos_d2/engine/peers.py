"""What the processes of a run tell each other beside the training, from CPU to CPU over Gloo."""

import logging
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.utils import comm

_LEAVES = -1  # a message; any other one is the rank of a process that has failed
# Launchers report the process that ends first: the others wait, so that it is the one that failed.
_GRACE = 7.0  # seconds
_FOREVER = timedelta(days=3650)

_host_group: dist.ProcessGroup | None = None


def host_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """The group of all processes for messages between CPUs.

    The first call makes it: all processes must make it at the same time.

    Args:
        timeout: for its collectives, of the first call; by default PyTorch's.
    """
    global _host_group
    if _host_group is None:
        _host_group = dist.new_group(backend="gloo", timeout=timeout)
    return _host_group


def forget_host_group() -> None:
    """Call it when the processes leave their group."""
    global _host_group
    _host_group = None


class Agreement:
    """The largest values of all processes, given one call later, so that no process waits.

    All processes must call it equally often.
    """

    def __init__(self):
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, *values: int) -> list[int] | None:
        """Send this process's values.

        Returns:
            the largest values of the call before, None in the first call. With one process: the
            values.
        """
        if comm.get_world_size() == 1:
            return list(values)
        earlier, sent = self._pending, torch.tensor(values)
        work = dist.all_reduce(sent, dist.ReduceOp.MAX, host_group(), async_op=True)
        self._pending = sent, work
        if earlier is None:
            return None
        largest, work = earlier
        work.wait()
        return largest.tolist()


class PeerWatch:
    """Ends this process soon after another one has failed or was killed.

    Without it the process would wait for the other one in a collective: under NCCL until the
    timeout. The processes form a ring, and a thread of each waits for the one message of the next
    process: that it leaves, or which process has failed. It passes a failure on, until that process
    hears of it itself. A killed process closes its connections, which ends the waiting, too.
    """

    def __init__(self):
        rank, world = comm.get_rank(), comm.get_world_size()
        self._rank, self._next, self._previous = rank, (rank + 1) % world, (rank - 1) % world
        self._group = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._failed: int | None = None
        self._is_failing = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def leave(self, within: float | None = None) -> None:
        """Wait until the next process leaves, too, at most so many seconds."""
        self._send(_LEAVES)
        self._thread.join(within)

    def fail(self) -> None:
        """Tell the others that this process fails; a second call does nothing.

        If another one failed before, that is the reason, and this process ends without a word.
        """
        if self._is_failing:
            return
        # The main thread and the listening one notice a killed process at the same time.
        self._thread.join(0.5)
        if self._failed is not None:
            self._thread.join()  # it ends the process
        self._is_failing = True
        self._send(self._rank)
        self._thread.join(2.0)  # until all have heard of it

    def _send(self, message: int) -> None:
        with suppress(RuntimeError):  # the other one has gone
            dist.send(torch.tensor([message]), self._previous, self._group)

    def _listen(self) -> None:
        message = torch.empty(1, dtype=torch.int64)
        try:
            dist.recv(message, self._next, self._group)
        except RuntimeError:
            message.fill_(self._next)
            text = f"Process {self._next} has ended without an error of its own: it was killed"
            os.write(2, f"{text}, perhaps for lack of memory\n".encode())
        if message == _LEAVES or self._is_failing:
            return
        self._failed = int(message)
        # What this process still has to say follows from that failure, and would hide it.
        logging.disable()
        self._send(self._failed)
        time.sleep(_GRACE)
        os._exit(1)  # the main thread may wait in a collective, where no exception reaches it
