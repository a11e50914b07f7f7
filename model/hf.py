"""Tritium's operations inside models of transformers, as Llama and GPT-2: `patch(model)`.

What is replaced computes the same, rounded once where transformers rounds several times; in float32
logits and gradients are equal to rounding. Weights, their names and `save_pretrained` stay. Tried
with transformers 5.24.
"""

from __future__ import annotations

import sys
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tritium.kernels import (
    geglu,
    layer_norm,
    linear_cross_entropy,
    relu_squared,
    rms_norm,
    rope,
    swiglu,
)
from tritium.model.native import ARCHITECTURES, GATES
from tritium.model.output import is_plain

GATED = "LlamaMLP", "MistralMLP", "Qwen3MLP"
PLAIN = "ArceeMLP", "ApertusMLP"
RMS_NORMS = [name.replace("MLP", "RMSNorm") for name in GATED + PLAIN]
ROTARY = [name.replace("MLP", "RotaryEmbedding") for name in GATED + PLAIN]
ACTIVATIONS = {"swiglu": swiglu, "geglu": partial(geglu, approximate="tanh")}


def patch(
    model: nn.Module,
    *,
    norm: bool = True,
    activation: bool = True,
    rotary: bool = True,
    loss: bool = True,
) -> nn.Module:
    """Let a model of transformers compute by Tritium's operations, and return it.

    Args:
        model: a Llama, Mistral, Qwen3, Arcee, Apertus or GPT-2 model, with a head or without;
            changed in place. A second call changes nothing of what the first one did.
        norm: `rms_norm`, or `layer_norm` in GPT-2, for every norm.
        activation: `swiglu` or `geglu` for the gated activation, `relu_squared` for ReLU²; GPT-2
            has neither.
        rotary: `rope` for queries and keys. GPT-2 has learned positions.
        loss: where labels are given in training mode, `linear_cross_entropy` of the hidden states,
            in a model with a language model's head: the logits are never stored whole, and None is
            returned for them. A head that is more than a linear layer, such as one with LoRA,
            quantized or with hooks, computes its logits as it did.

    Raises:
        TypeError: it is a model of another kind, or has a loss of its own.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES or not type(model).__module__.startswith("transformers."):
        raise TypeError(
            f"patch: model must be one of {', '.join(ARCHITECTURES)} of transformers, got "
            f"{type(model).__name__} of type {kind!r}"
        )
    has_head = type(model).__name__ == ARCHITECTURES[kind]
    if loss and has_head and "_loss_function" in vars(model):
        raise TypeError("patch: model must have the usual loss, got its own; pass loss=False")
    for module in model.modules():
        name = type(module).__name__
        if norm and name in RMS_NORMS:
            module.forward = MethodType(_rms_norm, module)
        elif norm and kind == "gpt2" and type(module) is nn.LayerNorm:
            module.forward = MethodType(_layer_norm, module)
        elif activation and name in GATED and config.hidden_act in GATES:
            module.forward = MethodType(_gated, module)
        elif activation and name in PLAIN and config.hidden_act == "relu2":
            module.forward = MethodType(_squared, module)
        elif rotary and name in ROTARY and not hasattr(module, "_tritium"):
            vars(module)["_tritium"] = True
            _turn_by_rope(sys.modules[type(module).__module__])
            module.forward = MethodType(_half_tables(type(module).forward), module)
    if loss and has_head and not hasattr(model, "_tritium"):
        vars(model)["_tritium"] = True
        model.forward = MethodType(_with_loss(type(model).forward), model)
    return model


def _rms_norm(self, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _layer_norm(self, input: Tensor) -> Tensor:
    return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _gated(self, x: Tensor) -> Tensor:
    act = ACTIVATIONS[GATES[self.config.hidden_act]]
    return self.down_proj(act(self.gate_proj(x), self.up_proj(x)))


def _squared(self, x: Tensor) -> Tensor:
    return self.down_proj(relu_squared(self.up_proj(x)))


# Functions of the class, not of the instance, which a copy of the model would share with it.
# Attention finds `apply_rotary_pos_emb` in its module, for all models of the class. So tables of
# half a head's width say that a model is patched: others have them twice, side by side.


def _half_tables(forward):
    @wraps(forward)
    def halved(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        cos, sin = forward(self, x, *args, **kwargs)
        return cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]

    return halved


def _turn_by_rope(module: Any) -> None:
    theirs = module.apply_rotary_pos_emb
    if hasattr(theirs, "_tritium"):
        return

    @wraps(theirs)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        if cos.shape[-1] == q.shape[-1]:
            return theirs(q, k, cos, sin, *args, **kwargs)
        B, _, L, _ = q.shape
        # One row of the tables for each token, as its position may be that of its row alone.
        tables = [x.float().expand(B, -1, -1).reshape(B * L, -1) for x in (cos, sin)]

        def turn(x: Tensor) -> Tensor:
            x_THK = x.transpose(1, 2).flatten(0, 1)
            return rope(x_THK, *tables).unflatten(0, (B, L)).transpose(1, 2)

        return turn(q), turn(k)

    vars(apply_rotary_pos_emb)["_tritium"] = True
    module.apply_rotary_pos_emb = apply_rotary_pos_emb


def _with_loss(forward):
    @wraps(forward)
    def with_loss(
        self, input_ids=None, *args, labels: Tensor | None = None, logits_to_keep=0, **kwargs
    ):
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        fuses = self.training and keeps_all and is_plain(self.lm_head)
        if args or labels is None or not fuses:
            kwargs["logits_to_keep"] = logits_to_keep
            return forward(self, input_ids, *args, labels=labels, **kwargs)
        from transformers.modeling_outputs import (
            CausalLMOutputWithCrossAttentions,
            CausalLMOutputWithPast,
        )

        told = {
            name: kwargs.pop(name, None)
            for name in ("num_items_in_batch", "ignore_index", "shift_labels", "return_dict")
        }
        outputs = self.base_model(input_ids=input_ids, **kwargs)
        found = {name: x for name, x in outputs.items() if name != "last_hidden_state"}
        loss = _shifted_loss(outputs.last_hidden_state, self.lm_head, labels, told)
        gpt2 = self.config.model_type == "gpt2"
        kind = CausalLMOutputWithCrossAttentions if gpt2 else CausalLMOutputWithPast
        output = kind(loss=loss, **found)
        return output.to_tuple() if told["return_dict"] is False else output

    return with_loss


def _shifted_loss(hidden_BLD: Tensor, head: nn.Linear, labels: Tensor, told: dict) -> Tensor:
    """Return the loss of each token against the next one's label, as transformers reduces it."""
    ignored = -100 if told["ignore_index"] is None else told["ignore_index"]
    targets = told["shift_labels"]
    if targets is None:
        targets = pad(labels, (0, 1), value=ignored)[..., 1:]
    count = told["num_items_in_batch"]
    loss = linear_cross_entropy(
        hidden_BLD, head.weight, targets.to(hidden_BLD.device), linear_bias=head.bias,
        ignore_index=ignored, reduction="mean" if count is None else "sum",
    )  # fmt: skip
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
