"""A wheel and an editable installation hold one name, `tritium`, and hide nobody else's packages.

What is run, runs in processes of its own and in virtual environments that hold what is installed
here, Tritium as the test has it, and nothing from a network.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers.utils.import_utils import KERNELS_MIN_VERSION

import tritium

ROOT = Path(__file__).parents[1]
SITE = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
ROOMS = ("kernels", "model", "data", "training", "bench")
FOR_TESTS = {"TRITON_INTERPRET", "PYTHONPATH"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The files of a clean checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory) -> Path:
    """A wheel with the name, version and contents that transformers expects of HF's `kernels`."""
    folder = tmp_path_factory.mktemp("hugging_face")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(HUGGING_FACE)
    (folder / "kernels" / "rms_norm.py").write_text("")
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "kernels"\nversion = "{KERNELS_MIN_VERSION}"\n'
        '[tool.setuptools]\npackages = ["kernels"]\n'
    )
    return build(folder, folder / "dist")


# Names that transformers imports while it defines a model, and those that decorate one.
HUGGING_FACE = """
IS_HUGGING_FACE = True
class CUDAProperties: pass
Device = KernelizeFallback = LayerRepository = LocalLayerRepository = Mode = CUDAProperties
FuncRepository = LocalFuncRepository = ROCMProperties = CUDAProperties
def get_kernel(*args, **kwargs): raise OSError("no network")
register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = get_kernel
kernelize = get_kernel
def use_kernel_forward_from_hub(*names): return lambda kernel_of: kernel_of
use_kernelized_func = use_kernel_func_from_hub = use_kernel_forward_from_hub
"""


@pytest.fixture(scope="session")
def install(tmp_path_factory):
    """Make an environment, install into it in order, and return its Python."""

    def install(*wanted: list[str], site: set[str] = SITE) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=False)
        python = folder / "bin" / "python"
        of_folder = {"base": str(folder), "platbase": str(folder)}
        (Path(sysconfig.get_path("purelib", "venv", of_folder)) / "here.pth").write_text(
            "\n".join(site)
        )
        for arguments in wanted:
            pip("--python", str(python), "install", "--ignore-installed", *arguments)
        return python

    return install


@pytest.fixture(scope="session")
def with_wheel(install, wheel) -> Path:
    return install([str(wheel)])


@pytest.fixture(scope="session")
def hugging_face_first(install, wheel, hugging_face) -> Path:
    return install([str(hugging_face)], [str(wheel)])


@pytest.fixture(scope="session")
def hugging_face_last(install, wheel, hugging_face) -> Path:
    return install([str(wheel)], [str(hugging_face)])


@pytest.fixture(scope="session")
def editable(install, source) -> Path:
    return install(["--no-build-isolation", "-e", str(source)])


@pytest.fixture(scope="session")
def core(install, wheel, tmp_path_factory) -> Path:
    """An environment with what the wheel requires and what that requires: no extra."""
    folder = tmp_path_factory.mktemp("core")
    for distribution in required(metadata.PathDistribution(unpacked_info(wheel, folder))):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return install([str(wheel)], site={str(folder)})


def build(project: Path, to: Path) -> Path:
    pip("wheel", "--no-build-isolation", "-w", str(to), str(project))
    return next(to.glob("*.whl"))


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def unpacked_info(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [x for x in archive.namelist() if ".dist-info/" in x])
    return next(folder.glob("*.dist-info")).rename(folder / "tritium-metadata")


def required(root: metadata.Distribution) -> list[metadata.Distribution]:
    """Every distribution that `root` requires, directly or not, without extras."""
    found, unread = {}, [root]
    while unread:
        for line in unread.pop().requires or ():
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                distribution = metadata.distribution(requirement.name)
            except metadata.PackageNotFoundError:  # CUDA's libraries, where torch is the CPU's
                continue
            if found.setdefault(distribution.name, distribution) is distribution:
                unread.append(distribution)
    return list(found.values())


def run(python: Path | str, code: str, folder: Path, *arguments: str, status: int = 0):
    """Run `code`, or without it what `arguments` name, with `folder` as the working folder."""
    command = [str(python), *(("-c", code) if code else ()), *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in FOR_TESTS}
    kept |= {"TRITIUM_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_wheel_holds_one_name_and_every_file(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    version = tritium.__version__
    assert {name.split("/")[0] for name in names} == {"tritium", f"tritium-{version}.dist-info"}
    files = [
        x for room in ROOMS for x in (source / room).rglob("*") if x.suffix in {".py", ".html"}
    ]
    expected = {f"tritium/{file.relative_to(source)}" for file in files}
    expected |= {"tritium/__init__.py", "tritium/py.typed"}
    assert {name for name in names if name.startswith("tritium/")} == expected


LLAMA = """
import importlib, sys
beside, first = sys.argv[1] == "beside", sys.argv[2]
importlib.import_module(first)
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
assert is_kernels_available() == beside
if beside:
    import kernels
    assert kernels.IS_HUGGING_FACE
    import kernels.rms_norm
tokens = torch.arange(16).view(2, 8)
sizes = dict(vocab_size=32, num_hidden_layers=1, num_attention_heads=2)
for model in (
    LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, **sizes)),
    GPT2LMHeadModel(GPT2Config(n_embd=16, **sizes)),
):
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
from tritium.kernels import rms_norm
from tritium.model import Transformer
assert callable(rms_norm) and rms_norm(torch.ones(2, 4), torch.ones(4)).sum() > 7.9
print(sys.modules["tritium"].__file__)
"""


@pytest.mark.parametrize(
    ("environment", "folder", "first"),
    [
        ("with_wheel", "checkout", "tritium.kernels"),
        ("with_wheel", "elsewhere", "transformers"),
        ("hugging_face_last", "checkout", "transformers"),
        ("hugging_face_last", "elsewhere", "tritium.kernels"),
        ("hugging_face_first", "checkout", "tritium.kernels"),
        ("hugging_face_first", "elsewhere", "transformers"),
    ],
)
def test_transformers_run_beside_tritium(environment, folder, first, source, tmp_path, request):
    python = request.getfixturevalue(environment)
    beside = "alone" if environment == "with_wheel" else "beside"
    out = run(python, LLAMA, source if folder == "checkout" else tmp_path, beside, first).stdout
    assert Path(out.strip()).is_relative_to(source) == (folder == "checkout")


ONCE = """
import kernels, tritium.kernels, model, tritium.model, data, tritium.data
assert kernels.rms_norm is tritium.kernels.rms_norm
assert model.Transformer is tritium.model.Transformer
assert data.Tokenizer is tritium.data.Tokenizer
try:
    import kernels.rms_norm
except ModuleNotFoundError:
    print("once")
"""


def test_operators_are_registered_once(source):
    assert run(sys.executable, ONCE, source).stdout == "once\n"


def test_train_starts_from_another_folder(source, tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 2000)
    arguments = ["tiny", "--data", "text.txt", "--max-steps", "1", "--out", "run"]
    run(sys.executable, "", tmp_path, str(source / "train.py"), *arguments)
    assert (tmp_path / "run" / "config.json").is_file()


# Projects of users, with folders and files named as Tritium's rooms are.
USE = """
import torch
from tritium.data import Tokenizer
from tritium.kernels import rms_norm
from tritium.model import ModelConfig, Transformer

def loss(rank=0):
    config = ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2)
    return Transformer(config)(*torch.zeros(2, 1, 8, dtype=torch.long)).item()
"""
MAIN = """
if __name__ == "__main__":
    print(loss() > 0)
"""
SPAWN = """
import multiprocessing
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(loss, [0])[0] > 0)
"""
OWN = "from data.loader import get_loader\nfrom model.net import Net\nassert get_loader is Net\n"
PROJECTS = {
    "folders": {"data/a.txt": "text", "data/loader.py": "get_loader = 1", "model/net.py": "Net = 1",
                "main.py": OWN + USE + MAIN},
    "files": {"model.py": "class GPT: pass", "data.py": "", "kernels.py": "", "train.py": "x = 1",
              "main.py": "import kernels, train\n" + USE + "from model import GPT\n" + MAIN},
    "packages": {"data/__init__.py": "", "data/loader.py": "get_loader = 1",
                 "model/__init__.py": "", "model/net.py": "Net = 1", "main.py": OWN + USE + SPAWN},
}  # fmt: skip


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("installation", ["with_wheel", "editable"])
def test_users_own_folders_are_theirs(project, installation, tmp_path, request):
    for name, text in PROJECTS[project].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    python = request.getfixturevalue(installation)
    assert run(python, "", tmp_path, "main.py").stdout == "True\n"


CORE = """
import torch, tritium.kernels
from tritium.model import ModelConfig, Transformer
config = ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2)
Transformer(config)(*torch.zeros(2, 1, 8, dtype=torch.long)).backward()
for room, extra in ("data", "train"), ("training", "train"), ("bench", "bench"):
    try:
        __import__(f"tritium.{room}")
    except ImportError as missing:
        message = str(missing)
        assert message.startswith(f"tritium.{room} needs "), message
        assert message.endswith(f"run: pip install 'tritium[{extra}]'"), message
    else:
        raise AssertionError(f"tritium.{room} found what it needs")
"""
COMMANDS = ("-m tritium.data.prepare x", "-m tritium.bench", "-m tritium.training.generate x")


def test_core_needs_no_extra(core, tmp_path):
    run(core, CORE, tmp_path)


@pytest.mark.parametrize("command", [*COMMANDS, "train.py"])
def test_command_names_the_missing_extra(command, core, source, tmp_path):
    is_script = command.endswith(".py")
    words = [str(source / command)] if is_script else command.split()
    error = run(core, "", tmp_path, *words, status=2).stderr
    extra = "bench" if "bench" in command else "train"
    package = f"-e '{source}[{extra}]'" if is_script else f"'tritium[{extra}]'"
    assert error.count("\n") == 1
    assert error.endswith(f"run: pip install {package}\n")
