"""A classifier of points in the plane, two spirals, and its decision boundary over training.

Linear layers with ReLU, tanh or sigmoid between them, batch normalization and dropout, all of
PyTorch; the loss and the optimizer are Tritium's. Batch normalization has the means of a batch in
training, and running means in evaluation; dropout leaves activations out in training alone: hence
`train()` and `eval()`.

    python -m examples.classifier_2d --activation tanh --dropout 0.2 --no-batch-norm
"""

import argparse
from math import pi
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from tritium.kernels import AdamW, cross_entropy

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
COLOURS = "#0072B2", "#E69F00"  # differ in brightness too
REACH = 1.25  # of the picture


def spirals(n: int, noise: float = 0.06) -> tuple[Tensor, Tensor]:
    """Return n points `[n, 2]` on two spirals, and which one each is on, `[n]`."""
    target_B = torch.arange(n) % 2
    turn_B = torch.rand(n).sqrt()
    angle_B = 3 * pi * turn_B + pi * target_B
    x_B2 = turn_B[:, None] * torch.stack([angle_B.cos(), angle_B.sin()], 1)
    return x_B2 + noise * torch.randn(n, 2), target_B


def network(activation: str, width: int, dropout: float, batch_norm: bool) -> nn.Sequential:
    """Return three hidden layers and an output layer of two classes."""
    layers: list[nn.Module] = []
    for i in range(3):
        layers.append(nn.Linear(width if i else 2, width))
        layers += [nn.BatchNorm1d(width)] if batch_norm else []
        layers += [ACTIVATIONS[activation](), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(width, 2))


@torch.no_grad()
def probabilities(model: nn.Module, x_B2: Tensor) -> Tensor:
    """Return the probability of the second class for each point."""
    model.eval()
    p_B = model(x_B2).softmax(-1)[..., 1]
    model.train()
    return p_B


def main() -> None:
    """Train the network, and draw what it makes of the plane at four of its steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of the optimizer [300]")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu", help="[relu]")
    parser.add_argument("--width", type=int, default=64, help="of hidden layers [64]")
    parser.add_argument("--dropout", type=float, default=0.05, help="probability [0.05]")
    parser.add_argument("--batch-norm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("runs/examples/classifier_2d.png"))
    asked = parser.parse_args()
    torch.manual_seed(1)
    x_B2, target_B = spirals(400)
    held_out_B2, held_out_target_B = spirals(1000)
    model = network(asked.activation, asked.width, asked.dropout, asked.batch_norm)
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    axis = torch.linspace(-REACH, REACH, 160)
    grid_HW2 = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    shown = sorted({0, asked.steps // 20, asked.steps // 5, asked.steps})
    maps, losses, accuracies = {}, [], []
    for step in range(asked.steps + 1):
        if step in shown:
            maps[step] = probabilities(model, grid_HW2.view(-1, 2)).view(len(axis), len(axis))
        found_B = probabilities(model, held_out_B2) > 0.5
        accuracies.append((found_B == held_out_target_B).float().mean().item())
        loss = cross_entropy(model(x_B2), target_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    most = held_out_target_B.bincount().max() / len(held_out_target_B)
    print(
        f"training loss {losses[0]:.3f} nats at first, {losses[-1]:.3f} after {asked.steps} steps"
    )
    print(f"accuracy on 1,000 points that it has not seen: {accuracies[-1]:.1%}")
    print(f"accuracy of always the same class (baseline): {most:.1%}")

    figure = Figure((14, 3.3), layout="constrained")
    *planes, curves = figure.subplots(1, len(shown) + 1)
    for plane, (step, p_HW) in zip(planes, maps.items(), strict=True):
        shades = plane.contourf(axis, axis, p_HW, 20, cmap="cividis", vmin=0, vmax=1)
        plane.contour(axis, axis, p_HW, [0.5], colors="white", linewidths=2)
        for i, colour in enumerate(COLOURS):
            x, y = x_B2[target_B == i].T
            plane.plot(x, y, "o", color=colour, markersize=3, markeredgecolor="black", mew=0.3)
        plane.set(title=f"step {step:,}", xlabel="$x_1$", aspect="equal")
    planes[0].set_ylabel("$x_2$")
    figure.colorbar(shades, ax=planes, label="probability of the yellow class")
    curves.plot(losses, color=COLOURS[0], label="training loss (nats)")
    curves.plot(accuracies, color=COLOURS[1], label="held-out accuracy (share)")
    curves.axhline(most, color="grey", linestyle="--", label="baseline accuracy (share)")
    curves.set(xlabel="step", ylim=(0, 1.05))
    curves.legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.7))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out, dpi=110)
    print(f"picture: {asked.out}")


if __name__ == "__main__":
    main()
