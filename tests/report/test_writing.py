"""The page and its files, as a training and tools/report.py write them."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from helpers import LIGHT, tiny_cfg

from fcos_d2.data import register_custom_datasets
from fcos_d2.report import report_after_training, write_report
from fcos_d2.report.runs import ground_truth, read_runs

ROOT = Path(__file__).parents[2]
KINDS = ["twice", "wrong class", "poor box", "background", "missed"]


class Page(HTMLParser):
    def __init__(self, file):
        super().__init__()
        self.links, self.text, self.tags = [], "", []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def detections_of(shapes_folder, move=2.0):
    """Every third box of the validation set taken for another class, the others moved a little."""
    truth = json.loads((shapes_folder / "shapes" / "val.json").read_text())
    categories = [category["id"] for category in truth["categories"]]
    results = []
    for i, a in enumerate(truth["annotations"]):
        x, y, w, h = a["bbox"]
        category = a["category_id"]
        if i % 3 == 0:
            category = categories[(categories.index(category) + 1) % len(categories)]
        results.append(
            {"image_id": a["image_id"], "category_id": category, "bbox": [x + move, y, w, h],
             "score": 0.9 - 0.8 * i / len(truth["annotations"])}
        )  # fmt: skip
    return results


@pytest.fixture
def cfg(shapes_folder, tmp_path, monkeypatch):
    """Of a run that left detections and metrics."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    cfg = tiny_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    leave(tmp_path / "run", detections_of(shapes_folder))
    return cfg


def leave(folder, detections, metrics=True):
    (folder / "inference").mkdir(parents=True)
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
    rows = [
        {"iteration": 19, "total_loss": 2.0, "loss_fcos_cls": 1.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 1.0, "loss_fcos_cls": float("nan"), "lr": 0.1},
        {"iteration": 40, "bbox/AP": 50.0},
    ]
    if metrics:
        (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_has_all_that_it_names_and_no_outside_links(cfg, tmp_path):
    (page,) = write_report(cfg)
    assert page == tmp_path / "run" / "report" / "index.html"
    shown = Page(page)
    assert not re.search(r"https?:|//", "".join(shown.links))
    for link in shown.links:
        assert (page.parent / link).is_file(), link
    plots = {"training", "precision_recall", "thresholds", "sizes", "classes", "confusion"}
    assert {f"{name}.png" for name in plots} <= set(shown.links)
    for link in shown.links:
        if link.endswith(".png"):
            picture = cv2.imread(str(page.parent / link))
            assert picture.std() > 5, link  # something is drawn
    assert len([x for x in shown.links if x.startswith("errors/wrong_class")]) == 6
    numbers = json.loads((page.parent / "report.json").read_text())
    assert list(numbers["errors"]) == KINDS
    boxes = sum(row["boxes"] for row in numbers["classes"])
    assert numbers["errors"]["wrong class"] <= -(-boxes // 3)
    for name in ("disc", "square", "triangle"):
        assert name in shown.text
    assert f"{numbers['ap']['run']['AP']:.1f}" in shown.text
    thresholds = json.loads((page.parent / "thresholds.json").read_text())
    assert set(thresholds["classes"]) == {"disc", "square", "triangle"}


def test_the_training_images_are_shown_if_the_run_left_them(cfg, tmp_path):
    (page,) = write_report(cfg)
    assert "augmented.jpg" not in Page(page).links
    (tmp_path / "run" / "augmented.jpg").write_bytes(b"a picture")
    (page,) = write_report(cfg)
    assert "augmented.jpg" in Page(page).links and "first ten images" in Page(page).text
    assert (page.parent / "augmented.jpg").read_bytes() == b"a picture"
    (tmp_path / "run" / "augmented.jpg").unlink()
    write_report(cfg)
    assert "augmented.jpg" not in Page(page).links and not (page.parent / "augmented.jpg").exists()


def test_a_second_report_leaves_nothing_of_the_first(cfg, shapes_folder, tmp_path):
    (page,) = write_report(cfg)
    assert list((page.parent / "errors").glob("wrong_class*"))
    perfect = json.loads((shapes_folder / "shapes" / "val.json").read_text())["annotations"]
    perfect = [{**a, "score": 1.0} for a in perfect]
    shutil.rmtree(tmp_path / "run")
    leave(tmp_path / "run", perfect, metrics=False)
    write_report(cfg, page.parent)
    numbers = json.loads((page.parent / "report.json").read_text())
    assert numbers["ap"]["run"]["AP"] == pytest.approx(100)
    assert numbers["class_agnostic_ap"]["run"]["0.9"] == pytest.approx(100)
    assert sum(numbers["errors"].values()) == 0
    assert not list((page.parent / "errors").iterdir())
    assert not {x for x in Page(page).links if x.startswith("errors") or "training" in x}


def test_nothing_detected(cfg, tmp_path):
    write_report(cfg)  # an earlier report, whose thresholds are not those of this one
    (tmp_path / "run" / "inference" / "coco_instances_results.json").write_text("[]")
    (page,) = write_report(cfg)
    assert "No detection finds a box" in Page(page).text
    assert not (page.parent / "thresholds.json").exists()


def test_files_of_others_stay(cfg, tmp_path):
    theirs = tmp_path / "folder" / "errors" / "mine.txt"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    write_report(cfg, tmp_path / "folder")
    assert theirs.exists() and len(list(theirs.parent.iterdir())) > 6


def test_runs_are_compared_by_name_or_else_by_path(cfg, shapes_folder, tmp_path):
    for other in ("other", "deeper/run"):
        leave(tmp_path / other, detections_of(shapes_folder, move=1.0), metrics=other == "other")
    for compared in (["other"], ["other", "deeper/run"]):
        (page,) = write_report(cfg, compare=[tmp_path / name for name in compared])
        runs = json.loads((page.parent / "report.json").read_text())["ap"]
        folders = [tmp_path / "run", *(tmp_path / name for name in compared)]
        expected = ["run", "other"] if len(compared) == 1 else [str(f) for f in folders]
        assert list(runs) == expected
        first, second = list(runs.values())[:2]
        assert second["AP"] > first["AP"]  # its boxes are nearer
        for name in expected:
            assert name in Page(page).text


def test_names_are_shown_and_not_obeyed(cfg, shapes_folder, tmp_path, monkeypatch):
    truth = json.loads((shapes_folder / "shapes" / "val.json").read_text())
    names = ["<script>alert(1)</script>", "$x_{1", "\ud800 & \N{WHITE HEART SUIT}"]
    for category, name in zip(truth["categories"], names, strict=True):
        category["name"] = name
    (tmp_path / "hostile.json").write_text(json.dumps(truth))
    cfg.DATASETS.CUSTOM.hostile = cfg.DATASETS.CUSTOM.shapes_val.clone()
    cfg.DATASETS.CUSTOM.hostile.JSON = str(tmp_path / "hostile.json")
    cfg.DATASETS.TEST = ("hostile",)
    (page,) = write_report(cfg)
    shown = Page(page)
    assert "script" not in shown.tags and names[0] in shown.text and "$x_{1" in shown.text


def test_several_data_sets_have_a_report_each(cfg, shapes_folder, tmp_path):
    cfg.DATASETS.CUSTOM.second = cfg.DATASETS.CUSTOM.shapes_val.clone()
    cfg.DATASETS.TEST = ("shapes_val", "second")
    for name, move in (("shapes_val", 2.0), ("second", 0.0)):
        folder = tmp_path / "run" / "inference" / name
        folder.mkdir()
        detections = json.dumps(detections_of(shapes_folder, move))
        (folder / "coco_instances_results.json").write_text(detections)
    pages = write_report(cfg)
    report = tmp_path / "run" / "report"
    assert pages == [report / name / "index.html" for name in cfg.DATASETS.TEST]
    first, second = (json.loads((p.parent / "report.json").read_text()) for p in pages)
    assert first["ap"]["run"]["AP75"] < second["ap"]["run"]["AP75"]


@pytest.mark.parametrize("prefix", ["", "shapes_val/"])
def test_metrics_of_a_run_are_those_of_the_data_set(cfg, tmp_path, prefix):
    register_custom_datasets(cfg)
    row = {f"{prefix}bbox/AP": 5.0, f"{prefix}test/total_loss": 2.0, "other/test/total_loss": 3.0}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"iteration": 1, **row}))
    (run,) = read_runs([tmp_path / "run"], "shapes_val", ground_truth("shapes_val"))
    assert (run.name, run.metrics[0]["AP"], run.metrics[0]["test_loss"]) == ("run", 5.0, 2.0)


def test_a_data_set_without_detections_does_not_prevent_the_others(
    cfg, shapes_folder, tmp_path, caplog
):
    """As those of PASCAL VOC's evaluator are."""
    cfg.DATASETS.CUSTOM.second = cfg.DATASETS.CUSTOM.shapes_val.clone()
    cfg.DATASETS.TEST = ("second", "shapes_val")
    inference = tmp_path / "run" / "inference"
    inference.rename(tmp_path / "run" / "shapes_val")
    inference.mkdir()
    (tmp_path / "run" / "shapes_val").rename(inference / "shapes_val")
    caplog.set_level(logging.INFO)
    page = tmp_path / "run" / "report" / "shapes_val" / "index.html"
    assert report_after_training(cfg) == [page]
    assert page.exists() and f"The report: {page}" in caplog.text
    assert "There is no report on 'second'. The run" in caplog.text


@pytest.mark.parametrize("last", ["", "shapes_val"])
def test_the_last_evaluation_counts(cfg, shapes_folder, tmp_path, last):
    inference = tmp_path / "run" / "inference"
    (inference / "shapes_val").mkdir()
    for second, part in enumerate(sorted(["", "shapes_val"], key=last.__eq__)):
        file = inference / part / "coco_instances_results.json"
        file.write_text(json.dumps(detections_of(shapes_folder, move=2.0 * (part == last))))
        os.utime(file, (second + 1e9,) * 2)
    (page,) = write_report(cfg)
    numbers = json.loads((page.parent / "report.json").read_text())
    assert 0 < numbers["class_agnostic_ap"]["run"]["0.9"] < 99  # that with boxes that were moved


def test_images_that_are_gone(cfg, shapes_folder, tmp_path):
    cfg.DATASETS.CUSTOM.shapes_val.IMAGES = str(tmp_path / "nowhere")
    (page,) = write_report(cfg)
    assert "Some pictures are missing" in Page(page).text
    assert "nowhere" in Page(page).text


def test_what_prevents_a_report_is_said(cfg, tmp_path, caplog):
    results = tmp_path / "run" / "inference" / "coco_instances_results.json"
    results.write_text(results.read_text()[:-40])
    with pytest.raises(ValueError, match=r"coco_instances_results\.json has no detections on"):
        write_report(cfg)
    results.unlink()
    with pytest.raises(FileNotFoundError, match=r"The run .*run has no .*--eval-only"):
        write_report(cfg)
    # After a training it is a warning: what was trained is there.
    caplog.set_level(logging.INFO)
    report_after_training(cfg)
    assert "There is no report on 'shapes_val'. The run" in caplog.text
    assert "Traceback" not in caplog.text
    assert not (tmp_path / "run" / "report").exists()


def test_a_data_set_without_annotations(cfg, shapes_folder, tmp_path):
    """COCO's test sets, which Detectron2 registers."""
    truth = json.loads((shapes_folder / "shapes" / "val.json").read_text())
    del truth["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(truth))
    register_coco_instances("report_unlabelled", {}, str(tmp_path / "test.json"), "nowhere")
    cfg.DATASETS.TEST = ("report_unlabelled",)
    with pytest.raises(ValueError, match="'report_unlabelled' has no annotations"):
        write_report(cfg)


def test_the_tool_evaluates_and_says_where_the_page_is(shapes_folder, tmp_path, cfg):
    cfg.merge_from_list(LIGHT)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "run.yaml").write_text(cfg.dump())
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*args):
        command = [sys.executable, "tools/report.py", "--config-file", tmp_path / "run.yaml", *args]
        command = list(map(str, [*command, "OUTPUT_DIR", tmp_path / "new"]))
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    failed = run()
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "was not evaluated" in failed.stderr
    done = run("--eval-only", "MODEL.WEIGHTS", tmp_path / "model.pth")
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'new' / 'report' / 'index.html'}" in done.stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_a_browser_shows_every_picture(cfg, tmp_path):
    (page,) = write_report(cfg)
    # The page as it is, and a script that says which pictures it shows.
    script = """<script>onload = () => { document.title = JSON.stringify(
        [...document.images].map(i => [i.getAttribute("src"), i.naturalWidth, i.width])) }</script>
        """
    copy = page.parent / "checked.html"
    copy.write_text(page.read_text() + script)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-dev-shm-usage"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=10000"]
    shown = subprocess.run(
        ["chromium", *options, "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    title = re.search(r"<title>(.*?)</title>", shown.stdout).group(1)
    pictures = json.loads(title.replace("&quot;", '"'))
    assert [source for source, *_ in pictures] == [x for x in Page(page).links if ".png" in x]
    assert len(pictures) > 10
    for source, natural, width in pictures:
        assert natural > 0 and width > 200, source
