"""Checks that read the images."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from tqdm import tqdm

from ..findings import Finding
from ..image_files import check_depth, size_and_orientation
from ..raw_data import RawData


def check_images(data: RawData, progress: bool = False) -> tuple[list[Finding], dict[str, bytes]]:
    """Read every image of a data set, several at a time.

    Returns:
        what is wrong with them; and by file, a hash of the pixels of each that could be read.
    """
    files = [os.path.join(data.image_root, image["file_name"]) for image in data.images]
    findings, hashes = [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(_look, files, data.images)
        bar = tqdm(results, data.name, len(files), unit=" images", disable=not progress)
        for file, image, (faults, digest) in zip(files, data.images, bar, strict=True):
            findings += [Finding(kind, file, text, image["id"]) for kind, text in faults]
            if digest is not None:
                hashes[file] = digest
    return findings, hashes


def check_same_images(hashes: Mapping[str, Mapping[str, bytes]]) -> list[Finding]:
    """Images with the same pixels, by the hashes of :func:`check_images` of each data set."""
    findings = []
    first: dict[bytes, tuple[str, str]] = {}
    for name, of_files in hashes.items():
        for file, digest in of_files.items():
            other_name, other = first.setdefault(digest, (name, file))
            if other_name != name:
                text = f"in {name}, and as {other} in {other_name}"
                findings.append(Finding("image in two sets", file, text))
            elif other != file:
                findings.append(Finding("image twice", file, f"also {other}"))
    return findings


def _look(file: str, image: dict) -> tuple[list[tuple[str, str]], bytes | None]:
    """The kinds of findings about an image with their details, and the hash of its pixels."""
    if not os.path.isfile(file):
        return [("no image", "there is no such file")], None
    try:
        size, turn = size_and_orientation(file)
    except Exception as error:  # of many kinds, in broken headers
        return [("unreadable image", f"{type(error).__name__}: {error}")], None
    faults = []
    annotated = image["height"], image["width"]
    if size != annotated:
        text = f"{size[1]} x {size[0]}, but annotated as {annotated[1]} x {annotated[0]}"
        text += ", which is its size before it is turned by EXIF" * (size == annotated[::-1])
        faults.append(("other size than annotated", text))
    if turn != 1:
        faults.append(("turned by EXIF", f"orientation {turn}: boxes must fit the turned image"))
    try:
        check_depth(file)
    except ValueError as error:
        return [*faults, ("more than 8 bits", str(error))], None
    try:
        with Image.open(file) as opened:
            if opened.format == "TIFF" and turn != 1:
                text = f"orientation {turn}: PIL turns it, and Detectron2 does again."
                faults[-1] = ("TIFF turned by EXIF", f"{text} Save it upright")
            pixels = opened.convert("RGB")
    except Exception as error:  # of many kinds, in broken files
        return [*faults, ("truncated image", f"{type(error).__name__}: {error}")], None
    digest = hashlib.blake2b(f"{pixels.size}".encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return faults, digest.digest()
