"""Rebuild the shipped sample from its original sources, byte for byte.

    python -m pipelines.sample.build --out pipelines/sample --cache /tmp/sample-sources

Fetches three Debian packages (openclipart-svg, openclipart-png, wordnet-base) with `apt-get download` and four npm
packages (emoji drawings, Unicode names) with `npm pack`, checks their digests, and writes the tars, the parquet
files, `planted.json` and `SHA256SUMS`. What the files hold, and what is broken in them on purpose, is described in
README.md. Needs Debian or Ubuntu, npm and the Pillow named there (another JPEG encoder gives other bytes).
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.sample.planted import Planted, plant_images, plant_texts, truncated_tar
from pipelines.sample.sources import SOURCES, fetch

CLIPART_SIZE, EMOJI_SIZE = 64, 48  # pixels, square
MOST_PIXELS = 50_000_000
CLIPART_TRAIN, PER_SHARD = 3000, 1500  # samples
TEXT_TRAIN, TEXT_HELDOUT, TWITTER_HELDOUT = 8000, 500, 500  # rows, rows, samples
LANGUAGES = ("de", "fr", "es", "ru", "ja", "ar")  # of the planted captions that are not English
USELESS_TITLE = re.compile(
    r"part of the flat icon|HASH\(0x|lemon svg theme|^clipart by|^untitled|^$|^drawing|\.svg$", re.I
)
USELESS_WORDS = {"hash", "unsorted", "", "clip art", "clipart", "svg"}
PEOPLE, GENDERS = {"1f468", "1f469", "1f9d1"}, {"2640", "2642"}
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@dataclass(frozen=True)
class Sample:
    """One webdataset sample: key, encoded image, caption, metadata with the `label` for zero-shot classification."""

    key: str
    image: bytes
    text: str
    meta: dict[str, Any]


def bucket(text: str, salt: str) -> int:
    """A stable number from 0 to 9999 that decides splits and order."""
    return int(hashlib.sha256(f"{salt}\0{text}".encode()).hexdigest()[:8], 16) % 10000


def order(text: str) -> str:
    """A stable pseudo-random sort key."""
    return hashlib.sha256(f"order\0{text}".encode()).hexdigest()


def jpeg(picture: Image.Image, side: int, quality: int = 75) -> bytes:
    """Fit a drawing into a white square and encode it as JPEG."""
    picture = picture.convert("RGBA")
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas.alpha_composite(small, ((side - width) // 2, (side - height) // 2))
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "JPEG", quality=quality)
    return out.getvalue()


def read_clipart(svg: Path, png: Path) -> Iterator[dict[str, Any]]:
    """Title, description, keywords, author and picture of every drawing dedicated to the public domain."""

    def field(pattern: str, text: str) -> str:
        found = re.search(pattern, text, re.S)
        return html.unescape(found[1]).strip() if found else ""

    for file in sorted(svg.rglob("*.svg")):
        path = file.relative_to(svg).as_posix()[:-4]
        metadata = field(r"(<metadata.*?</metadata>)", file.read_text(errors="replace"))
        picture = png / f"{path}.png"
        if not picture.exists() or "PublicDomain" not in field(r'cc:license rdf:resource="([^"]*)"', metadata):
            continue
        if path.split("/")[0] in {"logos", "unsorted", "special"}:  # trademarks, and folders that say nothing
            continue
        keywords = [html.unescape(word).strip() for word in re.findall(r"<rdf:li>(.*?)</rdf:li>", metadata, re.S)]
        try:
            with Image.open(picture) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    continue  # the package holds a few gigantic drawings
                image = jpeg(opened, CLIPART_SIZE)
        except (OSError, Image.DecompressionBombError):
            continue  # and a few broken ones
        yield {
            "path": path,
            "image": image,
            "title": field(r"<dc:title>(.*?)</dc:title>", metadata.split("<dc:publisher")[0]),
            "description": field(r"<dc:description>(.*?)</dc:description>", metadata),
            "keywords": [word for word in keywords if word],
            "author": field(r"<dc:creator>.*?<dc:title>(.*?)</dc:title>", metadata),
        }


def clipart_caption(row: dict[str, Any], titles: Counter[str]) -> str:
    """Title, else file name, with description and keywords: as noisy as the source is."""
    *folders, stem = re.sub(r"[_\-]+", " ", row["path"]).split("/")
    useless = bool(USELESS_TITLE.search(row["title"])) or titles[row["title"].lower()] > 8
    title = re.sub(r"[\s_]+", " ", row["title"]).strip(" -.")
    main = re.sub(r"\b\d+\b", "", stem).strip() if useless else title
    if not useless and len(row["description"]) > 12 and "HASH" not in row["description"]:
        main += ". " + re.sub(r"\s+", " ", row["description"])[:160]
    words = [w.replace("_", " ") for w in row["keywords"] if w.lower() not in USELESS_WORDS and "HASH" not in w]
    tail = [w for w in dict.fromkeys(words[:6] + folders[-1:]) if w.lower() not in main.lower()]
    return main + (f" ({', '.join(tail)})" if tail else "")


def clipart(svg: Path, png: Path) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Train, held-out and spare drawings. Families (same picture, or a numbered series) never straddle them."""
    rows = list(read_clipart(svg, png))
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for row in rows:
        folder, _, stem = row["path"].rpartition("/")
        for kin in (hashlib.sha256(row["image"]).hexdigest(), f"{folder}/{re.sub(r'[0-9_-]+', '', stem)}"):
            parent[root(row["path"])] = root(kin)
    titles = Counter(row["title"].lower() for row in rows)
    train: list[Sample] = []
    heldout: list[Sample] = []
    seen: set[str] = set()
    for row in sorted(rows, key=lambda row: (order(root(row["path"])), row["path"])):
        family, caption = root(row["path"]), clipart_caption(row, titles)
        meta = {key: row[key] for key in ("title", "keywords", "author", "path")}
        meta |= {"label": row["path"].split("/")[0].replace("_", " "), "license": "public domain"}
        key = "clipart-" + hashlib.sha256(row["path"].encode()).hexdigest()[:12]
        sample = Sample(key, row["image"], caption, meta)
        if bucket(family, "clipart") >= 600:
            train.append(sample)
        elif family not in seen and len(caption) >= 6 and caption.lower() not in seen:
            seen |= {family, caption.lower()}  # held out: one drawing a family, one a caption
            heldout.append(sample)
    shuffled = sorted(train[:CLIPART_TRAIN], key=lambda sample: order(sample.key))
    return shuffled, heldout, train[CLIPART_TRAIN:]


def cldr_names(annotations: Path, derived: Path, language: str) -> dict[str, tuple[str, list[str]]]:
    """Code points -> name and keywords in a language."""
    names = {}
    for folder, field in (
        (annotations / "annotations", "annotations"),
        (derived / "annotationsDerived", "annotationsDerived"),
    ):
        data = json.loads((folder / language / "annotations.json").read_text())[field]["annotations"]
        for characters, value in data.items():
            if value.get("tts"):
                names[code_points("-".join(f"{ord(c):x}" for c in characters))] = (
                    value["tts"][0],
                    value.get("default", []),
                )
    return names


def code_points(text: str) -> str:
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def concept(points: str) -> str:
    """What an emoji shows apart from gender: the unit that is trained on or held out as a whole."""
    parts = [part for part in points.split("-") if part not in GENDERS and part != "200d"]
    return "-".join("person" if part in PEOPLE else part for part in parts)


def emoji(vendor: str, folder: Path, names: dict[str, tuple[str, list[str]]]) -> tuple[list[Sample], list[Sample]]:
    """A vendor's drawings of train and of held-out concepts, without skin-tone variants."""
    train: list[Sample] = []
    heldout: list[Sample] = []
    for row in json.loads((folder / "emoji.json").read_text()):
        points = code_points(row["unified"])
        if not row[f"has_img_{vendor}"] or points not in names or SKIN_TONES & set(points.split("-")):
            continue
        with Image.open(folder / "img" / vendor / "64" / row["image"]) as picture:
            image = jpeg(picture, EMOJI_SIZE)
        name, keywords = names[points]
        meta = {"label": row["category"], "keywords": keywords, "code_points": points, "concept": concept(points)}
        meta |= {"vendor": vendor, "license": {"google": "Apache-2.0", "twitter": "CC-BY-4.0"}[vendor]}
        split = heldout if bucket(concept(points), "emoji") < 900 else train
        split.append(Sample(f"{vendor}-{points}", image, name, meta))
    return sorted(train, key=lambda s: order(s.key)), sorted(heldout, key=lambda s: order(s.key))


def wordnet(folder: Path) -> list[dict[str, Any]]:
    """Pairs of a synset's words and its gloss, in pseudo-random order."""
    rows = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            data, _, gloss = line.partition(" | ")
            if line.startswith("  "):
                continue  # the licence at the top of each file
            fields = data.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\(.*?\)", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count)]
            meaning = re.split(r';\s*(?=")', gloss.strip())[0].strip(" ;")
            if len(meaning.split()) >= 4:
                rows.append({"synset": f"{part}.{fields[0]}", "query": ", ".join(words), "positive": meaning})
    return sorted(rows, key=lambda row: order(row["synset"]))


def members(sample: Sample | Planted) -> Iterator[tuple[str, bytes]]:
    """The files of a sample; a planted one may lack some or hold broken ones."""
    if isinstance(sample, Planted):
        yield from sample.members
    else:
        yield f"{sample.key}.jpg", sample.image
        yield f"{sample.key}.txt", sample.text.encode()
        yield f"{sample.key}.json", json.dumps(sample.meta, ensure_ascii=False, sort_keys=True).encode()


def write_tar(path: Path, samples: list[Any]) -> None:
    """A webdataset shard; owner, mode and time are constant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for name, data in members(sample):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("synset", "query", "positive")}
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=2000)


def spread(samples: list[Sample], planted: list[Planted]) -> list[Any]:
    """Put the planted samples at even distances among the others."""
    places: dict[int, list[Planted]] = defaultdict(list)
    for number, each in enumerate(planted):
        places[(number + 1) * len(samples) // (len(planted) + 1)].append(each)
    return [each for i, sample in enumerate(samples) for each in (*places[i], sample)]


def build(out: Path, cache: Path) -> None:
    """Write the whole sample below `out`."""
    svg, png, wn, google, twitter, full, derived = (fetch(archive, cache) for archive in SOURCES)
    share = Path("usr/share")
    train, heldout, spare = clipart(svg / share / "openclipart/svg", png / share / "openclipart/png")
    names = cldr_names(full, derived, "en")
    foreign = {language: cldr_names(full, derived, language) for language in LANGUAGES}
    google_train, google_unseen = emoji("google", google, names)
    twitter_train, twitter_unseen = emoji("twitter", twitter, names)
    # These drawings get a caption in another language in place of their English one.
    translated = [s for s in google_train if all(s.meta["code_points"] in f for f in foreign.values())][:12]
    captions = [foreign[LANGUAGES[i % 6]][s.meta["code_points"]][0] for i, s in enumerate(translated)]
    others = [
        replace(s, text=c, key=LANGUAGES[i % 6]) for i, (s, c) in enumerate(zip(translated, captions, strict=True))
    ]
    google_train = [s for s in google_train if s not in translated]
    planted = plant_images(train, spare, others)
    shards = {"clipart-00000.tar": train[:PER_SHARD], "clipart-00001.tar": train[PER_SHARD:]}
    for name, samples in (shards | {"emoji-google-00000.tar": google_train}).items():
        write_tar(out / "train" / name, spread(samples, [each for each in planted if each.shard == name]))
    cut = truncated_tar(spare[100:112], out / "train", write_tar)
    write_tar(out / "heldout/clipart/clipart-00000.tar", heldout)
    write_tar(out / "heldout/unseen-drawings/emoji-twitter-00000.tar", twitter_train[:TWITTER_HELDOUT])
    write_tar(out / "heldout/unseen-concepts/emoji-google-00000.tar", google_unseen)
    write_tar(out / "heldout/unseen-concepts/emoji-twitter-00000.tar", twitter_unseen)
    pairs = wordnet(wn / share / "wordnet")
    text_rows, text_planted = plant_texts(pairs[TEXT_HELDOUT : TEXT_HELDOUT + TEXT_TRAIN])
    write_parquet(out / "text/train.parquet", text_rows)
    write_parquet(out / "text/heldout.parquet", pairs[:TEXT_HELDOUT])
    table = [each.row() for each in planted] + cut + text_planted
    (out / "planted.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    files = sorted(p.relative_to(out).as_posix() for s in ("*.tar", "*.parquet", "planted.json") for p in out.rglob(s))
    sums = "".join(f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
    (out / "SHA256SUMS").write_text(sums)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write (default: this one)")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded packages (300 MB)")
    arguments = parser.parse_args()
    build(arguments.out, arguments.cache)
