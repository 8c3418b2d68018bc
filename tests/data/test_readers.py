"""Reading documents: the same ones from every kind of file, each once, and errors that name file and place."""

import gzip
import io
import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from refusals import has, refusal

from megamoe.data import inputs, readers
from megamoe.data.inputs import input_files, parts_of, units_of
from megamoe.data.readers import zstd
from megamoe.data.selection import read_documents

DOCUMENTS = [
    "The mouse unrolls the map.\nIt shows a river, a mill and a bridge.\n",
    "Ünïcode — naïve 😀\r\nand a second line without an end",
    "One short line.\n",
    "\n  Indented after an empty line.\n\n\nThree empty lines before this one.\n",
]


def read(path):
    return list(read_documents(input_files(path), "text"))


def json_lines(documents):
    return "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(documents)).encode()


def parquet(rows, name="text", **options):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({name: rows}), file, **options)
    return file.getvalue()


def arrow(rows):
    file, table = io.BytesIO(), pyarrow.table({"text": rows})
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return file.getvalue()


KINDS = {
    "json": json_lines,
    "jsonl": json_lines,
    "jsonl.gz": lambda documents: gzip.compress(json_lines(documents)),
    "jsonl.zst": lambda documents: zstd.compress(json_lines(documents)),
    "json.zst": lambda documents: zstd.compress(json_lines(documents)),
    "parquet": lambda documents: parquet(documents, row_group_size=2),
    "arrow": arrow,
}
PACKED = ("jsonl.gz", "jsonl.zst")


def write_folder(path, documents):
    path.mkdir()
    for number, text in enumerate(documents):
        (path / f"{number:03}.txt").write_text(text, encoding="utf-8", newline="")


def write_dataset(path, documents):
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(path)
    datasets.load_from_disk(path).map(lambda row: {"text": "changed " + row["text"]})  # leaves cache-*.arrow there


@pytest.mark.parametrize("unit", [1 << 20, 3000, 100])
def test_every_kind_of_input_holds_the_same_documents_whatever_the_ranges(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(inputs, "UNIT", unit)
    draw = random.Random(1)
    documents = [draw.choice(DOCUMENTS) * draw.randrange(1, 40) + str(number) for number in range(50)]
    for kind, data_of in KINDS.items():
        (tmp_path / f"a.{kind}").write_bytes(data_of(documents))
    write_folder(tmp_path / "folder", documents)
    write_dataset(tmp_path / "dataset", documents)
    for path in list(tmp_path.iterdir()):
        assert read(path) == documents
        files = input_files(path)
        parts = [part for file in files for part in parts_of(file, ["text"])]
        if path.suffix != ".parquet":  # whose footer is in no part
            assert sum(part.size for part in parts) == sum(file.stat().st_size for file in files)
        if path.suffix in (".jsonl", ".json"):
            assert len(parts) == -(-files[0].stat().st_size // unit)


def test_a_folder_is_read_in_order_below_and_only_its_text(tmp_path):
    for name, text in (("b/2.md", "B2"), ("a.txt", "A"), ("b/1.text", "B1"), ("image.png", "no"), ("c.json", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jsonl.zst").write_bytes(KINDS["jsonl.zst"](["D1", "D2"]))
    assert read(tmp_path) == ["A", "B1", "B2", "D1", "D2"]
    assert read(tmp_path / "b*" / "*t") == ["B1"]
    assert [file.name for file in input_files(tmp_path / "[ab]**")] == ["a.txt", "1.text", "2.md"]


def test_row_groups_of_a_unit_are_read_in_one_go(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet(DOCUMENTS, row_group_size=2))
    ((unit,), groups) = units_of({"a": [file]}, ["text"]), parts_of(file, ["text"])
    assert [(part.start, part.stop) for part in groups] == [(0, 1), (1, 2)]
    assert unit.parts == (groups[0]._replace(stop=2, size=sum(part.size for part in groups)),)


def test_marks_seams_and_what_is_empty_are_no_text(tmp_path):
    mark = "\ufeff".encode()
    for name, data, expected in (
        ("a.txt", mark + DOCUMENTS[0].encode(), DOCUMENTS[:1]),
        ("a.jsonl", mark + json_lines(DOCUMENTS), DOCUMENTS),
        *((f"a.{kind}", KINDS[kind](DOCUMENTS[:2]) + KINDS[kind](DOCUMENTS[2:]), DOCUMENTS) for kind in PACKED),
        ("a.txt", b" \t\r\n\n", []),
        ("a.txt", b"", []),
        ("a.parquet", b"", []),
        ("a.jsonl", json_lines(["", "first", " \t\r\n\n", "second\n", "\u2003"]), ["first", "second\n"]),
        ("a.jsonl", b"\n" + json_lines(["x"])[:-1] + b"\r\n  \n\n" + json_lines(["y"])[:-1], ["x", "y"]),
    ):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == expected


def test_a_missing_path_and_a_folder_without_text_are_refused(tmp_path):
    has(refusal(input_files, tmp_path / "no"), str(tmp_path / "no"), "does not exist", "give")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    has(refusal(input_files, tmp_path), str(tmp_path), ".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst")


NO_TEXT = [{"body": "x"}, {"text": None}, {"text": 3}, {"text": ["x"]}, [1], "x", 3, None]
MANY = [random.Random(2).randbytes(300).hex() for _ in range(100)]
WHOLE = {kind: KINDS[kind](MANY) for kind in (*PACKED, "parquet", "arrow")}
BODY = parquet(["x" * 9000], compression=None)


def refused_inputs():
    for line, *parts in (
        (b'{"text": "caf\xe9"}', "0xe9", "offset 45", "convert"),
        (b'{"text": "no end}', "not JSON", "fix or remove"),
        (b"[" * 100_000, "not JSON"),  # beyond what Python reads
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": "half \\ud83d"}', "half of a surrogate pair"),
        *((json.dumps(record).encode(), '"text"', "--text_key") for record in NO_TEXT),
    ):
        yield "jsonl", b'{"text": "whole \\ud83d\\ude00"}\n\n' + line + b"\n", "line 3 (byte 32)", *parts
    for rows, *parts in (
        (["x", "y", None, "z"], "row 3", "--text_key", '--where "text!=null"'),
        (["x"] * 1200 + [None], "row 1201"),  # of the second batch
        (["x"] * 1500 + [None], "row 1501"),  # of the second row group
        ([["x"], ["y"]], "row 1", "--text_key"),
    ):
        yield "parquet", parquet(rows, row_group_size=1400), *parts
    for kind, data in (
        *((kind, whole[:size]) for kind, whole in WHOLE.items() for size in (3, len(whole) // 2, -9)),
        *((kind, b"not packed at all") for kind in WHOLE),
        ("jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff" * 50),  # a whole header, then no deflate stream
        ("jsonl.gz", gzip.compress(b'{"text": "a"}')[:-8] + bytes(8)),  # wrong checksum
        ("parquet", BODY[:4] + bytes(36) + BODY[40:]),  # whole at both ends
    ):
        yield kind, data, "cannot be read", "replace the file"
    yield "txt", b"PNG\x0d\x0a\x00", "0x00 at offset 5", "binary"
    yield "parquet", parquet(["x"], "body"), "no column text", "--text_key"


def test_what_cannot_be_read_is_refused_with_file_and_place(tmp_path):
    for kind, data, *parts in refused_inputs():
        path = tmp_path / f"a.{kind}"
        path.write_bytes(data)
        problem = refusal(read, path)
        has(problem, str(path), *parts)
        assert len(problem) < 500


def test_a_document_above_the_limit_is_refused(tmp_path, monkeypatch):
    for module in (inputs, readers):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 40)
    for kind, *parts in (
        ("txt", "41 bytes", "limit of 40", "cut"),
        ("jsonl", "line 2 (byte 27)", "longer than 40", "cut"),
    ):
        long = "long" * 10 + "x"
        (tmp_path / f"a.{kind}").write_bytes(long.encode() if kind == "txt" else KINDS[kind](["short", long]))
        has(refusal(read, tmp_path / f"a.{kind}"), f"a.{kind}", *parts)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_the_line_of_an_error_counts_from_the_beginning_of_the_file(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(inputs, "UNIT", 1000)
    monkeypatch.setattr(readers, "CHUNK", 77)
    lines = json_lines(["some text"] * 400).splitlines(keepends=True)
    lines[333] = b'{"text": "caf\xe9"}\n'
    data, place = b"".join(lines), sum(map(len, lines[:333]))
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(data) if kind == "jsonl.gz" else data)
    has(refusal(read, tmp_path / f"a.{kind}"), f"0xe9 at offset {place + 13}", f"line 334 (byte {place:,})")
