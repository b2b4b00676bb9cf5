"""A signal stops a run, which saves a checkpoint first.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end a run after the current step, or in the middle of an
evaluation. All processes stop after the same step. Clusters send these signals before they take a
machine away; ``--resume`` goes on as if nothing had happened.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.engine import HookBase
from detectron2.utils import comm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_INTERRUPT = 1.0  # seconds
# Global, as signals belong to the process.
_stop_requested = 0  # the last signal, 0 for none
_is_evaluating = False  # an evaluation can end at any point


class Stopped(SystemExit):
    """Ends the process after a signal, with its :func:`exit_code`."""

    def __init__(self):
        super().__init__(exit_code(_stop_requested))


def exit_code(number: int) -> int:
    """The exit code of a run that a signal has stopped: 130 for Ctrl-C, 143 for the others."""
    return 130 if number == signal.SIGINT else 143


@contextmanager
def stop_signals_recorded() -> Iterator[None]:
    """Record the stop signals; outside the main thread, where Python handles none, do nothing."""
    global _stop_requested
    _stop_requested = 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    first_interrupt: list[float] = []

    def record(number: int, frame: object) -> None:
        global _stop_requested
        _stop_requested = number
        if number == signal.SIGINT:
            first_interrupt.append(time.monotonic())
            # The terminal and the parent process may both send the first one.
            if first_interrupt[-1] - first_interrupt[0] > _SAME_INTERRUPT:
                signal.signal(number, before[number])
                raise KeyboardInterrupt
        if _is_evaluating:
            raise Stopped
        if comm.is_main_process():
            os.write(2, b"Stopping after this step. Ctrl-C once more ends it at once\n")

    for number in STOP_SIGNALS:
        signal.signal(number, record)
    try:
        yield
    finally:
        _stop_requested = 0
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stoppable_evaluation() -> Iterator[None]:
    """An evaluation, which ends at once when a signal requests a stop.

    Raises:
        Stopped: on the signal, and in place of an error after it: another process may have caused
            the error by stopping first.
    """
    global _is_evaluating
    _is_evaluating = True
    try:
        if _stop_requested:
            raise Stopped
        yield
    except Exception as error:
        if _stop_requested:
            raise Stopped from error
        raise
    finally:
        _is_evaluating = False


class StopOnSignal(HookBase):
    """Ends the training after the step in which one of the processes got a stop signal.

    After the last step it leaves that to the evaluation.
    """

    def after_step(self) -> None:
        global _stop_requested
        requested = max(comm.all_gather(_stop_requested))
        if requested == 0:  # do not assign it: a signal may have come in the meantime
            return
        _stop_requested = requested
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.save_where_stopped()
            comm.synchronize()  # a process that ends may take the others with it
            raise Stopped
