"""The emoji of the shipped sample as small tensors, for tests that train an objective in seconds.

Pictures at 12 x 12 pixels, captions as hashed words and letter triples; everything that objectives ask for beside two
views is derived from what the sample says of each emoji (Unicode group, keywords).
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SAMPLE = Path(__file__).resolve().parents[1] / "pipelines" / "sample"
SIDE, WORDS, TAGS = 12, 512, 16


@dataclass(frozen=True)
class Emoji:
    """N emoji: pictures [N, 3 x 12 x 12], captions [N, 512] and keywords [N, 512] as features, groups [N], tags."""

    pictures: Tensor
    captions: Tensor
    keywords: Tensor
    words: Tensor  # [N, 4, 512], the first words of the caption
    word_mask: Tensor  # [N, 4]
    group: Tensor  # [N] int64
    tags: Tensor  # [N, 16] of 0 and 1: its group, and which of the most frequent keywords it has

    def __len__(self) -> int:
        return len(self.group)


def read_emoji(*shards: str) -> Emoji:
    """Read tars of the sample, such as `train/emoji-google-00000.tar`."""
    rows = [row for shard in shards for row in _rows(SAMPLE / shard)]
    groups = sorted({meta["label"] for _, _, meta in rows})
    names = [word for _, _, meta in rows for word in meta["keywords"]]
    frequent = sorted(set(names), key=lambda word: (-names.count(word), word))[: TAGS - len(groups)]
    words = [text.lower().split()[:4] for _, text, _ in rows]
    return Emoji(
        pictures=torch.stack([_picture(data) for data, _, _ in rows]),
        captions=torch.stack([_features(text.lower().split()) for _, text, _ in rows]),
        keywords=torch.stack([_features(meta["keywords"] or text.split()) for _, text, meta in rows]),
        words=torch.stack([torch.stack([_features(w[i : i + 1]) for i in range(4)]) for w in words]),
        word_mask=torch.tensor([[i < len(w) for i in range(4)] for w in words]),
        group=torch.tensor([groups.index(meta["label"]) for _, _, meta in rows]),
        tags=torch.tensor(
            [
                [float(name == meta["label"]) for name in groups]
                + [float(word in meta["keywords"]) for word in frequent]
                for _, _, meta in rows
            ]
        ),
    )


def _rows(path: Path) -> list[tuple[bytes, str, dict]]:
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            members.setdefault(key, {})[kind] = file.read()
    found = []
    for key, parts in sorted(members.items()):
        if not key.startswith("planted") and parts.keys() == {"jpg", "txt", "json"}:
            found.append((parts["jpg"], parts["txt"].decode(), json.loads(parts["json"])))
    return found


def _picture(data: bytes) -> Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1).flatten()


def _features(words: list[str]) -> Tensor:
    """Counts of hashed words and letter triples, of length 1."""
    counts = torch.zeros(WORDS)
    for word in words:
        padded = f"#{word}#"
        for part in (word, *(padded[i : i + 3] for i in range(len(padded) - 2))):
            counts[zlib.crc32(part.encode()) % WORDS] += 1
    return counts / counts.norm().clamp_min(1e-6)
