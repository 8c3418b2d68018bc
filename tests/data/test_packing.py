"""Best-fit packing."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from refusals import has, refusal

from megamoe.commands.check import read_shard
from megamoe.data import packing
from megamoe.data.corpus_record import split_of
from megamoe.data.index_file import write_index
from megamoe.data.sources import Location, open_source

LENGTHS = [5, 8, 0, 8, 9, 17, 1, 3, 2, 25, 4, 1, 6, 16, 7]  # with samples of 8: whole, just full, empty and cut ones


def packed(prefix, lengths=LENGTHS, writes=True, opens=False):
    """Of a pair whose every id says where it stands."""
    np.arange(sum(lengths), dtype=np.int32).tofile(f"{prefix}.bin")
    prefix.with_suffix(".idx").unlink(missing_ok=True)
    write_index(prefix.with_suffix(".idx"), np.int32, lengths)
    if opens:
        Path(f"{prefix}.json").write_text(split_of([read_shard(prefix)], end_opens_next=True).model_dump_json())
    return open_source(Location(prefix), 8, 10_000, writes, "best_fit")


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


@pytest.mark.parametrize("opens", [False, True])
def test_no_document_is_cut_that_fits_and_each_token_but_the_first_is_a_label_once(tmp_path, opens):
    source, last = packed(tmp_path / "c", opens=opens), sum(LENGTHS) - 1
    begins = sorted({0, *(end - opens for end in np.cumsum(LENGTHS).tolist() if end < last)})
    documents = [list(range(*one)) for one in itertools.pairwise([*begins, last])]
    samples = [source.sample(index, ahead=2) for index in range(source.num_samples)]
    pieces = [part.tolist() for ids, _, starts in samples for part in np.split(ids, starts)]
    assert sorted(pieces) == [one[at : at + 8] for one in documents for at in range(0, len(one), 8)]
    for ids, labels, _ in samples:
        assert labels[: len(ids)].tolist() == (ids + 1).tolist()
        further = next((begin - ids[-1] for begin in begins if begin > ids[-1]), last - ids[-1])
        assert len(labels) - len(ids) == (min(further - 1, 2) if len(ids) == 8 == labels[7] - ids[0] else 0)
    assert source.unused == pytest.approx(1 - last / (8 * source.num_samples))


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


def test_a_source_of_the_users_own_is_not_packed():
    has(refusal(open_source, Location(Path("a:B")), 8, 50, True, "best_fit"), "a:B", "best_fit", "leave --packing out")
