"""Planted faults: `python -m tests.mutants [OP ...]`; `--sample 60 --seed 0` draws some of all.

Each is planted in a copy of the tree, and the test file of its operation, test_<op>.py, must fail.
The tests run once without a fault first: where they fail anyway, nothing is learnt from a failure.
"""

import argparse
import os
import random
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


def sample(size: int, seed: int) -> list[tuple[str, Mutant]]:
    """Draw `size` faults of all operations, in the order of the tables."""
    everything = [(op, mutant) for op in OPS for mutant in mutants(op)]
    chosen = sorted(random.Random(seed).sample(range(len(everything)), min(size, len(everything))))
    return [everything[i] for i in chosen]


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
                command, cwd=tree,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder},
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


def main(words: list[str] | None = None) -> int:
    """Run the chosen mutants, print what killed each, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"all, or some of {', '.join(OPS)}")
    parser.add_argument("--sample", type=int, metavar="N", help="N faults, drawn from all tables")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests run at once")
    asked = parser.parse_args(words)
    if unknown := set(asked.ops) - set(OPS):
        parser.error(f"no operation {sorted(unknown)}; there are {', '.join(OPS)}")
    size = sum(len(mutants(op)) for op in OPS) if asked.sample is None else asked.sample
    tasks = [task for task in sample(size, asked.seed) if task[0] in (asked.ops or OPS)]
    ops = list(dict.fromkeys(op for op, _ in tasks))
    console, killed = Console(), 0
    with ThreadPoolExecutor(asked.jobs) as pool:
        for op, failed in zip(ops, pool.map(run, ops, [NOTHING] * len(ops)), strict=True):
            if failed:
                print(f"mutants: {op}: {failed} fails without any fault; mend it first")
                return 2
        killers = pool.map(run, [op for op, _ in tasks], [mutant for _, mutant in tasks])
        shown = track(killers, "mutants", len(tasks), console=console, transient=True)
        for (op, mutant), killer in zip(tasks, shown, strict=True):
            killed += bool(killer)
            line = f"{op}: {mutant.what}: {f'killed by {killer}' if killer else 'SURVIVED'}"
            console.print(line, style=None if killer else "bold red", markup=False, soft_wrap=True)
    print(f"{killed} of {len(tasks)} faults killed")
    return 0 if killed == len(tasks) else 1


if __name__ == "__main__":
    sys.exit(main())
