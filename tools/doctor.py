#!/usr/bin/env python
"""Check that all that fcos_d2 needs is installed and works, and say what to do where it does not.

    python tools/doctor.py

Checks the Python that runs it, from any folder. Exits with 1 if a check fails.
"""

import importlib
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "torchvision", "detectron2", "fvcore", "pycocotools", "opencv-python")
# The file is read by its path because fcos_d2 cannot be imported where Detectron2 is missing.
_DETECTRON2 = (Path(__file__).parents[1] / "fcos_d2" / "detectron2.txt").read_text().strip()
_INSTALL_DETECTRON2 = f"pip install --no-build-isolation '{_DETECTRON2}'"


def _check_torch() -> str:
    import torch

    assert torch.ones(2).sum() == 2
    return "works"


def _check_torchvision_ops() -> str:
    import torch
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]
    return "work"


def _check_import(name: str) -> str:
    importlib.import_module(name)
    return "importable"


def _check_detectron2_ops() -> str:
    import torch
    from detectron2 import _C  # noqa: F401  the compiled part
    from detectron2.layers import nms_rotated

    boxes = torch.tensor([[5.0, 5, 10, 10, 0], [5, 5, 10, 9, 0], [30, 30, 4, 4, 0]])
    assert nms_rotated(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]
    return "work"


def _check_cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        assert not Path("/dev/nvidia0").exists(), "there is a GPU, but PyTorch does not see it"
        return "no GPU on this machine: training and inference run on CPU"
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]], device="cuda")
    assert nms(boxes, torch.tensor([0.9, 0.8], device="cuda"), 0.5).tolist() == [0]
    return f"works, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def _check_registered() -> str:
    importlib.import_module("fcos_d2")  # first, as it says what to do without Detectron2
    from detectron2.modeling import META_ARCH_REGISTRY

    META_ARCH_REGISTRY.get("FCOS")
    return "registered with Detectron2"


# Name, check, and what to do where it fails.
CHECKS: list[tuple[str, Callable[[], str], str]] = [
    ("PyTorch", _check_torch, "pip install torch torchvision"),
    (
        "torchvision's ops",
        _check_torchvision_ops,
        "install the torchvision that belongs to this torch: "
        "pip install --force-reinstall torch torchvision",
    ),
    (
        "pkg_resources",
        lambda: _check_import("pkg_resources"),
        "Detectron2 imports it, and setuptools dropped it in 81: pip install 'setuptools<81'",
    ),
    (
        "Detectron2's compiled ops",
        _check_detectron2_ops,
        "install Detectron2, or build it again for this torch (add --force-reinstall --no-deps): "
        + _INSTALL_DETECTRON2,
    ),
    (
        "OpenCV",
        lambda: _check_import("cv2"),
        "it needs the system's libGL: apt-get install libgl1 (or pip install "
        "opencv-python-headless in place of opencv-python)",
    ),
    (
        "CUDA",
        _check_cuda,
        "install CUDA builds of torch and torchvision that fit the driver: compare nvidia-smi "
        "with python -c 'import torch; print(torch.version.cuda)'",
    ),
    (
        "fcos_d2",
        _check_registered,
        "first what the checks above say; then, in the clone: "
        "pip install --no-build-isolation --editable .",
    ),
]


def main() -> int:
    """Print versions and checks; returns the exit code."""
    print(f"Python {platform.python_version()} on {platform.platform()}: {sys.executable}")
    for package in _PACKAGES:
        try:
            print(f"  {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"  {package}: not installed under this name")
    failed = 0
    for name, check, advice in CHECKS:
        try:
            print(f"ok    {name}: {check()}")
        except Exception as error:  # the user reads it and the advice
            failed += 1
            print(f"FAIL  {name}: {type(error).__name__}: {error}\n      what to do: {advice}")
    print("All is well." if not failed else f"{failed} of {len(CHECKS)} checks failed.")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
