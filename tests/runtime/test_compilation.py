"""MODEL.FCOS.COMPILE: the same results and names, one compilation for all sizes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from helpers import make_input, tiny_cfg
from torch._dynamo.utils import counters

from fcos_d2.runtime import compiler_works

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh():
    assert compiler_works("cpu")  # its own compilation is not to be counted
    torch.compiler.reset()
    counters.clear()


def make_pair(NORM="BN", **fcos_keys):
    """A compiled model and an eager one with the same weights."""
    cfg = tiny_cfg(**fcos_keys)
    cfg.MODEL.RESNETS.NORM = NORM
    eager = build_model(cfg)
    torch.nn.init.normal_(eager.head.cls_logits.weight, std=0.3)
    cfg.MODEL.FCOS.COMPILE = True
    compiled = build_model(cfg)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    compiled.load_state_dict(eager.state_dict())
    return compiled, eager


@torch.no_grad()
def maps(model, image):
    """All maps of the head, in one list."""
    model.eval()
    return [x for kind in model.head_outputs(model.preprocess_image([image]))[:3] for x in kind]


def assert_same_maps(image, *models):
    a, b = (maps(model, image) for model in models)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_computes_the_same_at_all_sizes_without_compiling_again():
    compiled, eager = make_pair()
    # All of one kind to torch.compile: maps of one cell are another, and for a batch of one also
    # those with up to 20480 numbers, for which PyTorch chooses other convolutions.
    for size in ((160, 192), (192, 160), (129, 200), (256, 160)):
        image = make_input(size=size)
        assert_same_maps(image, compiled, eager)
        # The backbone; the head is compiled on GPU only.
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # State dicts and copies are those of a model that is not compiled.
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    copied = copy.deepcopy(compiled)
    assert_same_maps(image, copied, eager)
    assert copied.backbone._compiled_call_impl is None


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="on CPU test_distributed.py compares compiled training"
)
def test_trains_the_same():
    results = []
    for model in make_pair(NORM="FrozenBN"):
        losses = model.train()([make_input(), make_input(seed=1)])
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append(({k: v.detach() for k, v in losses.items()}, gradients))
    (losses, gradients), (losses2, gradients2) = results
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(losses, losses2, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == gradients2.keys()
    for name, a in gradients.items():
        assert (a - gradients2[name]).norm() <= 1e-3 * a.norm(), name


def test_missing_compiler_is_one_warning(tmp_path):
    script = """
import numpy as np
from detectron2.engine import DefaultPredictor
from helpers import tiny_cfg
for _ in range(2):
    predict = DefaultPredictor(tiny_cfg(COMPILE=True))
    assert "instances" in predict(np.zeros((64, 96, 3), np.uint8))
"""
    env = os.environ | {"CXX": "/missing/g++", "PYTHONPATH": str(TESTS)}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)  # nothing compiled earlier
    result = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    warnings = [x for x in result.stderr.splitlines() if "The model is not compiled" in x]
    assert len(warnings) == 1
    assert "a C++ compiler" in warnings[0] and "/missing/g++" in warnings[0]


@pytest.mark.gpu
def test_gpu_computes_the_same():
    compiled, eager = (m.to("cuda") for m in make_pair())
    for size in ((64, 96), (160, 192)):
        assert_same_maps(make_input(size=size), compiled, eager)
