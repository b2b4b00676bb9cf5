"""What a run left in its folder: its metrics, and its detections on a data set."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..engine.resuming import metrics_rows
from .evaluation import BoxEvaluation


@dataclass(frozen=True)
class Run:
    """A run's detections on a data set, and its training."""

    name: str
    written: datetime  # the time of its detections
    evaluation: BoxEvaluation
    metrics: list[dict]  # of metrics.json, with the data set's as "AP" and "test_loss"


def read_runs(folders: Sequence[str | os.PathLike], dataset: str, truth: COCO) -> list[Run]:
    """
    Raises:
        FileNotFoundError: for a run without detections on the data set.
        ValueError: for detections that are of another data set, or cut short.
    """
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = [os.fspath(folder) for folder in folders]
    pairs = zip(map(Path, folders), names, strict=True)
    return [_read_run(folder, name, dataset, truth) for folder, name in pairs]


def _read_run(folder: Path, name: str, dataset: str, truth: COCO) -> Run:
    file = _results_file(folder, dataset)
    try:
        evaluation = BoxEvaluation(truth, json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} has no detections on {dataset!r}: {error}") from error
    rows = metrics_rows(str(folder / "metrics.json"))
    for row in rows:
        for key, metric in (("AP", "bbox/AP"), ("test_loss", "test/total_loss")):
            value = row.get(f"{dataset}/{metric}", row.get(metric))
            if value is not None:
                row[key] = value
    return Run(name, datetime.fromtimestamp(file.stat().st_mtime), evaluation, rows)


def _results_file(folder: Path, dataset: str) -> Path:
    """The file of Detectron2's COCO evaluator: the last, if it also evaluated several data sets."""
    name = "coco_instances_results.json"
    files = (folder / "inference" / dataset / name, folder / "inference" / name)
    if found := [file for file in files if file.is_file()]:
        return max(found, key=lambda file: file.stat().st_mtime)
    raise FileNotFoundError(
        f"The run {folder} has no {files[-1]}: it was not evaluated on {dataset!r}, or by an "
        "evaluator that keeps no detections. `fcos report --eval-only MODEL.WEIGHTS FILE` "
        "evaluates it"
    )


def ground_truth(dataset: str) -> COCO:
    """The annotations of a registered data set, as Detectron2's COCO evaluator takes them.

    Raises:
        ValueError: for one without annotations, as COCO's test sets are.
    """
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        file = MetadataCatalog.get(dataset).get("json_file")
        if file is None:
            file = os.path.join(folder, "annotations.json")
            convert_to_coco_json(dataset, file, allow_cached=False)
        truth = COCO(PathManager.get_local_path(file))
    if "annotations" not in truth.dataset:
        raise ValueError(f"The data set {dataset!r} has no annotations to compare detections with")
    return truth
