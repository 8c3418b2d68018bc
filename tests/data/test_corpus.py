"""Text to tokens: every character once, end-of-text between documents, nothing half-written."""

import gzip
import itertools
import json
import random

import numpy as np
import pytest
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset
from refusals import has, refusal
from tokenizers import Tokenizer, models, pre_tokenizers

from megamoe.data import corpus
from megamoe.data.corpus import input_files, read_documents, split_documents, write_corpus, zstd
from megamoe.data.corpus_record import read_record
from megamoe.data.tokenizer import END_OF_TEXT, train_tokenizer
from megamoe.utils.errors import UserError

DOCUMENTS = [
    "The mouse unrolls the map.\nIt shows a river, a mill and a bridge.\n",
    "Ünïcode — naïve 😀\r\nand a second line without an end",
    "One short line.\n",
    "\n  Indented after an empty line.\n\n\nThree empty lines before this one.\n",
]
KINDS = ["txt", "folder", "jsonl", "jsonl.gz", "jsonl.zst"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*DOCUMENTS] * 10, 300)


def read(path, key="text"):
    return list(read_documents(input_files(path), key, lambda count: None))


def json_lines(documents, key="text"):
    return "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(documents)).encode()


def packed(data, kind):
    if kind.endswith(".gz"):
        return gzip.compress(data)
    return zstd.compress(data) if kind.endswith(".zst") else data


def write(folder, kind, documents):
    """`documents` as a file or folder of `kind`; a text file holds only the first."""
    path = folder / f"text.{kind}"
    if kind == "folder":
        path.mkdir()
        for number, text in enumerate(documents):
            (path / f"{number:03}.txt").write_text(text, encoding="utf-8", newline="")
    elif kind == "txt":
        path.write_text(documents[0], encoding="utf-8", newline="")
    else:
        path.write_bytes(packed(json_lines(documents), kind))
    return path


# --- reading ---


def test_every_kind_of_input_holds_the_same_documents_and_progress_reports_the_bytes_on_disk(tmp_path):
    draw = random.Random(1)
    for name, documents in (
        ("few", DOCUMENTS),
        ("short", [draw.randbytes(3).hex() for _ in range(3)]),
        ("long", [draw.randbytes(200_000).hex() for _ in range(3)]),
    ):
        (tmp_path / name).mkdir()
        for kind in KINDS:
            files, counts = input_files(write(tmp_path / name, kind, documents)), []
            found = list(read_documents(files, "text", counts.append))
            assert found == (documents[:1] if kind == "txt" else documents), (name, kind)
            assert sum(counts) == sum(file.stat().st_size for file in files), (name, kind)


def test_a_folder_is_read_in_order_below_and_only_its_text(tmp_path):
    for name, text in (("b/2.md", "B2"), ("a.txt", "A"), ("b/1.text", "B1"), ("image.png", "no"), ("c.json", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jsonl.zst").write_bytes(packed(json_lines(["D1", "D2"]), ".zst"))
    assert read(tmp_path) == ["A", "B1", "B2", "D1", "D2"]


def test_files_packed_one_after_the_other_are_read_to_the_end(tmp_path):
    for kind in KINDS[3:]:
        path = tmp_path / f"a.{kind}"
        path.write_bytes(packed(json_lines(DOCUMENTS[:2]), kind) + packed(json_lines(DOCUMENTS[2:]), kind))
        assert read(path) == DOCUMENTS


def test_empty_documents_and_lines_are_left_out(tmp_path):
    for kind in ("folder", "jsonl"):
        assert read(write(tmp_path, kind, ["", "first", " \t\r\n\n", "second\n", "\u2003"])) == ["first", "second\n"]
    (tmp_path / "b.jsonl").write_bytes(b"\n" + json_lines(["x"]).strip() + b"\r\n  \n\n" + json_lines(["y"]).strip())
    assert read(tmp_path / "b.jsonl") == ["x", "y"]


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path):
    has(refusal(input_files, tmp_path / "no"), str(tmp_path / "no"), "does not exist", "give")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    has(refusal(input_files, tmp_path), str(tmp_path), ".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst")


NO_TEXT = [{"body": "x"}, {"text": None}, {"text": 3}, {"text": ["x"]}, [1], "x", 3, None]


def test_what_is_no_json_of_a_text_is_refused_with_its_line(tmp_path):
    without_key = (*(json.dumps(record).encode() for record in NO_TEXT),)
    whole = b'{"text": "whole \\ud83d\\ude00"}\n'
    for line, *parts in (
        (b'{"text": "caf\xe9"}', "0xe9", "offset 13", "convert"),
        (b'{"text": "no end}', "not JSON", "fix or remove"),
        (b"[" * 100_000, "not JSON"),  # beyond what Python reads
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "half \\ud83d"}', "half of a surrogate pair"),
        *((line, '"text"', "--text_key") for line in without_key),
    ):
        path = tmp_path / "a.jsonl"
        path.write_bytes(whole + b"\n" + line + b"\n")
        problem = refusal(read, path)
        has(problem, str(path), "line 3", *parts)
        assert len(problem) < 500


def test_a_truncated_or_corrupt_packed_file_is_refused(tmp_path):
    plain = json_lines([random.Random(3).randbytes(200).hex() for _ in range(500)])
    for kind, data in (
        *((kind, packed(plain, kind)[:-1]) for kind in KINDS[3:]),
        *((kind, packed(plain, kind)[:3]) for kind in KINDS[3:]),
        ("jsonl.gz", b"not packed at all"),
        ("jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff" * 50),  # a whole header, then no deflate stream
        ("jsonl.gz", gzip.compress(b'{"text": "a"}')[:-8] + bytes(8)),  # wrong checksum
        ("jsonl.zst", b"not packed at all"),
    ):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(data)
        has(refusal(read, path), str(path), "cannot be read", "replace the file")


# --- the held-out split ---


def splits(documents, fraction):
    pairs = list(split_documents(documents, fraction))
    return {name: [text for split, text in pairs if split == name] for name in ("train", "valid")}


def test_every_kth_document_is_held_out():
    for fraction, every, more in ((0.5, 2, 7), (0.25, 4, 1), (0.05, 20, 0), (0.01, 100, 7)):
        documents = [f"document {number}" for number in range(every + more)]
        found = splits(documents, fraction)
        assert found["valid"] == documents[every - 1 :: every]
        assert found["train"] == [text for number, text in enumerate(documents, start=1) if number % every]


def test_train_and_valid_hold_every_character_once_and_in_order():
    draw = random.Random(1)
    for count, fraction in itertools.product((1, 3, 19, 20, 45), (0.05, 0.2, 0.37, 0.5)):
        documents = ["".join(draw.choices("ab \n", k=draw.randrange(40, 90))) + "end" for _ in range(count)]
        pieces = [text for _, text in split_documents(iter(documents), fraction)]
        assert "".join(pieces) == "".join(documents)
    documents = ["".join(f"line {number} of {name}\n" for number in range(100)) for name in "abcdefghi"]
    found = splits(documents, 0.1)  # nine, where every tenth would be held out: the tails are, cut at a line's end
    for kept, held, document in zip(found["train"], found["valid"], documents, strict=True):
        assert kept.endswith("\n")
        assert 0.1 * len(document) - len("line 99 of a\n") < len(held) <= 0.1 * len(document)


def test_a_short_document_or_a_tail_of_empty_lines_is_not_split_into_nothing_and_the_rest():
    for document in ("a", "ab\n", "\n\n\n\nx", "x\n\n\n\n\n\n\n\n\n\n", "line\n" * 10 + "\n" * 20):
        pieces = [text for _, text in split_documents([document], 0.05)]
        assert "".join(pieces) == document
        assert all(text.strip() for text in pieces), pieces


# --- writing ---


def made(documents, tokenizer, out, split="train"):
    return write_corpus(((split, text) for text in documents), tokenizer, out)


def items(folder, split):
    """(documents as lists of items, dataset) read by DeepSpeed."""
    dataset = MMapIndexedDataset(str(folder / f"{split}-00000"), skip_warmup=True)
    starts = dataset.doc_idx.tolist()
    assert starts[0] == 0
    assert starts[-1] == len(dataset)
    return [
        [dataset[item].tolist() for item in range(start, end)] for start, end in itertools.pairwise(starts)
    ], dataset


def documents_of(folder, split, tokenizer):
    """Documents decoded from what DeepSpeed reads; checks that end-of-text ends each and stands nowhere else."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    texts = []
    for pieces in items(folder, split)[0]:
        tokens = [token for piece in pieces for token in piece]
        assert [place for place, token in enumerate(tokens) if token == end] == [len(tokens) - 1]
        texts.append(tokenizer.decode(tokens[:-1], skip_special_tokens=False))
    return texts


def test_the_tokens_decode_to_the_documents_of_each_split_and_are_counted(tmp_path, tokenizer):
    out = tmp_path / "out"
    documents = [f"number {number}\n{DOCUMENTS[number % 4]}" for number in range(12)]
    record = write_corpus(split_documents(documents, 0.25), tokenizer, out)
    assert read_record(out) == record
    expected = {"train": [text for number, text in enumerate(documents) if number % 4 != 3], "valid": documents[3::4]}
    for split, texts in expected.items():
        assert documents_of(out, split, tokenizer) == texts
        found = record.splits[split]
        assert found.documents == len(texts)
        assert found.tokens == (out / f"{split}-00000.bin").stat().st_size // 2
        assert found.bytes == sum(len(text.encode()) for text in texts)


def test_a_document_that_names_the_end_of_text_does_not_end_there(tmp_path, tokenizer):
    documents = [f"before {END_OF_TEXT} after", END_OF_TEXT, "plain"]
    made(documents, tokenizer, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train", tokenizer) == documents


@pytest.mark.parametrize("batch", [90, 1 << 20])
def test_long_documents_are_encoded_in_pieces_and_stay_one_document(tmp_path, tokenizer, monkeypatch, batch):
    monkeypatch.setattr(corpus, "PIECE", 40)
    monkeypatch.setattr(corpus, "BATCH", batch)
    draw = random.Random(4)
    lines = ["".join(draw.choices("abcdefg \t", k=draw.randrange(30))) for _ in range(60)]
    documents = [
        "short\n",
        "\n".join(lines),
        "\r\n".join(lines) + "\r\n",
        "x" * 300,
        "y" * 41 + "\n",
        "z" * 40 + "\n" + "z" * 40,
    ]
    record = made(documents, tokenizer, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train", tokenizer) == documents
    assert record.splits["train"].documents == len(documents)


def words_tokenizer(size):
    made_tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0, **{f"w{i}": i for i in range(1, size)}}))
    made_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return made_tokenizer


@pytest.mark.parametrize(("size", "dtype"), [(32768, np.int16), (65537, np.int32)])
def test_the_largest_id_of_a_vocabulary_fits_its_token_type(tmp_path, size, dtype):
    made([f"w1 w{size - 1}"], words_tokenizer(size), tmp_path / "out")
    documents, dataset = items(tmp_path / "out", "train")
    assert documents == [[[1, size - 1, 0]]]
    assert dataset.dtype == dtype


def test_no_training_text_or_no_end_of_text_is_refused_and_leaves_nothing(tmp_path, tokenizer):
    for pairs in ([], [("valid", "held out\n")]):
        has(refusal(write_corpus, pairs, tokenizer, tmp_path / "out"), "empty", "give")
    bare = Tokenizer(models.WordLevel({"w": 0}))
    has(refusal(made, DOCUMENTS, bare, tmp_path / "out"), "end-of-text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [UserError("broken line; fix it."), KeyboardInterrupt()])
def test_nothing_is_left_when_reading_fails_midway(tmp_path, tokenizer, monkeypatch, error):
    monkeypatch.setattr(corpus, "BATCH", 10)

    def documents():
        yield "train", DOCUMENTS[0]
        yield "valid", DOCUMENTS[1]
        (partial,) = tmp_path.iterdir()  # the work has begun
        assert (partial / "out" / "train-00000.bin").exists()
        raise error

    with pytest.raises(type(error)):
        write_corpus(documents(), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_another_process_has_made_meanwhile_is_refused_and_left_untouched(tmp_path, tokenizer):
    out = tmp_path / "out"

    def documents():
        yield "train", DOCUMENTS[0]
        out.mkdir()
        (out / "kept").write_text("precious")

    has(refusal(write_corpus, documents(), tokenizer, out), str(out), "exists already", "remove it, or choose another")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [out / "kept"]
