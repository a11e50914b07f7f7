"""A text embedding by contrast: docstrings and the code below them, from the standard library.

`Embedder` maps both to vectors of length 1; InfoNCE draws the pairs of a batch together and all
else apart. Then a docstring's code is searched among that of others, in files that were not trained
on. Words that both share help, trained or not: hence the line "not trained".

    python -m examples.text_embedding
"""

import argparse
import ast
import random
import sysconfig
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tritium.data import Tokenizer
from tritium.kernels import AdamW
from tritium.model import Embedder, ModelConfig, Transformer, pad_sequences

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#888888"  # differ in brightness too
BATCH, CANDIDATES = 128, 200
LENGTHS = 16, 32  # tokens that are read of a docstring, and of code


def pairs(files: list[Path]) -> list[tuple[str, str]]:
    """Return docstring and code, without it, of every documented function in the files."""
    found = {}
    for file in files:
        source = file.read_text(errors="replace")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                text = (ast.get_docstring(node) or "").partition("\n\n")[0]
                body = node.body[0]
                if len(text.split()) > 2:
                    head = lines[node.lineno - 1 : body.lineno - 1]
                    found[text] = "\n".join(head + lines[body.end_lineno : node.end_lineno])
    return list(found.items())


def encode(tokenizer: Tokenizer, texts: list[str], length: int) -> list[list[int]]:
    """Return the first ids of each text."""
    return [ids[:length] for ids in tokenizer.encode_batch(texts)]


@torch.no_grad()
def similarities(model: Embedder, sides: list[list[list[int]]]) -> Tensor:
    """Return the cosines of every docstring, a row, with every code, a column."""
    model.eval()
    queries, keys = (model(*pad_sequences(rows)) for rows in sides)
    model.train()
    return queries @ keys.mT


def accuracy(s_BB: Tensor, k: int) -> float:
    """Return the share of rows whose own column is among the k greatest."""
    own_B1 = s_BB.diagonal()[:, None]
    return ((s_BB > own_B1).sum(1) < k).float().mean().item()


def main() -> None:
    """Train the embedding, and draw how well it finds the code of docstrings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160, help="of the optimizer [160]")
    parser.add_argument("--files", type=int, default=1000, help="to read, at most [1000]")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/text_embedding.png"))
    asked = parser.parse_args()
    torch.manual_seed(1)
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-hj-su-z]*/*.py"))
    files = [x for x in files if "site-packages" not in x.parts][: asked.files]
    held_out = pairs(files[::5])
    held_out = random.Random(1).sample(held_out, min(CANDIDATES, len(held_out)))
    train = pairs([x for i, x in enumerate(files) if i % 5])
    tokenizer = Tokenizer.train([text for pair in train for text in pair], 2048)
    docs, codes = (encode(tokenizer, [x[i] for x in train], LENGTHS[i]) for i in range(2))
    other = [encode(tokenizer, [x[i] for x in held_out], LENGTHS[i]) for i in range(2)]
    config = ModelConfig(
        tokenizer.vocab_size, n_layers=1, d_model=128, n_heads=4, max_seq_len=max(LENGTHS)
    )
    model = Embedder(Transformer(config, dropout=0.1), temperature=0.1)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    measured, losses = [], []
    for step in range(asked.steps + 1):
        if step % max(1, asked.steps // 8) == 0 or step == asked.steps:
            s_BB = similarities(model, other)
            measured.append((step, accuracy(s_BB, 1), accuracy(s_BB, 10)))
        rows = torch.randperm(len(docs))[:BATCH].tolist()
        query, key = (model(*pad_sequences([side[i] for i in rows])) for side in (docs, codes))
        loss = model.loss(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    steps, top_1, top_10 = zip(*measured, strict=True)
    n = len(held_out)
    print(
        f"{len(train):,} pairs to train on; docstrings whose code is searched among {n:,} others:"
    )
    for name, one, ten in (
        (f"trained, {asked.steps} steps", top_1[-1], top_10[-1]),
        ("not trained", top_1[0], top_10[0]), ("random (baseline)", 1 / n, 10 / n),
    ):  # fmt: skip
        print(f"{name:20} the first found is right: {one:6.1%}, one of ten: {ten:6.1%}")

    figure = Figure((12, 3.7), layout="constrained")
    training, found, matrix = figure.subplots(1, 3)
    training.plot(losses, color=BLUE)
    training.set(xlabel="optimizer step", ylabel="InfoNCE (nats)", title=f"{BATCH} pairs a batch")
    for values, colour, k in ((top_1, BLUE, 1), (top_10, ORANGE, 10)):
        found.plot(steps, values, "o-", color=colour, markersize=4, label=f"among the first {k}")
        found.axhline(k / n, color=colour, linestyle="--", label=f"random: {k / n:.1%}")
    found.set(xlabel="optimizer step", ylabel="share of docstrings", ylim=(0, 1))
    found.set_title(f"Code found among {n}, other files", fontsize=11)
    found.legend(fontsize=8, loc="upper left")
    shades = matrix.imshow(s_BB[:40, :40].numpy(), cmap="cividis")
    matrix.set(xlabel="code", ylabel="docstring", title="40 pairs, trained")
    figure.colorbar(shades, label="cosine")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out, dpi=110)
    print(f"picture: {asked.out}")


if __name__ == "__main__":
    main()
