"""R-50 FCOS, whole: inference and a training step, beside Detectron2's and torchvision's.

Our model and Detectron2's FCOS have the same weights. Their outputs are compared before anything
is timed, and the run ends where they differ: a speed-up that changes detections does not count.
torchvision's FCOS and Detectron2's RetinaNet have random weights with as many candidates.

    python benchmarks/end_to_end.py [--modes inference training] [--precisions float32 bfloat16]
        [--batch 1 8] [--compile] [--device cuda]
"""

import argparse
import contextlib
from collections.abc import Callable

import torch
from common import (
    check_agreement,
    count_synchronizations,
    default_device,
    in_turns,
    machine,
    make_images,
    normalize_activations,
    peak_megabytes,
    spread_logits,
)
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from torchvision.models.detection import fcos_resnet50_fpn

from fcos_d2 import model_zoo
from fcos_d2.conversion import convert

CONFIG = "COCO-Detection/fcos_R_50_FPN_1x.yaml"
SCORE_THRESH = 0.2  # on sqrt(class * centerness): Detectron2's and torchvision's rule and value


@torch.no_grad()
def build_detectrons(image: dict, device: str) -> nn.Module:
    """Detectron2's FCOS with the statistics and the spread of outputs of a trained one."""
    model = instantiate(detectron2_zoo.get_config("common/models/fcos.py").model).to(device)
    model.eval()

    def run():
        model.head(list(model.backbone(model.preprocess_image([image]).tensor).values()))

    normalize_activations(model, run)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.02)
    nn.init.constant_(model.head.bbox_pred.bias, 3)
    # With a centerness around 1/2, sqrt(class / 2) > 0.2 where class > 0.08.
    spread_logits(model.head.cls_score, run, 2 * SCORE_THRESH**2)
    return model


def build_ours(theirs: nn.Module, device: str, opts: list) -> nn.Module:
    """Our model with their weights."""
    cfg = model_zoo.get_config(CONFIG)
    cfg.MODEL.DEVICE = device
    weights, cfg = convert(theirs.state_dict(), "detectron2", cfg, opts)
    model = build_model(cfg)
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def build_retinanet(image: dict, device: str) -> nn.Module:
    cfg = detectron2_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device, ""
    model = build_model(cfg).eval()

    def run():
        features = model.backbone(model.preprocess_image([image]).tensor)
        model.head([features[f] for f in model.head_in_features])

    normalize_activations(model, run)
    spread_logits(model.head.cls_score, run, 0.05)
    return model


@torch.no_grad()
def build_torchvisions(image: dict, size: tuple[int, int], device: str) -> nn.Module:
    model = fcos_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=min(size), max_size=max(size)
    )
    model = model.to(device).eval()
    spread_logits(
        model.head.classification_head.cls_logits,
        lambda: model([image["image"].to(device) / 255]),
        2 * SCORE_THRESH**2,
    )
    nn.init.constant_(model.head.regression_head.bbox_reg.bias, 3)
    return model


def at(precision: str, device: str):
    """The peers' precision: autocast around the model, as their users have it."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


@torch.no_grad()
def detect(model: nn.Module, batch: list[dict]) -> list:
    return [x["instances"].to("cpu") for x in model(batch)]


def inference_of(model: nn.Module, batch: list[dict], precision: str, device: str) -> Callable:
    @torch.no_grad()
    def run():
        with at(precision, device):
            return model(batch)

    return run


def torchvisions_inference(model: nn.Module, batch: list[dict], precision: str, device: str):
    images = [x["image"] for x in batch]

    @torch.no_grad()
    def run():
        with at(precision, device):
            return model([x.to(device) / 255 for x in images])

    return run


def training_of(model: nn.Module, batch: list[dict], precision: str, device: str) -> Callable:
    """A step with SGD; its rate is 0, so that every step does the same."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def run():
        with at(precision, device):
            losses = model(batch)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()  # each step then starts with the same memory

    return run


def check_training(ours: nn.Module, theirs: nn.Module, batch: list[dict]) -> None:
    """The same positives (but for exact ties) and, before they are normalised, class losses.

    Raises:
        SystemExit: if they differ by more than 1 %.
    """
    results = []
    for model, name in ((ours, "fcos/positives_per_image"), (theirs, "num_pos_anchors")):
        with EventStorage(1) as storage, torch.no_grad():
            loss = model.train()(batch)["loss_fcos_cls"].item()
            positives = storage.latest()[name][0] * len(batch)
        # Detectron2 divides by a moving average that starts at 300.
        normalizer = positives if model is ours else 0.9 * 300 + 0.1 * positives
        results.append((positives, loss * normalizer))
    (positives, loss), (positives2, loss2) = results
    if abs(positives / positives2 - 1) > 0.01 or abs(loss / loss2 - 1) > 0.01:
        raise SystemExit(f"Training differs: {results}")


def without_failing(functions: dict[str, Callable]) -> dict[str, Callable]:
    """Those that run: Detectron2's losses, for one, do not take bfloat16 from autocast."""
    running = {}
    for name, function in functions.items():
        try:
            function()
            running[name] = function
        except RuntimeError as error:
            print(f"{name} fails: {str(error).splitlines()[0]}")
    return running


class Table:
    """A row for each model and case, with the ratios to Detectron2's FCOS."""

    HEADERS = (
        "case", "precision", "model", "ms", "D2's FCOS / it", "D2's FCOS in float32 / it",
        "peak MB", "syncs",
    )  # fmt: skip

    def __init__(self, repeats: int, device: str):
        self.rows: list[list] = []
        self.in_float32: dict[str, float] = {}
        self.repeats, self.device = repeats, device

    def measure(self, case: str, precision: str, functions: dict[str, Callable]) -> None:
        functions = without_failing(functions)
        times = in_turns(functions, self.repeats, self.device)
        theirs = times.get("Detectron2's FCOS", float("nan"))
        if precision == "float32":
            self.in_float32[case] = theirs
        for name, milliseconds in times.items():
            ratios = [x / milliseconds for x in (theirs, self.in_float32.get(case, float("nan")))]
            memory = peak_megabytes(functions[name], self.device)
            syncs = count_synchronizations(functions[name], self.device)
            self.rows.append([case, precision, name, milliseconds, *ratios, memory, syncs])
        print(self.format(self.rows[-len(functions) :]), flush=True)

    def format(self, rows: list[list]) -> str:
        digits = ("g", "g", "g", ".0f", ".2f", ".2f", ".0f", "g")
        return tabulate(rows, self.HEADERS, floatfmt=digits, tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = default_device() == "cuda"
    parser.add_argument("--modes", nargs="+", default=["inference", "training"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16] if on_gpu else [1, 8])
    parser.add_argument("--train-batch", type=int, default=16 if on_gpu else 2)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216))
    parser.add_argument(
        "--train-size", type=int, nargs=2, default=(800, 1216) if on_gpu else (400, 608)
    )
    parser.add_argument("--compile", action="store_true", help="ours also compiled")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args()

    torch.manual_seed(0)
    device, size = args.device, tuple(args.size)
    images = make_images(max(args.batch), size)
    theirs = build_detectrons(images[0], device)
    retinanet = build_retinanet(images[0], device)
    torchvisions = build_torchvisions(images[0], size, device)
    variants = {"fcos_d2": ["MODEL.FCOS.COMPILE", False]}
    if args.compile:
        variants["fcos_d2 compiled"] = ["MODEL.FCOS.COMPILE", True]
    print(machine(device), flush=True)

    table = Table(args.repeats, device)
    expected = detect(theirs, images[:1])
    for precision in args.precisions if "inference" in args.modes else []:
        opts = ["MODEL.FCOS.PRECISION_TEST", precision]
        ours = {n: build_ours(theirs, device, opts + o).eval() for n, o in variants.items()}
        limits = {} if precision == "float32" else {"iou": 0.9, "score": 0.05}
        for name, model in ours.items():
            share = check_agreement(name, detect(model, images[:1]), expected, **limits)
            print(f"{precision}: {share:.1%} of {name}'s detections are Detectron2's in float32")
        for size_of_batch in args.batch:
            batch = images[:size_of_batch]
            functions = {n: inference_of(m, batch, "float32", device) for n, m in ours.items()}
            functions["Detectron2's FCOS"] = inference_of(theirs, batch, precision, device)
            functions["torchvision's FCOS"] = torchvisions_inference(
                torchvisions, batch, precision, device
            )
            functions["RetinaNet"] = inference_of(retinanet, batch, precision, device)
            case = f"inference, {size[0]}x{size[1]}, batch {size_of_batch}"
            table.measure(case, precision, functions)

    size = tuple(args.train_size)
    batch = make_images(args.train_batch, size)
    models = {n: build_ours(theirs, device, o).train() for n, o in variants.items()}
    if "training" in args.modes:
        check_training(models["fcos_d2"], theirs, batch)
        models |= {"Detectron2's FCOS": theirs.train(), "RetinaNet": retinanet.train()}
    for precision in args.precisions if "training" in args.modes else []:
        with EventStorage(1):
            functions = {n: training_of(m, batch, precision, device) for n, m in models.items()}
            case = f"training, {size[0]}x{size[1]}, batch {len(batch)}"
            table.measure(case, precision, functions)
    print("\nall cases")
    print(table.format(table.rows))


if __name__ == "__main__":
    main()
