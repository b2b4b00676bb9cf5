"""An exported file with 8-bit convolutions, by ONNX Runtime's static quantisation."""

import contextlib
import io
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools.coco import COCO
from tqdm import tqdm

from ..checkpoint import replacing
from ..inference.onnx_predictor import Detections, OnnxPredictor
from ..inference.results import to_instances
from .onnx import ExportError, check_packages, target_path

# Below this AP, with the float32 file's detections as the truth, a file is not kept. Models that
# lost 0.3 AP on their own data agreed to more than 90.
LEAST_AGREEMENT = 70.0
_COMPARED = 50  # images
# These stay in float32: boxes of large strides would move by pixels, and equal scores would tie.
_PREDICTORS = ("head.cls_logits", "head.bbox_pred", "head.ctrness")


class Int8Check(NamedTuple):
    """What the INT8 file does, beside the float32 file on the same images."""

    # AP in percent of its detections, where those of float32 with at least half of the best score
    # are the truth.
    agreement: float
    images: int
    speed: float  # how many times as fast it is on this machine


def quantize(file: str | os.PathLike, target: str | os.PathLike, images: Sequence) -> Int8Check:
    """Write an exported file with convolutions of 8 bits, and compare it with that file.

    Weights are signed, with a scale for each output channel; activations are unsigned, with a scale
    for each tensor, from the smallest and largest value on the images. All else stays float32, the
    last convolutions of the head, too.

    Args:
        file: of :func:`fcos_d2.export.to_onnx`, with detections.
        target: an earlier one stays if anything fails. Folders are made.
        images: files or (H, W, 3) BGR arrays that look like those that the detector will see; 100
            to 200 are enough. They are read one after the other, and up to 50 of them again.

    Raises:
        ImportError: without onnx and onnxruntime.
        ValueError: for a file that is not as above, no images, and images on which nothing is
            found, so that nothing can be compared.
        OSError: if a file cannot be read or written.
        ExportError: if the detections differ too much. No file is written then.
    """
    check_packages()
    from onnx import load
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not len(images):
        raise ValueError("There is no image to calibrate with")
    exact = OnnxPredictor(file)
    if exact.settings.get("precision") == "int8":
        raise ValueError(f"{file} has been quantised before: give the file in float32")

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.numbered = enumerate(tqdm(images, "Calibrating", unit=" images", disable=None))

        def get_next(self) -> dict[str, np.ndarray] | None:
            for index, image in self.numbered:
                return {"images": exact.network_input(image, index)[0][None]}
            return None

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        partial = stack.enter_context(replacing(target_path(target), own=True))
        # Its notes are about its own parts.
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        # Norms and scales become part of the convolutions first.
        folded, quantized = Path(folder, "folded.onnx"), Path(folder, "int8.onnx")
        quant_pre_process(file, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            quantized,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Of a ReLU that follows a convolution: then the 8 bits are for what is above 0.
            op_types_to_quantize=["Conv", "Relu"],
            nodes_to_exclude=[
                node.name
                for node in load(folded).graph.node
                if node.op_type == "Conv" and any(x in node.input[1] for x in _PREDICTORS)
            ],
        )
        proto, original = load(quantized), load(file, load_external_data=False)
        del proto.metadata_props[:]  # the quantiser drops them, or keeps its own
        proto.metadata_props.extend(original.metadata_props)
        proto.metadata_props.add(key="precision", value='"int8"')
        partial.write(proto.SerializeToString())
        partial.flush()
        every = math.ceil(len(images) / _COMPARED)
        check = _compare(exact, OnnxPredictor(partial.name), images[::every])
        if not check.agreement >= LEAST_AGREEMENT:
            raise ExportError(
                f"The INT8 file finds other objects than the float32 file: its AP is "
                f"{check.agreement:.1f} where the other's better detections are the truth, the "
                f"limit {LEAST_AGREEMENT:g}. No file was written. Calibrate with more images, such "
                "as the detector will see"
            )
    return check


def _compare(exact: OnnxPredictor, quantized: OnnxPredictor, images: Sequence) -> Int8Check:
    found, seconds = [], []
    for predictor in (exact, quantized):
        predictor(images[0])  # the first call of a session takes longer
        begin = time.perf_counter()
        found.append([x["instances"] for x in predictor.stream(images)])
        seconds.append(time.perf_counter() - begin)
    return Int8Check(_agreement(*found), len(images), seconds[0] / seconds[1])


def _agreement(expected: Sequence[Detections], actual: Sequence[Detections]) -> float:
    """See Int8Check."""
    from ..report import BoxEvaluation  # late: it takes as long as all other imports of the export

    best = max((x.scores.max(initial=0) for x in expected), default=0)
    if not best > 0:
        raise ValueError(
            "The float32 file finds nothing on the images, so that the INT8 file cannot be "
            "compared with it: calibrate with images that have objects"
        )
    boxes = [x for x in _as_coco(expected) if x["score"] >= best / 2]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number} for number in range(len(expected))],
        "categories": [
            {"id": int(number), "name": str(number)}
            for number in np.unique(np.concatenate([x.pred_classes for x in [*expected, *actual]]))
        ],
        "annotations": [x | {"id": i, "iscrowd": 0} for i, x in enumerate(boxes, 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return BoxEvaluation(truth, _as_coco(actual)).average_precision()


def _as_coco(detections: Sequence[Detections]) -> list[dict]:
    results = []
    for image, found in enumerate(detections):
        for x in instances_to_coco_json(to_instances(found), image):
            _, _, width, height = x["bbox"]
            results.append(x | {"area": width * height})
    return results
