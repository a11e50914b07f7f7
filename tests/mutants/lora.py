"""Faults of adapters: on other rows, at another scale, merged wrongly, trained where frozen."""

from functools import partial

from tests.mutants import Mutant

_lora = partial(Mutant, file="model/lora.py")

MUTANTS = [
    _lora(
        what="adapted from the first step on",
        original="nn.init.zeros_(self.B.weight)",
        replacement="nn.init.normal_(self.B.weight)",
    ),
    _lora(
        what="alpha forgotten in the product",
        original="self.A(x) * (self.alpha / self.rank)",
        replacement="self.A(x) / self.rank",
    ),
    _lora(
        what="the rank forgotten in the product",
        original="self.A(x) * (self.alpha / self.rank)",
        replacement="self.A(x) * self.alpha",
    ),
    _lora(
        what="the scale forgotten where it is merged",
        original="self.A.weight.to(wide) * (self.alpha / self.rank)",
        replacement="self.A.weight.to(wide)",
    ),
    _lora(
        what="merged in the weights' own precision",
        original="wide = torch.promote_types(self.A.weight.dtype, torch.float32)",
        replacement="wide = self.A.weight.dtype",
    ),
    _lora(
        what="the last projection's adapter on all rows",
        original="self.adapters[name](input) if name in self.adapters",
        replacement="self.adapters[[*self.adapters][-1]](input) if name in self.adapters",
    ),
    _lora(
        what="no projection is left out",
        original="            if part in spec.layers\n",
        replacement="",
    ),
    _lora(
        what="splits forgotten by the adapted layer",
        original="self.splits = linear.weight, linear.bias, linear.splits",
        replacement="self.splits = linear.weight, linear.bias, None",
    ),
    _lora(
        what="splits forgotten by the merged layer",
        original="plain.splits = layer.weight, layer.bias, layer.splits",
        replacement="plain.splits = layer.weight, layer.bias, None",
    ),
    _lora(
        what="the base is trained too",
        original="    model.requires_grad_(False)\n",
        replacement="",
    ),
    _lora(
        what="a merged model stays frozen",
        original="    model.requires_grad_(True)\n",
        replacement="",
    ),
    _lora(
        what="merging adds nothing",
        original="layer.weight.copy_(layer.merged())",
        replacement="layer.weight.copy_(layer.weight)",
    ),
    _lora(
        what="merging in place where a new tensor is promised",
        original="self.weight.detach().clone()",
        replacement="self.weight.detach()",
    ),
    _lora(
        what="the export leaves adapters out",
        original="yield name, adapted[layer].merged()",
        replacement="yield name, adapted[layer].weight",
    ),
    _lora(
        what="adapters among the merged weights",
        original='elif not any(name.startswith(f"{x}.adapters.") for x in adapted):',
        replacement="else:",
    ),
    _lora(
        what="a frozen product counts like a trained one",
        original="if p.requires_grad else -2 * p.numel()",
        replacement="if p.requires_grad else 0",
    ),
    _lora(
        what="a rank beyond the narrowest projection",
        original="most = min(sizes[narrowest])",
        replacement="most = max(sizes[narrowest])",
    ),
    _lora(
        what="a rank of 0",
        original="not 1 <= rank <= most",
        replacement="not 0 <= rank <= most",
    ),
    _lora(
        what="alpha is 1",
        original="alpha = rank if alpha is None else alpha",
        replacement="alpha = 1 if alpha is None else alpha",
    ),
    _lora(
        what="NaN for alpha",
        original="if not 0 < alpha < math.inf:",
        replacement="if alpha <= 0:",
    ),
    _lora(
        what="unknown layers are ignored",
        original="if odd := [name for name in layers if name not in sizes]:",
        replacement="if odd := []:",
    ),
    _lora(
        what="adapted twice",
        original="if adapters_of(model) is not None:",
        replacement="if False:",
    ),
    Mutant(
        what="the memory of gradients that nobody has",
        file="training/memory/predict.py",
        original="for p in model.parameters() if p.requires_grad)\n",
        replacement="for p in model.parameters())\n",
    ),
    Mutant(
        what="the head of a classifier is frozen",
        file="model/lora.py",
        original='if isinstance(getattr(model, "transformer", None), nn.Module):',
        replacement="if False:",
    ),
    Mutant(
        what="a layer of another kind gets no adapter",
        file="model/lora.py",
        original="if wanted and inside and not isinstance(layer, Linear):",
        replacement="if False:",
    ),
    Mutant(
        what="layers that are not named are refused",
        file="model/lora.py",
        original="wanted = {*PROJECTIONS.get(last, ())} & {*spec.layers}",
        replacement="wanted = {*PROJECTIONS.get(last, ())}",
    ),
]
