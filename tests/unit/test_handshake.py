"""pagenet/uffd/_handshake.py: what an owner's text may contain, and how its mappings cover a
region."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagenet import Block, HandshakeError, Region, Run
from pagenet.uffd._handshake import (
    MAX_HANDSHAKE_BYTES,
    Mapping,
    Note,
    check_mappings,
    check_request,
    first_object,
    mapping_pieces,
    parse_handshake,
    parse_mappings,
)

KIB, MIB = 1 << 10, 1 << 20
BASE = 0x7F00_0000_0000
GOOD = {"base_host_virt_addr": BASE, "size": 2 * MIB, "offset": 0, "page_size": 4096}


def text(*entries: Any) -> bytes:
    return json.dumps(entries).encode()


# ---- the request for a file ----

REQUEST = b'{"want": "file"}'


@pytest.mark.parametrize("before", [b"", b" \n"])
@pytest.mark.parametrize("after", [b"", b"[", b"{", b"\xff", REQUEST])
def test_request_before_the_handshake(before: bytes, after: bytes) -> None:
    found = first_object(before + REQUEST + after)
    assert found == before + REQUEST
    check_request(found)


@pytest.mark.parametrize("length", range(len(REQUEST)))
def test_part_of_a_request(length: int) -> None:
    assert first_object(REQUEST[:length]) is None


@pytest.mark.parametrize("wrong", ["{}", '{"want": "page"}', '{"want": "file", "more": 1}'])
def test_wrong_request(wrong: str) -> None:
    with pytest.raises(HandshakeError, match="asks for no file"):
        check_request(wrong.encode())


@given(st.binary(max_size=64) | st.text(alphabet='{}[]":, awntfile', max_size=40).map(str.encode))
def test_whatever_an_owner_sends_first(message: bytes) -> None:
    found = first_object(message)
    if found is not None:
        assert message.startswith(found)
        assert found.strip()[:1] == b"{"


def test_deep_request() -> None:
    assert first_object(b'{"a":' * 10000) is None


# ---- the text ----


@pytest.mark.parametrize(
    ("page_size", "expected"),
    [
        ({"page_size": 4096}, 4096),
        ({"page_size_kib": 4096}, 4096),  # misnamed: bytes
        ({"page_size_kib": 2 * MIB}, 2 * MIB),
        ({"page_size": 2 * MIB, "page_size_kib": 4096}, 2 * MIB),
        ({}, 4096),
    ],
)
def test_page_size_has_had_three_spellings(page_size: dict[str, int], expected: int) -> None:
    entry = {
        "base_host_virt_addr": BASE,
        "size": 2 * MIB,
        "offset": 4 * MIB,
        **page_size,
        "later": "ignored",
    }
    assert parse_mappings(text(entry)) == [Mapping(BASE, 2 * MIB, 4 * MIB, expected)]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"[",
        b"[{}",
        b"[{},]",
        b"not json",
        b"\xff\xfe\x00",
        b"[\xff]",
        text(GOOD) + b"x",
        b"[" * MAX_HANDSHAKE_BYTES,
        b'{"a":' * (MAX_HANDSHAKE_BYTES // 5),
        b"[" + b"1" * 5000 + b"]",  # more digits than Python turns into a number
    ],
    ids=lambda message: message[:12].hex(),
)
def test_no_json(message: bytes) -> None:
    with pytest.raises(HandshakeError, match=r"is not JSON: .+\Z") as caught:
        parse_mappings(message)
    assert "\n" not in str(caught.value)


def test_cut_anywhere_is_no_json() -> None:
    whole = text(GOOD)
    for end in range(len(whole)):
        with pytest.raises(HandshakeError):
            parse_mappings(whole[:end])


@pytest.mark.parametrize(
    "message", [b"[]", b"{}", b"null", b"1", b'"text"', b"true", json.dumps(GOOD).encode()]
)
def test_no_array(message: bytes) -> None:
    with pytest.raises(HandshakeError, match="is not a JSON array of mappings"):
        parse_mappings(message)


@pytest.mark.parametrize("entry", [None, 1, "text", [], [GOOD], True])
def test_no_object(entry: object) -> None:
    with pytest.raises(HandshakeError, match=r"mapping 1 .* is not a JSON object"):
        parse_mappings(text(GOOD, entry))


@pytest.mark.parametrize(
    "value", [True, False, None, "4096", 4096.0, float("inf"), [], {}, -4096, 2**64, 10**400]
)
@pytest.mark.parametrize("key", ["base_host_virt_addr", "size", "offset", "page_size"])
def test_no_proper_number(key: str, value: object) -> None:
    with pytest.raises(HandshakeError, match=f"mapping 0 .* has no proper '{key}'"):
        parse_mappings(text({**GOOD, key: value}))


@pytest.mark.parametrize("key", ["base_host_virt_addr", "size", "offset"])
def test_missing_number(key: str) -> None:
    with pytest.raises(HandshakeError, match=f"has no proper '{key}'"):
        parse_mappings(text({name: value for name, value in GOOD.items() if name != key}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"page_size": 0}, "page size 0"),
        ({"page_size": 4}, "page size 4 "),  # a number of KiB
        ({"page_size": 12288}, "page size 12288"),
        ({"page_size": 2 << 30, "size": 2 << 30}, "power of two from 4 KiB to 1 GiB"),
        ({"page_size": 2**63}, "power of two from 4 KiB to 1 GiB"),
        ({"size": 0}, "not whole pages"),
        ({"size": 4097}, "not whole pages"),
        ({"offset": 1}, "not whole pages"),
        ({"base_host_virt_addr": BASE + 2048}, "not whole pages"),
        ({"page_size": 2 * MIB, "offset": 4096}, "not whole pages of 2097152"),
        ({"base_host_virt_addr": 1 << 57}, "is no address range"),
        ({"size": (1 << 57) - BASE + 4096}, "is no address range"),
        ({"base_host_virt_addr": 2**64 - 4096, "size": 8192}, "is no address range"),
        ({"size": 2**64 - 4096}, "is no address range"),
    ],
)
def test_no_possible_mapping(change: dict[str, int], reason: str) -> None:
    with pytest.raises(HandshakeError, match=reason):
        parse_mappings(text({**GOOD, **change}))


@pytest.mark.parametrize(
    ("said", "is_zero"),
    [
        ((None, None), False),
        (("zero", "zero"), True),
        (("poison", "poison"), False),
        (("poison", None), False),
    ],
)
def test_what_is_outside(said: tuple[str | None, ...], is_zero: bool) -> None:
    entries = [GOOD if word is None else {**GOOD, "outside": word} for word in said]
    mappings, outside_is_zero = parse_handshake(text(*entries))
    assert (len(mappings), outside_is_zero) == (2, is_zero)
    note = Note(b"source", False, tuple(mappings), outside_is_zero)
    assert Note.decode(note.encode()) == note


@pytest.mark.parametrize(
    "said",
    [
        ("zero", None),
        (None, "zero"),
        ("zero", "poison"),
        ("nothing",),
        (0,),
        (True,),
        ([],),
        (None,),
    ],
)
def test_what_is_outside_makes_no_sense(said: tuple[object, ...]) -> None:
    entries = [
        GOOD if word is None and len(said) > 1 else {**GOOD, "outside": word} for word in said
    ]
    with pytest.raises(
        HandshakeError, match="says 'outside' otherwise than 'zero', or 'poison', in all mappings"
    ):
        parse_handshake(text(*entries))


def test_up_to_the_last_user_address() -> None:
    entry = {**GOOD, "base_host_virt_addr": (1 << 57) - 2 * MIB}
    assert parse_mappings(text(entry))[0].address == (1 << 57) - 2 * MIB


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*GOOD, "page_size_kib", "x"]), inner, max_size=5)
        ),
        max_leaves=6,
    ).map(lambda value: json.dumps([value]).encode())
)
def test_whatever_comes_is_mappings_or_a_handshake_error(message: bytes) -> None:
    try:
        mappings = parse_mappings(message)
    except HandshakeError:
        return
    assert all(isinstance(mapping, Mapping) for mapping in mappings)


# ---- against a region ----

# block a: bytes 0 to 4 MiB; block b: 4 to 6 MiB; block c: 6 to 6 MiB and 12 KiB
REGION = Region([Block("a", 4 * MIB), Block("b", 2 * MIB), Block("c", 12 * KIB)])


def at(offset: int, size: int, page_size: int = 4096, address: int | None = None) -> Mapping:
    return Mapping(BASE + offset if address is None else address, size, offset, page_size)


@pytest.mark.parametrize(
    ("mappings", "page_sizes"),
    [
        ([at(0, REGION.size)], [4096, 4096, 4096]),
        ([at(0, 6 * MIB, 2 * MIB), at(6 * MIB, 12 * KIB)], [2 * MIB, 2 * MIB, 4096]),
        # memory that is not mapped does not count
        ([at(2 * MIB, 2 * MIB, 2 * MIB)], [2 * MIB, 4096, 4096]),
        ([at(0, 4096), at(8192, 4096)], [4096, 4096, 4096]),
        (
            [at(4 * MIB, 2 * MIB, address=BASE), at(0, 4 * MIB, address=BASE + 2 * MIB)],
            [4096, 4096, 4096],
        ),
    ],
)
def test_region_in_the_owners_pages(mappings: list[Mapping], page_sizes: list[int]) -> None:
    assert check_mappings(mappings, REGION) == REGION.with_page_sizes(page_sizes)


@pytest.mark.parametrize(
    ("mappings", "reason"),
    [
        ([at(0, REGION.size + 4096)], "past the end of the region"),
        ([at(REGION.size, 4096)], "past the end of the region"),
        ([at(2**64 - 4096, 4096, address=BASE)], "past the end of the region"),
        ([at(4096, 1 << 56, address=0)], "past the end of the region"),
        (
            [at(0, 8192), at(8192, 4096, address=BASE + 4096)],
            r"overlap in the owner's address space, at 0x7f0000001000",
        ),
        ([at(0, 8192), at(4096, 4096, address=2 * BASE)], r"overlap in the region, at 0x1000"),
        ([at(0, 4096), at(0, 4096, address=2 * BASE)], "overlap in the region"),
        (
            [at(0, 2 * MIB, 2 * MIB), at(2 * MIB, 4096)],
            r"block 'a' in pages of \[4096, 2097152\] bytes: one size a block",
        ),
        ([at(0, 2 * MIB), at(2 * MIB, 4 * MIB, 2 * MIB)], "block 'a' in pages of"),
        (
            [at(6 * MIB, 8 * KIB, 8 * KIB)],
            "does not fit the source's memory: .* 12288 bytes is not a whole number of 8192",
        ),
    ],
)
def test_mappings_that_do_not_fit(mappings: list[Mapping], reason: str) -> None:
    for order in (mappings, mappings[::-1]):
        with pytest.raises(HandshakeError, match=reason) as caught:
            check_mappings(order, REGION)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "page_sizes", "pieces"),
    [
        (at(0, 8192), [4096] * 3, [(Run(0, 2), BASE)]),
        (at(0, REGION.size), [4096] * 3, [
            (Run(0, 1024), BASE),
            (Run(1024, 512), BASE + 4 * MIB),
            (Run(1536, 3), BASE + 6 * MIB),
        ]),
        (at(2 * MIB, 4 * MIB, 2 * MIB), [2 * MIB, 2 * MIB, 4096], [
            (Run(1, 1), BASE + 2 * MIB),
            (Run(2, 1), BASE + 4 * MIB),
        ]),
        (at(6 * MIB + 4096, 8192), [2 * MIB, 2 * MIB, 4096], [(Run(4, 2), BASE + 6 * MIB + 4096)]),
    ],
)  # fmt: skip
def test_pieces(mapping: Mapping, page_sizes: list[int], pieces: list[tuple[Run, int]]) -> None:
    assert mapping_pieces(mapping, REGION.with_page_sizes(page_sizes)) == pieces


@pytest.mark.parametrize("mapping", [at(4096, 2 * MIB), at(0, 4096), at(2 * MIB, MIB)])
def test_pieces_are_whole_pages_of_their_block(mapping: Mapping) -> None:
    with pytest.raises(
        HandshakeError, match="block 'a' is not mapped in whole pages of 2097152 bytes"
    ):
        mapping_pieces(mapping, REGION.with_page_sizes([2 * MIB, 4096, 4096]))


def test_block_that_begins_off_its_page_size() -> None:
    """The block's pages begin where the block does, so an owner whose pages are aligned in the flat
    numbering cannot map it."""
    region = Region([Block("rom", 4096), Block("ram", 4 * MIB)])
    mapping = at(2 * MIB, 2 * MIB, 2 * MIB)
    with pytest.raises(HandshakeError, match="'ram' is not mapped in whole pages"):
        mapping_pieces(mapping, check_mappings([mapping], region))


@given(st.data())
def test_pieces_cover_the_mappings_exactly(data: st.DataObject) -> None:
    region = Region(
        Block(f"b{i}", 4096 * n)
        for i, n in enumerate(data.draw(st.lists(st.integers(1, 5), min_size=1)))
    )
    cuts = data.draw(st.sets(st.integers(0, region.pages), min_size=2).map(sorted))
    mappings = [
        at(start * 4096, (end - start) * 4096)
        for start, end in zip(cuts[::2], cuts[1::2], strict=False)
    ]
    region = check_mappings(mappings, region)
    pieces = [piece for mapping in mappings for piece in mapping_pieces(mapping, region)]
    assert all(region.contains(run) for run, _ in pieces)
    assert all(address == BASE + region.offset_of_page(run.first) for run, address in pieces)
    covered = [page for run, _ in pieces for page in range(run.first, run.end)]
    assert covered == [
        page
        for mapping in mappings
        for page in range(mapping.offset // 4096, (mapping.offset + mapping.size) // 4096)
    ]
