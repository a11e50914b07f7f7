"""The special token of a tokenizer.json that ends a document."""

EOT = "<|endoftext|>"  # of the tokenizers that are learned here, and of the published ones

ENDS = (
    EOT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "[SEP]",
)
"""Candidate end-of-text tokens, in order of preference."""


def end_of_text(spec: dict) -> tuple[str, int]:
    """Return the text and the id of the end-of-text token; ValueError if there is none."""
    special = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
    for name in ENDS:
        if name in special:
            return name, special[name]
    raise ValueError(f"no special token is one of {' '.join(ENDS)}")
