"""Token files are checked once."""

import numpy as np
import pytest
from corpora import build, prepared, random_tokens
from refusals import has, refusal, refusals

from megamoe.commands import check
from megamoe.data.index_file import write_index
from megamoe.data.token_files import TokenCorpus


def test_a_pair_made_elsewhere_is_read_once_and_a_run_trusts_its_record(tmp_path, call, monkeypatch):
    pair = build(tmp_path / "theirs", [*random_tokens(500, 50), 77], np.int32)
    before = TokenCorpus(pair, 10, 78)
    monkeypatch.setattr(check, "PIECE", 64)
    (line,) = call("check", f"{pair}.bin")
    has(line, "72 documents", "501 tokens", "ids up to 77")
    monkeypatch.setattr(TokenCorpus, "_check_id", lambda corpus, token_id: read.append(token_id))
    read = []
    after = TokenCorpus(pair, 10, 78)
    assert read == [77]  # that of the record
    assert after.sample(3).ids.tolist() == before.sample(3).ids.tolist()
    assert after.fingerprint in line
    assert call("check", f"{pair}.bin") == [line]
    build(tmp_path / "bad", [1, -3, 2], np.int32)
    has(refusal(call, "check", tmp_path / "bad"), "bad.bin", "the id -3")


def test_documents_of_a_pair_that_all_end_with_one_token_begin_at_the_one_before(tmp_path, call):
    lengths = [4, 1, 5, 3]
    for name, opens, tokens in (
        ("end", True, [1, 2, 3, 0, 0, 4, 5, 6, 7, 0, 8, 9, 0]),
        ("begin_and_end", False, [1, 2, 3, 0, 1, 1, 5, 6, 7, 0, 1, 9, 0]),
        ("neither", False, [1, 2, 3, 0, 0, 4, 5, 6, 7, 8, 8, 9, 0]),
    ):
        np.asarray(tokens, np.int32).tofile(tmp_path / f"{name}.bin")
        write_index(tmp_path / f"{name}.idx", np.int32, lengths)
        call("check", tmp_path / name)
        assert TokenCorpus(tmp_path / name, 12, 10).sample(0).starts.tolist() == [n - opens for n in (4, 5, 10)]


@pytest.mark.parametrize("suffix", ["bin", "idx", "sums"])
def test_every_file_of_a_prepared_shard_is_compared_with_its_record(tmp_path, call, suffix):
    folder = prepared(tmp_path / "c", {"train": [[[1, 2, 3] * 9]]}).parent
    call("check", folder)
    with open(folder / f"train-00000.{suffix}", "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x07")
    assert refusals(call, "check", folder)
