"""Prove that parts of a model are all of it, and what cannot be shared out is refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.bench.scale.links import Group
from tritium.bench.scale.parts import Mesh, local_elements, mesh_of, split_config, units
from tritium.model import ModelConfig
from tritium.model.shapes import num_parameters

LLAMA = ModelConfig.named("llama-3.1-8b")
SMALL = ModelConfig(
    vocab_size=512, n_layers=3, d_model=64, n_heads=8, n_kv_heads=4, d_ff=96, max_seq_len=32
)


@given(shards=st.integers(1, 40), layers=st.integers(1, 5), tied=st.booleans())
def test_parts_are_the_whole_and_its_padding(shards, layers, tied):
    config = replace(SMALL, n_layers=layers, tie_embeddings=tied)
    count, parts = num_parameters(config), shards * local_elements(config, Mesh("", shards=shards))
    shapes = [*units(config)[0].shapes, *units(config)[1].shapes * layers]
    padding = sum(-rows % shards * rest[0] if rest else -rows % shards for rows, *rest in shapes)
    assert parts == count + padding


@pytest.mark.parametrize("config", [SMALL, LLAMA])
def test_split_tensors_are_the_whole_except_for_norms(config):
    part = split_config(config, 4)
    norms = (2 * config.n_layers + 1) * config.d_model
    norms += 2 * config.n_layers * config.head_width * config.qk_norm
    assert 4 * (num_parameters(part) - norms) == num_parameters(config) - norms


def test_meshes_have_all_ranks_and_neighbours_share_a_node():
    meshes = {mode: mesh_of(mode, 64, 8, LLAMA) for mode in ("ddp", "fsdp", "hsdp", "tp")}
    assert all(mesh.size == 64 for mesh in meshes.values())
    assert meshes["ddp"].group("replicas") == meshes["fsdp"].group("shards") == Group(64, 8)
    assert meshes["hsdp"].group("shards") == meshes["tp"].group("tensor") == Group(8, 8)
    assert meshes["hsdp"].group("replicas") == meshes["tp"].group("shards") == Group(8, 1)
    assert [meshes[mode].readers for mode in meshes] == [64, 64, 64, 8]
    assert mesh_of("tp", 4, 8, LLAMA).group("tensor") == Group(4, 4)


@pytest.mark.parametrize(
    ("mode", "gpus", "config", "message"),
    [
        ("fsdp", 12, LLAMA, "12 GPUs are no whole number of nodes of 8"),
        ("hsdp", 8, LLAMA, "hsdp on 8 GPUs of one node is fsdp"),
        ("tp", 8, SMALL, "tp over 8 GPUs must divide the 4 key and value heads"),
        ("tp", 8, replace(LLAMA, vocab_size=50257), "must divide the 50,257 classes"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(mode, gpus, config, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(mode, gpus, 8, config)
