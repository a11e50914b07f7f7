"""A GPU that compiles kernels and does not run them.

With a `StubDriver` active, Triton compiles each launch for the driver's target, with that launch's
own specialisation (divisible sizes, aligned pointers), from tensors in the memory of the host. The
launch is recorded and nothing is executed: outputs keep what they held.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

MAX_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one program may use, by target


@dataclass
class Compiled:
    """One kernel in one specialisation: its machine code, and the program it was made from."""

    name: str
    cubin: bytes
    shared: int
    threads: int = 0
    ttir: str = field(default="", repr=False)


class StubDriver(DriverBase):
    """Stand for a GPU of compute capability `arch`: 80, 90 or 100.

    `launches` lists what was launched, in order; a kernel launched twice is the same object twice.
    All drivers share the list: Triton keeps a kernel with the driver that was active at the first
    launch for its target.
    """

    launches: ClassVar[list[Compiled]] = []

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches.clear()
        self.utils = self  # Triton asks `utils` for the two methods below
        knobs.runtime.kernel_load_end_hook.add(self._attach_ttir)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Tell what Triton and kernels ask of a device; the multiprocessors are an H100's."""
        return {"max_shared_mem": MAX_SHARED[self.arch], "multiprocessor_count": 132}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        """Return module, function, registers, spills and most threads, as the real driver does."""
        compiled = Compiled(name, cubin, shared)
        return compiled, compiled, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what Triton calls to launch: grid, stream, function, further arguments."""

        def launch(x, y, z, stream, compiled: Compiled, *arguments) -> None:
            compiled.threads = metadata.num_warps * 32
            self.launches.append(compiled)

        return launch

    @staticmethod
    def _attach_ttir(
        module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str
    ) -> None:
        (path,) = (path for file, path in metadata_group.items() if file.endswith(".ttir"))
        function.ttir = Path(path).read_text()

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen by itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Name a type for the launcher's C source, which is not written."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """The key of Triton's cache of compiled kernels: by target, so that targets do not mix."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        """A benchmarker for autotuning: each configuration is compiled, all are equally fast."""

        def benchmark(call: Callable[[], None], *, quantiles, **options) -> list[float]:
            call()
            return [1.0] * len(quantiles)

        return benchmark
