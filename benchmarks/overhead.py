"""What the detector itself costs, beside Detectron2's FCOS: a training step without a backbone.

The backbone returns fixed p3 to p7 maps, the towers have one layer. Both sides get the same boxes
and run in turns.

    python benchmarks/overhead.py [--boxes 20 1000] [--repeats 9] [--radius 1.5]
"""

import argparse
import statistics
import time

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.meta_arch.fcos import FCOS as DetectronFCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead as DetectronHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from fcos_d2.modeling import FCOS, FCOSHead, FCOSLoss, FCOSPostProcessor, LocationAssigner

SIZE, STRIDES, CHANNELS, CLASSES = (800, 1216), (8, 16, 32, 64, 128), 32, 80
RANGES = [(0, 64), (64, 128), (128, 256), (256, 512), (512, float("inf"))]
PIXELS = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}


class FixedMaps(Backbone):
    """Returns the same feature maps whatever the image."""

    def __init__(self, images: int):
        super().__init__()
        self.maps = {
            f"p{i + 3}": torch.randn(images, CHANNELS, -(-SIZE[0] // s), -(-SIZE[1] // s))
            for i, s in enumerate(STRIDES)
        }

    def forward(self, x):
        return self.maps

    def output_shape(self):
        names = zip(self.maps, STRIDES, strict=True)
        return {name: ShapeSpec(channels=CHANNELS, stride=s) for name, s in names}


def build_ours(backbone: Backbone, radius: float) -> torch.nn.Module:
    shapes = list(backbone.output_shape().values())
    head = FCOSHead(input_shape=shapes, num_classes=CLASSES, num_cls_convs=1, num_box_convs=1)
    return FCOS(
        backbone=backbone,
        head=head,
        head_in_features=list(backbone.output_shape()),
        assigner=LocationAssigner(RANGES, radius),
        loss=FCOSLoss(),
        post_processor=FCOSPostProcessor(),
        num_classes=CLASSES,
        **PIXELS,
    )


def build_detectrons(backbone: Backbone, radius: float) -> torch.nn.Module:
    shapes = list(backbone.output_shape().values())
    head = DetectronHead(
        input_shape=shapes, num_classes=CLASSES, conv_dims=[CHANNELS], norm="GN", prior_prob=0.01
    )
    return DetectronFCOS(
        backbone=backbone,
        head=head,
        head_in_features=list(backbone.output_shape()),
        num_classes=CLASSES,
        center_sampling_radius=radius or 1e9,
        **PIXELS,
    )


def make_batch(images: int, boxes: int) -> list[dict]:
    batch = []
    for _ in range(images):
        sizes = torch.exp(torch.rand(boxes, 2) * 4 + 2.5).clamp(max=700)  # 12 to 665 pixels
        centers = torch.rand(boxes, 2) * torch.tensor([SIZE[1], SIZE[0]])
        instances = Instances(SIZE)
        instances.gt_boxes = Boxes(torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1))
        instances.gt_classes = torch.randint(CLASSES, (boxes,))
        batch.append({"image": torch.zeros(3, 8, 8), "instances": instances})
    return batch


def step(model: torch.nn.Module, batch: list[dict]) -> float:
    """Milliseconds of a training step."""
    model.zero_grad()
    begin = time.perf_counter()
    sum(model(batch).values()).backward()
    return (time.perf_counter() - begin) * 1e3


def peak_megabytes(model: torch.nn.Module, batch: list[dict]) -> float:
    """The most memory that tensors made in a training step hold at once."""
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profiler:
        step(model, batch)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, nargs="+", default=[5, 20, 100, 500, 1000])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--radius", type=float, default=1.5, help="centre sampling; 0 for none")
    args = parser.parse_args()

    torch.manual_seed(0)
    backbone = FixedMaps(args.images)
    ours, peer = (build(backbone, args.radius) for build in (build_ours, build_detectrons))
    rows = []
    with EventStorage(1):
        for boxes in args.boxes:
            batch = make_batch(args.images, boxes)
            times = {model: [] for model in (ours, peer)}
            for repeat in range(args.repeats + 1):
                for model, measured in times.items():
                    milliseconds = step(model, batch)
                    if repeat:  # the first one warms up
                        measured.append(milliseconds)
            a, b = (statistics.median(times[m]) for m in (ours, peer))
            rows.append([boxes, a, b, b / a, *(peak_megabytes(m, batch) for m in (ours, peer))])
    headers = [
        "boxes per image", "fcos_d2 ms", "Detectron2 ms", "ratio", "fcos_d2 MB", "Detectron2 MB",
    ]  # fmt: skip
    print(f"training step, {args.images} x {SIZE[0]}x{SIZE[1]}, medians of {args.repeats}")
    print(tabulate(rows, headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
