from .convert import as_checkpoint, convert, dump, settings_of
from .sources import SOURCES

__all__ = ["SOURCES", "as_checkpoint", "convert", "dump", "settings_of"]
