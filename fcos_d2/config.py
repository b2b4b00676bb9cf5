"""Every config key of fcos_d2, with its reason and the source of its default."""

from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as _get_detectron2_cfg

from .data.custom import register_custom_datasets

_CUSTOM = "DATASETS.CUSTOM."


def add_fcos_config(cfg: CN) -> None:
    """Add the keys of fcos_d2 to a Detectron2 config, in place.

    Values that are already there stay, so that calling it again changes nothing.

    Args:
        cfg: a config made by :func:`detectron2.config.get_cfg`.
    """
    new = CN()
    new.MODEL = CN({"FCOS": _fcos_defaults(), "TIMM": _timm_defaults()})
    new.SOLVER = CN({"AMP": {}, "EMA": {}})
    # Parts that each process splits its images of a step into, for batches that do not fit into
    # memory at once. They run one after the other, with one step of the optimizer. IMS_PER_BATCH
    # stays the number of images of a step, over all processes and parts. FCOS learns as from one
    # batch; other models learn from the mean of the losses of the parts. 1: Detectron2's own way.
    new.SOLVER.ACCUMULATE = 1
    # Moving average of the weights: 0 for none, else how much of it stays in each step, for example
    # 0.9998 for the 90000 steps of the recipes, 0.999 for a few thousand. The average is then what
    # is evaluated, kept as best and written as "model". The papers of FCOS use none. -1.0 averages
    # over a tenth of the run if it has at least 2000 steps, as --data does.
    new.SOLVER.EMA.DECAY = 0.0
    # "SGD" (Detectron2's, and the papers') or "AdamW", as for ConvNeXt. AdamW needs values of its
    # own: BASE_LR 0.0001 for 16 images, WEIGHT_DECAY 0.05 and WEIGHT_DECAY_BIAS 0.0 are those of
    # ConvNeXt (2201.03545). A BASE_LR that is one for SGD is an error.
    new.SOLVER.OPTIMIZER = "SGD"
    # The last stage of the backbone learns at this times the rate of what follows it (FPN, head),
    # and each stage before at this times the rate of the next: for weights that were pretrained
    # well. 1.0: one rate, as in Detectron2. ConvNeXt's authors tried 0.7 to 0.95, on finer layers.
    new.SOLVER.LAYER_DECAY = 1.0
    # The type that SOLVER.AMP.ENABLED computes in: "float16" (with loss scaling), "bfloat16", or
    # "auto": bfloat16 on CPU and, for FCOS, on GPUs that have it (Ampere and later), else float16.
    # Detectron2's RoI heads, in R-CNN, round their boxes in bfloat16.
    new.SOLVER.AMP.DTYPE = "auto"
    # Number of epochs, in place of MAX_ITER: the training is as long, and STEPS, WARMUP_ITERS,
    # CHECKPOINT_PERIOD and TEST.EVAL_PERIOD follow, for the images that are really trained on. 0
    # takes these keys as they are; -1 as many epochs as suit the data, as --data does.
    new.SOLVER.EPOCHS = 0
    # How many of the checkpoints that are written every CHECKPOINT_PERIOD stay: the newest ones,
    # also those of a run before --resume. model_best.pth and model_final.pth always stay. 0: all,
    # as in Detectron2.
    new.SOLVER.CHECKPOINTS_KEPT = 0
    # Iterations at the start of a training in which MODEL.FCOS.ASSIGNMENT "task_aligned" leaves the
    # choice of locations to ATSS, and all learn a class score of 1 with the focal loss, as in TOOD:
    # there in 4 epochs of 12, 30000 of 90000 iterations. SOLVER.EPOCHS, and a MAX_ITER of the
    # command line, scale it as they scale STEPS. 0: none.
    new.SOLVER.ATSS_ITERS = 0
    # Services that get the metrics, the config, the report and the best checkpoint, too, to compare
    # runs: "wandb" (Weights & Biases) and "mlflow". Each is an extra of the installation.
    new.SOLVER.LOGGERS = ()
    new.DATALOADER = CN()
    # What training does with an image or annotations that it cannot use: "raise" an error with the
    # file's name, or "skip" it: take another image, with a warning and a count. Evaluation always
    # raises: without an image its AP would be that of another data set.
    new.DATALOADER.ON_BAD_IMAGE = "raise"
    new.INPUT = CN({"LSJ": {}})
    # Large-scale jitter (2012.07177) in place of MIN_SIZE_TRAIN and MAX_SIZE_TRAIN: the image fits
    # into a square of SIZE pixels times a random scale, and then is cut or padded to SIZE. The
    # values are those of the paper, whose trainings are long; the papers of FCOS do without.
    new.INPUT.LSJ.ENABLED = False
    new.INPUT.LSJ.SIZE = 1024
    new.INPUT.LSJ.MIN_SCALE = 0.1
    new.INPUT.LSJ.MAX_SCALE = 2.0
    # Brightness, contrast and saturation each change by a random factor, from 1 - COLOR to
    # 1 + COLOR: for light and cameras that vary more than those of the training images. 0.0: off,
    # as in the papers.
    new.INPUT.COLOR = 0.0
    # Turn each image by 0, 90, 180 or 270 degrees: for pictures from above, such as those of
    # microscopes and satellites, which have no upright side. RANDOM_FLIP, beside Detectron2's
    # values, may then be "both": horizontal and vertical, each for half of the images.
    new.INPUT.ROTATE_90 = False
    new.TEST = CN()
    # End the training after so many evaluations in a row without a new best of the metric that
    # decides which checkpoint is model_best.pth. Each takes TEST.EVAL_PERIOD iterations. A small
    # data set is soon learnt by heart, and the schedules of COCO are long. 0: train to the end.
    new.TEST.PATIENCE = 0
    # Compute the losses on the images of DATASETS.TEST, too, at each evaluation: "test/total_loss"
    # and the like. One that rises while that of the training falls says that the detector learns
    # its images by heart. Not by default: it is another pass over these images.
    new.TEST.LOSS = False
    new.DATASETS = CN()
    # Data sets of your own, registered under their key before training or evaluation, e.g.
    #   DATASETS:
    #     CUSTOM:
    #       cells_train: {FORMAT: "voc", ROOT: "cells", SPLIT: "train", CLASSES: ["RBC"]}
    # See fcos_d2.data.custom for the entries of each format.
    new.DATASETS.CUSTOM = CN()
    _add_missing(cfg, new)
    cfg.DATASETS.CUSTOM.set_new_allowed(True)


def _add_missing(cfg: CN, new: CN) -> None:
    for key, value in new.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CN):
            _add_missing(cfg[key], value)


def get_cfg() -> CN:
    """Detectron2's default config with the keys of fcos_d2.

    ``MODEL.DEVICE`` is ``"cpu"`` if PyTorch sees no GPU; in Detectron2 it is always ``"cuda"``.
    """
    cfg = _get_detectron2_cfg()
    add_fcos_config(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def load_cfg(config_file: str, opts: Sequence = (), allow_unsafe: bool = False) -> CN:
    """The config of a YAML file, changed by ``[key, value, ...]``; see :func:`get_cfg`.

    Unlike Detectron2's ``get_cfg().merge_from_file``, it runs no code from the file, and registers
    the data sets of ``DATASETS.CUSTOM``, so that predictors find the names of the classes. Entries
    of ``DATASETS.CUSTOM`` may be new or be changed key by key. Their values, and that of
    ``MODEL.FCOS.REGRESSION_RANGES``, are read as YAML.

    Args:
        allow_unsafe: run the code that a YAML may contain behind ``!!python``. Some of Detectron2's
            own configs do.

    Raises:
        ValueError: for a key without a value, for a key of ``DATASETS.CUSTOM`` that is no entry
            and no key of one, for unknown keys and files, and for a YAML with code.
    """
    cfg = get_cfg()
    try:
        cfg.merge_from_file(config_file, allow_unsafe=allow_unsafe)
        cfg.merge_from_list(_merge_custom(cfg, opts))
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{config_file}, or a config that it is based on, contains Python code: {error}. "
            "Nothing was run. If you trust its makers, pass --allow-unsafe-config "
            "(allow_unsafe=True)"
        ) from error
    except (AssertionError, KeyError) as error:  # Detectron2's, for unknown keys and files
        raise ValueError(f"The config {config_file} with {list(opts)}: {error}") from error
    register_custom_datasets(cfg)
    return cfg


def _merge_custom(cfg: CN, opts: Sequence) -> list:
    """Merge the entries of ``DATASETS.CUSTOM``; return the rest for ``cfg.merge_from_list``.

    For errors see :func:`load_cfg`.
    """
    if len(opts) % 2 or any(str(key).startswith("-") for key in opts[0::2]):
        raise ValueError(
            "Changes to the config come as pairs of key and value, after all options such as "
            f"--resume, got {list(opts)}"
        )
    rest = []
    for key, value in zip(opts[0::2], opts[1::2], strict=True):
        is_custom = key.startswith(_CUSTOM)
        # merge_from_list reads literals of Python, which have no word for infinity.
        if isinstance(value, str) and (is_custom or key == "MODEL.FCOS.REGRESSION_RANGES"):
            value = yaml.safe_load(value)
        name, *entry_key = key.removeprefix(_CUSTOM).split(".")
        if not is_custom:
            rest += [key, value]
        elif len(entry_key) == 1:
            cfg.DATASETS.CUSTOM.setdefault(name, CN(new_allowed=True))[entry_key[0]] = value
        elif not entry_key and isinstance(value, dict):
            cfg.DATASETS.CUSTOM[name] = CN(value, new_allowed=True)
        else:
            raise ValueError(
                f"{key} {value!r}: write {_CUSTOM}NAME.KEY value, or the whole entry, "
                f'{_CUSTOM}NAME "{{FORMAT: ..., ...}}"'
            )
    return rest


def _fcos_defaults() -> CN:
    """The improved recipe of arXiv 2006.09214 on COCO, with ResNet-FPN P3 to P7."""
    fcos = CN()

    # Number of foreground classes. Must equal the number of classes of the data sets.
    fcos.NUM_CLASSES = 80
    # Feature maps of the backbone that the head runs on, from the finest to the coarsest.
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]

    # ---- Backbone (build_fcos_resnet_fpn_backbone, build_fcos_timm_fpn_backbone) ----
    # Levels that stride-2 convolutions add on top of the FPN: 2 (P6, P7), 1 (P6) or 0. Max pooling
    # does so for build_fcos_resnet_bifpn_backbone, from the backbone's last map. The keys here are
    # not read by build_fcos_timm_hrfpn_backbone: it pools the levels of IN_FEATURES, from P2 or P3.
    fcos.TOP_LEVELS = 2
    # What these convolutions start from: "p5" (1904.01355, section 4: fewer parameters, slightly
    # better) or "res5" (as in RetinaNet).
    fcos.TOP_IN_FEATURE = "p5"
    # BiFPN layers of build_fcos_resnet_bifpn_backbone (6 in AdelaiDet), which takes its levels,
    # channels and norms from MODEL.FPN.
    fcos.BIFPN_REPEATS = 6
    # Whether there is a ReLU between P6 and P7, as in RetinaNet and FCOS. GFL of mmdetection has
    # none.
    fcos.TOP_RELU = True

    # ---- Head ----
    # "fcos", a tower for the classes and one for the boxes; or "task_aligned" (TOOD, 2108.07755),
    # one stack of NUM_SHARE_CONVS convolutions (6 there) for both, whose scores and boxes are then
    # aligned. It needs NUM_CLS_CONVS 0, NUM_BOX_CONVS 0, BOX_ACTIVATION "exp" and QUALITY "joint".
    fcos.HEAD = "fcos"
    # 3x3 convolutions in the classification tower, the box tower, and shared before both.
    fcos.NUM_CLS_CONVS = 4
    fcos.NUM_BOX_CONVS = 4
    fcos.NUM_SHARE_CONVS = 0
    # Normalisation in the towers: "GN" (the papers), "BN" or "SyncBN" (statistics per level,
    # since the levels' distributions differ), "" for none.
    fcos.NORM = "GN"
    # Modulated deformable convolution as the last layer of both towers (the "dcnv2" models). With
    # HEAD "task_aligned": as the first two of the stack, with 4 groups of offsets (mmdetection).
    fcos.USE_DEFORMABLE = False
    # A learned scalar per level, multiplied with the box prediction (1904.01355, section 3.2).
    fcos.USE_SCALE = True
    # Initial class probability of every location, as in RetinaNet.
    fcos.PRIOR_PROB = 0.01
    # How the box branch turns its output x into pixels: "relu" is relu(scale * x) * stride
    # (2006.09214), "exp" is exp(scale * x) (1904.01355), and "distribution" is the expected value
    # of softmax(scale * x) over REG_MAX + 1 bins of one stride (2006.04388, section 3). With HEAD
    # "task_aligned", "exp" is scale * exp(x) * stride (2108.07755, as in mmdetection).
    fcos.BOX_ACTIVATION = "relu"
    # The last bin of a distribution, in strides; 16 there. No distance is larger.
    fcos.REG_MAX = 16
    # Multiply the class scores by a quality that two small layers read off the distributions, which
    # are sharp where the head is sure (GFLv2, 2011.12885). With QUALITY "joint".
    fcos.DISTRIBUTION_QUALITY = False
    # What the third branch predicts: "centerness" (1904.01355, eq. 3) or "iou" (of the predicted
    # with the true box). Without a branch: "none", or "computed", centerness of the predicted
    # distances themselves at test time (1904.01355, table 4); or "joint": the class score itself is
    # to be the IoU of the predicted box (2006.04388, section 3). Needs CLS_LOSS_TYPE
    # "quality_focal" or "varifocal".
    fcos.QUALITY = "centerness"
    # The tower the quality branch stands on: "box" (2006.09214) or "cls" (1904.01355).
    fcos.QUALITY_ON = "box"

    # ---- Target assignment ----
    # Which locations learn a box: "location", those in a window around its centre on the levels of
    # its size (1904.01355, section 3.2; 2006.09214), or "atss", the nearest ones whose IoU with the
    # box is high for this box (1912.02424). By what the head predicts: "simota", as many as predict
    # the box well, of those around its centre (2107.08430), and "task_aligned", those in the box
    # that are good at its class and at its sides (2108.07755), with BOX_LOSS_WEIGHTING "alignment".
    # Only the first reads REGRESSION_RANGES and CENTER_SAMPLING_RADIUS.
    fcos.ASSIGNMENT = "location"
    # Per level of IN_FEATURES: lower <= max(left, top, right, bottom) <= upper, in pixels
    # (1904.01355, section 3.2). `.inf` in a YAML means no upper bound.
    fcos.REGRESSION_RANGES = [[0, 64], [64, 128], [128, 256], [256, 512], [512, float("inf")]]
    # Where in its cell a location is, in strides: 0.5, its middle (1904.01355, section 3.1).
    # torchvision's models are trained with 0.
    fcos.LOCATION_OFFSET = 0.5
    # A location is positive only within this many strides of the box centre, on both axes
    # (2006.09214). 0: everywhere in the box (1904.01355).
    fcos.CENTER_SAMPLING_RADIUS = 1.5

    # ---- Losses ----
    # "focal" (1708.02002): the score of a present class is to be 1. "quality_focal" (2006.04388,
    # section 3) and "varifocal" (2008.13367, section 3), with QUALITY "joint": it is to be the IoU,
    # with ASSIGNMENT "task_aligned" the alignment.
    fcos.CLS_LOSS_TYPE = "focal"
    # Present classes weigh FOCAL_LOSS_ALPHA, in "varifocal" 1, absent ones 1 - FOCAL_LOSS_ALPHA:
    # with 0.25 as in both papers. "quality_focal" has no such weights. The exponent is the beta of
    # "quality_focal", 2 there too.
    fcos.FOCAL_LOSS_ALPHA = 0.25
    fcos.FOCAL_LOSS_GAMMA = 2.0
    # "iou" (-ln IoU, 1904.01355), "linear_iou" (1 - IoU), "giou" (2006.09214), "diou", "ciou".
    fcos.BOX_LOSS_TYPE = "giou"
    # "quality": weighted by the centerness target and divided by the sum of these weights (the
    # authors' code). "none": unweighted, divided by the number of positives (1904.01355, eq. 2);
    # also what the authors' code does with QUALITY "iou". "score", with QUALITY "joint": weighted
    # by the highest class score of the location, divided by the sum of these (2006.04388, as in
    # mmdetection). "alignment", with ASSIGNMENT "task_aligned": weighted by the target of the class
    # score and divided by the sum of these, as the classification loss is, too (2108.07755). Such
    # weights are predictions, which SOLVER.ACCUMULATE cannot know in advance.
    fcos.BOX_LOSS_WEIGHTING = "quality"
    # What the losses that are not weighted are divided by: "fg", the number of positives in this
    # step, or "ema_fg", its moving average, steadier for few positives per step. Both are of the
    # whole batch, over all processes. The average is part of the checkpoint.
    fcos.LOSS_NORMALIZER = "fg"
    # How much each loss counts in their sum; 1 each, as in the papers (1904.01355, eq. 2).
    fcos.CLS_LOSS_WEIGHT = 1.0
    fcos.BOX_LOSS_WEIGHT = 1.0
    fcos.QUALITY_LOSS_WEIGHT = 1.0
    # Of the distribution focal loss (2006.04388, section 3), with BOX_ACTIVATION "distribution". It
    # is weighted and divided as the box losses are. 0.25 there, of the mean of the four sides.
    fcos.DISTRIBUTION_LOSS_WEIGHT = 0.25

    # ---- Inference ----
    # Candidates are locations with a class probability above this, before quality is applied; or
    # with SCORE_THRESH_ON "score", with a final score above this, as in Detectron2 and torchvision.
    fcos.SCORE_THRESH_TEST = 0.05
    fcos.SCORE_THRESH_ON = "class"
    # Whether boxes are clipped to the image "before_nms" (the original FCOS) or "after_nms"
    # (AdelaiDet, Detectron2). Boxes that reach beyond the image overlap differently.
    fcos.CLIP_BOXES = "before_nms"
    # At most this many candidates per level and image go into NMS.
    fcos.TOPK_CANDIDATES_TEST = 1000
    # Of two boxes of a class whose IoU is above this, NMS keeps the one with the higher score. 0.6
    # is that of the authors' code (1904.01355, table 3).
    fcos.NMS_THRESH_TEST = 0.6
    # "sqrt": sqrt(class * quality) (2006.09214, eq. 4); "product": class * quality (1904.01355).
    fcos.SCORE_FUSION = "sqrt"
    # The type that the backbone and the head compute in at test time: "float32", "bfloat16" or
    # "float16". The weights stay float32, and the boxes are decoded in it. This and COMPILE are
    # read by META_ARCHITECTURE "FCOS" alone, not by R-CNN with FCOS proposals or RetinaNet.
    fcos.PRECISION_TEST = "float32"

    # ---- Speed ----
    # Compile the backbone and, on GPU, the head with torch.compile, in training and at test time.
    # Takes a minute or two at the start; image sizes may vary. Where no compiler is found there is
    # a warning, and the model runs as without.
    fcos.COMPILE = False

    # ---- In place of the RPN (MODEL.PROPOSAL_GENERATOR.NAME "FCOS") ----
    # Classes that the proposals tell apart, in place of NUM_CLASSES: 1 for any object against
    # background, as the RPN (1904.01355, section 5). How many proposals are made is up to
    # MODEL.RPN's PRE_NMS_TOPK_*, POST_NMS_TOPK_* and NMS_THRESH, as for the RPN.
    fcos.PROPOSAL_NUM_CLASSES = 1
    return fcos


def _timm_defaults() -> CN:
    """The backbone below an FPN or HRFPN on timm; all of it is trained, whatever FREEZE_AT."""
    timm = CN()
    # Any model of timm (https://huggingface.co/docs/timm) that makes maps of the strides 8, 16 and
    # 32. In MODEL.FPN.IN_FEATURES they are called as those of a ResNet: res3, res4, res5. HRFPN was
    # made for an HRNet, and takes res2, too.
    timm.NAME = "mobilenetv3_large_100"
    # Start from timm's weights, which are downloaded. Only where MODEL.WEIGHTS is empty: a
    # checkpoint of the detector has the backbone, too.
    timm.PRETRAINED = False
    # Batch norms, of models that have them: "BN", trained, with the statistics of each process;
    # "SyncBN", with those of all; "FrozenBN", as they were pretrained: the default of
    # MODEL.RESNETS.NORM, for the few images that a GPU holds.
    timm.NORM = "BN"
    return timm
