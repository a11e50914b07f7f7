"""Checks of CUDA graphs in a session: the same bits as without, and text sampled by them."""

import gc
import time
from collections.abc import Callable
from typing import cast

import torch

from tritium.bench.gpu.steps import Shape, tritium_step
from tritium.model import Transformer
from tritium.model.block import Block
from tritium.training.precision import deterministic

STEPS, PROMPT, TOKENS = 100, 16, 512


def graph_against_none(shape: Shape, device: torch.device, n_steps: int = STEPS) -> str:
    """Take the same steps as a CUDA graph and kernel by kernel; say where they differ first.

    By deterministic algorithms: that of attention's gradient is not by default.
    """
    found, first = [], 0.0
    for graph in (True, False):
        torch.manual_seed(0)
        began = time.perf_counter()
        with deterministic():
            step = tritium_step(shape, device, 2, graph=graph and device.type == "cuda")
            results = [torch.stack([x.float() for x in step()])]
            results[0].tolist()
            first = first or time.perf_counter() - began
            results += [torch.stack([x.float() for x in step()]) for _ in range(n_steps - 1)]
            found.append(torch.stack(results).cpu())
        del step
        _free(device)
    differ = (found[0] != found[1]).any(1).nonzero().flatten().tolist()
    said = f"differ from step {differ[0] + 1} on" if differ else "are the same bits"
    return (
        f"{n_steps} steps as a CUDA graph and kernel by kernel, both deterministic: losses and "
        f"gradient norms {said}. "
        f"From making the model to the end of the first step: {first:.1f} s."
    )


def sampling(shape: Shape, device: torch.device, n_tokens: int = TOKENS) -> str:
    """Draw greedy tokens by a CUDA graph and kernel by kernel; say how fast, and if they differ."""
    torch.manual_seed(0)
    model = Transformer(shape.config).to(device, torch.bfloat16).eval()
    with torch.no_grad():  # as after training: weights that matter
        for block in cast(list[Block], list(model.blocks)):
            block.attention.output.weight.mul_(20)
    prompt = torch.randint(shape.config.vocab_size, (1, PROMPT), device=device)
    rates, found = [], []
    for graph in (True, False):
        for _ in range(2):  # the second has all kernels compiled
            began = time.perf_counter()
            rows = model.generate(prompt, n_tokens, temperature=0, cuda_graph=graph)
            found.append(rows[0, prompt.shape[1] :].tolist())
            seconds = time.perf_counter() - began
        rates.append(n_tokens / seconds)
    of_graph, plain = found[1], found[3]
    same = next((i for i, x in enumerate(of_graph) if x != plain[i]), None)
    said = "the same" if same is None else f"different from number {same + 1} on"
    _free(device)
    return (
        f"Sampling, {n_tokens} greedy tokens of one row, bfloat16: {rates[0]:,.0f} tokens/s as a "
        f"CUDA graph, its capture included, {rates[1]:,.0f} kernel by kernel. "
        f"The tokens are {said}."
    )


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


CHECKS: dict[str, Callable[[Shape, torch.device], str]] = {
    "graph against none": graph_against_none,
    "sampling": sampling,
}
"""Checks by name; each returns sentences for the page."""
