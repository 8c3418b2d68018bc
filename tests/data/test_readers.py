"""Reading documents: the same ones from every kind of file, each once, and errors that name file and place."""

import gzip
import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from refusals import has, refusal

from megamoe.data import inputs, readers, selection
from megamoe.data.file_formats import zstd
from megamoe.data.inputs import input_files, parts_of, units_of
from megamoe.data.selection import read_documents

DOCUMENTS = [
    "The mouse unrolls the map.\nIt shows a river, a mill and a bridge.\n",
    "Ünïcode — naïve 😀\r\nand a second line without an end",
    "One short line.\n",
    "\n  Indented after an empty line.\n\n\nThree empty lines before this one.\n",
]
KINDS = ["txt", "folder", "json", "jsonl", "jsonl.gz", "json.zst", "parquet", "dataset"]


def read(path, key="text"):
    return list(read_documents(input_files(path), key))


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
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=2)
    elif kind == "dataset":
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"text": documents}).save_to_disk(path)
        datasets.load_from_disk(path).map(lambda row: {"text": "changed " + row["text"]})  # leaves cache-*.arrow there
    elif kind == "txt":
        path.write_text(documents[0], encoding="utf-8", newline="")
    else:
        path.write_bytes(packed(json_lines(documents), kind))
    return path


# --- reading ---


@pytest.mark.parametrize("unit", [1 << 20, 3000, 100])
def test_every_kind_of_input_holds_the_same_documents_whatever_the_ranges(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(inputs, "UNIT", unit)
    draw = random.Random(1)
    many = [draw.choice(DOCUMENTS) * draw.randrange(1, 40) + str(number) for number in range(50)]
    for name, documents in (("few", DOCUMENTS), ("many", many)):
        (tmp_path / name).mkdir()
        for kind in KINDS:
            files = input_files(write(tmp_path / name, kind, documents))
            assert list(read_documents(files, "text")) == (documents[:1] if kind == "txt" else documents), (name, kind)
            parts = [part for file in files for part in parts_of(file, ["text"])]
            if kind != "parquet":  # whose footer is in no part
                assert sum(part.size for part in parts) == sum(file.stat().st_size for file in files), (name, kind)
            if kind in ("jsonl", "json"):
                assert len(parts) == -(-files[0].stat().st_size // unit)


def test_a_folder_is_read_in_order_below_and_only_its_text(tmp_path):
    for name, text in (("b/2.md", "B2"), ("a.txt", "A"), ("b/1.text", "B1"), ("image.png", "no"), ("c.json", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jsonl.zst").write_bytes(packed(json_lines(["D1", "D2"]), ".zst"))
    assert read(tmp_path) == ["A", "B1", "B2", "D1", "D2"]
    assert read(tmp_path / "b*" / "*t") == ["B1"]
    assert [file.name for file in input_files(tmp_path / "[ab]**")] == ["a.txt", "1.text", "2.md"]


def test_row_groups_of_a_unit_are_read_in_one_go(tmp_path):
    files = [write(tmp_path, "parquet", DOCUMENTS)]
    ((unit,), groups) = units_of({"a": files}, ["text"]), parts_of(files[0], ["text"])
    assert [(part.start, part.stop) for part in groups] == [(0, 1), (1, 2)]
    assert unit.parts == (groups[0]._replace(stop=2, size=sum(part.size for part in groups)),)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for kind in ("txt", "jsonl"):
        path = write(tmp_path, kind, DOCUMENTS[:1])
        path.write_bytes("\ufeff".encode() + path.read_bytes())
        assert read(path) == DOCUMENTS[:1]


def test_files_packed_one_after_the_other_are_read_to_the_end(tmp_path):
    for kind in ("jsonl.gz", "jsonl.zst"):
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
        (b'{"text": "caf\xe9"}', "0xe9", "offset 45", "convert"),
        (b'{"text": "no end}', "not JSON", "fix or remove"),
        (b"[" * 100_000, "not JSON"),  # beyond what Python reads
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "half \\ud83d"}', "half of a surrogate pair"),
        *((line, '"text"', "--text_key") for line in without_key),
    ):
        path = tmp_path / "a.jsonl"
        path.write_bytes(whole + b"\n" + line + b"\n")
        problem = refusal(read, path)
        has(problem, str(path), "line 3 (byte 32)", *parts)
        assert len(problem) < 500


def test_a_truncated_or_corrupt_packed_file_is_refused(tmp_path):
    plain = json_lines([random.Random(3).randbytes(200).hex() for _ in range(500)])
    for kind, data in (
        *((kind, packed(plain, kind)[:-1]) for kind in ("jsonl.gz", "jsonl.zst")),
        *((kind, packed(plain, kind)[:3]) for kind in ("jsonl.gz", "jsonl.zst")),
        ("jsonl.gz", b"not packed at all"),
        ("jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff" * 50),  # a whole header, then no deflate stream
        ("jsonl.gz", gzip.compress(b'{"text": "a"}')[:-8] + bytes(8)),  # wrong checksum
        ("jsonl.zst", b"not packed at all"),
    ):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(data)
        has(refusal(read, path), str(path), "cannot be read", "replace the file")


def test_what_is_no_row_with_a_text_is_refused_with_its_place(tmp_path):
    path = tmp_path / "a.parquet"
    for rows, place, *parts in (
        (["x", "y", None, "z"], "row 3", "--text_key", '--where "text!=null"'),
        (["x"] * 1200 + [None], "row 1201"),  # of the second batch
        (["x"] * 1500 + [None], "row 1501"),  # of the second row group
        ([["x"], ["y"]], "row 1", "--text_key"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=1400)
        has(refusal(read, path), str(path), place, *parts)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    has(refusal(read, path), str(path), "no column text", "--text_key")


def test_a_truncated_table_is_refused(tmp_path):
    draw = random.Random(2)
    for kind in ("parquet", "dataset"):
        path = write(tmp_path, kind, [draw.randbytes(300).hex() for _ in range(100)])
        (file,) = input_files(path)
        whole = file.read_bytes()
        for size in (3, len(whole) // 2, len(whole) - 9):
            file.write_bytes(whole[:size])
            has(refusal(read, path), str(file), "cannot be read", "replace the file")
    path = tmp_path / "a.parquet"  # whole at both ends
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 9000]}), path, compression=None)
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(data)
    has(refusal(read, path), str(path), "cannot be read", "replace the file")


def test_a_binary_file_and_a_document_above_the_limit_are_refused_and_an_empty_file_is_not(tmp_path, monkeypatch):
    (tmp_path / "picture.txt").write_bytes(b"PNG\x0d\x0a\x00")
    has(refusal(read, tmp_path), "picture.txt", "0x00 at offset 5", "binary")
    (tmp_path / "picture.txt").write_bytes(b"")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "text.md").write_text("text")
    assert read(tmp_path) == ["text"]
    for module in (inputs, readers, selection):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 40)
    long = ["short", "long" * 10 + "x"]
    has(refusal(read, write(tmp_path, "txt", long[1:])), "text.txt", "41 bytes", "limit of 40", "cut")
    has(refusal(read, write(tmp_path, "jsonl", long)), "text.jsonl", "line 2 (byte 27)", "longer than 40", "cut")
    has(refusal(read, write(tmp_path, "parquet", long)), "text.parquet", "row 2", "longer than 40", "cut")


def test_the_line_of_an_error_counts_from_the_beginning_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "UNIT", 1000)
    monkeypatch.setattr(readers, "CHUNK", 77)
    for kind in ("jsonl", "jsonl.gz"):
        lines = json_lines(["some text"] * 400).splitlines(keepends=True)
        lines[333] = b'{"text": "caf\xe9"}\n'
        place = sum(map(len, lines[:333]))
        (tmp_path / f"a.{kind}").write_bytes(packed(b"".join(lines), kind))
        said = refusal(read, tmp_path / f"a.{kind}")
        has(said, f"0xe9 at offset {place + 13}", f"line 334 (byte {place:,})")
