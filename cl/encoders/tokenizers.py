"""Tokenizers that work offline, on the Rust library `tokenizers` (which releases the GIL).

`clip_bpe(vocab_size)` is CLIP's byte-pair encoding from the vocabulary that open_clip ships. The merges are ranked,
so the first K of them are a smaller vocabulary of the same kind: a small model need not spend most of its
parameters, and of its optimizer's time, on 49,408 embeddings. `folder_tokenizer` reads a Hugging Face folder.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Regex, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from cl import storage
from cl.errors import ConfigError

CLIP_VOCABULARY = 49408
SETTINGS_FILE = "clew_tokenizer.json"  # what tokenizer.json cannot say
_BYTES_AND_SPECIALS = 2 * 256 + 2  # every byte, every byte at a word's end, start and end of text
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Tokenizer:
    """Strings -> lists of ids with special tokens, at most `max_tokens` long.

    Attributes:
        rust: the tokenizer with its truncation set and padding off.
        max_tokens: longest result, special tokens included.
        pad_id: the id that pads a batch.
        clean: CLIP's cleaning (mend mojibake, unescape HTML, collapse white space, lower case) comes first.
    """

    rust: RustTokenizer
    max_tokens: int
    pad_id: int
    clean: bool

    @property
    def vocab_size(self) -> int:
        return self.rust.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        prepared = [clean_text(text) for text in texts] if self.clean else list(texts)
        return [encoding.ids for encoding in self.rust.encode_batch_fast(prepared)]

    def save(self, folder: Path) -> None:
        """Write what `folder_tokenizer` reads."""
        self.rust.save(str(folder / "tokenizer.json"))
        storage.write_json(str(folder / SETTINGS_FILE), {"clean": self.clean, "pad_id": self.pad_id})


def clean_text(text: str) -> str:
    """CLIP's cleaning, as open_clip's `clean="lower"`."""
    if not text.isascii() or not text.isprintable() or "&" in text:
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def clip_bpe(vocab_size: int, max_tokens: int) -> Tokenizer:
    """CLIP's BPE cut to `vocab_size` entries; 49,408 is CLIP's own.

    Raises:
        ConfigError: the size is not between 514 and 49,408.
    """
    if not _BYTES_AND_SPECIALS <= vocab_size <= CLIP_VOCABULARY:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but the built-in BPE vocabulary has from {_BYTES_AND_SPECIALS} to "
            f"{CLIP_VOCABULARY} entries (give `tokenizer` a folder for another one)."
        )
    rust = RustTokenizer.from_str(_clip_json(vocab_size))
    rust.enable_truncation(max_tokens)
    return Tokenizer(rust, max_tokens, pad_id=0, clean=True)


def ending(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The same tokenizer with `token` behind every text, however long: what the last state of a decoder stands on.

    Raises:
        ConfigError: the vocabulary has no such token.
    """
    rust = RustTokenizer.from_str(tokenizer.rust.to_str())
    number = rust.token_to_id(token)
    if number is None:
        raise ConfigError(f"eos is {token!r}, but the tokenizer has no such token.")
    if rust.encode("a").ids[-1] != number:  # it does so already
        end = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, number)])
        rust.post_processor = end if rust.post_processor is None else processors.Sequence([rust.post_processor, end])
        rust.enable_truncation(tokenizer.max_tokens)
    return replace(tokenizer, rust=rust)


@functools.lru_cache(maxsize=4)
def _clip_json(vocab_size: int) -> str:
    from open_clip.tokenizer import SimpleTokenizer

    clip = SimpleTokenizer()
    merges = sorted(clip.bpe_ranks, key=clip.bpe_ranks.__getitem__)[: vocab_size - _BYTES_AND_SPECIALS]
    start, end = "<start_of_text>", "<end_of_text>"
    tokens = [clip.decoder[i] for i in range(512)] + ["".join(pair) for pair in merges] + [start, end]
    rust = RustTokenizer(
        BPE({token: i for i, token in enumerate(tokens)}, merges, end_of_word_suffix="</w>", fuse_unk=False)
    )
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    rust.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocab_size - 2), (end, vocab_size - 1)]
    )
    return rust.to_str()


def folder_tokenizer(name: str, max_tokens: int, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (or hub name), cut to `max_tokens`.

    Raises:
        ConfigError: there is none, or it has more entries than the tower's `vocab_size` embeddings.
    """
    file = Path(name).expanduser() / "tokenizer.json"
    try:
        if file.is_file():
            rust = RustTokenizer.from_file(str(file))
        else:
            from transformers import AutoTokenizer

            rust = AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
        raise ConfigError(f"{name} has no tokenizer that can be read: {reason}.") from error
    if rust.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"The tokenizer of {name} has {rust.get_vocab_size()} entries, but the tower has {vocab_size} embeddings."
        )
    beside = Path(name).expanduser() / SETTINGS_FILE
    settings = storage.read_json(str(beside)) if beside.is_file() else {}
    pad_id = settings.get("pad_id", (rust.padding or {}).get("pad_id"))
    if pad_id is None:
        known = (rust.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>", "</s>"))
        pad_id = next((i for i in known if i is not None), 0)
    rust.no_padding()
    rust.enable_truncation(max_tokens)
    return Tokenizer(rust, max_tokens, pad_id, bool(settings.get("clean")))
