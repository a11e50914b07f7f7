"""PyTorch's own samples of these operations, through kernels and references, match float64.

Every sample that PyTorch keeps for its tests (OpInfo, ModuleInfo) either gives PyTorch's outputs
and gradients, or is refused in a sentence; how many of each there are is stated, so that none is
left out unseen. Every call that PyTorch must refuse is refused.
"""

from collections.abc import Iterator
from types import SimpleNamespace as Namespace

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map

from tritium import kernels
from tritium.kernels import runtime

OPS = {(op.name.removeprefix("nn.functional."), op.variant_test_name): op for op in op_db}
MODULES = {info.module_cls.__name__: info for info in module_db}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

ROOM = {  # relative, absolute: the defaults of torch.testing.assert_close
    torch.float64: (1e-7, 1e-7), torch.float32: (1.3e-6, 1e-5), torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
}  # fmt: skip

# How many samples give PyTorch's results, how many are refused, how many errors there are.
COUNTS = {
    ("rms_norm", ""): (6, 0, 3),
    ("layer_norm", ""): (6, 0, 0),
    ("embedding", ""): (3, 0, 2),
    ("softmax", ""): (7, 0, 0),
    ("softmax", "with_dtype"): (7, 0, 0),
    ("log_softmax", ""): (7, 0, 0),
    ("log_softmax", "with_dtype"): (7, 0, 0),
    ("mse_loss", ""): (6, 0, 0),
    ("cross_entropy", ""): (21, 0, 0),
}
# PyTorch's samples begin with what is differentiated.
REORDERED = {
    "embedding": lambda weight, tokens, **named: kernels.embedding(tokens, weight, **named)
}
MODULE_FUNCTIONS = {
    "CrossEntropyLoss": lambda m, x, t: kernels.cross_entropy(
        x, t, m.weight, ignore_index=m.ignore_index, reduction=m.reduction,
        label_smoothing=m.label_smoothing),
    "MSELoss": lambda m, x, t: kernels.mse_loss(x, t, reduction=m.reduction),
    "Softmax": lambda m, x: kernels.softmax(x, m.dim),
    "LogSoftmax": lambda m, x: kernels.log_softmax(x, m.dim),
    "LayerNorm": lambda m, x: kernels.layer_norm(x, m.normalized_shape, m.weight, m.bias, m.eps),
    "RMSNorm": lambda m, x: kernels.rms_norm(x, m.normalized_shape, m.weight, m.eps),
    "Embedding": lambda m, x: kernels.embedding(x, m.weight, m.padding_idx, m.max_norm),
}  # fmt: skip
MODULE_COUNTS = {
    "LayerNorm": (7, 0), "RMSNorm": (6, 0), "Embedding": (2, 0), "CrossEntropyLoss": (105, 0),
    "MSELoss": (8, 0), "Softmax": (3, 0), "LogSoftmax": (4, 0),
}  # fmt: skip


def in_dtype(values, dtype: torch.dtype):
    """Copies of all floating tensors among `values`, in `dtype`, that want a gradient."""

    def convert(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return tree_map(convert, values)


def outputs_and_gradients(f, values, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `f` for `values`, and gradients, the incoming one exact in `dtype`."""
    leaves = [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor)]
    leaves = [x for x in leaves if x.requires_grad]
    y = f(*values[0], **values[1])
    if not leaves or not y.requires_grad:
        return [y.detach()]
    dy = torch.linspace(-1, 2, y.numel(), device=y.device).to(dtype)
    grads = torch.autograd.grad(y, leaves, dy.view(y.shape).to(y.dtype), materialize_grads=True)
    return [y.detach(), *grads]


def agree(actual, torch_result, values, dtype: torch.dtype) -> bool:
    """Whether both agree on `values`; False if the call is refused in a sentence."""
    narrow = in_dtype(values, dtype)
    try:
        found = outputs_and_gradients(actual, narrow, dtype)
    except ValueError:
        return False
    expected = outputs_and_gradients(torch_result, in_dtype(narrow, torch.float64), dtype)
    for i, (y, e) in enumerate(zip(found, expected, strict=True)):
        if torch.allclose(y, e.to(y.dtype), *ROOM[dtype], equal_nan=True):
            continue
        # Or at most twice as wrong as PyTorch in the same dtype and one rounding, as everywhere.
        same_dtype = outputs_and_gradients(torch_result, in_dtype(values, dtype), dtype)[i]
        allowed = 2 * (same_dtype.double() - e).abs().max()
        allowed += torch.finfo(y.dtype).eps * e.abs().max()
        assert (y.double() - e).abs().max() <= allowed
    return True


def samples(op, device: str) -> Iterator:
    for sample in op.sample_inputs(device, torch.float64, requires_grad=True):
        yield (sample.input, *sample.args), sample.kwargs


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COUNTS, ids=" ".join)
def test_samples(name, dtype, device):
    op, actual = OPS[name], REORDERED.get(name[0]) or getattr(kernels, name[0])
    agreed = [agree(actual, op.op, values, dtype) for values in samples(op, device)]
    assert (agreed.count(True), agreed.count(False)) == COUNTS[name][:2]


@pytest.mark.filterwarnings("ignore:.*options.* ignored")  # where PyTorch does not chunk
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["", "chunked", "chunked_none"])
def test_samples_of_the_linear_loss(variant, dtype, device):
    op = OPS.get(("linear_cross_entropy", variant))  # torch 2.11 has none
    agreed, refused = 0, 0
    for values in samples(op, device) if op else ():
        _, linear_weight, _ = values[0]
        if linear_weight.dim() != 2:  # several axes of outputs: [V, D] is all that is taken here
            with pytest.raises(ValueError, match="linear_weight must have shape"):
                in_chunks(*values[0], **values[1])
            refused += 1
        else:
            assert agree(in_chunks, op.op, values, dtype)
            agreed += 1
    assert not op or agreed > refused > 10


def in_chunks(input, linear_weight, target, *, options=None, **named):
    """The loss of Tritium with as many rows a chunk as PyTorch's `options` say."""
    rows = options and options.batch_chunk_size
    chunk_bytes = rows and rows * len(linear_weight) * input.element_size()
    return kernels.linear_cross_entropy(
        input, linear_weight, target, chunk_bytes=chunk_bytes, **named
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", COUNTS, ids=" ".join)
def test_errors_are_refused(name, device):
    op, actual = OPS[name], REORDERED.get(name[0]) or getattr(kernels, name[0])
    errors = list(op.error_inputs(device)) if op.error_inputs_func else []
    for error in errors:
        sample = error.sample_input
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            actual(sample.input, *sample.args, **sample.kwargs)
    assert len(errors) == COUNTS[name][2]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULE_COUNTS)
def test_modules(name, dtype, device):
    info, actual = MODULES[name], MODULE_FUNCTIONS[name]
    inputs = info.module_inputs_func(
        info, device=device, dtype=torch.float64, requires_grad=True, training=True
    )
    agreed = []
    kernels_run = runtime.CPU_KERNELS and not runtime.REFERENCE
    if few := name == "CrossEntropyLoss" and (kernels_run or dtype != torch.float32):
        # The 24 of 200 rows take minutes in the interpreter, and are those of 50 with other axes.
        inputs = [x for x in inputs if x.forward_input.args[0].numel() < 600]
    for sample in inputs:
        made = sample.constructor_input
        module = info.module_cls(*made.args, **made.kwargs).to(device, torch.float64)
        named = dict(module.named_parameters())
        given = sample.forward_input

        def plain(*args, module=module, **named):
            return torch.func.functional_call(module.double(), named, args)

        def replaced(*args, module=module, **named):
            swapped = {key: getattr(module, key, None) for key in vars(module) if key[0] != "_"}
            swapped |= dict(module.named_buffers())
            return actual(Namespace(**{"weight": None, "bias": None} | swapped | named), *args)

        agreed.append(agree(replaced, plain, (given.args, named), dtype))
    many, others = MODULE_COUNTS[name]
    assert (agreed.count(True), agreed.count(False)) == (many - 24 * few, others)
