"""The page of ``fcos app``, in Gradio. Nothing else imports Gradio."""

import io
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path

import cv2
import gradio as gr
import numpy as np
from PIL import Image

from ..inference.writers import VideoWriter
from .detector import Detector, Found

# Seconds after which Gradio removes what was uploaded and shown, and its memory of it.
_KEPT = 600
_CAMERAS = 4  # at a time: each holds its place until its page is closed


def make_page(detector: Detector, folder: str) -> gr.Blocks:
    """The page, not served yet.

    Args:
        folder: for videos while they are written. Gradio keeps what is uploaded below it.
    """
    page = gr.Blocks(title=f"FCOS: {detector.name}", delete_cache=(60, _KEPT))
    with page:
        gr.Markdown(f"# FCOS\n`{detector.name}`")
        with gr.Row():
            threshold = gr.Slider(0, 1, 0.4, step=0.01, label="Least score")
            names = list(dict.fromkeys(detector.class_names or []))
            classes = gr.Dropdown(
                names,
                multiselect=True,
                label="Classes (all if none is chosen)",
                visible=bool(names),
            )
        with gr.Tab("Image"):
            _image_tab(detector, threshold, classes, folder)
        with gr.Tab("Camera"):
            _camera_tab(detector, threshold, classes)
        with gr.Tab("Video"):
            _video_tab(detector, threshold, classes, folder)
    return page


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until the process is interrupted.

    Raises:
        OSError: if the port is not free, or the host is not an address of this machine.
    """
    # Gradio's own fonts would come from another server.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, max_file_size="500mb",
            footer_links=["settings"], theme=theme, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"Port {port} of {host} cannot be had: choose another --port") from error
    print(f"The page is at http://{host}:{port}; Ctrl-C ends it.", flush=True)
    page.block_thread()


def _image_tab(detector: Detector, threshold: gr.Slider, classes: gr.Dropdown, folder: str) -> None:
    found = gr.State(time_to_live=_KEPT)
    with gr.Row():
        image = gr.Image(label="Image", buttons=["fullscreen"])
        picture = _figure("Detections")
        if not detector.unexplained:
            origin = _figure("Where a detection comes from")
    sentence = gr.Markdown("Choose an image.")
    settings = [threshold, classes]

    def draw(found: Found | None, threshold: float, classes: list[str]) -> tuple:
        if found is None:
            return None, "Choose an image."
        shown = len(detector.kept(found.instances, threshold, classes))
        text = f"{shown} of {len(found.instances)} detections are shown."
        if found.inspection:
            text += " Click on one to see where it comes from."
        return detector.picture(found, threshold, classes)[:, :, ::-1], text

    def look(file: dict | None, threshold: float, classes: list[str]) -> tuple:
        if file is None:
            return None, *draw(None, threshold, classes)
        try:
            found = detector.look(_uploaded(file, folder))
        except ValueError as error:
            return None, None, str(error)
        return found, *draw(found, threshold, classes)

    # Without Gradio's own reading, whose errors are no sentences.
    looked = image.input(look, [image, *settings], [found, picture, sentence], preprocess=False)
    for changed in (threshold.change, classes.change):
        changed(draw, [found, *settings], [picture, sentence], show_progress="hidden")
    if detector.unexplained:
        gr.Markdown(detector.unexplained)
        return
    gr.Markdown("### Heat maps of the levels")
    names = ["Class probability", *(["Quality"] if detector.has_quality else [])]
    maps = [_figure(name) for name in names]

    def explain(
        found: Found | None, threshold: float, classes: list[str], click: gr.SelectData
    ) -> np.ndarray | None:
        return found and detector.origin(found, *click.index, threshold, classes)

    def draw_maps(found: Found | None) -> list[np.ndarray | None]:
        return [None, *(detector.heat_maps(found) if found else [None] * len(maps))]

    picture.select(explain, [found, *settings], origin)
    looked.then(draw_maps, found, [origin, *maps])


def _uploaded(file: dict, folder: str) -> str:
    """The path of an uploaded file.

    A request may name any file of this machine in its place, or an address, which would be
    fetched. Gradio does not look at the path of an image.

    Raises:
        ValueError: for another file.
    """
    path = file.get("path") or ""
    if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{Path(path).name} was not uploaded.")
    return path


def _pixels_in(frame: dict) -> np.ndarray | None:
    """(H, W, 3) uint8, RGB, of a frame that is in the request itself; see :func:`_uploaded`."""
    kind, _, content = (frame.get("url") or "").partition(";base64,")
    if not kind.startswith("data:image/"):
        return None
    return np.asarray(Image.open(io.BytesIO(b64decode(content))).convert("RGB"))


def _figure(label: str) -> gr.Image:
    # A label that shows would lie over the picture. Gradio's third button, "share", would send it
    # to Hugging Face.
    return gr.Image(
        label=label, show_label=False, interactive=False, buttons=["download", "fullscreen"]
    )


def _camera_tab(detector: Detector, threshold: gr.Slider, classes: gr.Dropdown) -> None:
    with gr.Row():
        camera = gr.Image(label="Camera", sources=["webcam"], streaming=True)
        picture = gr.HTML()

    def watch(frame: dict | None, threshold: float, classes: list[str]) -> str:
        pixels = _pixels_in(frame or {})
        if pixels is None:
            return ""
        _, jpeg = cv2.imencode(".jpg", detector.frame(pixels[:, :, ::-1], threshold, classes))
        # An image of Gradio's would be a file.
        return f'<img alt="Detections" src="data:image/jpeg;base64,{b64encode(jpeg).decode()}">'

    camera.stream(
        watch, [camera, threshold, classes], picture, show_progress="hidden", preprocess=False,
        stream_every=0.1, concurrency_limit=_CAMERAS,
    )  # fmt: skip


def _video_tab(detector: Detector, threshold: gr.Slider, classes: gr.Dropdown, folder: str) -> None:
    with gr.Row():
        video = gr.Video(label="Video", sources=["upload"])
        result = gr.Video(label="Detections", interactive=False, buttons=["download"])
    sentence = gr.Markdown("Choose a video.")
    with gr.Row():
        start, stop = gr.Button("Detect", variant="primary"), gr.Button("Stop")

    def run(file: dict | None, threshold: float, classes: list[str]) -> Iterator[tuple]:
        if file is None:
            yield None, "Choose a video."
            return
        path = file["path"]  # of a video, Gradio makes sure that it was uploaded
        with tempfile.TemporaryDirectory(dir=folder) as written:
            writer = VideoWriter(Path(written), path, ".webm", "VP80")
            try:
                for n, picture in enumerate(detector.video(path, threshold, classes)):
                    writer.write(n, picture)
                    yield None, f"Frame {n + 1} of {writer.total or 'many'}."  # may be stopped here
            except (ValueError, OSError) as error:
                yield None, str(error)
                return
            finally:
                writer.close()
            yield str(writer.file), f"{n + 1} frames."  # Gradio takes a copy

    running = start.click(run, [video, threshold, classes], [result, sentence], preprocess=False)
    stop.click(None, cancels=running)
