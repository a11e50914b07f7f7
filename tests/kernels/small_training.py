"""Models, gradients, training and comparison for the tests of optimizers."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from tritium.kernels import SGD, Adagrad, Adam, AdamW, Lion, RMSprop

SMALL = [(5,), (127,), (8, 16)]


def parameters(shapes, device, dtype=torch.float32):
    """Random parameters, the last of which starts 4 bytes past a multiple of 16."""
    ps = [torch.randn(shape, device=device) for shape in shapes]
    ps.append(torch.randn(2302, device=device)[1:])
    return [nn.Parameter(p.to(dtype)) for p in ps]


def gradients(ps, seed, scale=1.0):
    """Gradients of very different sizes; now and then there is none."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(ps):
        g = torch.randn(p.shape, generator=generator) * scale * 10.0 ** (i % 5 - 2)
        p.grad = None if (seed + i) % 7 == 0 else g.to(p)


def train(make, ps, steps, *, clip=None, start=0, optimizer=None):
    optimizer = make(ps) if optimizer is None else optimizer
    for seed in range(start, start + steps):
        gradients(ps, seed)
        if clip is not None:
            nn.utils.clip_grad_norm_(ps, clip)
        optimizer.step()
    return optimizer


def assert_no_worse(actual, expected, exact, slack=2.0):
    """Assert that Tritium's distance from float64 is at most `slack` times torch's own."""
    for o, t, e in zip(actual, expected, exact, strict=True):
        if o.numel():
            floor = torch.finfo(o.dtype).eps * e.abs().max()
            assert (o - e).abs().max() <= slack * (t - e).abs().max() + floor


def bits(optimizer):
    state = [x for s in optimizer.state.values() for x in s.values()]
    return [x.clone() for group in optimizer.param_groups for x in group["params"]] + state


def assert_equal(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x, y)


def programs_in(order) -> AbstractContextManager:
    """Run the programs of every launch in `order`, where that can be chosen."""
    if torch.cuda.is_available():
        return nullcontext()
    import strict_interpreter

    return strict_interpreter.program_order(order)


def model_and_batch(device):
    """A small language model, and a function of no arguments that returns its loss."""
    model = nn.Sequential(
        nn.Embedding(16, 8), nn.Flatten(), nn.Tanh(), nn.Linear(16, 16, bias=False)
    ).to(device)
    tokens = torch.randint(16, (64, 2), device=device)
    return model, lambda: nn.functional.cross_entropy(model(tokens), tokens.sum(1) % 16)


class TorchLion(torch.optim.Optimizer):
    """Lion as its authors wrote it for PyTorch, which has none; and `maximize`."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = state["exp_avg"].clone().mul_(beta1).add(g, alpha=1 - beta1).sign_()
                p.add_(update, alpha=-group["lr"])
                state["exp_avg"].mul_(beta2).add_(g, alpha=1 - beta2)


THEIRS = {
    Adam: torch.optim.Adam,
    AdamW: torch.optim.AdamW,
    SGD: torch.optim.SGD,
    RMSprop: torch.optim.RMSprop,
    Adagrad: torch.optim.Adagrad,
    Lion: TorchLion,
}
MOMENTUM = {"momentum": 0.9}
OPTIONS = [
    (Adam, {"weight_decay": 0.1, "betas": (0.8, 0.9), "amsgrad": True}),
    (Adam, {"weight_decay": 0.1, "betas": (0.8, 0.99)}),
    (AdamW, {"weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.01}),
    (SGD, {**MOMENTUM, "lr": 0.05, "dampening": 0.4}),
    (SGD, {**MOMENTUM, "lr": 0.05, "weight_decay": 0.01, "nesterov": True}),
    (RMSprop, {"lr": 1e-3, "weight_decay": 0.1}),
    (RMSprop, {**MOMENTUM, "lr": 1e-3, "alpha": 0.9, "eps": 1e-3}),
    (RMSprop, {"lr": 1e-3, "alpha": 0.9, "eps": 1e-3, "centered": True}),
    (RMSprop, {**MOMENTUM, "lr": 1e-3, "eps": 1e-2, "weight_decay": 0.1, "centered": True}),
    (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.1}),
    (Lion, {"lr": 1e-3, "weight_decay": 0.1}),
]

# What a group of Tritium's may ask for beyond torch's options.
PENALTIES = [
    {"l1": 0.3},
    {"weight_decay": 0.2, "decoupled_weight_decay": True},
    {"weight_decay": 0.2, "decoupled_weight_decay": False, "maximize": True},
    {"l1": 0.3, "weight_decay": 0.2, "decoupled_weight_decay": True, "maximize": True},
]


def regularize(group, penalties):
    """Change parameters and gradients as `penalties` ask, before a step of torch.optim's."""
    decay, decoupled = penalties.get("weight_decay", 0.0), penalties.get("decoupled_weight_decay")
    for p in group["params"]:
        if p.grad is not None:
            penalty = penalties.get("l1", 0.0) * p.sign() + (0.0 if decoupled else decay) * p
            p.grad += penalty * (-1 if group["maximize"] else 1)
            p.mul_(1 - group["lr"] * decay if decoupled else 1.0)
