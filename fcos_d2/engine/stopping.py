"""A signal stops a run, which saves a checkpoint first.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end a run after the current step, or within seconds of an
evaluation. All processes stop after the same step. Clusters send these signals before they take a
machine away; ``--resume`` goes on as if nothing had happened. A second signal ends the process at
once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from .peers import Agreement

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Within it, signals are one: the terminal, the parent process and a cluster may all send it.
_SAME_SIGNAL_WITHIN = 1.0  # seconds
_ASKED_EVERY = 2.0  # seconds of an evaluation


class Stopped(SystemExit):
    """Ends the process after a stop signal, with its :func:`exit_code`."""

    def __init__(self, number: int):
        super().__init__(exit_code(number))


def exit_code(number: int) -> int:
    """The exit code of a run that a signal has stopped: 130 for Ctrl-C, 143 for the others."""
    return 130 if number == signal.SIGINT else 143


class StopSignals:
    """The stop signals that this process gets.

    Attributes:
        requested: the first signal, 0 for none.
        is_recording: whether they are recorded, or do what they did before.
    """

    numbers = _SIGNALS

    def __init__(self):
        self.requested, self.is_recording, self._raises = 0, False, False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the signals; outside the main thread, where Python handles none, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Python's handlers do not run while the main thread waits for another process in C++. So a
        # thread reads what the interpreter writes into a pipe when a signal comes.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        thread = threading.Thread(target=self._listen, args=(read_end,), daemon=True)
        thread.start()
        self.requested, self.is_recording = 0, True
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        pipe_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(pipe_before)
            # One of several processes that stops is about to end, and its own signal may come after
            # the news of another's.
            ends = isinstance(sys.exc_info()[1], Stopped) and comm.get_world_size() > 1
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if ends else handler)
            os.write(write_end, b"\0")  # ends the thread
            thread.join()
            os.close(write_end)
            self.requested, self.is_recording = 0, False

    @contextmanager
    def raising(self, is_alone: bool = True) -> Iterator[None]:
        """What this process does alone, while no other one waits for it in between.

        Args:
            is_alone: whether that is so; else the block changes nothing.

        Raises:
            Stopped: as soon as a signal comes.
        """
        before = self._raises
        self._raises = before or (is_alone and self.is_recording)
        try:
            if self._raises and self.requested:
                raise Stopped(self.requested)
            yield
        finally:
            self._raises = before

    def _handle(self, number: int, frame: object) -> None:
        self.requested = self.requested or number
        if self._raises:
            self._raises = False  # what is cleaned up now is not interrupted
            raise Stopped(number)

    def _listen(self, read_end: int) -> None:
        first = None
        with open(read_end, "rb", buffering=0) as pipe:
            while (number := pipe.read(1)[0]) != 0:
                if number not in _SIGNALS:  # there are signals of others, such as SIGCHLD
                    continue
                if first is None:
                    first, self.requested = time.monotonic(), self.requested or number
                    if comm.is_main_process():
                        os.write(2, b"Stopping after this step. Ctrl-C once more ends it at once\n")
                elif time.monotonic() - first > _SAME_SIGNAL_WITHIN:
                    os._exit(exit_code(number))


# One object, since signals belong to the process.
stop_signals = StopSignals()


class StopOnSignal(HookBase):
    """Ends the training after a step, when one of the processes got a stop signal before.

    With several processes it is the step after the one with the signal. After the last step it
    leaves the stop to the evaluation.
    """

    def before_train(self) -> None:
        self._agree = Agreement()

    def after_step(self) -> None:
        answer = self._agree(stop_signals.requested)
        if answer and answer[0] and self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.gather_metrics()  # a checkpoint follows, which must be finite
            raise Stopped(answer[0])


class StoppableCOCOEvaluator(COCOEvaluator):
    """Detectron2's, whose first process stops at once while it evaluates what all have found."""

    in_stoppable = False  # whether a StoppableEvaluator tells the other processes

    # Private, but Detectron2's own RotatedCOCOEvaluator overrides it, too. There is no other place
    # that one process reaches alone.
    def _eval_predictions(self, predictions, img_ids=None) -> None:
        with stop_signals.raising(self.in_stoppable or comm.get_world_size() == 1):
            super()._eval_predictions(predictions, img_ids)


class StoppableEvaluator(DatasetEvaluator):
    """An evaluator during a training of several processes, which all stop at the same point of it.

    Every few seconds the processes ask each other for a stop. Those that are done with their images
    go on asking until all are.
    """

    def __init__(self, evaluator: DatasetEvaluator | Sequence[DatasetEvaluator]):
        is_one = isinstance(evaluator, DatasetEvaluator)
        self._evaluator = evaluator if is_one else DatasetEvaluators(evaluator)
        if isinstance(evaluator, StoppableCOCOEvaluator):
            evaluator.in_stoppable = True

    def reset(self) -> None:
        self._evaluator.reset()
        self._agree, self._asked = Agreement(), time.monotonic()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self._evaluator.process(inputs, outputs)
        if time.monotonic() - self._asked > _ASKED_EVERY:
            self._ask(is_done=False)

    def evaluate(self) -> dict | None:
        while not self._ask(is_done=True):
            pass
        results = None
        with suppress(Stopped):  # the others learn it from the next question
            results = self._evaluator.evaluate()
        self._agree = Agreement()
        self._ask(is_done=True)
        self._ask(is_done=True)  # which brings the answer to the first one
        return results

    def _ask(self, is_done: bool) -> bool:
        """Whether all processes were done when they asked the time before."""
        self._asked = time.monotonic()
        answer = self._agree(stop_signals.requested, not is_done)
        if answer is None:
            return False
        number, some_work = answer
        if number:
            raise Stopped(number)
        return not some_work
