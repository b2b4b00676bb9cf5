"""Compare an exported file in ONNX Runtime with PyTorch."""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from ..modeling import FCOS
from .graph import DetectionGraph

# (N, H, W) of the batches: from less than a cell to many, one image and several.
_SHAPES = ((1, 1, 1), (1, 64, 97), (3, 130, 201), (1, 320, 480))
_CANDIDATES = 200  # about as many remain above the second threshold
_ROUNDING = 1e-4  # a score or an IoU this near to a limit may lie on either side


def largest_difference(model: FCOS, file: str) -> float:
    """Compare a file with the model it was made from, on batches of several sizes.

    Detections are compared twice: with the file as it is, and with a score threshold that leaves
    some in random images. Each is compared with the nearest of its class in the other list, unless
    rounding decides whether it is there: at the limit of detections or of the IoU in NMS.

    Args:
        model: on CPU, in evaluation mode. Its post-processor is changed during the call.
        file: of :func:`fcos_d2.export.to_onnx`.

    Returns:
        the largest difference of box coordinates in pixels and of scores, or of the maps of a raw
        file; divided by the value where that is above 1. Infinite for a detection without another
        of its class.
    """
    import onnx

    proto = onnx.load(file)
    batches = [_images(*shape) for shape in _SHAPES]
    is_raw = all(output.name != "boxes" for output in proto.graph.output)
    compare_batch = _raw_difference if is_raw else _detections_difference
    differences = _differences(compare_batch, model, proto, batches)
    post = model.post_processor
    before = post.score_thresh
    if not is_raw:
        try:
            post.score_thresh = _threshold(model, batches)
            thresholds = dict(DetectionGraph(model).named_buffers(recurse=False))
            for initializer in proto.graph.initializer:
                if initializer.name in thresholds:
                    initializer.raw_data = thresholds[initializer.name].numpy().tobytes()
            differences += _differences(compare_batch, model, proto, batches)
        finally:
            post.score_thresh = before
    return float(np.max(differences))  # Python's max may lose NaN


def _differences(compare_batch: Callable, model: FCOS, proto, batches: list[Tensor]) -> list[float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    file, providers = proto.SerializeToString(), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(file, options, providers=providers)
    (pixels,) = session.get_inputs()
    dtype = np.uint8 if pixels.type == "tensor(uint8)" else np.float32
    outputs = (session.run(None, {pixels.name: x.numpy().astype(dtype)}) for x in batches)
    return [compare_batch(model, *pair) for pair in zip(batches, outputs, strict=True)]


def _images(n: int, height: int, width: int) -> Tensor:
    """(N, 3, H, W) uint8: coarse patches of colour and noise, each image its own."""
    generator = torch.Generator().manual_seed(n * height * width)
    patches = torch.randint(0, 256, (n, 3, 6, 8), generator=generator).float()
    noise = torch.randint(-40, 41, (n, 3, height, width), generator=generator)
    return (F.interpolate(patches, (height, width)) + noise).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def _raw_difference(model: FCOS, images: Tensor, actual: list[np.ndarray]) -> float:
    outputs = model.head_outputs(model.preprocess_image([{"image": x} for x in images]))
    maps = [*outputs.class_logits, *outputs.ltrb, *(outputs.quality_logits or [])]
    pairs = zip(maps, actual, strict=True)
    return float(np.max([_difference(a.numpy(), b).max() for a, b in pairs]))


@torch.no_grad()
def _detections_difference(model: FCOS, images: Tensor, outputs: list[np.ndarray]) -> float:
    differences = []
    for image, *actual, count in zip(images, *outputs, strict=True):
        found = model([{"image": image}])[0]["instances"]
        expected = found.pred_boxes.tensor.numpy(), found.scores.numpy(), found.pred_classes.numpy()
        actual = [x[:count] for x in actual]
        differences.append(compare(expected, actual, model.post_processor))
    return float(np.max(differences))


def compare(expected: tuple, actual: tuple, post_processor) -> float:
    """The largest difference of two lists of detections, in any order.

    Args:
        expected, actual: boxes (D, 4), scores (D,) and classes (D,) as arrays.
    """
    a, b = (np.column_stack([boxes, scores]) for boxes, scores, _ in (expected, actual))
    differences = _difference(a[:, None], b).max(axis=2)
    differences[expected[2][:, None] != actual[2]] = np.inf
    of_a = differences.min(axis=1, initial=np.inf)
    of_b = differences.min(axis=0, initial=np.inf)
    open_a = _left_to_rounding(expected, actual, post_processor)
    open_b = _left_to_rounding(actual, expected, post_processor)
    return float(np.concatenate([[0.0], of_a[~open_a], of_b[~open_b]]).max())


def _left_to_rounding(detections: tuple, others: tuple, post_processor) -> np.ndarray:
    """(D,) whether rounding decides that a detection is there."""
    boxes, scores, classes = detections
    is_open = np.zeros(len(scores), dtype=bool)
    # Clipping after NMS may have left out some of a full list.
    clipped = post_processor.clip_boxes == "after_nms"
    if len(scores) == post_processor.max_detections_per_image or (clipped and len(scores)):
        is_open |= scores < scores.min() + _ROUNDING
    ious = box_iou(torch.from_numpy(boxes), torch.from_numpy(others[0])).numpy()
    near = np.abs(ious - post_processor.nms_thresh) < _ROUNDING
    near &= classes[:, None] == others[2]
    return is_open | near.any(axis=1)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a - b) / np.maximum(np.abs(a), 1)


@torch.no_grad()
def _threshold(model: FCOS, batches: list[Tensor]) -> float:
    """A score threshold that leaves some candidates, in a gap between two scores."""
    post = model.post_processor
    post.score_thresh = 0.0
    compared = "class_probability" if post.score_thresh_on == "class" else "scores"
    values = []
    for batch in batches:
        images = model.preprocess_image([{"image": x} for x in batch])
        found = model.head_outputs(images), model.levels, images.image_sizes
        candidates = post.candidates(*found, topk=sys.maxsize, with_cells=True)
        values += [x.get(compared) for x in candidates]
    best = torch.cat(values).topk(_CANDIDATES + 1).values
    best = best[len(best) // 2 :]
    gap = (best[:-1] - best[1:]).argmax()
    return ((best[gap] + best[gap + 1]) / 2).item()
