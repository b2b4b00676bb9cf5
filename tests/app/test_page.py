"""``fcos app`` as a user runs it: errors at its start, and the page."""

import json
import os
import shutil
import signal
import subprocess
import sys
from base64 import b64encode
from urllib.request import Request, urlopen

import cv2
import numpy as np
import pytest
import torch
from helpers import free_port, make_arrays, make_detector, tiny_cfg

from fcos_d2 import Predictor, app
from fcos_d2.app import main

VIDEO = cv2.VideoWriter_fourcc(*"FFV1")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command sets ends with the test."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        monkeypatch.setenv(name, "")


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "fcos_d2.app.page", raising=False)
    with pytest.raises(
        SystemExit, match=r"error: The page needs Gradio .*pip install 'fcos_d2\[app\]'"
    ):
        main(["--weights", "model.pth"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--weights", "text.pth"], r"text\.pth is damaged"),
        (["--weights", "text.onnx"], r"ONNX Runtime cannot load .*text\.onnx"),
        (["--weights", "text.ONNX", "--device", "cpu"], "leave out the other options"),
        (["--weights", "missing.pth"], r"There is no file missing\.pth"),
        (["--weights", "text.pth", "--model", "x"], "leave out the others"),
    ],
)
def test_errors_at_the_start_are_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.pth", "text.onnx"):
        (tmp_path / name).write_text("no weights")
    args = app._parser().parse_intermixed_args(options)
    with pytest.raises((ValueError, OSError), match=message):
        app._detector(args)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    cfg, names = tiny_cfg(), ["disc", "square", "triangle"]
    data = {"model": make_detector(cfg).state_dict(), "config": cfg.dump(), "class_names": names}
    torch.save(data, folder / "model.pth")
    (pixels,) = make_arrays([(60, 80)])
    cv2.imwrite(str(folder / "a.png"), pixels)
    (folder / "text.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def page(weights, tmp_path_factory):
    """The address of the page, and a folder that is the server's place for temporary files."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'fcos_d2[app]'")
    folder = tmp_path_factory.mktemp("temporary")
    port = free_port()
    code = "from fcos_d2.cli import main; main()"
    command = [sys.executable, "-c", code, "app", "--weights", "model.pth", "--port", port]
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--device", "cpu"], cwd=weights, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as server:  # fmt: skip
        lines = iter(server.stdout.readline, "")
        assert any(f"http://127.0.0.1:{port}" in line for line in lines)
        again = subprocess.run(
            [*command], cwd=weights, env=environment, text=True, capture_output=True
        )
        assert again.stderr.endswith(
            f"error: Port {port} of 127.0.0.1 cannot be had: choose another --port\n"
        )
        yield f"http://127.0.0.1:{port}", folder
        assert any(folder.glob("fcos_app_*/gradio/*/*"))
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGTERM)  # as a process group may get it
        rest = server.communicate(timeout=60)[0]
    assert server.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in rest
    assert not list(folder.glob("fcos_app_*"))  # nothing of the images is kept


def test_an_image_goes_in_and_boxes_come_out(page, weights):
    from gradio_client import Client, handle_file

    client = Client(page[0], verbose=False, download_files=str(page[1] / "client"))
    picture, text = client.predict(
        handle_file(str(weights / "a.png")), 0.18, ["square"], api_name="/look"
    )
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = str(weights / "model.pth")
    every = Predictor(cfg)(str(weights / "a.png"))["instances"]
    squares = int(((every.scores >= 0.18) & (every.pred_classes == 1)).sum())
    assert squares > 1
    assert text.startswith(f"{squares} of {len(every)} detections are shown.")
    plain, _ = client.predict(handle_file(str(weights / "a.png")), 1, [], api_name="/look")
    boxes, plain = (cv2.imread(file).astype(int) for file in (picture, plain))
    assert boxes.shape == (480, 640, 3)
    assert 0.01 < (np.abs(boxes - plain).max(axis=2) > 60).mean() < 0.5
    picture, text = client.predict(
        handle_file(str(weights / "text.jpg")), 0.18, [], api_name="/look"
    )
    assert picture is None and text == "text.jpg is not an image that can be read."


def test_only_what_was_uploaded_is_looked_at(page, weights, tmp_path):
    """A request names a file of the server, which a browser never does."""
    from gradio_client import Client

    client = Client(page[0], verbose=False, download_files=str(page[1] / "client"))
    file = {"path": str(weights / "a.png")}
    for sent in (file, {"path": "a.png"}, {"path": f"{page[0]}/theme.css"}, {"url": "x"}):
        picture, text = client.predict(sent, 0.18, [], api_name="/look")
        assert picture is None and text.endswith("was not uploaded.")
    assert watched(page[0], file) == [""]
    jpeg = b64encode(cv2.imencode(".jpg", cv2.imread(str(weights / "a.png")))[1]).decode()
    sent = {"url": f"data:image/jpeg;base64,{jpeg}"}  # as a browser sends the frames of a camera
    (html,) = watched(page[0], sent)
    assert html.startswith('<img alt="Detections"')


def watched(address, frame):
    """The answer to a frame of a camera, which Gradio's client does not know."""
    url, data = f"{address}/gradio_api/call/watch", {"data": [frame, 0.18, []]}
    request = Request(url, json.dumps(data).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urlopen(f"{url}/{event}", timeout=60) as answer:
        kind, content = answer.readline(), answer.readline()
    assert kind == b"event: generating\n"
    return json.loads(content.removeprefix(b"data: "))


def test_a_video_that_cannot_be_written_is_a_sentence(page, weights, tmp_path):
    from gradio_client import Client, handle_file

    # Shrunk to 1600 pixels, it is one pixel wide, which VP8 does not take.
    writer = cv2.VideoWriter(str(tmp_path / "thin.avi"), VIDEO, 5, (2, 4000))
    writer.write(np.zeros((4000, 2, 3), np.uint8))
    writer.release()
    client = Client(page[0], verbose=False, download_files=str(page[1] / "client"))
    file = handle_file(str(tmp_path / "thin.avi"))
    video, text = client.predict(file, 0.18, [], api_name="/run")
    assert video is None and "cannot write the video thin.webm of 1 x 1600 pixels" in text


def test_in_a_browser(page, weights):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    if not CHROMIUM:
        pytest.skip("needs a Chromium")
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        asked = set()
        tab.on("request", lambda request: asked.add(request.url.split("/")[2]))
        tab.goto(page[0])
        chosen = tab.locator("input[type=file]").first
        chosen.set_input_files(weights / "text.jpg")
        tab.get_by_text("text.jpg is not an image that can be read.").wait_for()
        tab.get_by_label("Remove Image").first.click()
        tab.get_by_text("Choose an image.").wait_for()
        chosen.set_input_files(weights / "a.png")
        tab.get_by_text("0 of 9 detections are shown.").wait_for()
        number = tab.get_by_label("number input for Least score")
        number.fill("0")
        number.press("Enter")
        tab.get_by_text("9 of 9 detections are shown.").wait_for()
        # The image, its detections, and two heat maps; then the origin of what is clicked on.
        pictures = tab.locator("img[src*='/file=']")
        tab.wait_for_function("document.querySelectorAll(\"img[src*='/file=']\").length == 4")
        box = pictures.nth(1).bounding_box()
        tab.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.5)
        tab.wait_for_function("document.querySelectorAll(\"img[src*='/file=']\").length == 5")
        browser.close()
    assert asked == {page[0].split("/")[2]}  # no other server is asked for anything
