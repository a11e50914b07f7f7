"""Implementations compared: Tritium, PyTorch, and peers where they are installed.

A loader imports its implementation when it is measured, so that a missing library, or a broken
kernel, costs its own rows and no other.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

Loader = Callable[[], Callable]


def _import(module: str, name: str, **options) -> Loader:
    """Load `module.name`, with `options` bound."""
    return lambda: partial(getattr(import_module(module), name), **options)


def own(name: str, module: str = "", **options) -> Loader:
    """Load an operation of kernels/, from the file of its name or from `module`."""
    return _import(f"tritium.kernels.{module or name}", name, **options)


def norm(name: str, eps: float) -> Loader:
    """Load a norm of kernels/, which takes its weight, and bias, behind the input."""

    def load() -> Callable:
        function = own(name)()
        return lambda x, w, *b: function(x, w.shape, w, *b, eps=eps)

    return load


def liger(name: str, **options) -> Loader:
    """Load an operation of Liger-Kernel."""
    return _import("liger_kernel.transformers.functional", f"liger_{name}", **options)


def quack(module: str, name: str = "", **options) -> Loader:
    """Load an operation of QuACK."""
    return _import(f"quack.{module}", name or module, **options)


def cut_cross_entropy() -> Callable:
    """Load Apple's linear cross-entropy."""
    return import_module("cut_cross_entropy").linear_cross_entropy


def cut_cross_entropy_log_prob() -> Callable:
    """Load the same as the log-probability of each target."""
    loss = cut_cross_entropy()
    return lambda h, w, target: -loss(h, w, target, reduction="none")


def fla_kl_div() -> Callable:
    """Load the linear KL divergence of flash-linear-attention."""
    loss = _import("fla.modules.fused_kl_div", "fused_kl_div_loss")()
    return lambda h, w, teacher_h, teacher_w: loss(h, teacher_h, w, teacher_w)


def cross_entropy_inplace() -> Callable:
    """Load Tritium's cross_entropy, overwriting the logits."""
    inplace = own("cross_entropy", inplace=True)()
    return lambda logits, target: inplace(logits.view_as(logits), target)


def quack_add_rms_norm() -> Callable:
    """Load QuACK's rmsnorm behind a residual addition."""
    rmsnorm = quack("rmsnorm", prenorm=True)()
    return lambda x, residual, w: rmsnorm(x, w, residual=residual)


def _rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, 1e-6)


def _add_rms_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    stream = residual + x
    return _rms_norm(stream, w), stream


def _layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, w.shape, w, b, 1e-5)


def _add_layer_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    stream = residual + x
    return _layer_norm(stream, w, b), stream


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = (table[:, None].to(x.dtype) for table in (cos, sin))
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _qk_norm_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.chunk(3, -2)
    q, k = _rms_norm(q, q_weight), _rms_norm(k, k_weight)
    return _rope(q, cos, sin), _rope(k, cos, sin), v


def _info_nce(query: Tensor, key: Tensor) -> Tensor:
    similarity = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T
    return F.cross_entropy(similarity / 0.07, torch.arange(len(query), device=query.device))


def _linear_log_prob(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(h, w), target, reduction="none")


def _linear_kl_div(h: Tensor, w: Tensor, teacher_h: Tensor, teacher_w: Tensor) -> Tensor:
    student, teacher = (
        F.linear(h, w).log_softmax(-1),
        F.linear(teacher_h, teacher_w).log_softmax(-1),
    )
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _linear_topk_kl_div(h: Tensor, w: Tensor, indices: Tensor, log_prob: Tensor) -> Tensor:
    student, teacher = F.linear(h, w).log_softmax(-1), log_prob.log_softmax(-1)
    return F.kl_div(student.gather(-1, indices), teacher, reduction="batchmean", log_target=True)


EAGER: dict[str, Callable] = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "cross_entropy": F.cross_entropy,
    "linear_cross_entropy": lambda h, w, target: F.cross_entropy(F.linear(h, w), target),
    "linear_log_prob": _linear_log_prob,
    "linear_kl_div": _linear_kl_div,
    "linear_topk_kl_div": _linear_topk_kl_div,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "rope": _rope,
    "qk_norm_rope": _qk_norm_rope,
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu_squared": lambda x: F.relu(x).square(),
    "dropout_add": lambda x, residual: residual + F.dropout(x, 0.1),
    "embedding": F.embedding,
    "mse_loss": F.mse_loss,
    "info_nce": _info_nce,
}
"""Plain PyTorch, as one writes it without a library, by operation."""
