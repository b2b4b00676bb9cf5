"""The files of a report: figures, pictures of errors, numbers as JSON, and the page."""

import json
import logging
import math
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from os import PathLike
from pathlib import Path

from detectron2.config import CfgNode
from jinja2 import Environment, PackageLoader
from PIL import Image

from ..analysis.records import load_dataset
from ..checkpoint import replacing
from ..data.image_files import read_image
from . import run_charts
from .error_pictures import ErrorPictures
from .errors import KINDS, Error, confusion_matrix, find_errors
from .evaluation import AREAS, CURVE_IOUS, MATCH_IOU, BoxEvaluation, ScoreCurve
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


def report_after_training(cfg: CfgNode) -> None:
    """Write ``OUTPUT_DIR/report``; what stands in the way of it is a warning.

    To be called by one process.
    """
    logger = logging.getLogger(__name__)
    for name in cfg.DATASETS.TEST:
        try:
            page = _write_one(cfg, name, Path(cfg.OUTPUT_DIR, "report"))
            logger.info(f"The report: {page}")
        except Exception as error:  # The training is done, and its checkpoints are written.
            expected = isinstance(error, ValueError | OSError)
            logger.warning(f"There is no report on {name!r}. {error}", exc_info=not expected)


def write_report(
    cfg: CfgNode,
    folder: str | PathLike | None = None,
    compare: Sequence[str | PathLike] = (),
) -> list[Path]:
    """Write a report on the detections that a run left in OUTPUT_DIR/inference.

    Args:
        cfg: of the run. Each data set of DATASETS.TEST has a report.
        folder: OUTPUT_DIR/report if not given. With several data sets, reports lie in folders
            under it, with their names. Files of an earlier report are replaced.
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
    return _Report(folder, name, runs).write(records)


class _Report:
    """On the first of some runs, the others beside it."""

    def __init__(self, folder: Path, dataset: str, runs: Sequence[Run]):
        self.folder, self.dataset, self.runs = folder, dataset, runs
        self.evaluation: BoxEvaluation = runs[0].evaluation
        self.curve = self.evaluation.score_curve()
        self.curves = {c: self.evaluation.score_curve(c) for c in self.evaluation.class_names}
        # Any does where nothing is found.
        self.threshold = 0.5 if self.curve.threshold is None else self.curve.threshold
        self.errors = find_errors(self.evaluation, self.threshold)
        self.confusion = confusion_matrix(self.evaluation, self.threshold)

    def write(self, records: Sequence[dict]) -> Path:
        """Write all files, the page last; returns its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = self._numbers()
        self._write_json("report.json", numbers)
        if self.curve.threshold is None:
            (self.folder / "thresholds.json").unlink(missing_ok=True)
        else:
            self._write_json("thresholds.json", self._thresholds())
        widths = {}  # in pixels of a page
        for name, figure in self._figures().items():
            if figure is not None:
                figure.savefig(self.folder / name)
                widths[name] = round(96 * figure.get_figwidth())
        pictures, problem = self._write_pictures(records)
        page = self.folder / "index.html"
        with replacing(str(page), "wb") as file:
            # Names may hold what is no character.
            file.write(self._page(numbers, widths, pictures, problem).encode(errors="replace"))
        return page

    def _write_json(self, name: str, content: dict) -> None:
        with replacing(str(self.folder / name), "w") as file:
            json.dump(content, file, indent=1)

    def _figures(self) -> dict:
        evaluations = {run.name: run.evaluation for run in self.runs}
        class_names = list(self.evaluation.class_names.values())
        sizes, classes = (
            {name: of(evaluation) for name, evaluation in evaluations.items()}
            for of in (_ap_of_sizes, _ap_of_classes)
        )
        return {
            "training.png": run_charts.training_figure({r.name: r.metrics for r in self.runs}),
            "precision_recall.png": run_charts.precision_recall_figure(evaluations),
            "thresholds.png": run_charts.score_figure(self.curve),
            "sizes.png": run_charts.bars_figure(AREAS, sizes, "AP by size"),
            "classes.png": run_charts.bars_figure(class_names, classes, "AP by class"),
            "confusion.png": run_charts.confusion_figure(self.confusion, class_names),
        }

    def _thresholds(self) -> dict:
        """What ``fcos_d2.predict --threshold`` reads."""
        of_classes = {c.name: c.threshold for c in self.curves.values()}
        return {
            "iou": MATCH_IOU,
            "threshold": self.threshold,
            "classes": {
                n: self.threshold if threshold is None else threshold
                for n, threshold in of_classes.items()
            },
        }

    def _numbers(self) -> dict:
        """All that the page says, for programs."""
        curve_ap = {
            run.name: {
                str(iou): 100 * float(run.evaluation.precision_recall(iou)[1].mean())
                for iou in CURVE_IOUS
            }
            for run in self.runs
        }
        return {
            "dataset": self.dataset,
            "ap": {
                run.name: {k: run.evaluation.average_precision(**of) for k, of in _AP.items()}
                for run in self.runs
            },
            "class_agnostic_ap": curve_ap,
            "threshold": self.curve.threshold,
            "classes": self._class_rows(),
            "confusion": {
                "classes": [*self.evaluation.class_names.values(), "background"],
                "counts": self.confusion.tolist(),
            },
            "errors": {kind: sum(e.kind == kind for e in self.errors) for kind in KINDS},
        }

    def _class_rows(self) -> list[dict]:
        rows = []
        for category, curve in self.curves.items():
            precision, recall, f1 = _at_best(curve)
            rows.append(
                {
                    "name": curve.name,
                    "boxes": curve.boxes,
                    "ap": self.evaluation.average_precision(category=category),
                    "threshold": curve.threshold,
                    "f1": f1,
                    "precision": precision,
                    "recall": recall,
                }
            )
        return rows

    def _write_pictures(self, records: Sequence[dict]) -> tuple[dict[str, list[dict]], str]:
        """Pictures of the largest errors of each kind, and what is to be said of missing ones."""
        (self.folder / "errors").mkdir(exist_ok=True)
        for kind in KINDS:
            for number in range(_PICTURES):
                (self.folder / _picture_file(kind, number)).unlink(missing_ok=True)
        draw = ErrorPictures(
            self.evaluation.truth,
            self.evaluation.detections,
            self.evaluation.class_names,
            self.threshold,
        )
        files = {record["image_id"]: record["file_name"] for record in records}
        pictures, problem = {}, ""
        for kind in KINDS:
            pictures[kind] = []
            largest = islice((e for e in self.errors if e.kind == kind), _PICTURES)
            for number, error in enumerate(largest):
                source = files.get(error.image_id, "")
                try:
                    image = read_image(source, "BGR")
                except Exception as unread:  # PIL raises many kinds
                    problem = f"Some pictures are missing. {source} could not be read: {unread}"
                    continue
                file = _picture_file(kind, number)
                Image.fromarray(draw.draw(image, error)[:, :, ::-1]).save(self.folder / file)
                caption = f"{self._caption(error)}. {Path(source).name}"
                pictures[kind].append({"file": file, "caption": caption})
        return pictures, problem

    def _caption(self, error: Error) -> str:
        names = self.evaluation.class_names
        x0, y0, x1, y1 = error.box
        said = f"{x1 - x0:.0f} x {y1 - y0:.0f} pixels"
        if error.score is not None:
            said = f"{error.score:.2f}, {said}"
        overlap = f"; IoU {error.iou:.2f}" if error.iou else ""
        if error.other is not None:
            whose = "detection" if error.kind == "missed" else "box"
            overlap += f" with a {whose} of {names[error.other]}"
        return f"{names[error.category]} {said}{overlap}"

    def _page(
        self, numbers: dict, widths: dict[str, int], pictures: dict[str, list[dict]], problem: str
    ) -> str:
        environment = Environment(loader=PackageLoader(__name__, "."), autoescape=True)
        environment.filters["number"] = _number
        truth = self.evaluation.truth
        return environment.get_template("page.html.j2").render(
            run=self.runs[0].name,
            dataset=self.dataset,
            images=len(truth.imgs),
            boxes=self.curve.boxes,
            detections=len(self.evaluation.detections.anns),
            date=f"{datetime.now():%Y-%m-%d %H:%M}",
            detections_date=f"{self.runs[0].written:%Y-%m-%d %H:%M}",
            ap_names=list(_AP),
            ap={name: values.values() for name, values in numbers["ap"].items()},
            widths=widths,
            iou=MATCH_IOU,
            threshold=self.curve.threshold,
            f1=0.0 if self.curve.best is None else self.curve.f1[self.curve.best],
            shown_threshold=self.threshold,
            classes=numbers["classes"],
            kinds=[
                {"name": k, "means": m, "count": numbers["errors"][k], "pictures": pictures[k]}
                for k, m in KINDS.items()
            ],
            pictures_problem=problem,
        )


def _picture_file(kind: str, number: int) -> str:
    return f"errors/{kind.replace(' ', '_')}_{number + 1}.png"


def _at_best(curve: ScoreCurve) -> tuple[float | None, float | None, float | None]:
    """Precision, recall and F1 at the best threshold."""
    if curve.best is None:
        return None, None, None
    return tuple(float(x[curve.best]) for x in (curve.precision, curve.recall, curve.f1))


def _ap_of_sizes(evaluation: BoxEvaluation) -> list[float | None]:
    return [evaluation.average_precision(area=area) for area in AREAS]


def _ap_of_classes(evaluation: BoxEvaluation) -> list[float | None]:
    return [evaluation.average_precision(category=c) for c in evaluation.class_names]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
