"""A tokenizer as Hugging Face's `AutoTokenizer` reads it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as RustTokenizer

from cl.encoders.tokenizers import Tokenizer

_CLIP_START = "<start_of_text>"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and its settings.

    CLIP's cleaning becomes a normaliser: white space and case as in training, but not ftfy's mending of broken
    encodings and HTML, which the format cannot say. Padding is by the tokenizer's own pad token; for CLIP's BPE by the
    start token, as its pad id 0 is the word "!".
    """
    from transformers import PreTrainedTokenizerFast

    rust = RustTokenizer.from_str(tokenizer.rust.to_str())
    rust.no_truncation()
    if tokenizer.clean:
        rust.normalizer = normalizers.Sequence(
            [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
        )
    pad = rust.id_to_token(tokenizer.pad_id)
    if tokenizer.pad_id == 0 and rust.token_to_id(_CLIP_START) is not None:
        pad = _CLIP_START
    PreTrainedTokenizerFast(
        tokenizer_object=rust,
        pad_token=pad,
        model_max_length=tokenizer.max_tokens,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
