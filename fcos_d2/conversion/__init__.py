from .convert import convert
from .sources import SOURCES

__all__ = ["SOURCES", "convert"]
