"""Names of a package that are imported when they are first used, so that the package itself loads nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """Make `__all__`, `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: name of the package.
        modules: public names, separated by spaces, by the module that defines them.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        return getattr(import_module(module_of[name]), name)

    return sorted(module_of), load, lambda: sorted({*vars(import_module(package)), *module_of})
