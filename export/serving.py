"""Alias of `export.pyfunc`: models registered under this earlier name of the module still load."""

from export.pyfunc import _load_pyfunc

__all__ = ["_load_pyfunc"]
