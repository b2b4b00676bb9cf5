"""Where the shipped configs are."""

from pathlib import Path


def get_config_file(config_path: str) -> str:
    """Path of a shipped config.

    Args:
        config_path: name under ``configs/``, e.g. "COCO-Detection/fcos_R_50_FPN_1x.yaml", or that
            of a LazyConfig, e.g. "COCO-Detection/fcos_R_50_FPN_1x.py".

    Raises:
        FileNotFoundError: if there is no such config, with a list of the shipped ones.
    """
    # An installed package contains the configs; in a clone they are beside it.
    root = next(p / "configs" for p in Path(__file__).parents[:2] if (p / "configs").is_dir())
    file = root / config_path
    if not file.is_file():
        names = sorted(
            str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".yaml", ".py")
        )
        raise FileNotFoundError(f"No config {config_path!r}. The configs are: {', '.join(names)}")
    return str(file)
