"""A regression from sequences to numbers: the value of a sum that is read as text, such as 7-12+5.

A small transformer reads characters; `Regressor` predicts a number from what the last one has seen.
Sums of different lengths are one batch, padded at the end.

    python -m examples.regression
"""

import argparse
import random
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tritium.kernels import AdamW
from tritium.model import ModelConfig, Regressor, Transformer, pad_sequences

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#888888"  # differ in brightness too
CHARACTERS = "0123456789+-="
BATCH = 128
SCALE = 20.0  # by which targets are divided, so that most are between -1 and 1


def sums(n: int, generator: random.Random) -> tuple[list[str], Tensor]:
    """Return n sums of one to five numbers from 0 to 20, and their values, `[n, 1]`."""
    texts, values = [], []
    for _ in range(n):
        terms = [generator.randint(0, 20) for _ in range(generator.randint(1, 5))]
        signs = [generator.choice("+-") for _ in terms[1:]]
        text = str(terms[0]) + "".join(f"{s}{t}" for s, t in zip(signs, terms[1:], strict=True))
        texts.append(text + "=")
        values.append([float(eval(text))])  # of digits and signs that were drawn here
    return texts, torch.tensor(values)


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the texts as one batch of ids, and their lengths."""
    return pad_sequences([[CHARACTERS.index(c) for c in text] for text in texts])


def main() -> None:
    """Train on fresh sums, measure on others, and draw predictions beside values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of the optimizer [600]")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/regression.png"))
    asked = parser.parse_args()
    torch.manual_seed(1)
    shape = ModelConfig(len(CHARACTERS), n_layers=2, d_model=64, n_heads=4, max_seq_len=16)
    model = Regressor(Transformer(shape), pooling="last")
    optimizer = AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, asked.steps))
    drawn, losses = random.Random(1), []
    for _ in range(asked.steps):
        texts, value_B1 = sums(BATCH, drawn)
        tokens, lengths = encode(texts)
        loss = model(tokens, value_B1 / SCALE, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
        losses.append(loss.item() ** 0.5 * SCALE)
    texts, value_B1 = sums(1000, random.Random(2))
    tokens, lengths = encode(texts)
    with torch.no_grad():
        found_B1 = model.eval()(tokens, lengths=lengths) * SCALE
    error = (found_B1 - value_B1).square().mean().sqrt()
    baseline = value_B1.std(correction=0)
    print(f"root mean squared error on 1,000 other sums: {error:.2f}")
    print(f"root mean squared error of their mean (baseline): {baseline:.2f}")
    for text, found in list(zip(texts, found_B1[:, 0], strict=True))[:3]:
        print(f"{text} {found:.1f}")

    figure = Figure((9, 3.8), layout="constrained")
    descent, scatter = figure.subplots(1, 2)
    descent.plot(losses, color=BLUE, linewidth=0.8, label="each batch of fresh sums")
    descent.axhline(baseline, color=GREY, linestyle="--", label="always the mean (baseline)")
    descent.set(
        xlabel="optimizer step", ylabel="root mean squared error", yscale="log", title="Training"
    )
    descent.legend(fontsize=8)
    shades = scatter.scatter(value_B1, found_B1, 9, lengths, cmap="cividis")
    scatter.axline((0, 0), slope=1, color=ORANGE, label="prediction = value")
    scatter.set(xlabel="value of the sum", ylabel="prediction", title="1,000 other sums")
    figure.colorbar(shades, label="characters of the sum")
    scatter.legend(fontsize=8)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out, dpi=110)
    print(f"picture: {asked.out}")


if __name__ == "__main__":
    main()
