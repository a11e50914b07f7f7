"""Prove that bounds equal those computed by hand, and that errors name the valid arguments."""

import re

import pytest
import torch

from tritium.kernels.roofline import (
    DEVICES,
    OPERATIONS,
    Device,
    explain,
    find_device,
)

SLOW = Device("slow", "", copy=1e6, matrix_16=1e3, matrix_32=1e2, arithmetic=1e9)


@pytest.mark.parametrize(
    ("op", "dims", "pass_name", "microseconds"),
    [
        ("cross_entropy", {"T": 32768, "V": 50304}, "both", 1530),
        ("cross_entropy", {"T": 8192, "V": 128256}, "both", 977),
        ("linear_cross_entropy", {"T": 32768, "D": 768, "V": 50304}, "both", 11_200),
        ("linear_cross_entropy", {"T": 32768, "D": 4096, "V": 128256}, "both", 135_000),
        ("add_rms_norm", {"T": 32768, "D": 768}, "forward", 47),
        ("add_rms_norm", {"T": 32768, "D": 2048}, "forward", 125),
        ("add_rms_norm", {"T": 32768, "D": 4096}, "forward", 250),
        ("add_rms_norm", {"T": 32768, "D": 4096}, "backward", 250),
        ("adamw", {"N": 124_000_000}, "both", 810),
        ("adamw", {"N": 1_558_000_000}, "both", 10_100),
    ],
)
def test_reproduces_the_published_table(op, dims, pass_name, microseconds):
    bound = getattr(explain(op, **dims, device="H200"), pass_name)
    assert bound.microseconds == pytest.approx(microseconds, rel=0.01)


@pytest.mark.parametrize(
    ("op", "dims", "forward", "backward", "both"),
    [
        ("softmax", {"M": 3, "N": 5}, 2 * 15, 3 * 15, 5 * 15),
        ("log_softmax", {"M": 3, "N": 5}, 2 * 15, 3 * 15, 5 * 15),
        ("cross_entropy", {"T": 3, "V": 5}, 15, 2 * 15, 2 * 15),
        ("rms_norm", {"T": 3, "D": 5}, 2 * 15, 3 * 15, 5 * 15),
        ("layer_norm", {"T": 3, "D": 5}, 2 * 15, 3 * 15, 5 * 15),
        ("add_rms_norm", {"T": 3, "D": 5}, 4 * 15, 4 * 15, 8 * 15),
        ("add_layer_norm", {"T": 3, "D": 5}, 4 * 15, 4 * 15, 8 * 15),
        ("rope", {"T": 3, "H": 5, "K": 2}, 2 * 30, 2 * 30, 4 * 30),
        # four heads of queries and keys; backward moves the gradient of one head of values, too
        ("qk_norm_rope", {"T": 3, "H": 3, "G": 1, "K": 2}, 48, 72 + 12, 48 + 84),
        ("swiglu", {"T": 3, "F": 5}, 3 * 15, 5 * 15, 8 * 15),
        ("geglu", {"T": 3, "F": 5}, 3 * 15, 5 * 15, 8 * 15),
        ("relu_squared", {"T": 3, "F": 5}, 2 * 15, 3 * 15, 5 * 15),
        ("dropout_add", {"T": 3, "D": 5}, 3 * 15, 2 * 15, 5 * 15),
        ("mse_loss", {"N": 15}, 2 * 15, 3 * 15, 3 * 15),
        ("embedding", {"T": 3, "D": 5, "V": 2}, 25, 25, 50),
        ("info_nce", {"B": 3, "D": 5}, 2 * 15, 4 * 15, 6 * 15),
        # hidden and weight for each product, and the logits read and overwritten in between
        ("linear_cross_entropy", {"T": 3, "D": 5, "V": 2}, 31, 12 + 50, 25 + 12 + 50),
        # two products of logits, both read and one overwritten
        ("linear_kl_div", {"T": 3, "D": 5, "V": 2}, 50 + 12, 18 + 50, 50 + 18 + 50),
        # backward recomputes the logits
        ("linear_log_prob", {"T": 3, "D": 5, "V": 2}, 31, 25 + 12 + 50, 31 + 87),
    ],
)
def test_counts_bytes(op, dims, forward, backward, both):
    for dtype, s in ((torch.bfloat16, 2), (torch.float32, 4)):
        found = explain(op, **dims, dtype=dtype, device="A100")
        assert found.backward is not None
        counted = (found.forward.bytes, found.backward.bytes, found.both.bytes)
        assert counted == (s * forward, s * backward, s * both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teachers_classes_are_read_once_in_every_pass(dtype):
    """The bytes of `linear_cross_entropy`, and for each class 8 and a number in dtype."""
    layer = {"T": 3, "D": 5, "V": 7, "dtype": dtype, "device": "A100"}
    hard = explain("linear_cross_entropy", **layer)
    named = explain("linear_topk_kl_div", **layer, K=2)
    assert named.backward is not None
    assert hard.backward is not None
    for more, less in (
        (named.forward, hard.forward), (named.backward, hard.backward), (named.both, hard.both)
    ):  # fmt: skip
        assert more.bytes - less.bytes == 3 * 2 * (8 + dtype.itemsize)


F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8


@pytest.mark.parametrize(
    ("op", "dtype", "master", "state_dtype", "bytes_each"),
    [
        ("adamw", F32, "float32", F32, 28),
        ("adamw", F32, None, F32, 28),
        ("adamw", F32, "split", BF16, 20),
        ("adamw", BF16, "float32", F32, 28),
        ("adamw", BF16, "split", F32, 26),
        ("adamw", BF16, None, F32, 22),
        ("adamw", BF16, None, BF16, 14),
        ("adamw", BF16, None, U8, 10.125),
        ("adamw", F32, None, U8, 16.125),
        ("adamw_clipped", F32, None, F32, 32),
        ("adamw_clipped", BF16, "float32", F32, 30),
        ("adam", F32, None, F32, 28),
        ("sgd", F32, None, F32, 12),
        ("sgd_momentum", F32, None, F32, 20),
        ("rmsprop", F32, None, F32, 20),
        ("adagrad", F32, None, F32, 20),
        ("lion", F32, None, F32, 20),
        ("lion", BF16, "float32", F32, 20),
        ("grad_norm", BF16, None, F32, 2),
    ],
)
def test_an_optimizer_has_one_pass(op, dtype, master, state_dtype, bytes_each):
    found = explain(op, N=12800, dtype=dtype, master=master, state_dtype=state_dtype, device="B200")
    assert found.backward is None
    assert found.forward == found.both
    assert found.both.bytes == 12800 * bytes_each
    assert "step" in str(found)
    assert "backward" not in str(found)


def test_an_incomplete_block_of_8_bit_states_has_a_scale_too():
    options = {"dtype": BF16, "master": None, "device": "B200"}
    found = explain("adamw", N=129, state_dtype=U8, **options)
    assert found.both.bytes == 6 * 129 + 2 * 2 * (129 + 2 * 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"master": "fp32"}, 'master must be "float32", "split" or None; got \'fp32\''),
        ({"state_dtype": torch.int8}, "state_dtype must be .* got torch.int8"),
    ],
)
def test_refuses_a_precision_that_no_optimizer_has(options, words):
    with pytest.raises(ValueError, match=f"explain: {words}"):
        explain("adamw", N=1, device="H200", **options)


def test_phases_wait_for_one_another():
    """2·T·D·V operations at 1 kFLOP/s, then T·V elements at 1 MB/s: neither hides the other."""
    forward = explain("linear_cross_entropy", T=10, D=10, V=10, device=SLOW).forward
    assert forward.microseconds == pytest.approx(1e6 * (2 * 1000 / 1e3 + 200 / 1e6))
    assert forward.resource == "matrix products"


def test_products_in_float32_run_at_their_own_rate():
    half, single = (
        explain("info_nce", B=10, D=10, dtype=dtype, device=SLOW).forward
        for dtype in (torch.float16, torch.float32)
    )
    assert single.microseconds == pytest.approx(10 * half.microseconds)


def test_names_the_resource():
    quick_memory = Device("", "", copy=1e15, matrix_16=1e3, matrix_32=1e2, arithmetic=1e6)
    assert explain("softmax", M=1, N=8, device=SLOW).forward.resource == "memory"
    assert explain("softmax", M=1, N=8, device=quick_memory).forward.resource == "arithmetic"


@pytest.mark.parametrize("op", OPERATIONS)
def test_explains_every_operation(op):
    dims = dict.fromkeys(OPERATIONS[op], 4096)
    found = explain(op, **dims, device="MI300X")
    assert 0 < found.forward.microseconds <= found.both.microseconds
    apart = found.forward.microseconds + (found.backward.microseconds if found.backward else 0)
    assert found.both.microseconds <= apart * (1 + 1e-12)
    assert f"{op} " in str(found)


def test_table_is_readable():
    assert str(explain("cross_entropy", T=32768, V=50304, device="H200")) == (
        "cross_entropy T=32768 V=50304 bfloat16, on H200: "
        "copy 4.30 TB/s, products in bf16 785 TFLOP/s\n"
        "  forward    3.30 GB    6.59 GFLOP    767 us  bound by memory\n"
        "  backward   6.59 GB    6.59 GFLOP   1.53 ms  bound by memory\n"
        "  both       6.59 GB    13.2 GFLOP   1.53 ms  bound by memory"
    )


@pytest.mark.parametrize(
    ("op", "dims", "words"),
    [
        ("soft", {"M": 1, "N": 1}, "op must be one of softmax,"),
        ("softmax", {"M": 1}, "softmax needs M, N, each at least 1; got {'M': 1}"),
        ("softmax", {"M": 1, "N": 1, "V": 1}, "softmax needs M, N"),
        ("softmax", {"M": 1, "N": 0}, "each at least 1"),
        ("adamw", {}, "adamw needs N, each at least 1; got None"),
    ],
)
def test_refuses_a_wrong_question(op, dims, words):
    with pytest.raises(ValueError, match=f"explain: .*{re.escape(words)}"):
        explain(op, **dims, device="H200")


@pytest.mark.parametrize("name", ["H300", "00", ""])
def test_refuses_a_device_that_is_not_one_of_those_known(name):
    with pytest.raises(ValueError, match="device must be one of A100 80GB SXM, H100 SXM, H200"):
        find_device(name)


@pytest.mark.parametrize(
    ("cuda_name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GB200", None),
    ],
)
def test_knows_the_present_device_by_its_name(cuda_name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: cuda_name)
    if known:
        assert find_device(None).name == known
    else:
        with pytest.raises(ValueError, match=f"or a Device; got {cuda_name}"):
            find_device(None)


def test_says_that_there_is_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="got no CUDA device"):
        explain("softmax", M=1, N=1)


def test_devices_are_their_datasheets():
    """The H200's rates are shares of its datasheet's, of copies and of products."""
    h200 = find_device("H200")
    assert (h200.copy, h200.matrix_16) == pytest.approx((4.3e12, 785e12))
    assert all(d.copy < d.matrix_32 < d.matrix_16 for d in DEVICES)
