import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import tiny_cfg
from pycocotools.coco import COCO

from fcos_d2 import Predictor, load_cfg
from fcos_d2.command_line import config_parser
from fcos_d2.inference import predict
from fcos_d2.inference.drawing import draw_instances
from fcos_d2.inference.model_options import add_model_options, chosen_cfg

ROOT = Path(__file__).parents[2]
CLASSES = ["disc", "square", "triangle"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint that carries its config, of a model that detects something."""
    torch.manual_seed(0)
    cfg = tiny_cfg(PRIOR_PROB=0.3)
    for entry in cfg.DATASETS.CUSTOM.values():
        entry["CLASSES"] = CLASSES
    file = tmp_path_factory.mktemp("model") / "model.pth"
    data = {"model": build_model(cfg).state_dict(), "config": cfg.dump(), "class_names": CLASSES}
    torch.save(data, file)
    return str(file)


@pytest.fixture
def images(shapes_folder, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (1, 2, 3):
        source = shapes_folder / "shapes" / "val" / f"{i:04d}.png"
        (folder / source.name).write_bytes(source.read_bytes())
    return folder


def test_a_folder_with_an_unreadable_file_as_a_user_runs_it(weights, images, tmp_path):
    (images / "0000.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "fcos_d2.predict", "--weights", weights, "--json"]
    command += ["--input", str(images), "--output", "detections", "--threshold", "0.1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "3 images in" in done.stdout
    assert "1 file(s) could not be read:" in done.stdout
    assert f"{images / '0000.png'}: cannot identify image file" in done.stdout
    output = tmp_path / "detections"
    names = sorted(p.name for p in output.iterdir())
    assert names == ["0001.png", "0002.png", "0003.png", "results.json"]
    for name in names[:3]:
        original, drawn = cv2.imread(str(images / name)), cv2.imread(str(output / name))
        assert drawn.shape == original.shape
        assert (drawn != original).any()

    # The results are those of Predictor, in a data set that COCO's tools read.
    loaded = COCO(str(output / "results.json"))
    cfg = load_cfg_of(weights, tmp_path)
    for i in (1, 2, 3):
        expected = Predictor(cfg)(str(images / f"{i:04d}.png"))["instances"]
        found = loaded.loadAnns(loaded.getAnnIds(imgIds=[i]))
        assert len(found) == len(expected) > 0
        x, y, w, h = found[0]["bbox"]
        corners = expected.pred_boxes.tensor[0].tolist()
        assert [x, y, x + w, y + h] == pytest.approx(corners, abs=1e-3)
        assert found[0]["score"] == pytest.approx(expected.scores[0].item(), abs=1e-5)
    assert [c["name"] for c in loaded.loadCats(loaded.getCatIds())] == CLASSES
    assert loaded.getCatIds() == [1, 2, 3]  # the weights say no ids
    assert [x["file_name"] for x in loaded.loadImgs([1, 2, 3])] == names[:3]
    shape = cv2.imread(str(images / names[0])).shape
    assert (loaded.imgs[1]["height"], loaded.imgs[1]["width"]) == shape[:2]


def load_cfg_of(weights, tmp_path):
    (tmp_path / "c.yaml").write_text(torch.load(weights)["config"])
    cfg = load_cfg(str(tmp_path / "c.yaml"))
    cfg.MODEL.WEIGHTS = weights
    return cfg


def test_patterns_single_files_and_sub_folders(weights, images, tmp_path, capsys):
    (images / "more").mkdir()
    (images / "0003.png").rename(images / "more" / "0001.png")
    output = tmp_path / "out"
    main = ["--weights", weights, "--output", str(output), "--input"]
    predict.main([*main, str(images / "**" / "0001.png"), "MODEL.FCOS.SCORE_THRESH_TEST", "0.9"])
    found = sorted(str(p.relative_to(output)) for p in output.rglob("*.png"))
    assert found == ["0001.png", "more/0001.png"]
    predict.main([*main, str(images / "0002.png")])
    assert (output / "0002.png").exists()
    assert "1 images in" in capsys.readouterr().out


def test_a_threshold_for_each_class(weights, images, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(predict, "draw_instances", lambda *args: drawn.append(args) or args[0])
    file = tmp_path / "thresholds.json"
    file.write_text(json.dumps({"classes": {"triangle": 0.3, "disc": 0.1, "square": 0.2}}))
    args = ["--weights", weights, "--input", str(images), "--output", str(tmp_path / "out")]
    predict.main([*args, "--threshold", str(file)])
    assert [threshold for *_, threshold in drawn] == [[0.1, 0.2, 0.3]] * 3

    file.write_text(json.dumps({"classes": {"disc": 0.1}}))
    with pytest.raises(SystemExit, match=r"has no scores of the classes .*'square'"):
        predict.main([*args, "--threshold", str(file)])
    for bad in ("0,4", "1.5", "nan", "-1"):
        with pytest.raises(SystemExit, match=rf"Nothing was detected.* {bad}\b.* neither a score"):
            predict.main([*args, f"--threshold={bad}"])


def test_instances_are_drawn_from_the_threshold_of_their_class():
    boxes = torch.tensor([[10.0, 60, 80, 140], [120, 60, 190, 140], [120, 60, 190, 140]])
    instances = Instances((200, 200), pred_boxes=Boxes(boxes), scores=torch.full((3,), 0.3))
    instances.pred_classes = torch.tensor([0, 1, 1])
    image, metadata = np.zeros((200, 200, 3), np.uint8), Metadata(thing_classes=["a", "$b_{$"])
    for threshold, shown in (([0.4, 0.31], (0, 0)), ([0.3, 0.2], (1, 1)), ([0.2, 0.4], (1, 0))):
        drawn = draw_instances(image, instances, metadata, threshold)
        assert (drawn[:, :100].any(), drawn[:, 100:].any()) == shown


@pytest.fixture
def film(shapes_folder, tmp_path):
    """A file of four frames."""
    file = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*"MJPG"), 5, (160, 128))
    for i in range(4):
        frame = cv2.imread(str(shapes_folder / "shapes" / "val" / f"{i + 1:04d}.png"))
        writer.write(cv2.resize(frame, (160, 128)))
    writer.release()
    return file


def test_a_video(weights, film, tmp_path, capsys):
    output = tmp_path / "out"
    args = ["--weights", weights, "--input", film, "--output", str(output), "--json"]
    with pytest.raises(SystemExit, match="A video starts anew"):  # else it has frames twice
        predict.main([*args, "--resume"])
    predict.main(args)
    drawn = cv2.VideoCapture(str(output / "film.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    assert drawn.get(cv2.CAP_PROP_FPS) == 5
    assert drawn.read()[1].shape == (128, 160, 3)
    results = json.loads((output / "results.json").read_text())
    assert [(x["id"], x["file_name"]) for x in results["images"]] == [
        (i, f"frame {i}") for i in range(4)
    ]
    assert {r["image_id"] for r in results["annotations"]} == {0, 1, 2, 3}
    assert "cut off" not in capsys.readouterr().out


def test_a_video_that_is_cut_off_is_said(weights, film, tmp_path, capsys):
    content = Path(film).read_bytes()
    Path(film).write_bytes(content[: len(content) * 2 // 3])
    predict.main(["--weights", weights, "--input", film, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert re.search(r"^[123] images in ", printed, re.M)
    assert f"{film} should have 4 frames; it may be cut off or damaged." in printed


@pytest.fixture
def drawn(monkeypatch):
    """Pictures, of which the second one brings Ctrl-C."""
    drawn = []

    def stopped_at_the_second(image, *args):
        drawn.append(image)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return image

    monkeypatch.setattr(predict, "draw_instances", stopped_at_the_second)
    return drawn


def test_ctrl_c_ends_a_camera_but_stops_a_video(weights, film, tmp_path, drawn):
    for source, code in ((film, 130), (f"file://{film}", None)):  # the address is like a camera
        drawn.clear()
        args = ["--weights", weights, "--input", source, "--output", str(tmp_path / "out")]
        found = None
        try:
            predict.main([*args, "--json"])
        except SystemExit as stopped:
            found = stopped.code
        assert found == code
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["images"][0]["file_name"] == "frame 0"
        assert len(results["images"]) < 4


def test_a_video_without_frames(weights, tmp_path):
    film = str(tmp_path / "film.avi")
    cv2.VideoWriter(film, cv2.VideoWriter_fourcc(*"MJPG"), 5, (160, 128)).release()
    args = ["--weights", weights, "--input", film, "--output", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit, match=r"No frame of .*film\.avi can be read$"):
        predict.main(args)
    assert not (tmp_path / "out" / "results.json").exists()


def test_numbers_of_classes_are_those_of_the_data_set(weights, images, tmp_path, monkeypatch):
    cfg = load_cfg_of(weights, tmp_path)
    monkeypatch.setattr(
        MetadataCatalog.get(cfg.DATASETS.TEST[0]), "thing_dataset_id_to_contiguous_id",
        {7: 0, 8: 1, 9: 2}, raising=False,
    )  # fmt: skip
    predict.main(["--weights", weights, "--input", str(images), "--json",
                  "--output", str(tmp_path / "out")])  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["categories"] == [
        {"id": 7, "name": "disc"}, {"id": 8, "name": "square"}, {"id": 9, "name": "triangle"}
    ]  # fmt: skip
    assert {r["category_id"] for r in results["annotations"]} <= {7, 8, 9}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "x.png"], r"There is no image at --input 'x\.png'"),
        (["--input", "none/*.png", "--weights", "W"], "There is no image at --input 'none"),
        (["--input", "I", "--weights", "missing.pth"], r"There is no file missing\.pth"),
        (["--input", "film.mp4", "--weights", "W"], "There is no image at --input 'film.mp4'"),
        (["--input", "I", "--weights", "W", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--input", "I", "--weights", "W", "--device", "gpu"], "There is no device 'gpu'"),
    ],
)
def test_errors_say_what_to_do(weights, images, tmp_path, args, message):
    args = [{"W": weights, "I": str(images)}.get(a, a) for a in args]
    with pytest.raises(SystemExit, match=message):
        predict.main([*args, "--output", str(tmp_path / "out")])


def test_a_device_of_the_command_line_counts(weights, monkeypatch):
    parser = config_parser("", config_required=False)
    add_model_options(parser)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words, device in (
        ([], "cuda"), (["MODEL.DEVICE", "cpu"], "cpu"), (["--device", "cuda:1"], "cuda:1")
    ):  # fmt: skip
        args = parser.parse_intermixed_args(["--weights", weights, *words])
        chosen = chosen_cfg(args).MODEL.DEVICE
        assert chosen == device


def test_a_checkpoint_without_a_config_needs_one(weights, images, tmp_path):
    torch.save(torch.load(weights)["model"], tmp_path / "plain.pth")
    args = ["--weights", str(tmp_path / "plain.pth"), "--input", str(images)]
    args += ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="does not carry its config: add --config-file"):
        predict.main(args)
    (tmp_path / "c.yaml").write_text(torch.load(weights)["config"])
    predict.main([*args, "--config-file", str(tmp_path / "c.yaml")])
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_originals_are_not_written_over(weights, images):
    before = (images / "0001.png").read_bytes()
    with pytest.raises(SystemExit, match="written over"):
        predict.main(["--weights", weights, "--input", str(images), "--output", str(images)])
    assert (images / "0001.png").read_bytes() == before


def test_a_picture_without_a_format_ends_with_a_sentence(weights, images, tmp_path):
    (images / "0002.png").rename(images / "0002")
    args = ["--weights", weights, "--output", str(tmp_path / "out"), "--json", "--input"]
    args += [str(images / name) for name in ("0001.png", "0002", "0003.png")]
    with pytest.raises(SystemExit, match=r"Stopped\. .* picture .*0002: .* --resume goes on"):
        predict.main(args)
    predict.main([*args, "--resume", "--no-pictures"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [image["file_name"] for image in results["images"]] == ["0001.png", "0002", "0003.png"]


def test_drawing_without_names_and_without_detections():
    from detectron2.data.catalog import Metadata
    from detectron2.structures import Boxes, Instances

    from fcos_d2.inference.drawing import draw_instances

    image = np.zeros((50, 60, 3), np.uint8)
    none = Instances((50, 60), pred_boxes=Boxes(torch.zeros(0, 4)),
                     pred_classes=torch.zeros(0, dtype=int), scores=torch.zeros(0))  # fmt: skip
    assert not draw_instances(image, none, Metadata()).any()
    one = Instances((50, 60), pred_boxes=Boxes([[5, 5, 40, 30]]),
                    pred_classes=torch.tensor([2]), scores=torch.tensor([0.5]))  # fmt: skip
    assert draw_instances(image, one, Metadata()).any()
    assert draw_instances(image, one, Metadata(thing_classes=["a"])).any()  # of class 2 of 1
    assert not draw_instances(image, one, Metadata(), threshold=0.6).any()
    assert draw_instances(image, one, Metadata(), scale=2).shape == (100, 120, 3)


@pytest.mark.usefixtures("drawn")
def test_ctrl_c_keeps_what_is_done_and_does_not_look_like_success(
    weights, images, tmp_path, monkeypatch, capsys
):
    args = ["--weights", weights, "--input", str(images), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        predict.main([*args, "--json"])
    assert stopped.value.code == 130
    assert "--resume goes on" in capsys.readouterr().out
    lines = (tmp_path / "out" / "results.0.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["name"].endswith("0001.png")
    monkeypatch.undo()
    predict.main([*args, "--json", "--resume"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [x["id"] for x in results["images"]] == [1, 2, 3]


def test_resume_with_annotations_knows_the_images_of_the_earlier_run(
    weights, images, tmp_path, monkeypatch
):
    annotations = [{"id": 10 + i, "file_name": f"000{i}.png"} for i in (1, 2, 3)]
    (tmp_path / "all.json").write_text(json.dumps({"images": annotations}))
    args = ["--weights", weights, "--output", str(tmp_path / "out"), "--json"]
    args += ["--annotations", str(tmp_path / "all.json"), "--input", str(images)]
    drawn = []

    def failing_at_the_second(image, *args):
        drawn.append(image)
        if len(drawn) == 2:
            raise RuntimeError("a fault")
        return image

    monkeypatch.setattr(predict, "draw_instances", failing_at_the_second)
    with pytest.raises(RuntimeError, match="a fault"):
        predict.main(args)
    monkeypatch.undo()
    (images / "0001.png").unlink()  # done, and no longer there
    predict.main([*args, "--resume"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {result["image_id"] for result in results} == {11, 12, 13}
