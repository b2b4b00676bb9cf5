"""What the loggers of SOLVER.LOGGERS have in common."""

import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..checkpoint import replacing

_WINDOW = 20  # iterations of the median, as in metrics.json
_PAUSE = 1800.0  # seconds without a call after one that failed: such calls may take minutes
_warned: set[Path] = set()  # files of runs whose failure was said
_LARGEST_ARTIFACT = 500e6  # bytes; services charge for what they store


class RunLogger(EventWriter, ABC):
    """One run at a service, for which subclasses make the calls.

    What fails is one warning, and never stops the training. A file in OUTPUT_DIR has the id of the
    run, and what was sent: a resumed training goes on in the same run, and sends nothing twice of
    what a killed process had sent after its last checkpoint.
    """

    name: str  # in SOLVER.LOGGERS, of the package, and of the extra of setup.py
    _run: Any = None  # of the package, once it is open

    def __init__(self, cfg: CfgNode, resume: bool):
        """
        Args:
            resume: go on in the run that OUTPUT_DIR names, if it names one.
        """
        self._cfg, self._folder = cfg, Path(cfg.OUTPUT_DIR)
        self._file = self._folder / f"{self.name}_run.json"
        self._record = {"run": None, "sent": {}}  # the last iteration of each metric
        if resume and self._file.is_file():
            with suppress(ValueError):  # damaged: a new run
                self._record = json.loads(self._file.read_text())
        self._paused_until = -float("inf")
        self._is_open()

    def write(self) -> None:
        if self._is_open():
            self._attempt(self._write)

    def _write(self) -> None:
        sent, fresh = self._record["sent"], defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(_WINDOW)
        for key, (value, iteration) in latest.items():
            if iteration > sent.get(key, -1):
                fresh[iteration][key] = value
        for iteration, metrics in fresh.items():
            sent.update(dict.fromkeys(metrics, iteration))
        # Before they are sent: after a kill, one row too few is better than one twice.
        self._keep_record()
        for iteration in sorted(fresh):
            self._send(fresh[iteration], iteration)

    def close(self) -> None:
        if self._run is not None:
            self._attempt(self._close, sys.exc_info()[1])
            self._run = None

    def send_results(self, reports: Sequence[Path]) -> None:
        """Send the folders of reports, and the best checkpoint, or the last if there is no best.

        Of a checkpoint of more than 500 MB only the path.
        """
        if not self._is_open():
            return
        for page in reports:
            place = "report" if len(reports) == 1 else f"report/{page.parent.name}"
            self._attempt(self._send_report, page.parent, place)
        files = [self._folder / f"model_{name}.pth" for name in ("best", "final")]
        checkpoint = next((file.absolute() for file in files if file.is_file()), None)
        if checkpoint is None:
            return
        size = checkpoint.stat().st_size
        is_small = size <= _LARGEST_ARTIFACT
        what = checkpoint.name if is_small else f"the path of {checkpoint.name}, but not the file"
        logging.getLogger(__name__).info(f"{self.name} gets {what}: it has {size / 1e6:.0f} MB")
        self._attempt(self._send_checkpoint, checkpoint, is_small)

    @abstractmethod
    def _open(self, run_id: str | None) -> str:
        """Set ``_run`` to a new run, or to that of the id, send the config, return the id."""

    @abstractmethod
    def _send(self, metrics: dict[str, float], iteration: int) -> None: ...

    @abstractmethod
    def _send_report(self, folder: Path, place: str) -> None: ...

    @abstractmethod
    def _send_checkpoint(self, file: Path, is_small: bool) -> None:
        """Send the path, and the file if it is small."""

    @abstractmethod
    def _close(self, error: BaseException | None) -> None:
        """End the run, at least for this process, which ends with ``error`` or well."""

    def _is_open(self) -> bool:
        """Whether calls make sense now; opens the run if that has not worked before."""
        if self._run is None:
            self._attempt(self._open_run)
        return self._run is not None and time.monotonic() >= self._paused_until

    def _open_run(self) -> None:
        self._record["run"] = self._open(self._record["run"])
        self._keep_record()

    def _keep_record(self) -> None:
        with replacing(str(self._file), "w") as file:
            json.dump(self._record, file)

    def _attempt(self, call: Callable, *args: Any) -> None:
        if time.monotonic() < self._paused_until:
            return
        try:
            call(*args)
        except Exception as error:  # services, networks and packages raise all kinds
            self._paused_until = time.monotonic() + _PAUSE
            if self._file not in _warned:
                logging.getLogger(__name__).warning(
                    f"SOLVER.LOGGERS {self.name!r} fails ({type(error).__name__}: {error}). The "
                    f"run goes on without it. It is tried again after {_PAUSE / 60:.0f} minutes, "
                    "without a further warning. metrics.json has all metrics"
                )
            _warned.add(self._file)
