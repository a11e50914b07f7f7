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

from tritium.bench.compiled._devices import DEVICES


@dataclass
class Compiled:
    """One kernel in one specialisation: its machine code, and the program it was made from."""

    name: str
    cubin: bytes
    shared: int
    threads: int = 0
    ttir: str = field(default="", repr=False)
    assembly: str = field(default="", repr=False)
    """The listing that the compiler wrote on the way, for an AMD target."""


class StubDriver(DriverBase):
    """Stand for a GPU: 80, 90 or 100 (compute capability times ten), or "gfx942".

    `launches` lists what was launched, in order; a kernel launched twice is the same object twice.
    All drivers share the list: Triton keeps a kernel with the driver that was active at the first
    launch for its target.
    """

    launches: ClassVar[list[Compiled]] = []

    def __init__(self, arch: int | str) -> None:
        self.device = DEVICES[f"sm_{arch}" if isinstance(arch, int) else arch]
        self.launches.clear()
        self.utils = self  # Triton asks `utils` for the two methods below
        knobs.runtime.kernel_load_end_hook.add(self._attach_listings)

    def get_device_properties(self, device: int | str) -> dict[str, int]:
        """Tell what Triton and kernels ask of a device; the multiprocessors are an H100's."""
        return {"max_shared_mem": self.device.program_shared, "multiprocessor_count": 132}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int | str) -> tuple:
        """Return module, function, registers, spills and most threads, as the real driver does.

        No number of threads is refused here: `static` finds fault with too many itself.
        """
        compiled = Compiled(name, cubin, shared)
        return compiled, compiled, 0, 0, 1 << 30

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what Triton calls to launch: grid, stream, function, further arguments."""

        threads = metadata.num_warps * metadata.target.warp_size
        record = self.launches.append

        def launch(x, y, z, stream, compiled: Compiled, *arguments) -> None:
            compiled.threads = threads
            record(compiled)

        return launch

    @staticmethod
    def _attach_listings(
        module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str
    ) -> None:
        listings = {Path(file).suffix: Path(path) for file, path in metadata_group.items()}
        function.ttir = listings[".ttir"].read_text()
        if ".amdgcn" in listings:
            function.assembly = listings[".amdgcn"].read_text()

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen unless `set_active` chooses it."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Name a type for the launcher's C source, which is not written."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return self.device.target

    def get_current_device(self) -> int | str:
        """The key of Triton's cache of compiled kernels: by target, so that targets do not mix."""
        return self.device.target.arch

    def get_current_stream(self, device: int | str) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The device of the tensors: the CPU."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        """A benchmarker for autotuning: each configuration is compiled, all are equally fast."""

        def benchmark(call: Callable[[], None], *, quantiles, **options) -> list[float]:
            call()
            return [1.0] * len(quantiles)

        return benchmark
