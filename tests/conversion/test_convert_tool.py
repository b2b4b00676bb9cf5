"""Reading files of other implementations, and `fcos convert` up to an evaluation."""

import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from helpers import Payload, make_input, tiny_cfg

import fcos_d2
from fcos_d2.checkpoint import read_checkpoint
from fcos_d2.commands import convert

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quick_schedules" / "fcos_R_18_FPN_shapes.yaml")
SMALL = ["MODEL.FCOS.NUM_CLS_CONVS", "1", "MODEL.FCOS.NUM_BOX_CONVS", "1"]


@pytest.fixture
def adelaidet_file(tmp_path):
    """A checkpoint with AdelaiDet's names, and our model with the same parameters."""
    model = build_model(tiny_cfg()).eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.2, 0.2)
    state_dict = OrderedDict(
        (name.replace("head.", "proposal_generator.fcos_head."), x)
        for name, x in model.state_dict().items()
    )
    path = tmp_path / "FCOS_published.pth"
    torch.save({"model": state_dict, "optimizer": {}, "iteration": 1}, path)
    return path, model


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
@pytest.mark.parametrize(("suffix", "protocol"), [(".pth", 2), (".pkl", 2), (".pkl", 4)])
def test_arrays_are_read_without_trust(tmp_path, suffix, protocol, dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    path = str(tmp_path / f"model{suffix}")
    data = {"model": OrderedDict(a=array), "__author__": "X", "matching_heuristics": True}
    if suffix == ".pkl":
        Path(path).write_bytes(pickle.dumps(data, protocol=protocol))
    else:
        torch.save(data, path, pickle_protocol=protocol)
    actual = read_checkpoint(path)["model"]["a"]
    assert actual.dtype == dtype and (actual == array).all()


def test_files_of_pytorch_before_1_6_are_read(tmp_path):
    path = str(tmp_path / "model.pth")
    data = {"model": OrderedDict(a=torch.ones(2)), "iteration": 90000}
    torch.save(data, path, _use_new_zipfile_serialization=False)
    assert (read_checkpoint(path)["model"]["a"] == 1).all()


def test_arrays_of_numpy_1_are_read(tmp_path):
    data = pickle.dumps({"model": {"a": np.ones(3, np.float32)}}, protocol=2)
    path = tmp_path / "model.pkl"
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert (read_checkpoint(str(path))["model"]["a"] == 1).all()


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_objects_are_read_only_with_trust(tmp_path, suffix):
    path, created = str(tmp_path / f"model{suffix}"), tmp_path / "created"
    if suffix == ".pkl":
        Path(path).write_bytes(pickle.dumps({"model": {"a": np.ones(2)}, "meta": Payload(created)}))
    else:
        torch.save({"model": {"a": torch.ones(2)}, "meta": Payload(created)}, path)
    with pytest.raises(ValueError, match=r"--trust-pickle.*The cause: an object posix\.mkdir$"):
        read_checkpoint(path)
    assert not created.exists()
    assert (read_checkpoint(path, trust_pickle=True)["model"]["a"] == 1).all()
    assert created.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("trust", [False, True])
def test_damaged_files_are_refused(tmp_path, suffix, trust):
    path = tmp_path / f"model{suffix}"
    for content in (b"", b"<html>404</html>", complete_file()[:900]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"model{suffix}"):
            read_checkpoint(str(path), trust)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_checkpoint(str(tmp_path / "none.pth"))


def complete_file():
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(99)}, buffer)
    return buffer.getvalue()


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "model.pth")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(str(tmp_path / "model.pth"))


def test_converted_file_loads_without_running_code(adelaidet_file, tmp_path, capsys):
    src, model = adelaidet_file
    dst = tmp_path / "new" / "fcos.pth"
    convert.main([str(src), str(dst), "--source", "adelaidet", "--config-file", CONFIG, *SMALL])
    printed = capsys.readouterr().out
    assert "MODEL.PIXEL_MEAN: [128.0, 128.0, 128.0]" in printed
    assert sorted(p.name for p in dst.parent.iterdir()) == ["fcos.pth", "fcos.yaml"]

    data = torch.load(dst, weights_only=True)
    assert set(data) == {"model", "config"} and type(data["config"]) is str
    assert "DEVICE" not in data["config"] and str(tmp_path) not in data["config"]

    cfg = fcos_d2.get_cfg()
    device = cfg.MODEL.DEVICE
    cfg.merge_from_file(str(dst.with_suffix(".yaml")))
    assert str(dst) == cfg.MODEL.WEIGHTS and device == cfg.MODEL.DEVICE
    assert cfg.MODEL.FCOS.NUM_CLS_CONVS == 1
    cfg.MODEL.DEVICE = "cpu"
    loaded = build_model(cfg).eval()
    DetectionCheckpointer(loaded).load(cfg.MODEL.WEIGHTS)
    expected, actual = model.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[k], v) for k, v in expected.items() if "num_batches" not in k)
    model.post_processor.clip_boxes = "after_nms"  # AdelaiDet's, which the conversion sets
    batch = [{"image": make_input(size=(128, 128))["image"]}]
    with torch.no_grad():
        expected_boxes, boxes = (m(batch)[0]["instances"].pred_boxes for m in (model, loaded))
    torch.testing.assert_close(boxes.tensor, expected_boxes.tensor, rtol=0, atol=0)


def test_from_the_command_line_to_the_evaluation(adelaidet_file, shapes_folder, tmp_path):
    src, _ = adelaidet_file
    env = os.environ | {"DETECTRON2_DATASETS": str(shapes_folder), "OMP_NUM_THREADS": "1"}

    def run(*command):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=env,
            text=True,
            capture_output=True,
            timeout=300,
        )

    dst = tmp_path / "fcos.pth"
    command = ["tools/convert_checkpoint.py", src, dst, "--config-file", CONFIG]
    refused = run(*command, "--source", "mmdet", *SMALL)
    assert refused.returncode == 1 and not dst.exists()
    assert "It looks like one of 'adelaidet'" in refused.stderr
    assert "Traceback" not in refused.stderr
    converted = run(*command, "--source", "adelaidet", *SMALL, "OUTPUT_DIR", tmp_path / "output")
    assert converted.returncode == 0, converted.stderr
    evaluated = run("train_net.py", "--config-file", dst.with_suffix(".yaml"), "--eval-only")
    output = evaluated.stdout + evaluated.stderr
    assert evaluated.returncode == 0, output[-3000:]
    assert "copypaste: AP" in output and "not found in the checkpoint" not in output


def test_a_failed_write_leaves_the_old_files(adelaidet_file, tmp_path, monkeypatch):
    src, _ = adelaidet_file
    dst = tmp_path / "fcos.pth"
    args = [str(src), str(dst), "--source", "adelaidet", "--config-file", CONFIG, *SMALL]
    convert.main(args)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def write_half(data, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="No space left"):
        convert.main(args)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dst", ["fcos.pkl", "fcos.yaml", "FCOS_published.pth"])
def test_unusable_destinations_are_refused(adelaidet_file, tmp_path, dst):
    src, _ = adelaidet_file
    before = src.read_bytes()
    with pytest.raises(SystemExit, match=r"must be a \.pth file other than SRC"):
        convert.main(
            [str(src), str(tmp_path / dst), "--source", "adelaidet", "--config-file", CONFIG]
        )
    assert src.read_bytes() == before and list(tmp_path.iterdir()) == [src]


def test_the_config_file_is_not_written_over(adelaidet_file, tmp_path):
    config_file = tmp_path / "fcos.yaml"
    config_file.write_text(f"_BASE_: {CONFIG}\n")
    arguments = [str(adelaidet_file[0]), str(tmp_path / "fcos.pth"), "--source", "adelaidet"]
    with pytest.raises(SystemExit, match=r"would be written over --config-file .*fcos\.yaml"):
        convert.main([*arguments, "--config-file", str(config_file), *SMALL])
    assert config_file.read_text() == f"_BASE_: {CONFIG}\n"
    assert not (tmp_path / "fcos.pth").exists()
