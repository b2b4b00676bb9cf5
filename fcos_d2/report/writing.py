"""The files of a report: figures, pictures of errors, numbers as JSON, and the page."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image

from ..analysis.charts import save_figures
from ..checkpoint import replacing
from ..data import load_dataset
from ..data.image_files import read_image
from . import run_charts
from .error_pictures import draw_error
from .errors import KINDS, Error, confusion_matrix, find_errors
from .evaluation import AREAS, CURVE_IOUS, MATCH_IOU, BoxEvaluation
from .runs import Run, ground_truth, read_runs

_PICTURES = 6  # of each kind of error
_AP = {
    "AP": {},
    "AP50": {"iou": 0.5},
    "AP75": {"iou": 0.75},
    "APs": {"area": "small"},
    "APm": {"area": "medium"},
    "APl": {"area": "large"},
}


def report_after_training(cfg: CfgNode) -> list[Path]:
    """Write ``OUTPUT_DIR/report``, in one process; errors become warnings. Returns the pages."""
    logger, pages = logging.getLogger(__name__), []
    for name in cfg.DATASETS.TEST:
        try:
            pages.append(_write_one(cfg, name, Path(cfg.OUTPUT_DIR, "report")))
            logger.info(f"The report: {pages[-1]}")
        except Exception as error:  # The training is done, and its checkpoints are written.
            expected = isinstance(error, ValueError | OSError)
            logger.warning(f"There is no report on {name!r}. {error}", exc_info=not expected)
    return pages


def write_report(
    cfg: CfgNode, folder: str | PathLike | None = None, compare: Sequence[str | PathLike] = ()
) -> list[Path]:
    """Write a report on the detections that a run left in OUTPUT_DIR/inference.

    Args:
        cfg: of the run. Each data set of DATASETS.TEST has a report.
        folder: OUTPUT_DIR/report if not given. Several data sets have folders of their names in
            it. Files of an earlier report are replaced.
        compare: folders of other runs, whose detections are compared with these.

    Returns:
        the pages.

    Raises:
        FileNotFoundError: for a run without detections on a data set.
        ValueError: if there is no such data set, or if detections are of another one.
    """
    folder = Path(cfg.OUTPUT_DIR, "report") if folder is None else Path(folder)
    return [_write_one(cfg, name, folder, compare) for name in cfg.DATASETS.TEST]


def _write_one(
    cfg: CfgNode, name: str, folder: Path, compare: Sequence[str | PathLike] = ()
) -> Path:
    """The report on one of the data sets; see :func:`write_report`."""
    records = load_dataset(cfg, name)
    runs = read_runs([cfg.OUTPUT_DIR, *compare], name, ground_truth(name))
    folder = folder / name if len(cfg.DATASETS.TEST) > 1 else folder
    return _Report(folder, name, runs).write(records, Path(cfg.OUTPUT_DIR, "augmented.jpg"))


class _Report:
    """A report on the first of the runs, with the others beside it."""

    def __init__(self, folder: Path, dataset: str, runs: Sequence[Run]):
        self.folder, self.dataset, self.runs = folder, dataset, runs
        self.evaluation: BoxEvaluation = runs[0].evaluation
        self.curve = self.evaluation.score_curve()
        # Where nothing is found, any threshold does.
        self.threshold = 0.5 if self.curve.threshold is None else self.curve.threshold
        self.errors = find_errors(self.evaluation, self.threshold)
        self.confusion = confusion_matrix(self.evaluation, self.threshold)
        self.class_ap: dict[str, list[float | None]] = self._by_run(
            lambda e: [e.average_precision(category=c) for c in e.class_names]
        )

    def write(self, records: Sequence[dict], augmented: Path) -> Path:
        """Write all files, the page last; returns its path.

        ``augmented`` is the picture of the first images of the training, if there is one.
        """
        (self.folder / "errors").mkdir(parents=True, exist_ok=True)
        numbers = self._numbers()
        self._write("report.json", json.dumps(numbers, indent=1))
        (self.folder / "thresholds.json").unlink(missing_ok=True)
        if self.curve.threshold is not None:
            # What ``fcos_d2.predict --threshold`` reads.
            found = ((row["name"], row["threshold"]) for row in numbers["classes"])
            best = {name: self.threshold if t is None else t for name, t in found}
            content = {"iou": MATCH_IOU, "threshold": self.threshold, "classes": best}
            self._write("thresholds.json", json.dumps(content, indent=1))
        figures = self._figures(numbers["ap"])
        save_figures(figures, self.folder)
        (self.folder / augmented.name).unlink(missing_ok=True)
        if augmented.is_file():
            shutil.copyfile(augmented, self.folder / augmented.name)
        pictures, problem = self._write_pictures(records)
        environment = Environment(loader=PackageLoader(__name__, "."), autoescape=True)
        page = environment.get_template("page.html.j2").render(
            report=self,
            numbers=numbers,
            now=datetime.now(),
            iou=MATCH_IOU,
            kinds=KINDS,
            augmented=augmented.name if augmented.is_file() else "",
            widths={name: round(96 * f.get_figwidth()) for name, f in figures.items()},
            pictures=pictures,
            pictures_problem=problem,
        )
        return self._write("index.html", page)

    def _write(self, name: str, text: str) -> Path:
        with replacing(str(self.folder / name), "wb") as file:
            file.write(text.encode(errors="replace"))  # names may hold what is no character
        return self.folder / name

    def _figures(self, ap: dict[str, dict[str, float | None]]) -> dict[str, Figure]:
        """By name, without one that has nothing to show."""
        names = list(self.evaluation.class_names.values())
        sizes = {run: [x["AP"], x["APs"], x["APm"], x["APl"]] for run, x in ap.items()}
        figures = {
            "training": run_charts.training_figure({r.name: r.metrics for r in self.runs}),
            "precision_recall": run_charts.precision_recall_figure(self._by_run(lambda e: e)),
            "thresholds": run_charts.score_figure(self.curve),
            "sizes": run_charts.ap_figure(AREAS, sizes, "AP by size"),
            "classes": run_charts.ap_figure(names, self.class_ap, "AP by class"),
            "confusion": run_charts.confusion_figure(self.confusion, names),
        }
        return {name: figure for name, figure in figures.items() if figure is not None}

    def _by_run(self, value: Callable[[BoxEvaluation], Any]) -> dict[str, Any]:
        return {run.name: value(run.evaluation) for run in self.runs}

    def _numbers(self) -> dict:
        """All that the page says, for programs."""
        names, ap = self.evaluation.class_names, self.class_ap[self.runs[0].name]
        curves = map(self.evaluation.score_curve, names)
        return {
            "dataset": self.dataset,
            "ap": self._by_run(
                lambda e: {name: e.average_precision(**of) for name, of in _AP.items()}
            ),
            "class_agnostic_ap": self._by_run(
                lambda e: {str(x): 100 * e.precision_recall(x)[1].mean() for x in CURVE_IOUS}
            ),
            "threshold": self.curve.threshold,
            "classes": [
                {"name": name, "boxes": curve.boxes, "ap": of_class, **curve.at_best()}
                for name, curve, of_class in zip(names.values(), curves, ap, strict=True)
            ],
            "confusion": {
                "classes": [*names.values(), "background"],
                "counts": self.confusion.tolist(),
            },
            "errors": {kind: sum(e.kind == kind for e in self.errors) for kind in KINDS},
        }

    def _write_pictures(self, records: Sequence[dict]) -> tuple[dict[str, list[dict]], str]:
        """Pictures of the largest errors of each kind, and why some are missing."""
        sources = {record["image_id"]: record["file_name"] for record in records}
        pictures, problem = {kind: [] for kind in KINDS}, ""
        for kind in KINDS:
            name = f"errors/{kind.replace(' ', '_')}_"
            for earlier in self.folder.glob(f"{name}[1-{_PICTURES}].png"):
                earlier.unlink()
            largest = [e for e in self.errors if e.kind == kind][:_PICTURES]
            for number, error in enumerate(largest, 1):
                source = sources.get(error.image_id, "")
                try:
                    image = read_image(source, "BGR")
                except Exception as unread:  # PIL raises many kinds
                    problem = f"Some pictures are missing. {source} could not be read: {unread}"
                    continue
                picture = draw_error(image, error, self.evaluation, self.threshold)
                file = f"{name}{number}.png"
                Image.fromarray(picture[:, :, ::-1]).save(self.folder / file)
                caption = f"{self._caption(error)}. {Path(source).name}"
                pictures[kind].append({"file": file, "caption": caption})
        return pictures, problem

    def _caption(self, error: Error) -> str:
        names = self.evaluation.class_names
        x0, y0, x1, y1 = error.box
        score = "" if error.score is None else f"{error.score:.2f}, "
        text = f"{names[error.category]} {score}{x1 - x0:.0f} x {y1 - y0:.0f} pixels"
        if error.other is None:
            return text
        whose = "detection" if error.kind == "missed" else "box"
        return f"{text}; IoU {error.iou:.2f} with a {whose} of {names[error.other]}"
