"""The packages that the sample is made of, fetched by their own package managers and checked by digest."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

SOURCES = {  # archive -> sha256
    "openclipart-svg_1%3a0.18+dfsg-19_all.deb": "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "openclipart-png_1%3a0.18+dfsg-19_all.deb": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "wordnet-base_1%3a3.0-37_all.deb": "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "emoji-datasource-google-16.0.0.tgz": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter-16.0.0.tgz": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "cldr-annotations-full-48.2.0.tgz": "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    "cldr-annotations-derived-full-48.2.0.tgz": "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
}


def fetch(archive: str, cache: Path) -> Path:
    """Download one archive with its own package manager, check its digest, unpack it; returns the folder."""
    file, folder = cache / archive, cache / "unpacked" / archive
    cache.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        name, _, version = archive.rsplit(".", 1)[0].rpartition("-")
        if archive.endswith(".deb"):
            name, version = archive.split("_")[:2]
            command = ["apt-get", "download", "-o", "APT::Sandbox::User=root", f"{name}={version.replace('%3a', ':')}"]
        else:
            command = ["npm", "pack", "--silent", f"{name}@{version}"]
        subprocess.run(command, cwd=cache, check=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SOURCES[archive]:
        raise SystemExit(f"{file} has sha256 {digest}, expected {SOURCES[archive]}.")
    if not folder.exists():
        folder.mkdir(parents=True)
        unpack = ["dpkg-deb", "-x", str(file), str(folder)] if archive.endswith(".deb") else None
        subprocess.run(unpack or ["tar", "xzf", str(file), "-C", str(folder), "--strip-components=1"], check=True)
    return folder
