"""The values that the parts of a detector are built with: from ``MODEL.FCOS``, and checked."""

from collections.abc import Mapping, Sequence


def values_of_keys(cfg, *keys: str) -> dict:
    """The values of keys of ``MODEL.FCOS``, under their names in lower case."""
    return {key.lower(): cfg.MODEL.FCOS[key] for key in keys}


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError unless the value of a key of ``MODEL.FCOS`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"MODEL.FCOS.{key} must be one of {list(choices)}, got {value!r}")


def check_between(key: str, value: float, low: float, high: float) -> None:
    """Raise a ValueError unless the value of a key of ``MODEL.FCOS`` is a number in [low, high]."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"MODEL.FCOS.{key} must be a number from {low} to {high}, got {value!r}")


def check_count(key: str, value: int, low: int) -> None:
    """Raise a ValueError unless the value of a key of ``MODEL.FCOS`` is a whole number >= low."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"MODEL.FCOS.{key} must be a whole number >= {low}, got {value!r}")


def check_same(name: str, values: Mapping[str, object]) -> None:
    """Raise a ValueError unless all parts have the same value of ``name``.

    Args:
        values: part -> its value.
    """
    if len(set(values.values())) > 1:
        built = ", ".join(f"{part} {value!r}" for part, value in values.items())
        raise ValueError(f"The parts must be built with the same {name}, got {built}")
