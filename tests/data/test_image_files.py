"""Which image files are there."""

import os

import pytest

from fcos_d2.data.image_files import images_in, missing_files


def test_images_in_a_folder(tmp_path):
    for name in ("b.JPG", "a.png", "._a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert images_in(tmp_path) == [str(tmp_path / name) for name in ("a.png", "b.JPG")]


def test_missing_files(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("a.jpg", "sub/b.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    monkeypatch.chdir(tmp_path)
    there = ["a.jpg", "sub/b.jpg", "link.jpg", "sub//b.jpg", "sub/../a.jpg", "./a.jpg"]
    addresses = ["s3://bucket/a.jpg", "http://localhost/a.jpg"]
    missing = [
        "c.jpg",
        "folder.jpg",
        "broken.jpg",
        "loop.jpg",
        "sub/a.jpg",
        "nowhere/a.jpg",
        "x" * 999,
    ]
    for prefix in ("", f"{tmp_path}/"):
        files = [prefix + file for file in [*missing, *there]]
        assert missing_files([*files, *addresses]) == files[: len(missing)]
    assert missing_files([]) == []


def test_a_folder_is_listed_once_and_its_files_are_not_looked_for(tmp_path, monkeypatch):
    files = [str(tmp_path / f"{i}.jpg") for i in range(50)]
    for file in files:
        open(file, "w").close()
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    monkeypatch.setattr(os.path, "isfile", lambda file: pytest.fail(file))
    assert missing_files(files) == []
    assert listed == [str(tmp_path)]


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    """Their files may still be there: then each is looked for."""
    (tmp_path / "a.jpg").write_bytes(b"")

    def refuse(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    files = [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    assert missing_files(files) == files[1:]
