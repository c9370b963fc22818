"""The tar scanner agrees with the standard library on good tars and loses nothing before the damage in bad ones."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.tar import BLOCK, Damage, Member, is_unsafe, scan, split_name

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Bytes:
    """A reader over bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def make_tar(files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return out.getvalue()


def found(data: bytes) -> list[Member | Damage]:
    return list(scan(Bytes(data)))


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=8).map("/".join)
contents = st.binary(max_size=1500)


@quick
@given(st.sampled_from(sorted(FORMATS)), st.lists(st.tuples(paths, contents), max_size=6))
@example("gnu", [("d" * 300 + "/x.jpg", b"long")])
@example("pax", [("é" * 120 + ".txt", b"pax")])
@example("ustar", [("p" * 100 + "/" + "n" * 90 + ".jpg", b"prefix")])
def test_reads_what_tarfile_writes(form: str, files: list[tuple[str, bytes]]) -> None:
    try:
        data = make_tar(files, FORMATS[form])
    except ValueError:
        return  # ustar has no room for this name
    members = found(data)
    assert all(isinstance(member, Member) for member in members)
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in members if isinstance(m, Member)] == files
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.offset_data, m.size) for m in tar] == [tuple(member) for member in members]


FILES = [(f"{i:04d}.{suffix}", bytes([i]) * (100 + 300 * i)) for i in range(8) for suffix in ("jpg", "txt")]
WHOLE = make_tar(FILES)


@quick
@given(st.integers(0, len(WHOLE)))
def test_truncation_keeps_everything_before_it(length: int) -> None:
    got = found(WHOLE[:length])
    kept = [member for member in got if isinstance(member, Member)]
    ends = [member.offset + member.size for member in found(WHOLE) if isinstance(member, Member)]
    assert [tuple(member) for member in kept] == [tuple(m) for m in found(WHOLE)[: sum(end <= length for end in ends)]]
    marker = (ends[-1] + BLOCK - 1) // BLOCK * BLOCK + BLOCK
    assert any(isinstance(each, Damage) and each.reason == "truncated_shard" for each in got) == (length < marker)


@quick
# One flip a block: two in one header can leave its sum as it was, which no reader could notice.
@given(
    st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 7)),
        min_size=1,
        max_size=5,
        unique_by=lambda flip: flip[0] // BLOCK,
    )
)
def test_bit_flips_cost_only_what_they_hit(flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, bit in flips:
        data[place] ^= 1 << bit
    hit = {place // BLOCK for place, _ in flips}
    expected = [m for m in found(WHOLE) if isinstance(m, Member)]
    got = {each.offset: each for each in found(bytes(data)) if isinstance(each, Member)}
    for member in expected:
        if (member.offset - BLOCK) // BLOCK not in hit:  # its header is whole, whatever became of its bytes
            assert got.get(member.offset) == member
    if len(got) < len(expected):
        assert any(isinstance(each, Damage) for each in found(bytes(data)))


@quick
@given(st.binary(max_size=4000))
@example(bytes(10240))
@example(b"\x80" * 2048)
def test_garbage_never_raises(data: bytes) -> None:
    assert all(isinstance(each, (Member, Damage)) for each in found(data))


def header(
    name: bytes = b"x.jpg", size: bytes = b"00000000010\0", kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytes:
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"0" * 11 + b"\0" + b" " * 8 + kind)
    block = block.ljust(257, b"\0") + magic
    block = block.ljust(BLOCK, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (header(size=b"77777777777\0"), "truncated_shard", "bytes are missing"),
        (header(size=b"\x80" + b"\xff" * 11), "truncated_shard", "bytes are missing"),
        (header(size=b"\xff" * 12), "damaged_shard", "size is negative"),
        (header(size=b"-0000000010\0"), "damaged_shard", "size is not octal"),
        (header(kind=b"L", size=b"00077777777\0"), "damaged_shard", "extended header of"),
        (header(kind=b"2", size=b"00000000000\0"), "unsupported_member", "link or device"),
        (header(kind=b"S", size=b"00000000000\0"), "unsupported_member", "sparse"),
        (header(name=b"../../etc/passwd", size=b"0" * 11 + b"\0"), "unsafe_name", "leaves the folder"),
        (header(name=b"/etc/passwd", size=b"0" * 11 + b"\0"), "unsafe_name", "leaves the folder"),
        (b"\x1f\x8b\x08" + bytes(600), "compressed_shard", "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed_shard", "zstd"),
        (b"PK\x03\x04" + bytes(1020), "damaged_shard", "wrong checksum"),
        (b"", "truncated_shard", "without an end marker at byte 0"),
    ],
)
def test_every_damage_is_named(data: bytes, reason: str, words: str) -> None:
    damages = [each for each in found(data + bytes(1024) if data else data) if isinstance(each, Damage)]
    assert damages[0].reason == reason
    assert words in damages[0].detail


def test_a_damaged_header_costs_its_member_only() -> None:
    data = bytearray(WHOLE)
    second = found(WHOLE)[2]
    assert isinstance(second, Member)
    data[second.offset - BLOCK + 3] ^= 0xFF
    got = found(bytes(data))
    assert [m.name for m in got if isinstance(m, Member)] == [n for n, _ in FILES if n != second.name]
    [damage] = [each for each in got if isinstance(each, Damage)]
    assert damage.offset == second.offset - BLOCK


def test_data_behind_a_hole_of_zeros_is_found_and_reported() -> None:
    one, two = make_tar([("a.jpg", b"1")]), make_tar([("b.jpg", b"2")])
    got = found(one + two)
    assert [each.name for each in got if isinstance(each, Member)] == ["a.jpg", "b.jpg"]
    assert [each.reason for each in got if isinstance(each, Damage)] == ["damaged_shard"]


def test_names_that_are_not_utf8_stay_different() -> None:
    tar = (
        header(name=b"\xe9.jpg", size=b"0" * 11 + b"\0")
        + header(name=b"\xe8.jpg", size=b"0" * 11 + b"\0")
        + bytes(1024)
    )
    assert [each.name for each in found(tar)] == ["\\xe9.jpg", "\\xe8.jpg"]


def test_keys_follow_the_webdataset_rule() -> None:
    assert split_name("a/b/c.seg.PNG") == ("a/b/c", "seg.png")
    assert split_name("./x.jpg") == ("x", "jpg")
    assert split_name("plain") == ("plain", "")
    assert is_unsafe("a/../b")
    assert not is_unsafe("a..b/c")


def test_a_size_beyond_the_end_does_not_hide_what_follows() -> None:
    got = found(header(name=b"liar.jpg", size=b"77777777777\0") + WHOLE)
    assert [m.name for m in got if isinstance(m, Member)] == [name for name, _ in FILES]
    [damage] = [each for each in got if isinstance(each, Damage)]
    assert (damage.reason, damage.name) == ("truncated_shard", "liar.jpg")
