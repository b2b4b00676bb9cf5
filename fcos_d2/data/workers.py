"""Processes that load images, and the signals that stop a run."""

import os
import signal
import sys
from collections.abc import Iterator
from functools import cache, partial
from multiprocessing import RawValue
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


class SteadyLoader(DataLoader):
    """A DataLoader whose workers ignore the stop signals as long as the trainer runs.

    A cluster or a terminal sends its signals to all processes of a job, and the trainer needs its
    workers to finish a step. They end when it ends them.
    """

    @classmethod
    def of(cls, loader: DataLoader) -> "SteadyLoader":
        """Make one of Detectron2's loaders, in place."""
        loader.__class__ = cls  # which only adds a method: Detectron2 takes no class for its loader
        return loader

    def __iter__(self) -> Iterator[Any]:
        self.worker_init_fn = partial(_ignore_stop_signals, _is_leaving())
        if self.num_workers and sys.platform == "linux":
            # Processes of --num-gpus would spawn theirs, each of which imports everything anew.
            self.multiprocessing_context = "fork"
        # New workers have the mask of this thread.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@cache
def _is_leaving() -> RawValue:
    """Shared with the workers: whether this process ends. Python then sends them SIGTERM."""
    is_leaving = RawValue("b", False)
    # atexit is too late in a process that multiprocessing has started.
    Finalize(None, setattr, (is_leaving, "value", True), exitpriority=100)
    return is_leaving


def _ignore_stop_signals(is_leaving: RawValue, worker_id: int) -> None:
    signal.set_wakeup_fd(-1)  # a forked worker has that of the trainer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: is_leaving.value and os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
