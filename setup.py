from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "fcos_d2" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# The configs stand at the top of the repository and travel inside the package as
# fcos_d2/configs, where fcos_d2.model_zoo finds them.
config_folders = [p for p in (ROOT / "configs").rglob("*") if p.is_dir()]
config_packages = {"fcos_d2.configs": "configs"} | {
    "fcos_d2.configs." + ".".join(p.relative_to(ROOT / "configs").parts): str(p.relative_to(ROOT))
    for p in config_folders
    if p.name != "__pycache__"
}

# What fcos_d2.export needs. To run what it made, onnxruntime is enough.
ONNX = ["onnx", "onnxscript", "onnxruntime"]

setup(
    name="fcos_d2",
    version=VERSION,
    description="FCOS (Fully Convolutional One-Stage detection) as a Detectron2 extension",
    # The opening alone: what follows has pictures and links relative to the repository.
    long_description=(ROOT / "README.md").read_text().split("\n## ")[0],
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["fcos_d2", "fcos_d2.*"]), *config_packages],
    package_dir=config_packages,
    package_data={
        "fcos_d2": ["detectron2.txt", "py.typed", "report/page.html.j2", "zoo/published.yaml"]
    }
    | {name: ["*.yaml", "*.py"] for name in config_packages},
    # Detectron2 is needed too, but is in no package registry: see "Install" in the README.
    install_requires=[
        "torch>=2.7",
        "torchvision",
        "fvcore",
        "pycocotools",
        "opencv-python",
        "jinja2",
        "hotcoco>=1.3",  # the report: pycocotools' numbers, without its minutes
    ],
    extras_require={
        "onnx": ONNX,
        "app": ["gradio>=6.31"],
        "timm": ["timm"],  # backbones: MODEL.BACKBONE.NAME "build_fcos_timm_fpn_backbone"
        "wandb": ["wandb"],  # SOLVER.LOGGERS
        "mlflow": ["mlflow"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "psutil", "timm", *ONNX],
    },
    # Another package of the registry has a command "fcos", too.
    entry_points={
        "console_scripts": ["fcos = fcos_d2.cli:main", "fcos-d2 = fcos_d2.cli:main"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
