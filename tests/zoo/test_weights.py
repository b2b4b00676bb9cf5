"""Published checkpoints by name, fetched from a server of the test that stands for their hosts."""

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from helpers import tiny_cfg

from fcos_d2 import model_zoo
from fcos_d2.checkpoint import read_checkpoint
from fcos_d2.commands import convert
from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import Trainer
from fcos_d2.inference import predict
from fcos_d2.zoo import DEFAULT, PUBLISHED, published, weights

# An architecture that is small, in place of the published ones.
TINY = "quick_schedules/fcos_R_18_FPN_shapes.yaml"
ADELAIDET = "adelaidet://FCOS_R_50_1x"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, and notes what was asked for."""

    daemon_threads = True

    def __init__(self, folder, slow_after=None):
        self.asked, self.slow_after = [], slow_after
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def copyfile(self, source, outputfile):
        if self.server.slow_after is None:
            super().copyfile(source, outputfile)
        else:
            outputfile.write(source.read(self.server.slow_after))
            time.sleep(100)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "host").mkdir()
    server = Server(tmp_path / "host")
    yield server
    server.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_model():
    cfg = model_zoo.get_config(TINY)
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg).eval()


def their_file(file, model=None):
    """A checkpoint with AdelaiDet's names, and our model with the same tensors."""
    model = model or tiny_model()
    names = {n: n.replace("head.", "proposal_generator.fcos_head.") for n in model.state_dict()}
    torch.save({"model": {names[n]: x for n, x in model.state_dict().items()}}, file)
    return model


def digest(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@pytest.fixture
def listed(monkeypatch, server, cache, tmp_path):
    """Puts a file on the server, with a row of the table that it is found by."""

    def _listed(address=ADELAIDET, file="FCOS_R_50_1x.pth", **changes):
        row = replace(PUBLISHED[address], config=TINY, url=f"{server.url}/models/{file}", **changes)
        monkeypatch.setitem(PUBLISHED, address, row)
        folder = tmp_path / "host" / "models"
        folder.mkdir(exist_ok=True)
        return row, folder / file

    return _listed


def test_a_name_is_fetched_and_converted_once(listed, server, caplog):
    _, file = listed()
    model = their_file(file)
    cfg = model_zoo.get_config(ADELAIDET, trained=True)
    assert cfg.MODEL.WEIGHTS == ADELAIDET and cfg.MODEL.FCOS.CLIP_BOXES == "after_nms"
    for device in ("cpu", None):
        loaded = model_zoo.get(ADELAIDET, trained=True, device=device)
        for name, value in loaded.state_dict().items():
            assert value.cpu().equal(model.state_dict()[name]), name
    assert server.asked == ["/models/FCOS_R_50_1x.pth"]
    # Detectron2's own checkpointer, of DefaultPredictor, takes it too.
    theirs = tiny_model()
    DetectionCheckpointer(theirs).load(ADELAIDET)
    assert theirs.head.cls_logits.weight.equal(model.head.cls_logits.weight)
    content = read_checkpoint(PathManager.get_local_path(ADELAIDET))
    assert len(content["class_names"]) == len(content["category_ids"]) == 80
    assert content["class_names"][79] == "toothbrush" and content["category_ids"][79] == 90
    assert "CLIP_BOXES: after_nms" in content["config"]


def test_the_hash_is_checked(listed, cache):
    _, file = listed()
    their_file(file)
    listed(sha256=digest(file)[:8])
    weights.local_file(PUBLISHED[ADELAIDET])
    row, file = listed(sha256="0123abcd")
    with pytest.raises(ValueError, match=r"its SHA-256 is .*, not 0123abcd.*where it lay before"):
        weights.local_file(row)
    Path(weights.raw_file(row)).unlink()
    with pytest.raises(ValueError, match=r"not 0123abcd\. It was removed\. Try again"):
        weights.local_file(row)
    assert not [f for f in cache.rglob("*") if f.is_file() and f.suffix not in (".lock",)][1:]


@pytest.mark.parametrize("content", [b"<html>Sign in</html>", b"", None])
def test_what_is_no_checkpoint_is_not_kept(listed, content):
    row, file = listed()
    if content is None:  # cut short
        their_file(file)
        content = file.read_bytes()[:-1000]
    file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=r"models/FCOS_R_50_1x\.pth"):
        weights.local_file(row)
    assert not os.path.exists(weights.raw_file(row))
    model = their_file(file)
    found = read_checkpoint(weights.local_file(row))["model"]
    assert found["head.cls_logits.weight"].equal(model.head.cls_logits.weight)


def test_without_a_network_the_file_may_be_put_there(listed, server):
    row, _ = listed()
    with pytest.raises(OSError, match=r"fetched from .*404.*Nothing was changed.*by hand: ") as e:
        weights.local_file(row)
    by_hand = Path(str(e.value).rpartition("by hand: ")[2])
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="cannot be fetched from"):
        PathManager.get_local_path(ADELAIDET)
    by_hand.parent.mkdir(parents=True, exist_ok=True)
    their_file(by_hand)
    assert os.path.isfile(PathManager.get_local_path(ADELAIDET))


def test_eight_threads_fetch_once(listed, server):
    row, file = listed()
    their_file(file)
    with ThreadPoolExecutor(8) as pool:
        files = set(pool.map(weights.local_file, [row] * 8))
    assert len(files) == 1 and len(server.asked) == 1


# Fetches the file of a row that the test describes.
WORKER = """
import sys
from dataclasses import replace
from fcos_d2.zoo import PUBLISHED, weights
row = replace(PUBLISHED[sys.argv[1]], config=sys.argv[2], url=sys.argv[3])
print(weights.local_file(row))
"""


def worker(row):
    command = [sys.executable, "-c", WORKER, row.address, row.config, row.url]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_once(listed, server):
    row, file = listed()
    their_file(file)
    processes = [worker(row) for _ in range(2)]
    files = {process.communicate(timeout=100)[0] for process in processes}
    assert len(files) == 1 and len(server.asked) == 1
    assert [process.returncode for process in processes] == [0, 0]


def test_a_download_that_was_killed_is_begun_anew(listed, server):
    row, file = listed()
    their_file(file)
    server.slow_after = 1_000_000
    process = worker(row)
    while not server.asked:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(weights.raw_file(row))
    server.slow_after = None
    assert "model" in read_checkpoint(weights.local_file(row))
    assert digest(weights.raw_file(row)) == digest(file)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"called 'adelaidet://R_50'\. There are .*FCOS_R_50_1x"):
        PathManager.get_local_path("adelaidet://R_50")
    with pytest.raises(ValueError, match=r"called 'configs/x\.yaml'"):
        published.find("configs/x.yaml")


def test_a_config_that_does_not_fit_is_refused(listed):
    _, file = listed()
    their_file(file)
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = ADELAIDET
    cfg.INPUT.FORMAT, cfg.MODEL.FCOS.BOX_ACTIVATION = "RGB", "exp"
    with pytest.raises(ValueError) as error:
        published.check_fits(cfg)
    text = str(error.value)
    assert "INPUT.FORMAT RGB, it has BGR" in text and "BOX_ACTIVATION exp, it has relu" in text
    # The keys that it says make the config fit.
    words = text.rpartition("command: ")[2].split('"')
    pairs = [(words[i].strip(), words[i + 1]) for i in range(0, len(words) - 1, 2)]
    cfg.merge_from_list([x for pair in pairs for x in pair])
    published.check_fits(cfg)
    cfg.MODEL.FCOS.CLIP_BOXES = "before_nms"  # the user's choice
    published.check_fits(cfg)


def test_prediction_by_name(listed, shapes_folder, tmp_path, capsys):
    row, file = listed()
    their_file(file)
    image = str(shapes_folder / "shapes" / "val" / "0001.png")
    common = ["--input", image, "--device", "cpu", "--output"]
    predict.main(["--model", "FCOS_R_50_1x", *common, str(tmp_path / "a"), "--json"])
    printed = capsys.readouterr().out
    assert "The model is adelaidet://FCOS_R_50_1x (AP 38.7, AdelaiDet's licence: non-com" in printed
    predict.main(["--weights", row.address, *common, str(tmp_path / "b"), "--json"])
    results = [(tmp_path / x / "results.json").read_text() for x in "ab"]
    assert results[0] == results[1]
    for arguments, message in [
        (["--model", "FCOS_R_50_9x"], "No published checkpoint is called 'FCOS_R_50_9x'"),
        (["--model", "FCOS_R_50_1x", "--weights", "x.pth"], "leave out the others"),
    ]:
        with pytest.raises(SystemExit, match=message):
            predict.main([*arguments, *common, str(tmp_path / "c")])


def test_without_a_model_prediction_says_what_it_takes(listed, shapes_folder, tmp_path, capsys):
    _, file = listed(DEFAULT, "fcos_resnet50.pth", source="adelaidet", sha256="")
    their_file(file)
    image = str(shapes_folder / "shapes" / "val" / "0001.png")
    predict.main(["--input", image, "--output", str(tmp_path / "out"), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert f"The model is {DEFAULT.replace('torchvision', 'adelaidet')}" in printed
    assert "Choose another one with --model" in printed
    assert f"\n  {ADELAIDET} (AP 38.7)\n" in printed
    assert (tmp_path / "out" / "0001.png").is_file()


def test_conversion_by_name(listed, tmp_path, capsys):
    row, file = listed(keys={"MODEL.FCOS.NMS_THRESH_TEST": 0.45})
    model = their_file(file)
    convert.main([row.address, str(tmp_path / "ours.pth"), "MODEL.FCOS.SCORE_THRESH_TEST", "0.1"])
    assert "check that they are right" not in capsys.readouterr().out
    content = read_checkpoint(str(tmp_path / "ours.pth"))
    assert content["model"]["head.cls_logits.bias"].equal(model.head.cls_logits.bias)
    text = (tmp_path / "ours.yaml").read_text()
    assert "NMS_THRESH_TEST: 0.45" in text and "SCORE_THRESH_TEST: 0.1" in text
    with pytest.raises(SystemExit):
        convert.main(["file.pth", str(tmp_path / "new.pth")])
    assert "name --source and --config-file" in capsys.readouterr().err


def test_fine_tuning_starts_the_classes_anew(listed, shapes_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    row, file = listed()
    model = their_file(file)
    cfg = row.cfg()
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "cpu", str(tmp_path / "run")
    register_custom_datasets(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    ours, theirs = trainer.model.state_dict(), model.state_dict()
    changed = [name for name in theirs if not theirs[name].equal(ours[name])]
    assert changed == ["head.cls_logits.weight", "head.cls_logits.bias"] or changed == [
        "head.cls_logits.weight"  # whose bias starts with the same value
    ]
    cfg.INPUT.FORMAT = "RGB"
    trainer = Trainer(cfg)
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT RGB, it has BGR"):
        trainer.resume_or_load(resume=False)
