"""Best-fit packing."""

import itertools

import numpy as np
import pytest
from refusals import has, refusal

from megamoe.data import packing
from megamoe.data.index_file import write_index
from megamoe.data.sources import open_source

LENGTHS = [5, 8, 0, 8, 9, 17, 1, 3, 2, 25, 4, 1, 6, 16, 7]  # with samples of 8: whole, just full, empty and cut ones


def packed(prefix, lengths=LENGTHS, writes=True):
    """Of a pair whose every id says where it stands."""
    np.arange(sum(lengths), dtype=np.int32).tofile(f"{prefix}.bin")
    prefix.with_suffix(".idx").unlink(missing_ok=True)
    write_index(prefix.with_suffix(".idx"), np.int32, lengths)
    return open_source(str(prefix), 8, 10_000, writes, "best_fit")


def by_hand(lengths, capacity):
    """The room left in each bin after best-fit decreasing, item by item."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        room = min((room for room in rooms if room >= length), default=capacity)
        if room < capacity:
            rooms.remove(room)
        rooms.append(room - length)
    return rooms


@pytest.mark.parametrize("capacity", [1, 7, 64, 500])
def test_each_item_goes_into_the_fullest_bin_that_has_room(capacity):
    draw = np.random.default_rng(capacity)
    for count, largest in itertools.product((1, 2, 30, 1000), {1, capacity // 3 + 1, capacity}):
        lengths = draw.integers(1, largest + 1, count)
        bins = packing.best_fit(lengths, capacity)
        rooms = capacity - np.bincount(bins, lengths).astype(int)
        assert sorted(rooms) == sorted(by_hand(lengths, capacity))


def test_no_document_is_cut_that_fits_and_a_longer_one_goes_on_in_its_labels(tmp_path):
    source = packed(tmp_path / "c")
    ends = np.cumsum(LENGTHS).tolist()
    documents = [range(end - length, end) for length, end in zip(LENGTHS, ends, strict=True)]
    assert open_source(str(tmp_path / "c"), 8, 10_000, True).starts(0, ends[-1]).tolist() == sorted({0, *ends[:-1]})
    pieces = []
    for index, ahead in itertools.product(range(source.num_samples), (0, 2)):
        ids, starts = source.sample(index, ahead)
        parts = [part.tolist() for part in np.split(ids, starts)]
        if len(ids) > 8:
            document = next(one for one in documents if ids[0] in one)
            first = document.index(ids[0])
            assert parts == [list(document[first : first + 9 + ahead])]
        pieces += [part[:8] for part in parts] if not ahead else []
    # Of a token that is alone nothing can be learned.
    wanted = [list(one[at : at + 8]) for one in documents for at in range(0, len(one), 8) if len(one) > at + 1]
    assert sorted(pieces) == sorted(wanted)
    going_on = [len(source.sample(index).ids) for index in range(source.num_samples)].count(9)
    assert going_on == sum(max(length - 1, 0) // 8 for length in LENGTHS)
    assert source.unused == pytest.approx(1 - sum(map(len, wanted)) / (8 * source.num_samples))


def test_the_samples_are_kept_in_a_file_next_to_the_corpus_until_it_changes(tmp_path, monkeypatch):
    def samples(lengths=LENGTHS, writes=True):
        source = packed(tmp_path / "c", lengths, writes)
        return [source.sample(index).ids.tolist() for index in range(source.num_samples)]

    wanted = samples(writes=False)
    assert not list(tmp_path.glob("*.npy"))
    assert samples() == wanted
    with monkeypatch.context() as patch:
        patch.setattr(packing, "best_fit", None)
        assert samples(writes=False) == wanted
    other = samples(LENGTHS[::-1])
    assert other != wanted
    for number, file in enumerate(tmp_path.glob("*.npy")):  # where none can be read or written, every rank has its own
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[: -number * 9]) if number else file.mkdir()
    assert [samples(), samples(LENGTHS[::-1])] == [wanted, other]
    assert packed(tmp_path / "c").fingerprint != packed(tmp_path / "c", LENGTHS[::-1]).fingerprint


def test_what_cannot_be_packed_is_refused(tmp_path):
    has(refusal(packed, tmp_path / "c", [1] * 20), f"{tmp_path}/c", "no document of two tokens", "give one with text")
    has(refusal(open_source, "a:B", 8, 50, True, "best_fit"), "a:B", "best_fit", "leave --packing out")
