"""Timing in turns, peak memory, and weights as of a trained detector, for all benchmarks."""

import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

# Candidates are this share of all class scores, as with a trained detector on COCO.
CANDIDATES = 0.001
LOGIT_SPREAD = 1.5


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> str:
    """One line: what the numbers were measured on."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        models = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; PyTorch {torch.__version__}, torchvision {torchvision.__version__}"


def in_turns(
    functions: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, float]:
    """Median milliseconds of each function; each is run once in every round, after a warm-up.

    Each round has another order, since what a function leaves in caches and in memory helps or
    hinders the next one.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for i in range(repeats + 1):
        for name in order.sample(list(functions), len(functions)):
            _synchronize(device)
            begin = time.perf_counter()
            functions[name]()
            _synchronize(device)
            if i > 0:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(x) for name, x in times.items()}


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_megabytes(function: Callable[[], object], device: str) -> float:
    """The most memory that tensors made in a call hold at once."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    in_use = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak / 2**20


def count_synchronizations(function: Callable[[], object], device: str) -> int | str:
    """How often a call makes the host wait for the GPU."""
    if not device.startswith("cuda"):
        return "-"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


@torch.no_grad()
def spread_logits(conv: nn.Module, run: Callable[[], object], threshold: float) -> None:
    """Give class logits the spread of a trained detector's.

    Args:
        conv: the layer that predicts them.
        run: runs the model.
        threshold: the class probability that the share ``CANDIDATES`` of them is to exceed.
    """
    logits: list[Tensor] = []
    conv.bias.zero_()
    hook = conv.register_forward_hook(lambda module, inputs, output: logits.append(output))
    run()
    hook.remove()
    values = torch.cat([x.flatten().float() for x in logits])
    conv.weight.mul_(LOGIT_SPREAD / values.std())
    values = values * (LOGIT_SPREAD / values.std())
    best = values.topk(round(len(values) * CANDIDATES)).values
    conv.bias.fill_(torch.logit(torch.tensor(threshold)).item() - best[-1].item())


@torch.no_grad()
def normalize_activations(model: nn.Module, run: Callable[[], object]) -> None:
    """Give frozen batch norms the statistics that training would have given them.

    The branches of residual blocks get a small scale, as training makes them: at full scale a
    random network amplifies rounding errors from block to block.
    """

    def take_statistics(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        x = inputs[0].float()
        norm.running_mean.copy_(x.mean(dim=(0, 2, 3)))
        norm.running_var.copy_(x.var(dim=(0, 2, 3)) + 1e-3)

    for module in model.modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.fill_(0.2)
    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    hooks = [m.register_forward_pre_hook(take_statistics) for m in norms]
    run()
    for hook in hooks:
        hook.remove()


def agreement(detections: Instances, expected: Instances, iou: float, score: float) -> float:
    """Share of the better half of ``expected`` that has its like in ``detections``.

    Its like: the same class, an IoU and a difference of scores within the bounds. Of the worse
    half rounding may leave out some, at the limit of detections per image.
    """
    expected = expected[: (len(expected) + 1) // 2]
    overlap = pairwise_iou(expected.pred_boxes, detections.pred_boxes)
    alike = overlap >= iou
    alike &= expected.pred_classes[:, None] == detections.pred_classes[None]
    alike &= (expected.scores[:, None] - detections.scores[None]).abs() <= score
    return alike.any(dim=1).float().mean().item()


def check_agreement(name: str, detections: list, expected: list, iou=0.99, score=1e-3) -> float:
    """Mean agreement of the images' detections.

    Raises:
        SystemExit: below 0.95: a speed-up that changes detections does not count.
    """
    shares = [agreement(a, b, iou, score) for a, b in zip(detections, expected, strict=True)]
    share = sum(shares) / len(shares)
    if not share >= 0.95 or min(len(x) for x in expected) < 20:
        raise SystemExit(f"{name}: only {share:.1%} of the detections agree")
    return share


def random_instances(size: tuple[int, int], boxes: int, classes: int) -> Instances:
    """Ground truth: boxes of 12 to 665 pixels, evenly on a logarithmic scale."""
    sizes = torch.exp(torch.rand(boxes, 2) * 4 + 2.5).clamp(max=700)
    centers = torch.rand(boxes, 2) * torch.tensor([size[1], size[0]])
    corners = torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1)
    # Off whole pixels: Detectron2's ranges leave out distances of exactly 64, 128, ...
    limits = torch.tensor([size[1], size[0]] * 2) - 0.3
    instances = Instances(size)
    instances.gt_boxes = Boxes(corners.clamp(min=0.3).minimum(limits))
    instances.gt_classes = torch.randint(classes, (boxes,))
    return instances


def make_images(count: int, size: tuple[int, int]) -> list[dict]:
    """Random images, smooth at the scale of objects, with 20 boxes each of COCO's 80 classes."""
    images = []
    for _ in range(count):
        coarse = torch.rand(1, 3, size[0] // 16, size[1] // 16)
        image = nn.functional.interpolate(coarse, size, mode="bicubic")[0]
        image = (image.clamp(0, 1) * 255).to(torch.uint8)
        images.append({"image": image, "instances": random_instances(size, 20, 80)})
    return images
