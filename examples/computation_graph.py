"""The computation graph of a small expression, drawn, and its gradients as sums over paths.

Every operation is a node, every edge carries the derivative of its end with respect to its start.
By the chain rule the derivative of the last node with respect to an input is

    sum over all paths from one to the other of the product over the path's edges

Paths double at every node that is used twice, which is why backpropagation multiplies backwards
node by node instead, and adds where paths meet: as autograd does, with which this is compared.

    python -m examples.computation_graph --x 0.7 --y -1.2
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#666666"


class Node:
    """A number, and how it was made: its operands, with the derivative with respect to each."""

    def __init__(self, name: str, value: float, *operands: tuple["Node", float]):
        self.name, self.value, self.operands = name, value, operands
        self.depth: int = 1 + max((node.depth for node, _ in operands), default=-1)

    def __add__(self, other: "Node") -> "Node":
        return Node("+", self.value + other.value, (self, 1.0), (other, 1.0))

    def __mul__(self, other: "Node") -> "Node":
        return Node("×", self.value * other.value, (self, other.value), (other, self.value))

    def sin(self) -> "Node":
        """Return the sine, whose derivative is the cosine."""
        return Node("sin", math.sin(self.value), (self, math.cos(self.value)))

    def exp(self) -> "Node":
        """Return the exponential, which is its own derivative."""
        return Node("exp", math.exp(self.value), (self, math.exp(self.value)))


def expression(x, y):
    """Return (x·y + sin(x)) · exp(y), of nodes or of tensors."""
    return (x * y + x.sin()) * y.exp()


def paths(end: Node, start: Node) -> list[list[tuple[Node, float]]]:
    """Return every path from `start` to `end`: the nodes behind `start`, each with its edge."""
    if end is start:
        return [[]]
    return [
        [*path, (end, slope)] for node, slope in end.operands for path in paths(node, start)
    ]  # fmt: skip


def nodes(end: Node) -> list[Node]:
    """Return `end` and everything that it was made of, each once, operands first."""
    found = [node for operand, _ in end.operands for node in nodes(operand)]
    return list(dict.fromkeys([*found, end]))


def draw(end: Node, gradients: dict[str, float], out: Path) -> None:
    """Draw the graph from left to right, one column for each depth."""
    figure = Figure((9, 4.2), layout="constrained")
    axes = figure.subplots()
    columns: dict[int, list[Node]] = {}
    for node in nodes(end):
        columns.setdefault(node.depth, []).append(node)
    place = {
        node: (2.2 * depth, (len(column) - 1) / 2 - i + 0.12 * (depth % 2))
        for depth, column in columns.items() for i, node in enumerate(column)
    }  # fmt: skip
    for node, (x, y) in place.items():
        for operand, slope in node.operands:
            x0, y0 = place[operand]
            axes.annotate(
                "", (x, y), (x0, y0),
                arrowprops=dict(arrowstyle="-|>", color=GREY, shrinkA=26, shrinkB=26),
            )  # fmt: skip
            share = 0.6 if x - x0 < 3 else 0.4  # of the way: where no other edge is near
            axes.text(
                x0 + share * (x - x0), y0 + share * (y - y0), f"{slope:.3g}", color=BLUE,
                ha="center", va="center", bbox=dict(facecolor="white", edgecolor="none", pad=1),
            )  # fmt: skip
        leaf = not node.operands
        axes.text(
            x, y, f"{node.name}\n{node.value:.3g}", ha="center", va="center", fontsize=9,
            linespacing=1.4,
            bbox=dict(boxstyle="circle", facecolor=ORANGE if leaf else "white", edgecolor="black"),
        )  # fmt: skip
        if leaf:
            text = f"$\\partial f/\\partial {node.name}$ = {gradients[node.name]:.4g}"
            axes.text(x, y - 0.47, text, ha="center", va="center")
    axes.set_title(
        "f = (x·y + sin x) · exp y: values in the circles, derivatives on the edges.\n"
        "A gradient is the sum, over the paths to f, of the products of their edges.",
        fontsize=10,
    )
    axes.set(xlim=(-0.9, 2.2 * end.depth + 0.6), ylim=(-1.4, 1.4))
    axes.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Print every path and its product, compare the sums with autograd, and draw the graph."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--x", type=float, default=0.7, help="[0.7]")
    parser.add_argument("--y", type=float, default=-1.2, help="[-1.2]")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/computation_graph.png"))
    asked = parser.parse_args()
    inputs = Node("x", asked.x), Node("y", asked.y)
    tensors = [torch.tensor(n.value, dtype=torch.float64, requires_grad=True) for n in inputs]
    end = expression(*inputs)
    expression(*tensors).backward()
    gradients = {}
    for node, tensor in zip(inputs, tensors, strict=True):
        products = []
        for path in paths(end, node):
            products.append(math.prod(slope for _, slope in path))
            names = " → ".join([node.name, *(step.name for step, _ in path)])
            print(f"{names:16} {' · '.join(f'{s:.4g}' for _, s in path):24} = {products[-1]:.6f}")
        gradients[node.name] = sum(products)
        print(
            f"∂f/∂{node.name} = {gradients[node.name]:.6f}, by autograd {tensor.grad:.6f}, "
            f"difference {abs(gradients[node.name] - tensor.grad):.1e}"
        )
    draw(end, gradients, asked.out)
    print(f"picture: {asked.out}")


if __name__ == "__main__":
    main()
