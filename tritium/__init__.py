"""Tritium: autoregressive transformers trained through handwritten Triton GPU kernels.

`tritium.kernels`, `tritium.model`, `tritium.data`, `tritium.training` and `tritium.bench` are its
rooms. A wheel holds them inside this folder; in a checkout they are stored beside it, and are
found there under the same names.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path

__version__ = "0.2.0"

_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "kernels/runtime.py").is_file():
    __path__.append(str(_CHECKOUT))


def _is_command() -> bool:
    """Whether Python was started to run a command of Tritium: train.py, or one of `-m tritium.`."""
    if sys.argv[:1] == ["-m"]:  # Python is still looking for the module
        module = "".join(sys.orig_argv[-len(sys.argv) :][:1]).removeprefix("-m")
        return module.startswith("tritium.")
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return script is not None and Path(script).resolve() == _CHECKOUT / "train.py"


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports without a traceback


@contextmanager
def interruptible(said: str = "") -> Iterator[None]:
    """Run a command, whose imports are over, inside the block: Ctrl-C cleans up, then ends it.

    Args:
        said: a line for stderr after Ctrl-C.

    Raises:
        SystemExit: after Ctrl-C, with status 130, as a shell says of SIGINT.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        if said:
            print(said, file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGINT, before)


def give_way(name: str) -> None:
    """Import the package `name` that is installed, where a room of a checkout hides it.

    With a checkout as the working folder, its `kernels/` is found before Hugging Face's package
    of that name, which transformers and others import. Where none is installed, the room stays,
    under both names the same objects, and its modules have one name: no operator is defined twice.
    """
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _CHECKOUT]
    spec = PathFinder.find_spec(name, elsewhere)
    if spec is not None and spec.loader is not None:
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    else:
        sys.modules[name].__path__ = []


def require(room: str, extra: str, *modules: str) -> None:
    """Check that the libraries a room needs are installed.

    Args:
        room: the package that needs them, or train.py.
        extra: the extra of Tritium that installs them.
        modules: their import names.

    Raises:
        ImportError: one is missing; the message names the command that installs it.
        SystemExit: the same, for a command: the message on stderr, and status 2.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        source = f"-e '{_CHECKOUT}" if str(_CHECKOUT) in __path__ else "'tritium"
        message = f"{room} needs {', '.join(missing)}; run: pip install {source}[{extra}]'"
        script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
        if sys.argv[:1] == ["-m"] or script == room:  # Python is still looking for `-m`'s module
            print(message, file=sys.stderr)
            raise SystemExit(2)
        raise ImportError(message)
