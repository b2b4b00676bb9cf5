"""FCOS as an ONNX file: from pixels to detections, with NMS."""

import copy
import json
import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from .. import __version__
from ..checkpoint import replacing
from ..modeling import FCOS
from ..modeling.deform_conv import PortableDeformConv
from ..runtime import Runtime
from .check import largest_difference
from .graph import DetectionGraph, RawGraph

# The largest difference to PyTorch that a file may have; see largest_difference for its unit.
LIMIT = 1e-3
# The exporter takes a size of 0, 1 or another axis for a constant. p7, of stride 128, has more than
# one cell on either side.
_TRACED_SHAPE = (2, 3, 192, 320)


class ExportError(RuntimeError):
    """The exported file does not do what the model does."""


def to_onnx(
    model: FCOS,
    file: str | os.PathLike,
    *,
    raw: bool = False,
    input_type: str = "float32",
    opset: int | None = None,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    min_size: int = 800,
    max_size: int = 1333,
) -> float:
    """Export a detector to one ONNX file, and compare the file with it in ONNX Runtime.

    The file takes ``images`` (N, 3, H, W) of any size, in [0, 255] and in the channel order of
    ``INPUT.FORMAT``. It computes in float32 and gives

    - ``boxes`` (N, D, 4) as x0, y0, x1, y1 in pixels of the H x W image, inside it,
    - ``scores`` (N, D), best first,
    - ``classes`` (N, D) int64,
    - ``num_detections`` (N,) int64: how many of the D are detections; the rest is 0,

    with D = ``TEST.DETECTIONS_PER_IMAGE``. Names and settings are in its metadata (docs/export.md).

    Args:
        model: left as it is.
        file: an earlier one stays if anything fails. Folders are made.
        raw: instead of detections give the maps of the head for the image padded to the stride of
            the backbone: ``class_logits_p3`` (N, K, H3, W3), ``ltrb_p3`` (N, 4, H3, W3) in pixels,
            ``quality_logits_p3`` (N, 1, H3, W3) if there is a quality branch, and so on.
        input_type: of the pixels, "float32" or "uint8".
        opset: of ONNX, 18 or higher; with deformable convolutions 19 or higher. None for that.
        class_names: of each class, for the metadata.
        category_ids: of each class in its data set, for the metadata; None for 1, 2, ...
        min_size, max_size: for the metadata: ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST``, to
            which :class:`OnnxPredictor` resizes images.

    Returns:
        the largest difference to PyTorch's results, at most 1e-3; see
        :func:`fcos_d2.export.check.largest_difference`.

    Raises:
        ImportError: without onnx, onnxscript and onnxruntime.
        ValueError: for a model or an option that cannot be exported.
        OSError: if the file cannot be written.
        ExportError: if the file gives other results than PyTorch. No file is written then.
    """
    check_model(model)
    if input_type not in ("float32", "uint8"):
        raise ValueError(f"input_type must be 'float32' or 'uint8', got {input_type!r}")
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(
            f"{len(class_names)} class names, but the model has {model.num_classes} classes"
        )
    category_ids = list(category_ids or range(1, model.num_classes + 1))
    if len(category_ids) != model.num_classes:
        raise ValueError(
            f"{len(category_ids)} category ids, but the model has {model.num_classes} classes"
        )
    opset = _check_opset(model, opset)
    check_packages()
    file = target_path(file)
    model = copy.deepcopy(model).cpu().float().eval()
    model.runtime = Runtime()  # not compiled
    graph = (RawGraph if raw else DetectionGraph)(model).eval()
    settings = {
        "outputs": "raw" if raw else "detections",
        "input_type": input_type,
        "class_names": None if class_names is None else list(class_names),
        "category_ids": category_ids,
        "min_size": min_size,
        "max_size": max_size,
    }
    # Opened first: what cannot be written fails now, not in a minute.
    with replacing(file, own=True) as partial:
        proto = _export(graph, getattr(torch, input_type), opset)
        for key, value in (_metadata(model) | settings).items():
            proto.metadata_props.add(key=key, value=json.dumps(value))
        partial.write(proto.SerializeToString())
        partial.flush()
        difference = largest_difference(model, partial.name)
        if not difference <= LIMIT:  # also NaN
            raise ExportError(
                f"The exported file gives other results than PyTorch: the largest difference is "
                f"{difference:.1e}, the limit {LIMIT}. No file was written"
            )
    return difference


def target_path(file: str | os.PathLike) -> str:
    """The full path of a file to write, whose folder is made; an OSError if it cannot be."""
    file = os.path.abspath(file)
    if os.path.isdir(file):
        raise IsADirectoryError(f"{file} is a folder: name the file to write, such as model.onnx")
    os.makedirs(os.path.dirname(file), exist_ok=True)
    return file


def check_model(model: FCOS) -> None:
    """Raise a ValueError for a model that cannot be exported."""
    if not isinstance(model, FCOS):
        raise ValueError(
            f"Only META_ARCHITECTURE 'FCOS' can be exported, not {type(model).__name__!r}. For "
            "other detectors use Detectron2's tools/deploy/export_model.py"
        )
    limit = model.post_processor.max_detections_per_image
    if limit < 1:
        raise ValueError(
            f"The file needs a limit of detections per image: set TEST.DETECTIONS_PER_IMAGE to 1 "
            f"or more, for example 100, instead of {limit}"
        )
    bad = [name for name, x in model.state_dict().items() if not x.isfinite().all()]
    if bad:
        raise ValueError(f"The weights have NaN or infinite values, e.g. in {bad[0]}")


def _check_opset(model: FCOS, opset: int | None) -> int:
    deformable = any(isinstance(m, PortableDeformConv) for m in model.modules())
    lowest = 19 if deformable else 18
    opset = lowest if opset is None else opset
    if opset < lowest:
        reason = " with deformable convolutions" if deformable else ""
        raise ValueError(f"The opset must be {lowest} or higher{reason}, got {opset}")
    return opset


def check_packages() -> None:
    """Raise an ImportError without the packages of the extra "onnx"."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Exporting needs onnx, onnxscript and onnxruntime ({error}): pip install onnx "
            "onnxscript onnxruntime, or pip install -e '.[onnx]' in a clone of fcos_d2"
        ) from error


def _export(graph: RawGraph, dtype: torch.dtype, opset: int):
    """The onnx.ModelProto of a graph."""
    images = torch.zeros(_TRACED_SHAPE, dtype=dtype)
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    with torch.no_grad(), warnings.catch_warnings(), ExitStack() as end:
        # The exporter's warnings are about its own parts.
        warnings.simplefilter("ignore")
        for logger in loggers:
            end.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["images"],
            output_names=graph.output_names,
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
            custom_translation_table={torch.ops.fcos_d2.class_wise_nms.default: _onnx_nms},
        )
    return program.model_proto


def _onnx_nms(boxes, scores, limit: int, iou: float):
    """:func:`fcos_d2.export.graph.class_wise_nms` in ONNX."""
    from onnxscript import opset18 as op

    return op.NonMaxSuppression(
        boxes,
        scores,
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[0.0]),
    )


def _metadata(model: FCOS) -> dict:
    """What a file says of the model."""
    post = model.post_processor
    return {
        "fcos_d2_version": __version__,
        "channel_order": model.input_format,
        "num_classes": model.num_classes,
        "levels": model.head_in_features,
        "strides": model.levels.strides,
        "location_offset": model.levels.offset,
        "quality": post.quality,
        "score_fusion": post.score_fusion,
        "score_thresh": post.score_thresh,
        "score_thresh_on": post.score_thresh_on,
        "topk_candidates": post.topk_candidates,
        "nms_thresh": post.nms_thresh,
        "clip_boxes": post.clip_boxes,
        "detections_per_image": post.max_detections_per_image,
    }
