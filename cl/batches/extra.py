"""Further texts of a sample, any number each: mined negatives, or more positives.

    extra:
      negatives: {column: negatives, view: positive}                         # read as the view `positive` is
      captions: {column: captions, view: text, role: positive, most: 4}

The column holds a list of texts (null: none). Of more than `most` some are drawn, by (seed, epoch, sample id): the same
for any number of workers, others in the next epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from blake3 import blake3
from pydantic import Field

from cl import storage
from cl.batches.batch import Further
from cl.batches.hashing import permutation
from cl.config import Config
from cl.corpus import Corpus, normal_text
from cl.encoders.inputs import Inputs
from cl.errors import ConfigError, DataError

_DRAW = 5  # what a permutation is for


class ExtraConfig(Config):
    """Where further texts come from, and what they are."""

    column: str = Field(description="column of the light plane that holds a list of texts for each sample")
    view: str = Field(description="the view of the model that they are read as: its tower, its tokenizer")
    role: Literal["negative", "positive"] = Field("negative", description="what they are to their sample")
    most: int = Field(8, ge=1, description="texts a sample; of more, so many are drawn in each epoch")


@dataclass(frozen=True)
class ExtraTexts:
    """Further texts by that name, as the config describes them."""

    name: str
    config: ExtraConfig

    def choose(self, texts: Sequence[str] | None, seed: int, epoch: int, sample: np.ndarray) -> list[str]:
        """At most `most` of a sample's texts; blank ones are none. `sample` is its id, int64 [2]."""
        found = [text for text in texts or () if text and not text.isspace()]
        if len(found) <= self.config.most:
            return found
        order = permutation(len(found), seed, epoch, _DRAW, int(sample[0]), int(sample[1]))
        return [found[place] for place in sorted(order[: self.config.most])]

    def batch(self, chosen: Sequence[Sequence[str]], inputs: Inputs, fields: Sequence[str]) -> Further:
        """Tokenise the texts of a batch.

        Args:
            chosen: of each local sample.
            inputs: the model's.
            fields: those of the batch's content ids, in their order.
        """
        texts = [text for each in chosen for text in each]
        owner = np.repeat(np.arange(len(chosen)), [len(each) for each in chosen])
        field = inputs.field_of(self.config.view)
        content = np.stack([_content(texts, known=name == field) for name in fields], 1)
        return Further(
            self.config.view,
            self.config.role,
            inputs.texts(self.config.view, texts),
            torch.from_numpy(owner.astype(np.int64)),
            torch.from_numpy(content),
        )


def _content(texts: Sequence[str], known: bool) -> np.ndarray:
    """Content ids int64 [M] as the reader gives them to that field; of fields that a text does not show, its own."""
    prefix = "" if known else "\0"
    digests = (blake3((prefix + normal_text(text)).encode()).digest(length=8) for text in texts)
    return np.frombuffer(b"".join(digests), dtype=">i8").astype(np.int64)


def open_extra(configs: Mapping[str, ExtraConfig], corpora: Sequence[Corpus], inputs: Inputs) -> list[ExtraTexts]:
    """The further texts of a run.

    Raises:
        ConfigError: a column that a corpus does not have or that holds no lists of texts, or a view of pictures.
    """
    for name, config in configs.items():
        inputs.text(config.view)
        for corpus in corpora:
            kind = _column_type(config.column, corpus)
            if kind is None:
                raise ConfigError(
                    f"extra.{name} names the column {config.column!r}, which {corpus.root} does not have."
                )
            listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            if not listed or not (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)):
                raise ConfigError(
                    f"extra.{name}: the column {config.column!r} of {corpus.root} is {kind}; expected lists of texts."
                )
    return [ExtraTexts(name, config) for name, config in configs.items()]


def _column_type(column: str, corpus: Corpus) -> pa.DataType | None:
    url = corpus.fragment_url(next(each for each in corpus.fragments if each.samples))
    fs, path = storage.open_fs(url)
    try:
        with fs.open(path, "rb") as raw:
            schema = pq.read_schema(raw)
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{url} is not a readable parquet file: {error}.") from error
    return schema.field(column).type if column in schema.names else None
