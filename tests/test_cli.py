"""The command ``fcos``, which pip installs; its parts have tests of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fcos_d2 import command_line, model_zoo
from fcos_d2.cli import _COMMANDS, main

CONFIG = "quick_schedules/fcos_R_18_FPN_shapes.yaml"


@pytest.fixture(autouse=True)
def debug(monkeypatch):
    monkeypatch.setattr(command_line, "debug", False)


def test_is_installed_beside_python():
    command = [str(Path(sys.executable).with_name("fcos")), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("train", "eval", "predict", "export", "report", "check", "convert", "app"):
        assert f"\n  {name} " in text


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_shows_the_command_as_it_was_typed(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: fcos {name} ")


def test_a_config_may_be_named_as_in_the_zoo(shapes_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    out = tmp_path / "found.json"
    with pytest.raises(SystemExit) as ended:
        main(["check", "--config-file", CONFIG, "--no-images", "--json", str(out)])
    assert ended.value.code == 0
    assert json.loads(out.read_text())["counts"]["error"] == 0
    assert command_line.find_config(CONFIG) == model_zoo.get_config_file(CONFIG)


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--data", "/nowhere"],
        ["train"],
        ["train", "--config-file", "nothing.yaml"],
        ["eval", "--config-file", CONFIG, "MODEL.DEVICE", "cpu"],
        ["app", "--weights", "nothing.pth"],
        ["report", "--config-file", CONFIG, "OUTPUT_DIR", "/nowhere"],
    ],
)
def test_errors_of_the_user_are_one_line(arguments, tmp_path, monkeypatch, shapes_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert str(ended.value.code).startswith("error: ")
    with pytest.raises((OSError, ValueError)):
        main(["--debug", *arguments])
