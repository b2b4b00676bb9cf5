import os
import random
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fcos_d2.checkpoint import AtomicCheckpointer, is_intact


def save_three_checkpoints(folder):
    model = nn.Linear(1, 1)
    checkpointer = AtomicCheckpointer(model, str(folder))
    for i in range(3):
        nn.init.constant_(model.weight, float(i))
        checkpointer.save(f"model_{i}", iteration=i)
        os.utime(folder / f"model_{i}.pth", (i, i))
    return checkpointer


def test_resumes_from_the_last(tmp_path):
    checkpointer = save_three_checkpoints(tmp_path)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 2
    assert checkpointer.model.weight.item() == 2


def test_killed_while_writing_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    checkpointer = save_three_checkpoints(tmp_path)

    def write_half(data, f):
        f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", write_half)
    for name in ("model_2", "model_3"):  # an existing file, and a new one
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(name, iteration=9)
    monkeypatch.undo()
    assert not (tmp_path / "model_3.pth").exists()
    assert AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path)).resume_or_load("")["iteration"] == 2


@pytest.mark.parametrize(
    "damage", ["cut", "zeroed", "missing", "empty tag", "no tag", "zeros tag", "binary tag"]
)
def test_falls_back_to_the_newest_complete_checkpoint(tmp_path, damage, caplog):
    checkpointer = save_three_checkpoints(tmp_path)
    last = tmp_path / "model_2.pth"
    if damage == "cut":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif damage == "zeroed":  # as a full disk or a lost cache leaves it
        content = bytearray(last.read_bytes())
        with zipfile.ZipFile(last) as archive:
            tensor = next(x for x in archive.infolist() if x.filename.endswith("/data/0"))
        start = content.index(np.float32(2).tobytes(), tensor.header_offset)
        content[start : start + 4] = bytes(4)
        last.write_bytes(content)
        assert torch.load(last)["model"]["weight"].item() == 0  # PyTorch does not notice
    elif damage == "missing":
        last.unlink()
    elif damage == "empty tag":
        (tmp_path / "last_checkpoint").write_text("")
    elif damage == "zeros tag":
        (tmp_path / "last_checkpoint").write_bytes(bytes(8))
    elif damage == "binary tag":
        (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe")
    else:
        (tmp_path / "last_checkpoint").unlink()
    torch.save({"a released model": 1}, tmp_path / "model_zoo.pth")  # newer, but not of this run
    newest = 2 if "tag" in damage else 1
    with caplog.at_level("WARNING"):
        assert checkpointer.resume_or_load("", resume=True)["iteration"] == newest
    assert f"resuming from {tmp_path}/model_{newest}.pth" in caplog.text


def test_untagged_checkpoint_is_not_resumed_from(tmp_path):
    checkpointer = save_three_checkpoints(tmp_path)
    checkpointer.save("model_best", tag=False, iteration=1)
    assert (tmp_path / "model_best.pth").exists()
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 2
    checkpointer.save("model_3", iteration=3)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3


def test_says_the_classes_of_the_last_file(tmp_path):
    checkpointer = save_three_checkpoints(tmp_path)
    checkpointer.load(str(tmp_path / "model_2.pth"))
    assert checkpointer.class_names is checkpointer.category_ids is None
    checkpointer.description = {"class_names": ["a", "b"], "category_ids": [7, 3]}
    checkpointer.save("model_3")
    checkpointer.load(str(tmp_path / "model_3.pth"))
    assert checkpointer.class_names == ["a", "b"]
    assert checkpointer.category_ids == [7, 3]


def test_what_starts_anew_for_other_classes_is_what_the_model_says(tmp_path):
    def detector(weight):
        model = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("classes", "classes2", "boxes")})
        for parameter in model.parameters():
            nn.init.constant_(parameter, weight)
        return model

    trained = AtomicCheckpointer(detector(1.0), str(tmp_path))
    trained.description["class_names"] = ["a"]
    trained.save("model")
    for class_layers, expected in ((("classes",), 0.0), (None, 1.0)):
        model = detector(0.0)
        if class_layers:
            model.class_layers = class_layers
        checkpointer = AtomicCheckpointer(model)
        checkpointer.classes_of_data = ["b"]
        checkpointer.load(str(tmp_path / "model.pth"))
        assert model["classes"].weight.item() == model["classes"].bias.item() == expected
        assert model["classes2"].weight.item() == model["boxes"].weight.item() == 1.0


def test_a_folder_that_is_not_local_is_refused():
    with pytest.raises(ValueError, match="'s3://bucket/run' is no local folder"):
        AtomicCheckpointer(nn.Linear(1, 1), "s3://bucket/run")


def test_empty_folder_has_no_checkpoint(tmp_path):
    assert not AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path)).has_checkpoint()
    assert not AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path / "none")).has_checkpoint()


def test_no_complete_checkpoint_is_an_error(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0.pth")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint to resume from"):
        AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize("name", ["../other/model_0.pth", "/other/model_0.pth", "a/model_0.pth"])
def test_a_checkpoint_of_another_folder_is_refused(tmp_path, name):
    checkpointer = save_three_checkpoints(tmp_path)
    (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(ValueError, match="not a file of its own folder"):
        checkpointer.resume_or_load("", resume=True)


def test_a_link_under_the_temporary_name_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "model_3.pth.partial").symlink_to(victim)
    (tmp_path / "last_checkpoint.partial").symlink_to(victim)
    checkpointer = save_three_checkpoints(tmp_path)
    checkpointer.save("model_3", iteration=3)
    assert victim.read_text() == "untouched"
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3
    assert not list(tmp_path.glob("*.partial"))


def test_damage_anywhere_is_noticed(tmp_path):
    """A byte changed anywhere is noticed, or changes nothing that is read."""
    checkpointer = save_three_checkpoints(tmp_path)
    file = tmp_path / "model_2.pth"
    content = file.read_bytes()
    expected = torch.load(file)
    rng = random.Random(0)
    unnoticed = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        if is_intact(str(file)):
            unnoticed += 1
            assert torch.load(file)["iteration"] == expected["iteration"]
            assert torch.equal(torch.load(file)["model"]["weight"], expected["model"]["weight"])
        assert checkpointer.get_checkpoint_file()
    assert unnoticed < 150


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    address = "http://127.0.0.1:9/R-50.pkl"  # nobody listens
    with pytest.raises(
        OSError, match=r"R-50\.pkl cannot be fetched \(.*refused\).*torchvision:///"
    ):
        AtomicCheckpointer(nn.Linear(1, 1)).load(address)
