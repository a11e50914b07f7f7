"""One sigmoid neuron under mean squared error, its gradient derived by hand beside autograd's.

    z_B  = w · x_B + b,  a_B = σ(z_B),  loss = mean over B of (a_B - y_B)²

By the chain rule, with σ' = σ · (1 - σ):

    dloss/da_B = 2 · (a_B - y_B) / B        da_B/dz_B = a_B · (1 - a_B)
    dz_B/dw = x_B                           dz_B/db = 1
    dw = sum over B of 2 / B · (a_B - y_B) · a_B · (1 - a_B) · x_B,  db the same without x_B

The factor a · (1 - a) is at most 1/4 and vanishes where the neuron is saturated: that is the plain
in the picture, on which it begins.

    python -m examples.sigmoid_neuron
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tritium.kernels import SGD, mse_loss

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"  # differ in brightness too


def loss_of(w: Tensor, b: Tensor, x_B: Tensor, y_B: Tensor) -> Tensor:
    """Return the neuron's mean squared error."""
    return mse_loss(torch.sigmoid(w * x_B + b), y_B)


def gradient_by_hand(w: Tensor, b: Tensor, x_B: Tensor, y_B: Tensor) -> Tensor:
    """Return the derivatives of the loss with respect to w and b, `[2]`."""
    a_B = torch.sigmoid(w * x_B + b)
    dz_B = 2 / len(x_B) * (a_B - y_B) * a_B * (1 - a_B)
    return torch.stack([(dz_B * x_B).sum(), dz_B.sum()])


def main() -> None:
    """Train the neuron, compare both gradients at every step, and draw the way it takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of gradient descent [150]")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/sigmoid_neuron.png"))
    asked = parser.parse_args()
    torch.manual_seed(1)
    x_B = torch.randn(60) * 2
    y_B = (torch.rand_like(x_B) < torch.sigmoid(2 * (x_B - 0.5))).float()  # 0 or 1
    w, b = (torch.tensor(value, requires_grad=True) for value in (-2.5, 3.0))
    first = w.item(), b.item()
    optimizer = SGD([w, b], lr=2.0)
    path, losses, by_hand, by_autograd = [], [], [], []
    for _ in range(asked.steps + 1):
        loss = loss_of(w, b, x_B, y_B)
        optimizer.zero_grad()
        loss.backward()
        path.append((w.item(), b.item()))
        losses.append(loss.item())
        by_autograd.append(torch.stack([w.grad, b.grad]))
        by_hand.append(gradient_by_hand(w.detach(), b.detach(), x_B, y_B))
        optimizer.step()
    hand_S2, autograd_S2 = torch.stack(by_hand), torch.stack(by_autograd)
    print(f"gradient by hand and by autograd differ by {(hand_S2 - autograd_S2).abs().max():.1e}")
    print(
        f"mean squared error {losses[0]:.3f} at first, {losses[-1]:.3f} after {asked.steps} steps"
    )
    print(f"mean squared error {y_B.var(correction=0):.3f} of the best constant (baseline)")

    figure = Figure((11, 3.6), layout="constrained")
    curve, surface, gradients = figure.subplots(1, 3)
    x = torch.linspace(-6, 6, 200)
    curve.plot(x_B, y_B, "o", color=GREY, alpha=0.4, label="data (0 or 1)")
    for (w_, b_), style, name in ((first, "--", "at first"), (path[-1], "-", "trained")):
        curve.plot(x, torch.sigmoid(w_ * x + b_), style, color=BLUE, label=f"neuron, {name}")
    curve.set(xlabel="input x", ylabel="output σ(w·x + b)", title="The neuron")
    curve.legend(fontsize=8, loc="center left")
    w_W, b_H = torch.linspace(-4, 4, 120), torch.linspace(-4.5, 4.5, 120)
    a_HWB = torch.sigmoid(w_W[:, None] * x_B + b_H[:, None, None])
    loss_HW = (a_HWB - y_B).square().mean(-1)
    shades = surface.contourf(w_W, b_H, loss_HW, 20, cmap="cividis")
    figure.colorbar(shades, label="mean squared error")
    surface.plot(*zip(*path, strict=True), color="white", linewidth=2)
    surface.plot(*path[0], "o", color="white", label="start")
    surface.plot(*path[-1], "*", color="white", markersize=13, label="end")
    surface.set(xlabel="weight w", ylabel="bias b", title="Descent on the loss")
    surface.legend(fontsize=8, facecolor=GREY, labelcolor="white")
    for i, (name, colour) in enumerate((("w", BLUE), ("b", ORANGE))):
        gradients.plot(autograd_S2[:, i], color=colour, alpha=0.35, linewidth=6)
        gradients.plot(hand_S2[:, i], "--", color=colour, label=f"∂loss/∂{name}")
    gradients.set(xlabel="step", ylabel="derivative", title="Wide: autograd, dashed: by hand")
    gradients.legend(fontsize=8)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out, dpi=110)
    print(f"picture: {asked.out}")


if __name__ == "__main__":
    main()
