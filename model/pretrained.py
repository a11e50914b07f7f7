"""Folders in Hugging Face's layout: config.json, generation_config.json, safetensors, tokenizer.

What is written needs no code of Tritium to be read: the architectures are those of `model.native`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from tritium.model.config import ModelConfig
from tritium.model.lora import AdaptedLinear, merged_parameters
from tritium.model.native import (
    IGNORED,
    FormatError,
    Part,
    config_from_native,
    config_to_native,
    layout,
)

Model = TypeVar("Model", bound=nn.Module)
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5_000_000_000
PREFIXES = "transformer.", "model."  # which files of the bare model leave out


@runtime_checkable
class SavedTokenizer(Protocol):
    """A tokenizer that can be written, such as `tritium.data.Tokenizer`."""

    @property
    def eot(self) -> int:
        """The id that ends a document."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """Return the text of ids."""
        ...

    def save(self, path: Path, /) -> None:
        """Write tokenizer.json."""
        ...


def save(
    model: nn.Module,
    config: ModelConfig,
    folder: str | os.PathLike[str],
    tokenizer: SavedTokenizer | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model; see `Transformer.save_pretrained`."""
    folder = Path(folder)
    if tokenizer is not None and not isinstance(tokenizer, SavedTokenizer):
        raise FormatError(
            "the tokenizer must have eot, decode and save, as tritium.data.Tokenizer, got a "
            f"{type(tokenizer).__name__}; leave it out, and write one of transformers by its own "
            "save_pretrained afterwards"
        )
    eot = None if tokenizer is None else tokenizer.eot
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    native = config_to_native(config, dtype, eot)
    _check_unchanged(model, config)
    head, embedding = model.get_submodule("head"), model.get_submodule("embedding")
    if config.tie_embeddings and head.weight is not embedding.weight:
        raise FormatError(
            "the output layer is not the embedding any more, which tie_embeddings=True says it is; "
            "set model.head.weight = model.embedding.weight, or build the model with "
            "tie_embeddings=False"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder} must not exist yet, or be an empty folder; name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    draft.mkdir()
    try:
        _write_json(draft / CONFIG, native)
        ends = {"bos_token_id": eot, "eos_token_id": eot}
        _write_json(draft / "generation_config.json", {} if eot is None else ends)
        _write_weights(native_weights(model, config), draft, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(draft / "tokenizer.json")
            text = tokenizer.decode([tokenizer.eot])
            _write_json(draft / "tokenizer_config.json", {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": text,
                "eos_token": text, "model_max_length": config.max_seq_len,
                "clean_up_tokenization_spaces": False,
            })  # fmt: skip
        for path in (*draft.iterdir(), draft):
            _sync(path)
        draft.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _check_unchanged(model: nn.Module, config: ModelConfig) -> None:
    """Raise a FormatError unless a model consists of what its config says, adapters apart."""
    from tritium.model.transformer import Transformer

    with torch.device("meta"):
        usual = Transformer(config)
    wanted, found = _parts(usual), _parts(model)
    for name in (*wanted, *(name for name in found if name not in wanted)):
        want, got = (parts.get(name, "not there") for parts in (wanted, found))
        if want != got:
            raise FormatError(
                f"the model must be that of its config, where {name} is {want}; here it is {got}: "
                "undo the change, or keep the model by its state_dict"
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """Return the modules and parameters of a model, adapters merged, and what each is."""
    layers = [name for name, x in model.named_modules() if isinstance(x, AdaptedLinear)]
    adapters = tuple(f"{name}.adapters" for name in layers)
    modules = {
        name: f"{_kind(type(x))}({x.extra_repr()})"
        for name, x in model.named_modules(remove_duplicate=False)
        if name and not name.startswith(adapters)
    }
    parameters = {
        name: f"a parameter {[*p.shape]}"
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith(adapters)
    }
    return modules | parameters


def _kind(kind: type[nn.Module]) -> str:
    """Return the name of a class; of a layer of Tritium's that of torch's which it stands for."""
    if not kind.__module__.startswith(("tritium.model.", "torch.nn.modules.")):
        return f"{kind.__module__}.{kind.__qualname__}"
    base = next(x for x in kind.__mro__ if x.__module__.startswith("torch.nn.modules."))
    return (kind if base is nn.Module else base).__name__


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_weights(
    weights: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int
) -> None:
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    held = total = 0
    for name, x in weights:
        if held and held + x.nbytes > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = x
        held, total = held + x.nbytes, total + x.nbytes
    files = [WEIGHTS]
    if len(shards) > 1:
        stem, n = WEIGHTS.removesuffix(".safetensors"), len(shards)
        files = [f"{stem}-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        places = {name: f for f, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / INDEX, index)
    for file, shard in zip(files, shards, strict=True):
        # A copy, one shard at a time: safetensors takes no views of one storage.
        copies = {name: x.to("cpu", copy=True).contiguous() for name, x in shard.items()}
        save_file(copies, folder / file, metadata={"format": "pt"})


def native_weights(model: nn.Module, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of native files, by their names there: views of the parameters.

    Adapters (`model.lora`) are merged, into tensors of their own.
    """
    own = dict(merged_parameters(model))
    for name, part in layout(config):
        x = own[name].detach()
        x = x.T if part.transposed else x
        yield from zip(part.names, x.split(part.rows) if part.rows else (x,), strict=True)


def load(
    kind: Callable[..., Model],
    dir_or_name: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Model:
    """Read a model; see `Transformer.from_pretrained`."""
    folder = _folder(dir_or_name)
    with ExitStack() as stack:
        weights = _Weights(folder, stack)
        given = _read_json(folder / CONFIG)
        try:
            config = config_from_native(given)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{folder / CONFIG}: {error}") from error
        parts = dict(layout(config))
        weights.check(parts, tied=config.tie_embeddings)
        with torch.device("meta"):
            model: Any = kind(config, **options)
        model.to(dtype or weights.dtype(parts["embedding.weight"].names[0])).to_empty(device=device)
        with torch.no_grad():
            for name, p in model.named_parameters():
                weights.copy_into(p, name, parts[name])
        if config.tie_embeddings:
            weights.check_tied(parts["embedding.weight"].names[0], model.embedding.weight)
    return model.eval()


def _folder(dir_or_name: str | os.PathLike[str]) -> Path:
    folder = Path(os.path.expanduser(dir_or_name))
    if folder.is_dir():
        return folder
    name = str(dir_or_name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise FormatError(f"{name} is no folder; name one that holds {CONFIG} and {WEIGHTS}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FormatError(
            f"{name} is no folder, and huggingface_hub, which would download the model of that "
            "name, is not installed; name a folder, or: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of the network, the name, the rights
        raise FormatError(f"{name} is no folder, and could not be downloaded: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; name a folder that holds it") from None
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold an object, got a {type(content).__name__}")
    return content


class _Weights:
    """The tensors of a folder, in one file or several, read one by one."""

    def __init__(self, folder: Path, stack: ExitStack):
        from safetensors import SafetensorError, safe_open

        places: dict[str, str] = {}
        if (folder / INDEX).is_file():
            places = _read_json(folder / INDEX).get("weight_map") or {}
            if not isinstance(places, dict) or not places:
                raise FormatError(f"{folder / INDEX} has no weight_map")
        files = sorted({*map(str, places.values())}) or [WEIGHTS]
        self._place: dict[str, tuple[Path, Any]] = {}
        self.source = folder / (INDEX if places else WEIGHTS)
        for file in files:
            path = folder / file
            if not path.is_file():
                raise FormatError(f"{path} does not exist{_instead(folder)}")
            try:
                reader = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path} is damaged or no safetensors file: {error}") from None
            for name in reader.keys():  # noqa: SIM118 (no mapping)
                if not IGNORED.search(name):
                    self._place[name] = path, reader
        for name in places:
            if name not in self._place and not IGNORED.search(name):
                raise FormatError(f"{folder / places[name]} lacks {name}, which {INDEX} puts there")

    def _stored(self, name: str) -> str:
        """Return the name in the files, which may lack the prefix."""
        bare = next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)
        return bare if bare in self._place and name not in self._place else name

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        _, reader = self._place[self._stored(name)]
        part: Any = reader.get_slice(self._stored(name))
        return part[:0].dtype

    def check(self, parts: dict[str, Part], *, tied: bool) -> None:
        """Raise FormatError unless the files hold these tensors and no others."""
        wanted = {self._stored(name) for part in parts.values() for name in part.names}
        if missing := sorted(wanted - self._place.keys()):
            raise FormatError(f"{self.source} lacks {missing[0]}, and {len(missing) - 1} others")
        known = wanted | ({"lm_head.weight"} if tied else set())
        if odd := sorted(self._place.keys() - known):
            path = self._place[odd[0]][0]
            raise FormatError(
                f"{path} holds {odd[0]}, which no part of this model is, and {len(odd) - 1} others"
            )

    def copy_into(self, p: Tensor, own: str, part: Part) -> None:
        """Copy the tensors of a parameter into it, of whatever dtype they are."""
        targets = p.split(part.rows) if part.rows else (p,)
        for name, target in zip(part.names, targets, strict=True):
            path, reader = self._place[self._stored(name)]
            x = reader.get_tensor(self._stored(name))
            x = x.T if part.transposed and x.dim() == 2 else x
            if x.shape != target.shape:
                raise FormatError(
                    f"{path}: {self._stored(name)}, for {own}, must be {list(target.shape)} by "
                    f"{CONFIG}, got {list(x.shape)}{' transposed' if part.transposed else ''}"
                )
            target.copy_(x)

    def check_tied(self, embedding: str, weight: Tensor) -> None:
        """Raise FormatError if the files hold another output layer than the embedding."""
        if "lm_head.weight" in self._place:
            path, reader = self._place["lm_head.weight"]
            _, own = self._place[self._stored(embedding)]
            stored = own.get_tensor(self._stored(embedding))
            if not torch.equal(reader.get_tensor("lm_head.weight"), stored):
                raise FormatError(
                    f"{path}: lm_head.weight differs from {embedding}, which it is by {CONFIG}; "
                    "set tie_word_embeddings to false there"
                )


def _instead(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    return f"; {pickles[0]} is a pickle, which is not read: save it again" if pickles else ""
