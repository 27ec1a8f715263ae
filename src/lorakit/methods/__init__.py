"""One file per parametrisation or wrapper. Importing this package fills `lorakit.method.METHODS`."""

from importlib import import_module
from pkgutil import iter_modules

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")
