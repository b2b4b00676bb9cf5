"""Make the README's two pictures from the results of `make demo`; `make pictures` runs both.

python tools/readme_pictures.py demo_output docs/pictures
"""

import argparse
from pathlib import Path

from PIL import Image

WIDTH = 1000  # pixels


def shrunk(picture: Image.Image) -> Image.Image:
    return picture.resize(
        (WIDTH, picture.height * WIDTH // picture.width), Image.Resampling.LANCZOS
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="the folder that `make demo` has written")
    parser.add_argument("output", type=Path, help="the folder of the pictures")
    args = parser.parse_args()
    predictions = args.demo / "predictions.png"
    curves = args.demo / "report" / "precision_recall.png"
    for file in (predictions, curves):
        if not file.is_file():
            parser.error(f"{file} is not there: run `make demo` first")

    args.output.mkdir(parents=True, exist_ok=True)
    picture = Image.open(predictions).convert("RGB")
    rows = picture.crop((0, 0, picture.width, picture.height * 3 // 5))  # of its five rows
    shrunk(rows).save(args.output / "detections.jpg", quality=85)
    # A chart has few colours: a palette of them takes a third of the space.
    chart = shrunk(Image.open(curves).convert("RGB")).quantize(64)
    chart.save(args.output / "precision_recall.png", optimize=True)


if __name__ == "__main__":
    main()
