"""Tritium: autoregressive transformers trained through handwritten Triton GPU kernels.

`tritium.kernels`, `tritium.model`, `tritium.data`, `tritium.training` and `tritium.bench` are its
rooms. A wheel holds them inside this folder; in a checkout they are stored beside it, and are
found there under the same names.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path

__version__ = "0.2.0"

_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "kernels/runtime.py").is_file():
    __path__.append(str(_CHECKOUT))


def give_way(name: str) -> None:
    """Import the package `name` that is installed, where a room of a checkout hides it.

    With a checkout as the working folder, its `kernels/` is found before Hugging Face's package
    of that name, which transformers and others import. Does nothing where none is installed.
    """
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _CHECKOUT]
    spec = PathFinder.find_spec(name, elsewhere)
    if spec is not None and spec.loader is not None:
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def require(room: str, extra: str, *modules: str) -> None:
    """Check that the libraries a room needs are installed.

    Args:
        room: the package that needs them.
        extra: the extra of Tritium that installs them.
        modules: their import names.

    Raises:
        ImportError: one is missing; the message names the command that installs it.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ImportError(f"{room} needs {', '.join(missing)}; run: pip install 'tritium[{extra}]'")
