"""`python -m tests.mutants [OP ...]`: plant each fault in a copy of the tree, and run the tests.

Every fault must be killed by the test file of its operation, test_<op>.py. The tests run once
without a fault first: where they fail anyway, nothing is learnt from a failure.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.mutants import Mutant

ROOT = Path(__file__).parents[2]
OPS = sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py"))
TIMEOUT = 600  # seconds; a fault that hangs is noticed, too
NOTHING = Mutant("nothing", "pyproject.toml", "[build-system]", "[build-system]")


def file_of(op: str) -> Path:
    """The file whose tests must catch the faults of one operation."""
    for folder in ("tests/kernels", "tests"):  # the trainer has an optimizer and precisions too
        for file in (ROOT / folder).rglob(f"test_{op}.py"):
            return file
    raise ValueError(f"mutants: no test_{op}.py in tests/; name the table after its test file")


def mutants(op: str) -> list[Mutant]:
    """The planted faults of one operation."""
    return import_module(f"{__package__}.{op}").MUTANTS


def run(op: str, mutant: Mutant) -> str:
    """Return the test that failed first, "" if all passed; raise if the tests could not run."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        _copy(tree)
        file = tree / mutant.file
        file.write_text(mutant.apply(file.read_text()))
        test = str(file_of(op).relative_to(ROOT))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["--hypothesis-profile", "mutants", test]
        try:
            done = subprocess.run(
                command, cwd=tree, env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, timeout=TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{TIMEOUT} s without an end"
    failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode == 1) != bool(failed):
        raise RuntimeError(f"mutants: {op}, {mutant.what}: no test ran\n{done.stdout}{done.stderr}")
    return failed[1] if failed else ""


def _copy(tree: Path) -> None:
    """Copy what git tracks, or would: the working tree without its build products."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).exists():  # not so where a file is deleted but not yet committed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)


def main(ops: list[str]) -> int:
    """Run the mutants of `ops`, show what killed each, and return the exit code."""
    if unknown := set(ops) - set(OPS):
        print(f"mutants: no operation {sorted(unknown)}; there are {', '.join(OPS)}")
        return 2
    tasks = [(op, mutant) for op in ops for mutant in mutants(op)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for op, failed in zip(ops, pool.map(run, ops, [NOTHING] * len(ops)), strict=True):
            if failed:
                print(f"mutants: {op}: {failed} fails without any fault; mend it first")
                return 2
        running = pool.map(run, *zip(*tasks, strict=True))
        killers = list(track(running, "mutants", len(tasks), transient=True))
    table = Table("operation", "fault", "killed by")
    for (op, mutant), killer in zip(tasks, killers, strict=True):
        table.add_row(op, mutant.what, killer or "[bold red]SURVIVED")
    Console().print(table)
    print(f"{len(tasks) - killers.count('')} of {len(tasks)} faults killed")
    return 1 if "" in killers else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or OPS))
