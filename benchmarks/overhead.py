"""What the detector itself costs: a training step and inference without a backbone.

The backbone returns fixed p3 to p7 maps, the towers have one layer. Few channels and no norm, so
that the layers of the head, which are the same in both FCOS, do not hide the rest; for the ratios
of whole models see end_to_end.py. All sides get the same boxes and run in turns; Detectron2's FCOS
has the same weights too. "ATSS", "SimOTA" and "TaskAligned" are ours with another
MODEL.FCOS.ASSIGNMENT, the last with the losses of TOOD. Inference is the head, decoding and NMS,
with class logits as of a trained detector. The maps come in the memory layout in which each side's
own backbone returns them.

    python benchmarks/overhead.py [--modes training inference] [--boxes 20 1000] [--device cuda]
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable

import torch
from common import (
    check_agreement,
    default_device,
    in_turns,
    machine,
    peak_megabytes,
    random_instances,
    spread_logits,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.fcos import FCOS as DetectronFCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead as DetectronHead
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.fcos import FCOSHead as TorchvisionHead
from torchvision.models.detection.image_list import ImageList as TorchvisionImageList

from fcos_d2.conversion import SOURCES
from fcos_d2.modeling import (
    FCOS,
    Assigner,
    ATSSAssigner,
    FCOSHead,
    FCOSLoss,
    FCOSPostProcessor,
    LocationAssigner,
    SimOTAAssigner,
    TaskAlignedAssigner,
)

SIZE, STRIDES, CHANNELS, CLASSES = (800, 1216), (8, 16, 32, 64, 128), 8, 80
RANGES = [(0, 64), (64, 128), (128, 256), (256, 512), (512, float("inf"))]
PIXELS = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}
ALIGNED = {
    "quality": "joint",
    "cls_loss_type": "quality_focal",
    "box_loss_weighting": "alignment",
}
SCORE_THRESH = 0.2  # on sqrt(class * centerness): Detectron2's and torchvision's rule and value


class FixedMaps(Backbone):
    """Returns the same feature maps whatever the image."""

    out_channels = CHANNELS  # torchvision asks for it

    def __init__(self, images: int, device: str, memory_format=torch.contiguous_format):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.maps = OrderedDict()
        for i, s in enumerate(STRIDES):
            shape = (images, CHANNELS, -(-SIZE[0] // s), -(-SIZE[1] // s))
            x = torch.randn(shape, generator=generator).to(device)
            self.maps[f"p{i + 3}"] = x.contiguous(memory_format=memory_format)

    def forward(self, x):
        return self.maps

    def output_shape(self):
        names = zip(self.maps, STRIDES, strict=True)
        return {name: ShapeSpec(channels=CHANNELS, stride=s) for name, s in names}


def build_ours(images: int, device: str, assigner: Assigner, **loss_keys) -> nn.Module:
    # Our backbone's maps are channels-last on CPU: the model's runtime makes its input so.
    layout = torch.channels_last if device == "cpu" else torch.contiguous_format
    backbone = FixedMaps(images, device, layout)
    shapes = list(backbone.output_shape().values())
    return FCOS(
        backbone=backbone,
        head=FCOSHead(
            input_shape=shapes,
            num_classes=CLASSES,
            num_cls_convs=1,
            num_box_convs=1,
            norm="",
            use_scale=False,  # as in Detectron2's
            quality=loss_keys.get("quality", "centerness"),
        ),
        head_in_features=list(backbone.output_shape()),
        assigner=assigner,
        loss=FCOSLoss(**loss_keys),
        post_processor=FCOSPostProcessor(
            score_thresh=SCORE_THRESH,
            score_thresh_on="score",
            quality=loss_keys.get("quality", "centerness"),
        ),
        num_classes=CLASSES,
        **PIXELS,
    )


def build_detectrons(images: int, device: str, radius: float) -> nn.Module:
    backbone = FixedMaps(images, device)
    shapes = list(backbone.output_shape().values())
    head = DetectronHead(
        input_shape=shapes, num_classes=CLASSES, conv_dims=[CHANNELS], norm="", prior_prob=0.01
    )
    return DetectronFCOS(
        backbone=backbone,
        head=head,
        head_in_features=list(backbone.output_shape()),
        num_classes=CLASSES,
        center_sampling_radius=radius or 1e9,
        test_score_thresh=SCORE_THRESH,
        **PIXELS,
    )


def build_retinanet(images: int, device: str) -> nn.Module:
    backbone = FixedMaps(images, device)
    shapes = list(backbone.output_shape().values())
    sizes = [[s * 4 * 2 ** (i / 3) for i in range(3)] for s in STRIDES]
    return RetinaNet(
        backbone=backbone,
        head=RetinaNetHead(
            input_shape=shapes, num_classes=CLASSES, num_anchors=9, conv_dims=[CHANNELS], norm=""
        ),
        head_in_features=list(backbone.output_shape()),
        anchor_generator=DefaultAnchorGenerator(
            sizes=sizes, aspect_ratios=[0.5, 1.0, 2.0], strides=STRIDES
        ),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=CLASSES,
        **PIXELS,
    )


def build_torchvisions(images: int, device: str) -> nn.Module:
    backbone = FixedMaps(images, device)
    head = TorchvisionHead(CHANNELS, 1, CLASSES, num_convs=0)
    for part in (head.classification_head, head.regression_head):  # its own has a group norm of 32
        part.conv = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())
    return TorchvisionFCOS(backbone, CLASSES, head=head, score_thresh=SCORE_THRESH)


@torch.no_grad()
def same_weights(ours: nn.Module, detectrons: nn.Module) -> None:
    """Ours get Detectron2's, which predict boxes of some cells around each location."""
    nn.init.normal_(detectrons.head.bbox_pred.weight, std=0.1)
    nn.init.constant_(detectrons.head.bbox_pred.bias, 2)
    features = list(detectrons.backbone.maps.values())
    # With a centerness around 1/2, sqrt(class / 2) > 0.2 where class > 0.08.
    spread_logits(detectrons.head.cls_score, lambda: detectrons.head(features), 2 * SCORE_THRESH**2)
    theirs = detectrons.state_dict()
    names = SOURCES["detectron2"].our_names(theirs)
    ours.load_state_dict({new: theirs[old] for old, new in names.items()})


def step(model: nn.Module, batch: list[dict]) -> None:
    model.zero_grad()
    sum(model(batch).values()).backward()


@torch.no_grad()
def infer(model: nn.Module) -> list:
    """The head, decoding and NMS, without images; a list of Instances or torchvision's dicts."""
    features = list(model.backbone.maps.values())
    predictions = model.head(features)
    sizes = [SIZE] * len(features[0])
    if isinstance(model, FCOS):
        return model.post_processor(predictions, model.levels, sizes)
    images = torch.empty(len(sizes), 3, *SIZE, device="meta")
    if not isinstance(model, TorchvisionFCOS):
        return model.forward_inference(ImageList(images, sizes), features, predictions)
    anchors = model.anchor_generator(TorchvisionImageList(images, sizes), features)
    cells = [x.shape[-2] * x.shape[-1] for x in features]
    by_level = {name: list(x.split(cells, dim=1)) for name, x in predictions.items()}
    return model.postprocess_detections(by_level, [list(a.split(cells)) for a in anchors], sizes)


def row(models: dict[str, nn.Module], run: Callable, repeats: int, device: str) -> list:
    """Times, ratios and memory of a case; the first two models are ours and Detectron2's FCOS."""
    functions = {name: lambda m=model: run(m) for name, model in models.items()}
    times = list(in_turns(functions, repeats, device).values())
    memory = [peak_megabytes(functions[name], device) for name in list(models)[:2]]
    return [*times, *(t / times[0] for t in times[1:]), *memory]


def print_table(title: str, first: str, rows: list, models: dict, repeats: int) -> None:
    headers = [first, *(f"{name} ms" for name in models)]
    headers += [f"{name} / ours" for name in list(models)[1:]]
    headers += ["our MB", "Detectron2's MB"]
    print(f"\n{title}, {SIZE[0]}x{SIZE[1]}, medians of {repeats}")
    print(tabulate(rows, [h.replace(" ", "\n", 1) for h in headers], floatfmt=".1f"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", default=["training", "inference"])
    parser.add_argument("--boxes", type=int, nargs="+", default=[5, 20, 100, 500, 1000])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--radius", type=float, default=1.5, help="centre sampling; 0 for none")
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args()

    torch.manual_seed(0)
    device = args.device
    ours, atss, simota = (
        build_ours(args.images, device, assigner).to(device)
        for assigner in (LocationAssigner(RANGES, args.radius), ATSSAssigner(), SimOTAAssigner())
    )
    aligned = build_ours(args.images, device, TaskAlignedAssigner(), **ALIGNED).to(device)
    detectrons = build_detectrons(args.images, device, args.radius).to(device)
    same_weights(ours, detectrons)
    retinanet = build_retinanet(args.images, device).to(device)
    retinanet.num_images = args.images
    features = list(retinanet.backbone.maps.values())
    spread_logits(retinanet.head.cls_score, lambda: retinanet.head(features), 0.05)
    print(machine(device))

    if "training" in args.modes:
        models = {"fcos_d2": ours, "Detectron2": detectrons, "RetinaNet": retinanet}
        others = {"ATSS": atss, "SimOTA": simota, "TaskAligned": aligned}
        for other in others.values():  # the last has no branch for quality
            other.load_state_dict(ours.state_dict(), strict=False)
        models |= others
        rows = []
        with EventStorage(1):
            for boxes in args.boxes:
                batch = [
                    {
                        "image": torch.zeros(3, 8, 8),
                        "instances": random_instances(SIZE, boxes, CLASSES),
                    }
                    for _ in range(args.images)
                ]

                def run(model, batch=batch):
                    step(model, batch)

                rows.append([boxes, *row(models, run, args.repeats, device)])
        title = f"Training step of {args.images} images"
        print_table(title, "boxes", rows, models, args.repeats)

    if "inference" in args.modes:
        torchvisions = build_torchvisions(args.images, device).to(device)
        features = list(torchvisions.backbone.maps.values())
        spread_logits(
            torchvisions.head.classification_head.cls_logits,
            lambda: torchvisions.head(features),
            2 * SCORE_THRESH**2,
        )
        nn.init.constant_(torchvisions.head.regression_head.bbox_reg.bias, 2)
        models = {
            "fcos_d2": ours,
            "Detectron2": detectrons,
            "torchvision": torchvisions,
            "RetinaNet": retinanet,
        }
        for model in models.values():
            model.eval()
        share = check_agreement("Detectron2's FCOS", infer(ours), infer(detectrons))
        with torch.no_grad():
            outputs = ours.head(list(ours.backbone.maps.values()))
            candidates = ours.post_processor.candidates(outputs, ours.levels, [SIZE] * args.images)
        rows = [
            [sum(map(len, candidates)) / args.images, *row(models, infer, args.repeats, device)]
        ]
        title = f"Inference of {args.images} images ({share:.0%} of the better detections agree)"
        print_table(title, "candidates", rows, models, args.repeats)


if __name__ == "__main__":
    main()
