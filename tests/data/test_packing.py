"""Best-fit packing."""

import itertools

import numpy as np
import pytest
from refusals import has, refusal

from megamoe.data import packing
from megamoe.data.index_file import write_index
from megamoe.data.opening import open_source

LENGTHS = [5, 8, 8, 9, 17, 1, 3, 2, 25, 4, 1, 6, 16, 7]  # with samples of 8: whole, just full, and cut ones


def build(prefix, lengths):
    """A pair whose every id says where it stands."""
    np.arange(sum(lengths), dtype=np.int32).tofile(f"{prefix}.bin")
    write_index(prefix.with_suffix(".idx"), np.int32, lengths)
    return str(prefix)


def packed(prefix, writes=True):
    return open_source(prefix, 8, 10_000, writes, "best_fit")


def by_hand(lengths, capacity):
    """The room left in each bin after best-fit decreasing, item by item."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        best = min((room for room in rooms if room >= length), default=None)
        if best is not None:
            rooms.remove(best)
        rooms.append((capacity if best is None else best) - length)
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
    source = packed(build(tmp_path / "c", LENGTHS))
    ends = np.cumsum(LENGTHS).tolist()
    documents = [range(end - length, end) for length, end in zip(LENGTHS, ends, strict=True)]
    pieces = []
    for index, ahead in itertools.product(range(source.num_samples), (0, 2)):
        ids, starts = source.sample(index, ahead)
        parts = [part.tolist() for part in np.split(ids, starts)]
        if len(parts[0]) >= 8:
            document = next(one for one in documents if parts[0][0] in one)
            first = document.index(parts[0][0])
            assert first % 8 == 0
            assert parts == [list(document[first : first + 9 + ahead])]
        assert len(ids) <= 9 + ahead
        pieces += [part[:8] for part in parts] if not ahead else []
    # Of a token that is alone nothing can be learned.
    wanted = [list(one[at : at + 8]) for one in documents for at in range(0, len(one), 8) if len(one) > at + 1]
    assert sorted(pieces) == sorted(wanted)
    assert source.unused == pytest.approx(1 - sum(map(len, wanted)) / (8 * source.num_samples))


def test_the_samples_are_kept_in_a_file_next_to_the_corpus_until_it_changes(tmp_path, monkeypatch):
    def samples(source):
        return [source.sample(index).ids.tolist() for index in range(source.num_samples)]

    prefix = build(tmp_path / "c", LENGTHS)
    wanted = samples(packed(prefix, writes=False))
    assert not list(tmp_path.glob("*.npy"))
    packed(prefix)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "best_fit", None)
        assert samples(packed(prefix, writes=False)) == wanted
    (file,) = tmp_path.glob("c.best_fit-8-*")
    for content in (b"", file.read_bytes()[:-1]):
        file.write_bytes(content)
        assert samples(packed(prefix)) == wanted
    before = packed(prefix)
    (tmp_path / "c.idx").unlink()
    after = packed(build(tmp_path / "c", LENGTHS[::-1]))
    assert samples(after) != wanted
    assert after.fingerprint != before.fingerprint
    for file in tmp_path.glob("*.npy"):  # where none can be written, every rank computes them
        file.unlink()
        file.mkdir()
    assert samples(packed(prefix)) == samples(after)


def test_what_cannot_be_packed_is_refused(tmp_path):
    has(refusal(packed, build(tmp_path / "c", [1] * 20)), f"{tmp_path}/c", "no document of two tokens", "give one")
    has(refusal(packed, "own_source:Mine"), "own_source:Mine", "best_fit", "leave --packing out")
