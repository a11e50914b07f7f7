"""A fine-tuning of a small saved model, beside the same model trained on the new text alone.

Without --model it first trains one on Python code, of the standard library, and saves it in Hugging
Face's layout. Fine-tuned is it on English, the language reference that Python's help() shows: of
that there is little, and a model that has read code needs less of it than one that begins anew.

    python -m examples.fine_tuning --model FOLDER    # of save_pretrained, with its tokenizer
"""

import argparse
import math
import sysconfig
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tritium.data import Tokenizer
from tritium.kernels import AdamW
from tritium.model import ModelConfig, Transformer

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#888888"  # differ in brightness too
BATCH, LENGTH = 16, 64
FEW, HELD_OUT = 30_000, 20_000  # characters of the new text: to train on, to measure on


def code(size: int) -> str:
    """Return the beginning of the standard library, in characters."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(file.read_text(errors="replace") for file in files)[:size]


def batch(ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return windows at random places, and the tokens behind each of theirs."""
    start_B1 = torch.randint(len(ids_N) - LENGTH, (BATCH, 1))
    window_BL = ids_N[start_B1 + torch.arange(LENGTH + 1)]
    return window_BL[:, :-1], window_BL[:, 1:]


@torch.no_grad()
def bits_per_byte(model: Transformer, ids_N: Tensor, size: int) -> float:
    """Return the loss of a text of `size` bytes, in windows side by side."""
    whole = (len(ids_N) - 1) // LENGTH * LENGTH
    tokens, targets = (ids_N[i : i + whole].view(-1, LENGTH) for i in (0, 1))
    nats = model.eval()(tokens, targets).item() * (len(ids_N) - 1)
    model.train()
    return nats / math.log(2) / size


def train(model: Transformer, ids_N: Tensor, steps: int, rate: float, measure=None) -> list:
    """Train a model in place; return its steps, with what `measure` says at ten of them."""
    optimizer = AdamW(model.parameters(), lr=rate, max_grad_norm=1.0)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    measured = []
    for step in range(steps + 1):
        if measure and (step % max(1, steps // 10) == 0 or step == steps):
            measured.append((step, measure(model)))
        loss = model(*batch(ids_N))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
    return measured


def save_a_small_model(folder: Path, steps: int) -> None:
    """Train a model on code, and save it with its tokenizer."""
    text = code(2_000_000)
    tokenizer = Tokenizer.train([text], 1024)
    model = Transformer(ModelConfig(1024, n_layers=2, d_model=128, n_heads=4, max_seq_len=LENGTH))
    train(model, torch.tensor(tokenizer.encode(text)), steps, 3e-3)
    model.save_pretrained(folder, tokenizer)


def main() -> None:
    """Fine-tune, train anew, and draw both on text that neither has seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="on the new text [150]")
    parser.add_argument("--model", type=Path, help="folder of a saved model; else one is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/fine_tuning.png"))
    asked = parser.parse_args()
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        source = asked.model or Path(folder) / "code"
        if asked.model is None:
            save_a_small_model(source, 4 * asked.steps)
        tuned = Transformer.from_pretrained(source).train()
        tokenizer = Tokenizer.load(source)
    english = "\n".join(topics[name] for name in sorted(topics))
    seen = torch.tensor(tokenizer.encode(english[:FEW]))
    held_out = english[-HELD_OUT:]
    other, size = torch.tensor(tokenizer.encode(held_out)), len(held_out.encode())
    anew = Transformer(tuned.config)

    def measure(model: Transformer) -> float:
        return bits_per_byte(model, other, size)

    curves = {
        "fine-tuned": train(tuned, seen, asked.steps, 1e-3, measure),
        "trained anew": train(anew, seen, asked.steps, 3e-3, measure),
    }
    before, after, baseline = (
        curves["fine-tuned"][0][1], curves["fine-tuned"][-1][1], curves["trained anew"][-1][1],
    )  # fmt: skip
    print(f"{len(seen):,} tokens of English to train on, {asked.steps} steps; on other text:")
    print(f"saved model, as it was:         {before:.2f} bits per byte")
    print(f"fine-tuned:                     {after:.2f} bits per byte")
    print(f"same shape, anew (baseline):    {baseline:.2f} bits per byte")

    figure = Figure((6.4, 4), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(curves.items(), (BLUE, ORANGE), strict=True):
        axes.plot(*zip(*values, strict=True), "o-", color=colour, label=name)
    axes.axhline(before, color=GREY, linestyle="--", label="saved model, as it was")
    axes.set(xlabel="optimizer step", ylabel="bits per byte of unseen English")
    axes.set_title(f"A model of code reads {len(seen):,} tokens of English", fontsize=11)
    axes.legend()
    axes.grid(alpha=0.3)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out, dpi=110)
    print(f"picture: {asked.out}")


if __name__ == "__main__":
    main()
