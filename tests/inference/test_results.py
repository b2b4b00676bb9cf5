"""Detections that leave the program: right ids, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import tiny_cfg
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fcos_d2 import Predictor
from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import evaluate
from fcos_d2.inference import predict
from fcos_d2.inference.results import ResultFile, ids_of_annotations, image_ids

ROOT = Path(__file__).parents[2]
CLASSES = ["disc", "square", "triangle"]


def instances(number, size=(30, 40)):
    boxes = torch.tensor([[1.0, 2.0, 11.5, 22.25]]).repeat(number, 1)
    scores = torch.linspace(0.9, 0.5, number)
    classes = torch.arange(number) % 2
    return Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)


@pytest.fixture
def metadata():
    ids = {5: 0, 9: 1}
    return Metadata(thing_classes=["cat", "dög"], thing_dataset_id_to_contiguous_id=ids)


def test_a_data_set_of_detections(tmp_path, metadata):
    results = ResultFile(tmp_path, metadata, goes_on=False)
    folder = tmp_path / "images"
    names = [str(folder / "day" / "a.png"), str(folder / "night" / "a.png"), str(folder / "b.png")]
    for name, number in zip(names, (2, 0, 1), strict=True):
        results.write(name, instances(number))
    target = results.merge()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json"]
    content = json.loads(target.read_text())
    assert content["categories"] == [{"id": 5, "name": "cat"}, {"id": 9, "name": "dög"}]
    files = ["day/a.png", "night/a.png", "b.png"]
    assert content["images"] == [
        {"id": i, "file_name": f, "width": 40, "height": 30} for i, f in enumerate(files, 1)
    ]
    # 10.5 x 20.25 pixels.
    first = {"image_id": 1, "category_id": 5, "bbox": [1.0, 2.0, 10.5, 20.25], "id": 1}
    assert first.items() <= content["annotations"][0].items()
    assert content["annotations"][0]["area"] == 10.5 * 20.25
    assert [(a["id"], a["image_id"], a["category_id"]) for a in content["annotations"]] == [
        (1, 1, 5), (2, 1, 9), (3, 3, 5)
    ]  # fmt: skip
    COCO(str(target))


def test_an_incomplete_line_is_written_anew(tmp_path, metadata):
    results = ResultFile(tmp_path, metadata, goes_on=False)
    for name in ("a.png", "b.png"):
        results.write(name, instances(1))
    results.close()
    lines = tmp_path / "results.0.jsonl"
    lines.write_bytes(lines.read_bytes()[:-5])
    with pytest.raises(ValueError, match="add --resume to go on with it, or remove it"):
        ResultFile(tmp_path, metadata, goes_on=False)
    results = ResultFile(tmp_path, metadata, goes_on=True)
    assert results.done == {"a.png"}
    results.write("b.png", instances(1))
    images = json.loads(results.merge().read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.png", "b.png"]
    lines.write_text("[1]\n")
    with pytest.raises(ValueError, match="not of an earlier prediction"):
        ResultFile(tmp_path, metadata, goes_on=True)


def test_a_file_without_lines_is_of_no_earlier_run(tmp_path, metadata):
    """That of a run that ended before its first image, as for a video that cannot be read."""
    ResultFile(tmp_path, metadata, goes_on=False).close()
    assert (tmp_path / "results.0.jsonl").read_text() == ""
    results = ResultFile(tmp_path, metadata, goes_on=False)
    results.write("a.png", instances(1))
    assert len(json.loads(results.merge().read_text())["images"]) == 1


def test_ids():
    assert image_ids(["x/0007.jpg", "x/12.png"]) == {"x/0007.jpg": 7, "x/12.png": 12}
    assert image_ids(["x/7.jpg", "y/7.jpg"]) == {"x/7.jpg": 1, "y/7.jpg": 2}  # twice
    assert image_ids(["a.jpg", "7.jpg"]) == {"a.jpg": 1, "7.jpg": 2}
    assert image_ids([0, 1]) == {0: 0, 1: 1}


def test_ids_of_annotations(tmp_path):
    file = tmp_path / "all.json"
    names = ["day/a.png", "night/a.png", "only.png", "deep/er/x.png"]
    images = [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)]
    file.write_text(json.dumps({"images": images}))
    asked = ["/data/night/a.png", "elsewhere/only.png", "day/a.png", "x.png"]
    assert list(ids_of_annotations(str(file), asked).values()) == [11, 12, 10, 13]
    with pytest.raises(ValueError, match=r"2 of 3 images are not known by .*a\.png \(0 images"):
        ids_of_annotations(str(file), ["a.png", "new.png", "only.png"])
    file.write_text("[]")
    with pytest.raises(ValueError, match="is not a COCO annotation file"):
        ids_of_annotations(str(file), asked)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    cfg = tiny_cfg(PRIOR_PROB=0.3)
    data = {"model": build_model(cfg).state_dict(), "config": cfg.dump(), "class_names": CLASSES}
    torch.save(data | {"category_ids": [1, 2, 3]}, tmp_path / "model.pth")
    return str(tmp_path / "model.pth")


def test_ap_of_the_results_is_the_evaluators(weights, shapes_folder, tmp_path):
    """On objects that the detector finds: the best boxes of each image, moved a little."""
    files = sorted((shapes_folder / "shapes" / "val").iterdir())[:12]
    cfg = tiny_cfg(PRIOR_PROB=0.3)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = weights, str(tmp_path / "evaluation")
    images, objects = [], []
    for number, (file, found) in enumerate(
        zip(files, Predictor(cfg)(list(map(str, files))), strict=True), 100
    ):
        found = found["instances"]
        height, width = found.image_size
        images.append({"id": number, "file_name": file.name, "height": height, "width": width})
        for (x0, y0, x1, y1), label in zip(
            found.pred_boxes.tensor[:9:3].tolist(), found.pred_classes[:9:3].tolist(), strict=True
        ):
            box = [x0, y0, (x1 - x0) * 0.8, y1 - y0]
            one = {"id": len(objects) + 1, "image_id": number, "category_id": label + 1}
            objects.append(one | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    annotations, output = tmp_path / "found.json", tmp_path / "out"
    annotations.write_text(
        json.dumps({"images": images, "annotations": objects, "categories": categories})
    )
    predict.main(
        ["--weights", weights, "--json", "--annotations", str(annotations), "--no-pictures",
         "--output", str(output), "--input", *map(str, files)]
    )  # fmt: skip
    assert [p.name for p in output.iterdir()] == ["results.json"]
    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(str(output / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    entry = {"FORMAT": "coco", "JSON": str(annotations), "IMAGES": str(files[0].parent)}
    cfg.DATASETS.CUSTOM["found"] = CfgNode(entry, new_allowed=True)
    cfg.DATASETS.TEST = ("found",)
    register_custom_datasets(cfg)
    expected = evaluate(cfg)["bbox"]
    # The evaluator's C++ adds up in another order than pycocotools.
    expected_ap = [expected[key] / 100 for key in ("AP", "AP50", "AP75")]
    assert evaluation.stats[:3].tolist() == pytest.approx(expected_ap, rel=1e-12)
    assert 10 < expected["AP"] < 100


def detections(folder):
    content = json.loads((folder / "results.json").read_text())
    return content["images"], content["annotations"]


def assert_same(found, expected):
    """Other batches change the rounding."""
    assert found[0] == expected[0] and len(found[1]) == len(expected[1]) > 0
    for a, b in zip(found[1], expected[1], strict=True):
        assert a["image_id"] == b["image_id"] and a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_kills_and_other_numbers_of_processes_lose_nothing(weights, shapes_folder, tmp_path):
    """Killed in the middle, alone and with two processes; the result is that of one run."""
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted((shapes_folder / "shapes" / "train").iterdir())[:90]:
        (images / file.name).symlink_to(file)
    command = [sys.executable, "-m", "fcos_d2.predict", "--weights", weights, "--json"]
    command += ["--input", str(images), "--no-pictures", "--batch-size", "4", "--output"]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    output = tmp_path / "killed"

    def done():
        return sum(x.read_text().count("\n") for x in output.glob("results.*.jsonl"))

    for options in ([], ["--resume", "--num-gpus", "2"]):
        least = done() + 8
        process = subprocess.Popen(
            [*command, str(output), *options], env=env, start_new_session=True
        )
        while done() < least:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = done()
    assert 16 <= before < 90
    again = subprocess.run(
        [*command, str(output), "--resume", "--num-gpus", "3"],
        env=env, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert f"{before} images were done before" in again.stdout
    assert f"{90 - before} images in" in again.stdout
    assert [p.name for p in output.iterdir()] == ["results.json"]
    subprocess.run([*command, str(tmp_path / "whole")], env=env, check=True, capture_output=True)
    assert_same(detections(output), detections(tmp_path / "whole"))
    assert len(detections(output)[0]) == 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "results.json: add --json"),
        (["--annotations", "x"], "results.json: add --json"),
        (["--no-pictures"], "leaves nothing to write"),
    ],
)
def test_options_that_need_others(options, message, capsys):
    with pytest.raises(SystemExit):
        predict.main(["--input", "a.png", "--output", "out", *options])
    assert message in capsys.readouterr().err


def test_several_inputs_and_what_is_skipped(weights, shapes_folder, tmp_path, capsys):
    source = sorted((shapes_folder / "shapes" / "val").iterdir())[:4]
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in source[:2]:
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "notes.heic").write_text("")
    arguments = ["--weights", weights, "--output", str(tmp_path / "out"), "--input"]
    predict.main(
        [*arguments, str(folder), str(source[2]), str(source[3]), str(source[3]),
         "MODEL.FCOS.SCORE_THRESH_TEST", "0.2"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "4 images in" in printed and "Skipped 1 file(s)" in printed and "notes.heic" in printed
    writer = cv2.VideoWriter(
        str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (160, 128)
    )
    writer.write(np.zeros((128, 160, 3), np.uint8))
    writer.release()
    with pytest.raises(SystemExit, match=r"takes one video alone, got .*film\.avi"):
        predict.main([*arguments, str(source[2]), str(tmp_path / "film.avi")])
