"""Faults of model/pretrained.py and model/native.py: files hold, or are read as, another model."""

from functools import partial

from tests.mutants import Mutant

_native = partial(Mutant, file="model/native.py")
_pretrained = partial(Mutant, file="model/pretrained.py")

MUTANTS = [
    _native(
        what="GPT-2's matrices are not transposed",
        original='transposed = kind == "weight" and "c_" in name',
        replacement="transposed = False",
    ),
    _native(
        what="keys where values are",
        original='(("q_proj", "k_proj", "v_proj"), ',
        replacement='(("q_proj", "v_proj", "k_proj"), ',
    ),
    _native(
        what="gate and up change places",
        original='(("gate_proj", "up_proj"), ',
        replacement='(("up_proj", "gate_proj"), ',
    ),
    _native(
        what="Llama 3's factors of frequencies change places",
        original='"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast',
        replacement='"low_freq_factor": scaling.fast, "high_freq_factor": scaling.slow',
    ),
    _native(
        what="YaRN's turns are read the other way round",
        original='x.replace("beta_", "") for x in ("beta_slow", "beta_fast")}',
        replacement='("fast" if "slow" in x else "slow") for x in ("beta_slow", "beta_fast")}',
    ),
    _native(
        what="YaRN's own factor is left out",
        original="    if scaling.attention_factor is not None:\n",
        replacement="    if False:\n",
    ),
    _native(
        what="the theta that ntk began with",
        original="ntk_theta(config.rope_theta, config.head_width, config.rope_scaling)",
        replacement="config.rope_theta",
    ),
    _native(
        what="a context before the stretching that is that of Llama 3",
        original='found.setdefault("original_length", given("max_position_embeddings", 2048))',
        replacement='found.setdefault("original_length", 8192)',
    ),
    _native(
        what="an epsilon that is not read",
        original='norm_eps=given("rms_norm_eps", 1e-6)',
        replacement="norm_eps=1e-6",
    ),
    _native(
        what="as many key heads as query heads",
        original='"num_key_value_heads": config.kv_heads',
        replacement='"num_key_value_heads": config.n_heads',
    ),
    _native(
        what="heads as wide as the model divided by them",
        original='"head_dim": config.head_width',
        replacement='"head_dim": config.d_model // config.n_heads',
    ),
    _native(
        what="GELU without its approximation",
        original='"geglu": "gelu_pytorch_tanh"',
        replacement='"geglu": "gelu"',
    ),
    _native(
        what="a window of one token more",
        original='return {"sliding_window": config.window}',
        replacement='return {"sliding_window": (config.window or 0) + 1}',
    ),
    _native(
        what="layers without a window one too early",
        original="every = types.index(FULL) + 1",
        replacement="every = types.index(FULL)",
    ),
    _native(
        what="a softcap of the scores is exported as none",
        original='"softcap": None, "attention_softcap": None, "parallel_blocks": False,',
        replacement='"softcap": None, "parallel_blocks": False,',
    ),
    _native(
        what="the tie is not told",
        original='"tie_word_embeddings": config.tie_embeddings,',
        replacement='"tie_word_embeddings": True,',
    ),
    _native(
        what="biases beside normalised queries are exported as none",
        original='        wanted |= {"bias": False}\n',
        replacement="        pass\n",
    ),
    _native(
        what="an Apertus whose positions are stretched as published",
        original='"pad_token_id": None, "rope_parameters": rope}',
        replacement='"pad_token_id": None}',
    ),
    _native(
        what="an Apertus that never trains the embedding of id 3",
        original='"pad_token_id": None, "rope_parameters": rope}',
        replacement='"rope_parameters": rope}',
    ),
    _native(
        what="the norms of an Apertus change places",
        original='"attention_layernorm", "feed_forward_norm": "feedforward_layernorm"',
        replacement='"feedforward_layernorm", "feed_forward_norm": "attention_layernorm"',
    ),
    _native(
        what="ReLU² without the square",
        original='"relu_squared": "relu2",',
        replacement='"relu_squared": "relu",',
    ),
    _native(
        what="a window of an Apertus is exported as none",
        original='if kind in ("gpt2", "arcee", "apertus") and any(windows):',
        replacement='if kind == "gpt2" and any(windows):',
    ),
    _native(
        what="biases of an Arcee are exported as none",
        original='    if kind in ("llama", "arcee"):\n        return',
        replacement='    if kind == "llama":\n        return',
    ),
    _native(
        what="an absent epsilon of an Apertus is Llama's",
        original='"max_position_embeddings": 65536, "rms_norm_eps": 1e-5,',
        replacement='"max_position_embeddings": 65536,',
    ),
    _native(
        what="an Apertus that says no activation is one of ReLU²",
        original='"hidden_act": "xielu", ',
        replacement="",
    ),
    Mutant(
        what="head and embedding are not tied again",
        file="model/transformer.py",
        original="if tied:  # `to_empty`",
        replacement="if False:  # `to_empty`",
    ),
    _pretrained(
        what="the index names the first shard for all",
        original="{name: f for f, shard in zip(",
        replacement="{name: files[0] for f, shard in zip(",
    ),
    _pretrained(
        what="a shard may be as large as two",
        original="if held and held + x.nbytes > max_shard_bytes:",
        replacement="if held and held > 10**6:",
    ),
    _pretrained(
        what="a tensor that is missing is not named",
        original="if missing := sorted(wanted - self._place.keys()):",
        replacement="if missing := []:",
    ),
    _pretrained(
        what="a tensor of no part is ignored",
        original="if odd := sorted(self._place.keys() - known):",
        replacement="if odd := []:",
    ),
    _pretrained(
        what="another shape is not named",
        original="if x.shape != target.shape:",
        replacement="if x.numel() != target.numel():",
    ),
    _pretrained(
        what="a head that differs from the embedding it is tied to",
        original='if not torch.equal(reader.get_tensor("lm_head.weight"), stored):',
        replacement="if False:",
    ),
    _pretrained(
        what="a shard that lacks its part",
        original="if name not in self._place and not IGNORED.search(name):\n                raise",
        replacement="if False:\n                raise",
    ),
    _pretrained(
        what="a truncated file is read as one without tensors",
        original="except (SafetensorError, OSError) as error:\n",
        replacement="except (SafetensorError, OSError) as error:\n                continue\n",
    ),
    _pretrained(
        what="float32 whatever the files hold",
        original="model.to(dtype or weights.dtype(",
        replacement="model.to(dtype or torch.float32 or weights.dtype(",
    ),
    _pretrained(
        what="generation does not end at the end of text",
        original="{} if eot is None else ends",
        replacement="{}",
    ),
    _pretrained(
        what="what is half written stays",
        original="        shutil.rmtree(draft, ignore_errors=True)\n",
        replacement="",
    ),
    _pretrained(
        what="a folder that holds something is written into",
        original="if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):",
        replacement="if False:",
    ),
    _native(
        what="a width that is what None means is named after reading",
        original='meant = {"d_ff": replace(config, d_ff=None).feed_forward_width, ',
        replacement="meant = {",
    ),
    _native(
        what="heads that are as many as None means are named after reading",
        original='meant["d_head"] = config.d_model // config.n_heads',
        replacement="pass",
    ),
    _native(
        what="a feed-forward width that None does not mean is forgotten",
        original="for x, value in meant.items() if getattr(config, x) == value})",
        replacement="for x, value in meant.items()})",
    ),
]
