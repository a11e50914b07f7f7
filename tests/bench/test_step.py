"""Prove what a training step launches, without a GPU, and how a profile of one is read."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import triton

from tritium.bench import step, step_launches
from tritium.bench.__main__ import main
from tritium.bench.ends import FailedError
from tritium.bench.step_launches import (
    ACTIVATION,
    ADDITIONS,
    ATTENTION,
    CASTS,
    LOSS,
    NORMS,
    OPTIMIZER,
    OTHER,
    POSITIONS,
    PRODUCTS,
)
from tritium.kernels._activation import _named
from tritium.kernels.roofline import find_device
from tritium.model import ModelConfig

OWN = (NORMS, POSITIONS, ACTIVATION)


@pytest.fixture(scope="module")
def account():
    return step_launches.account()


def of(counts, phase):
    return {kind: n for (passed, kind), n in counts.items() if passed == phase}


def test_a_block_goes_forward_in_4_products_1_attention_and_4_kernels(account):
    forward = of(account.block, "forward")
    assert forward == {PRODUCTS: 4, ATTENTION: 1, NORMS: 2, POSITIONS: 1, ACTIVATION: 1}


def test_all_weights_are_cast_by_one_call_a_step(account):
    assert of(account.first_block, "forward") == of(account.block, "forward")
    first, further = (of(x, "forward")[CASTS] for x in (account.first_rest, account.rest))
    assert first == further + 1


def test_a_block_goes_backward_in_8_products_1_attention_and_7_kernels(account):
    # Partial sums of a weight's gradient are added by a launch of their own: three of the seven.
    for counts in (account.first_block, account.block):
        backward = of(counts, "backward")
        assert backward[PRODUCTS] == 8
        assert backward[ATTENTION] == 1
        assert {kind: backward[kind] for kind in OWN} == {NORMS: 4, POSITIONS: 2, ACTIVATION: 1}
        assert set(backward) <= {PRODUCTS, ATTENTION, *OWN, CASTS, ADDITIONS}
    # A weight's gradient is converted in the first micro-batch, read as it is in the others.
    assert of(account.first_block, "backward")[CASTS] == 4
    assert ADDITIONS not in of(account.first_block, "backward")
    assert of(account.block, "backward")[ADDITIONS] == 4
    assert CASTS not in of(account.block, "backward")


def test_no_launch_is_of_an_unknown_kernel(account):
    assert not any(kind == OTHER for _, kind in account.total(12, 4))


def test_a_step_is_its_parts(account):
    assert account.total(4, 3) == step_launches.counts(4, 3)


def test_the_launches_of_gpt2_in_four_micro_batches(account):
    total = account.total(12, 4)
    # With PyTorch's autocast they were 302 and 204, as a profile of an H100 counted them, of 1,933.
    assert total["backward", ADDITIONS] + total["forward", ADDITIONS] == 155
    assert total["backward", CASTS] == 52
    # PyTorch's gradient of embeddings would count as one launch, and make about fifteen on a GPU.
    assert total.total() == 1529


def test_the_optimizer_launches_three_kernels_and_uploads_addresses():
    # What makes the table of addresses runs on the host, and was once counted with them.
    launches = step_launches.step_launches(2, 1)
    found = [x.name for x in launches if x.phase == "optimizer"]
    assert found == [*step_launches.OF_OPTIMIZER]
    assert {x.kind for x in launches if x.name in found} == {OPTIMIZER}


def test_a_launch_that_the_recorder_cannot_see_is_an_error():
    from tritium.kernels._activation import _forward

    with step_launches.recorded(), pytest.raises(RuntimeError, match="hides what it launches"):
        _forward.overload(torch.zeros(2, 2), None, "silu")


def test_everything_is_put_back_behind_a_recording():
    from tritium.kernels.launcher import Launcher
    from tritium.kernels.runtime import _is_watched

    before = Launcher.launch, torch.Tensor.backward
    with step_launches.recorded():
        assert Launcher.launch is not before[0]
    assert (Launcher.launch, torch.Tensor.backward) == before
    assert _is_watched() is False


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", PRODUCTS),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16>", PRODUCTS),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", ATTENTION),
        ("void pytorch_flash::flash_bwd_kernel", ATTENTION),
        ("_norm_backward_tile_kernel", NORMS),
        ("_qk_norm_rope_forward_kernel", POSITIONS),
        ("_activation_backward_kernel", ACTIVATION),
        ("_swiglu_backward_kernel", ACTIVATION),
        ("_cross_entropy_kernel", LOSS),
        ("_optimizer_update_kernel", OPTIMIZER),
        ("_grad_norm_partials_kernel", OPTIMIZER),
        ("void at::native::elementwise_kernel<at::native::direct_copy_kernel_cuda>", CASTS),
        ("Memcpy DtoD (Device -> Device)", CASTS),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
         ADDITIONS),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
         step_launches.FILLS),
        ("void at::native::reduce_kernel<512, 1>", OTHER),
    ],
)  # fmt: skip
def test_kinds_of_a_gpus_kernels_by_their_names(kernel, kind):
    assert step.kind_of(kernel) == kind


def test_every_kernel_of_tritium_is_of_a_known_kind():
    # As a profile names it: a kernel's repr where it has one, and for each activation.
    names = set()
    for module in [m for name, m in sys.modules.items() if name.startswith("tritium.kernels")]:
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and hasattr(kernel, "arg_names"):
                names.add(name)
    names |= {
        _named(way)(SimpleNamespace(constants={"ACTIVATION": activation}))
        for way in ("forward", "backward")
        for activation in ("silu", "gelu", "gelu_tanh", "relu_squared")
    }
    assert len(names) > 25
    known = {name: step.kind_of(name) for name in names}
    aside = ("_softmax", "_dropout_add", "_chunk")  # no part of the step that is profiled
    assert not [n for n, kind in known.items() if kind == OTHER and not n.startswith(aside)]


def event(name, begin, end, device="DeviceType.CUDA", **more):
    span = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, **more)


PROFILE = [
    event("aten::mm", 0.0, 9000.0, "DeviceType.CPU"),
    event("Memcpy HtoD (Pinned -> Device)", 10.0, 20.0),
    event("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", 30.0, 1030.0),
    event("_swiglu_forward_kernel", 1030.0, 1530.0),
    event("Optimizer.step#AdamW.step", 1530.0, 2030.0),
    event("my range", 0.0, 2030.0, is_user_annotation=True),
    event("_optimizer_update_kernel", 1540.0, 2030.0, is_user_annotation=False),
]


def test_a_profile_is_what_ran_on_the_device_without_the_ranges_around_it():
    found = step.by_kind(step.device_events(PROFILE))
    assert {kind: busy.launches for kind, busy in found.items()} == {
        PRODUCTS: 1, ACTIVATION: 1, OPTIMIZER: 1, CASTS: 1, step.GAPS: 0
    }  # fmt: skip
    assert sum(busy.milliseconds for busy in found.values()) == pytest.approx(2.02)
    with pytest.raises(FailedError, match="saw no kernel"):
        step.device_events(PROFILE[:1])


@pytest.mark.parametrize("known", [True, False])
def test_the_command_tabulates_a_profile(known, monkeypatch, capsys):
    h100 = find_device("H100")

    def unknown(name):
        raise ValueError("no datasheet")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(step.harness, "device_name", lambda device: "A card")
    monkeypatch.setattr(step.harness, "measured_device", lambda *_: h100)
    monkeypatch.setattr(step, "find_device", (lambda name: h100) if known else unknown)
    monkeypatch.setattr(step, "profiled_step", lambda *_: step.device_events(PROFILE))
    monkeypatch.setattr(sys, "argv", ["bench", "step"])
    main()
    shown = capsys.readouterr().out
    expected = ("products", 1, 1), ("activation", 1, 0.5), ("gaps", 0, 0.02), ("all", 4, 2.02)
    for kind, launches, milliseconds in expected:
        assert re.search(rf"{kind} +{launches} +{milliseconds:.2f} ", shown), shown
    assert re.search(r"attention +0 +0\.00 ", shown)  # a floor, and nothing measured


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"),
        ("void at::native::(anonymous namespace)::sum_and_scatter<float, long>", "embedding"),
        ("_adam_update_kernel", "optimizer"),
        ("_optimizer_prepare_kernel", "optimizer"),
        ("_embedding_blocks_kernel", "embedding"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::Te",
         "casts and copies"),
    ],
)  # fmt: skip
def test_kernels_that_an_h100_ran_are_of_their_kinds(kernel, kind):
    assert step.kind_of(kernel) == kind


def test_gaps_are_the_time_in_which_no_kernel_runs():
    kernels = [
        ("_norm_a", 5000.0, 7000.0), ("gemm", 0.0, 1000.0), ("gemm", 500.0, 3000.0),
        ("gemm", 8000.0, 8500.0),
    ]  # fmt: skip
    found = step.by_kind(kernels)
    assert found[PRODUCTS] == (3, pytest.approx(4.0))
    assert found[NORMS] == (1, pytest.approx(2.0))
    assert found[step.GAPS] == (0, pytest.approx(3.0))


def test_the_floor_of_gpt2_on_an_h100_is_that_of_its_floating_point_operations():
    config = ModelConfig(
        vocab_size=50304, n_layers=12, d_model=768, n_heads=12, max_seq_len=1024, d_ff=2048
    )
    device = find_device("H100")
    least = step.floors(config, 64, device)
    tokens, weights = 64 * 1024, 12 * (4 * 768**2 + 3 * 768 * 2048) + 50304 * 768
    expected = 6 * tokens * weights / device.matrix_16 * 1e3
    assert least[PRODUCTS].milliseconds == pytest.approx(expected)
    expected = 12 * 7 * tokens * 1024 * 768 / device.matrix_16 * 1e3
    assert least[step.count.ATTENTION].milliseconds == pytest.approx(expected)
    assert 80 < sum(x.milliseconds for x in least.values()) < 110
    assert all(x.bytes >= 0 and x.milliseconds > 0 for x in least.values())


def test_the_command_prints_both_tables(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "step", "--micro-batches", "2"])
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)  # as where nobody tests
    main()
    shown = capsys.readouterr().out
    for word in ("products", "further", "optimizer", "casts and copies"):
        assert word in shown


def test_refuses_parts_that_do_not_divide(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "step", "--micro-batches", "5"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == "bench step: 5 micro-batches do not divide 64\n"
