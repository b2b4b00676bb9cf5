"""Test-time augmentation: the candidates of scaled and flipped copies, merged before one NMS."""

from collections.abc import Callable
from itertools import groupby

import torch
from detectron2.config import CfgNode
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.image_files import read_image
from .fcos import FCOS


class FCOSWithTTA(nn.Module):
    """Detects with an FCOS in several versions of each image. Called like the model itself.

    ``TEST.AUG`` says which versions. One version that is the image itself gives exactly the result
    of the model alone.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, tta_mapper: Callable[[dict], list[dict]] | None = None
    ):
        """
        Args:
            cfg: for ``TEST.AUG`` where no mapper is given.
            model: an FCOS, also inside DistributedDataParallel.
            tta_mapper: makes the versions of an image, like Detectron2's DatasetMapperTTA.

        Raises:
            TypeError: if the model is not an FCOS.
        """
        super().__init__()
        model = model.module if isinstance(model, DistributedDataParallel) else model
        if not isinstance(model, FCOS):
            raise TypeError(
                f"FCOSWithTTA augments FCOS models, not {type(model).__name__}. For R-CNN there is "
                "detectron2.modeling.GeneralizedRCNNWithTTA"
            )
        self.model = model
        self.tta_mapper = DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper
        # Evaluation restores the mode of this module, so it must be that of the model.
        self.train(model.training)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """The ``instances`` of each image, at its "height" and "width", as the model's."""
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, image_input: dict) -> Instances:
        image = image_input.get("image")
        if image is None:
            pixels = read_image(image_input["file_name"], self.model.input_format)
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        height, width = image.shape[-2:]
        # The mapper's transforms start from this "height" and "width". With those of the image,
        # boxes come back to the frame of the model alone.
        versions = self.tta_mapper({"image": image.cpu(), "height": height, "width": width})
        candidates_of_all = []
        # Only versions of one size, as an image and its mirror image, run at once: padding to a
        # common size would change the result.
        for _, same_size in groupby(versions, key=lambda version: version["image"].shape):
            batch = list(same_size)
            found = self.model.candidates(self.model.preprocess_image(batch))
            for version, candidates in zip(batch, found, strict=True):
                fields = candidates.get_fields()
                boxes = fields["pred_boxes"].tensor
                back = version["transforms"].inverse().apply_box(boxes.cpu().numpy())
                fields["pred_boxes"] = Boxes(torch.as_tensor(back).to(boxes))
                candidates_of_all.append(Instances((height, width), **fields))
        return self.model.detect(Instances.cat(candidates_of_all), image_input)
