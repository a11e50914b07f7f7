"""Prove that the two models whose speed is compared are of one size, and both learn."""

import torch

from tritium.bench.runs import throughput


def test_the_models_have_as_many_parameters():
    plain, actual = (
        sum(p.numel() for p in model.parameters())
        for model, _ in (make() for make in throughput.IMPLEMENTATIONS.values())
    )
    assert plain == 804_096  # nanoGPT's count for this shape, its table of positions included
    assert abs(actual - plain) < 0.01 * plain


def test_both_learn_a_batch_by_heart(monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.CPU_KERNELS", False)
    exact = torch.autocast("cpu", enabled=False)
    tokens = torch.randint(65, (12, 65))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for make in throughput.IMPLEMENTATIONS.values():
        model, step = make()
        before = model(*batch).item()
        for _ in range(8):
            step(batch, exact)
        assert model(*batch).item() < before - 0.3


def test_the_plain_model_is_causal():
    model, _ = throughput.plain()
    tokens = torch.randint(65, (1, 64))
    targets = torch.full((1, 64), -100)
    targets[0, 20] = 3
    changed = tokens.clone()
    changed[0, 21:] = (changed[0, 21:] + 1) % 65
    torch.testing.assert_close(model(tokens, targets), model(changed, targets))


def test_measures_each_in_turn_in_a_process_of_its_own(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    throughput.main(turns=2, steps=1, threads=(1,))
    lines = [line for line in capsys.readouterr().out.splitlines() if "float" in line]
    assert [line.split()[1] for line in lines] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert "804,096" in lines[0]
    assert "800,256" in lines[1]
