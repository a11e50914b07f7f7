"""Draw what a trained model attends to: python -m tritium.training.inspect RUN --text TEXT."""

from __future__ import annotations

import sys
from math import ceil
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

import tritium
from tritium.data import DataError, Tokenizer
from tritium.kernels.units import counted
from tritium.model.transformer import Transformer
from tritium.training.device import choose_device
from tritium.training.monitor.plot import draw
from tritium.training.monitor.terminal import printable, tolerant_output
from tritium.training.trained import read

LAYERS, HEADS = 6, 8  # that fit a picture
LABELS = 40  # tokens that can be named beside a map
LONGEST = 200  # tokens of a map


class Seen(NamedTuple):
    """Attention and probabilities of a model on a text."""

    words: list[str]
    """The text of each of L tokens."""
    weights: Tensor
    """`[n_layers, H, L, L]`, in which token i attends to token j."""
    probability: Tensor
    """`[L, V]`, of each token behind each place."""
    ids: list[int]

    def following(self, tokenizer: Tokenizer, top: int) -> list[tuple[str, float]]:
        """Return the most probable next tokens of the text, and their probabilities."""
        p, ids = self.probability[-1].topk(min(top, self.probability.shape[1]))
        return [(shown(tokenizer, i), x) for i, x in zip(ids.tolist(), p.tolist(), strict=True)]


def shown(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text on one line, with its spaces seen; an id where it is no text."""
    text = tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return printable(text) if text and "\ufffd" not in text else f"#{token}"


@torch.no_grad()
def look(model: Transformer, tokenizer: Tokenizer, text: str) -> Seen:
    """Return the attention and probabilities of a model on a text.

    Raises:
        ValueError: the text has more tokens than the context or a picture.
    """
    ids = tokenizer.encode(text) or [tokenizer.eot]
    if len(ids) > (most := min(LONGEST, model.config.max_seq_len)):
        raise ValueError(f"text must have at most {most} tokens, got {len(ids)}; shorten it")
    tokens = torch.tensor([ids], device=model.device)
    weights = model.attention_weights(tokens)[:, 0].float().cpu()
    probability = model(tokens)[0].float().softmax(-1).cpu()
    return Seen([shown(tokenizer, i) for i in ids], weights, probability, ids)


def plot(seen: Seen, path: Path, layers: list[int], following: list, title: str) -> None:
    """Draw attention maps, a row for each of `layers`, above the probabilities of tokens."""
    from matplotlib.figure import Figure

    columns = min(seen.weights.shape[1], HEADS)
    heads = [i * seen.weights.shape[1] // columns for i in range(columns)]
    size, below = (1.7 if len(seen.words) > LABELS // 2 or columns > 4 else 2.4), 3.0
    width, height = max(8.5, size * columns + 1.6), size * len(layers) + 0.6
    figure = Figure(figsize=(width, height + below), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=(height, below))
    maps, bars = parts  # pyright: ignore[reportGeneralTypeIssues]
    grid, image = maps.subplots(len(layers), columns, squeeze=False), None
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            axes = grid[row][column]
            image = axes.imshow(seen.weights[layer, head], vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"layer {layer}, head {head}", fontsize=7)
            axes.tick_params(labelsize=5, length=1)
            _name(axes, seen.words, y=column == 0, x=row == len(layers) - 1)
    maps.supxlabel("token that is attended to", fontsize=8)
    maps.supylabel("token that attends", fontsize=8)
    maps.colorbar(image, ax=grid, shrink=0.6).set_label("attention weight", fontsize=8)
    given, next_ = bars.subplots(1, 2, width_ratios=(1.6, 1))
    rest, place = seen.ids[1:], range(1, len(seen.ids))
    given.bar(place, seen.probability[torch.arange(len(rest)), rest], color="tab:blue")
    given.set_ylabel("probability", fontsize=8)
    given.set(ylim=(0, 1), xlim=(0.3, max(len(seen.ids) - 0.3, 1)))
    given.set_title("each token of the text, behind those before it", fontsize=8)
    _name(given, seen.words, x=True)
    words, p = zip(*following, strict=True)
    next_.barh(range(len(p)), p, color="tab:orange")
    next_.set_yticks(range(len(p)), words, fontsize=7, parse_math=False)
    next_.invert_yaxis()
    next_.set_xlabel("probability", fontsize=8)
    next_.set_title("the next token", fontsize=8)
    for axes in (given, next_):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(printable(title), fontsize=9).set_parse_math(False)
    figure.savefig(path, dpi=130, format="png")


def _name(axes, words: list[str], *, x: bool = False, y: bool = False) -> None:
    """Write tokens beside an axis, or only some of their numbers where they are many."""
    every = range(0, len(words), 1 if len(words) <= LABELS else ceil(len(words) / 10))
    names = [words[i] if len(words) <= LABELS else str(i) for i in every]
    for wanted, axis, options in ((x, axes.xaxis, {"rotation": 90}), (y, axes.yaxis, {})):
        if wanted:
            axis.set_ticks(list(every), names, parse_math=False, **options)
        elif axes.images:
            axis.set_ticks([])


def main(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    text: str,
    out: Path = Path("attention.png"),
    layers: tuple[int, ...] = (),
    top: int = 10,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    checkpoint: Literal["best", "newest"] = "best",
) -> None:
    """Draw the attention maps of a text, and the probabilities of its tokens and of the next one.

    The most probable next tokens are printed too.

    Args:
        run: folder of a run, of one checkpoint, or in Hugging Face's layout.
        text: the text, of at most 200 tokens.
        out: the picture, a PNG.
        layers: numbers of the layers to draw, from 0. Without them up to six, evenly spread.
        top: number of next tokens.
        device: device to compute on. auto: a GPU if there is one.
        checkpoint: the one of a run with the lowest validation loss, if it was kept, or the newest.
    """
    model, tokenizer = read(run, choose_device(device), checkpoint=checkpoint)
    n = model.config.n_layers
    rows = [*layers] or sorted({round(i * (n - 1) / max(LAYERS - 1, 1)) for i in range(LAYERS)})
    if wrong := [i for i in rows if not 0 <= i < n]:
        raise ValueError(f"layers must be in [0, {n}), got {wrong[0]}")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    seen = look(model, tokenizer, text)
    following = seen.following(tokenizer, top)
    for word, p in following:
        print(f"{p:7.1%}  {word}")
    failures: list[str] = []
    draw(failures.append, plot, seen, out, rows, following, f"{run}: {text!r}")
    if failures:
        raise ValueError(failures[0])
    print(f"Attention of {counted(len(rows), 'layer')}: {out}")


if __name__ == "__main__":
    try:
        with tritium.interruptible(), tolerant_output():
            tyro.cli(main, prog="python -m tritium.training.inspect")
    except (ValueError, DataError) as error:  # a checkpoint, or an argument out of range
        print(f"tritium.training.inspect: {error}", file=sys.stderr)
        sys.exit(2)
