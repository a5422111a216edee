"""Texts: every format gives the same rows, and what is broken is named."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from smoothquant.bundled import wikitext
from smoothquant.core import texts
from smoothquant.core.texts import read_texts

ROWS = wikitext("validation")[:60]


def json_lines(rows):
    return "".join(json.dumps({"id": 1, "text": row}) + "\n" for row in rows).encode()


def write_jsonl(path, rows):
    path.write_bytes(json_lines(rows))


def write_parquet(path, rows, column="text"):
    table = pyarrow.table({"id": [1] * len(rows), column: pyarrow.array(rows, pyarrow.string())})
    pyarrow.parquet.write_table(table, path)


def write_zst(path, rows):
    """Two frames, cut inside of a line and of a character."""
    content = json_lines(rows) + '{"text": "é"}\n'.encode()
    cut = len(content) - 4
    parts = (content[:cut], content[cut:])
    path.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, parts)))


def write_lines(path, rows):
    # A blank row is a line of white space, as in the WikiText files.
    path.write_text("".join(row or " \n" for row in rows), encoding="utf-8", newline="\n")


WRITERS = {
    "a.txt": write_lines,
    "a.raw": write_lines,
    "a.jsonl": write_jsonl,
    "a.json": write_jsonl,
    "a.parquet": write_parquet,
    "a.jsonl.zst": write_zst,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_every_format_gives_the_same_texts(name, block, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "READ_BYTES", block)
    WRITERS[name](tmp_path / name, ROWS)
    want = ROWS + ["é"] * name.endswith("zst")
    assert list(read_texts(tmp_path / name)) == want
    assert list(read_texts(str(tmp_path / name))) == want
    assert list(read_texts(iter(ROWS))) == ROWS


def test_several_files_are_read_one_after_the_other(tmp_path):
    for name in ("a.txt", "a.parquet"):
        WRITERS[name](tmp_path / name, ROWS)
    paths = [tmp_path / "a.txt", str(tmp_path / "a.parquet")]
    for source in (paths, tuple(paths)):
        assert list(read_texts(source)) == ROWS * 2
    assert list(read_texts([str(tmp_path / "a.txt"), "text"])) == [str(tmp_path / "a.txt"), "text"]


def test_lines_break_at_newlines_only(tmp_path):
    rows = ["a\x85b\u2028c\x0cd\re\n", "", "last"]
    (tmp_path / "a.txt").write_bytes("a\x85b\u2028c\x0cd\re\n \t\nlast".encode())
    assert list(read_texts(tmp_path / "a.txt")) == rows


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    WRITERS[name](tmp_path / name, ["one\n", "two\n"])
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert list(read_texts(tmp_path / name)) == ["one\n", "two\n"]


COMPRESSED = zstandard.ZstdCompressor().compress(json_lines(ROWS))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, r"source: no such file: .*missing\.txt"),
        ("a.csv", b"text\n", r"source must end in .*\.parquet.*a\.csv"),
        ("a.txt", b"good\n\xff\xfe", r"source: .*a\.txt.*line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl.*line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', r"a\.jsonl.*line 2.*\"text\""),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a\.jsonl.*line 3"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl.*line 1.*\"text\""),
        ("a.jsonl", b"\n" + b"[" * 100_000, r"a\.jsonl.*line 2.*recursion"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl.*line 1.*surrogates"),
        ("a.jsonl.zst", b"no frame", r"a\.jsonl\.zst.*zstandard"),
        ("a.jsonl.zst", b"", r"a\.jsonl\.zst.*ends too early"),
        ("a.jsonl.zst", COMPRESSED[:-1], r"a\.jsonl\.zst.*ends too early"),
        ("a.jsonl.zst", COMPRESSED[: len(COMPRESSED) // 2], r"a\.jsonl\.zst.*ends too early"),
        ("a.jsonl.zst", COMPRESSED * 2 + COMPRESSED[:20], r"a\.jsonl\.zst.*ends too early"),
        ("a.parquet", b"PAR1 but not really", r"source: .*a\.parquet"),
    ],
)
def test_unreadable_sources(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(texts, "open", denied, raising=False)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", denied)
    for name, write in WRITERS.items():
        write(tmp_path / name, ROWS)
    for name in WRITERS:
        with pytest.raises(ValueError, match=f"source: .*{name}.*Permission denied"):
            list(read_texts(tmp_path / name))


@pytest.mark.parametrize("rows", [["a"], []])
def test_parquet_without_a_text_column(rows, tmp_path):
    write_parquet(tmp_path / "a.parquet", rows, column="words")
    with pytest.raises(ValueError, match='a.parquet.*no column "text"'):
        list(read_texts(tmp_path / "a.parquet"))
    write_parquet(tmp_path / "a.parquet", [None])
    with pytest.raises(ValueError, match='a.parquet.*column "text": expected a string, got None'):
        list(read_texts(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name, package", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_missing_reader_package(name, package, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=f"{name}.* pip install {package}"):
        read_texts(tmp_path / name)


def test_wrong_types_of_source():
    with pytest.raises(TypeError, match="source .*5"):
        read_texts(5)
    with pytest.raises(TypeError, match="item 1 is int"):
        list(read_texts(["a", 5]))
    with pytest.raises(ValueError, match="item 1: .*surrogates"):
        list(read_texts(["a", "\ud800"]))


def test_missing_path_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="source"):
        read_texts("no-such-file.jsonl")
