"""Files as text; and each bad file its own sentence."""

import io
import os
import pickle
from pathlib import Path

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from agentmesh import DocumentError
from agentmesh.rag.loaders import decode, knows, load_document, parse
from agentmesh.rag.splitter import split


def pdf(*pages: str, password: str = "", owner: str = "") -> bytes:
    """A PDF with a line of Helvetica a page."""
    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(300, 300)
        named = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        font = DictionaryObject({NameObject(k): NameObject(v) for k, v in named.items()})
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode() if text else b"")
        page[NameObject("/Contents")] = writer._add_object(content)
    if password or owner:
        writer.encrypt(password, owner or None, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_text_in_its_encodings(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_bytes("naïve\r\n猫\rend".encode(encoding))
        assert load_document(tmp_path / "a.txt").text == "naïve\n猫\nend"
    (tmp_path / "b.txt").write_bytes("naïve".encode("cp1252"))
    assert load_document(tmp_path / "b.txt", encoding="cp1252").text == "naïve"
    assert parse("猫".encode("utf-16-le"), "c.txt", encoding="utf-16-le").text == "猫"


def test_html_is_its_article_with_titles() -> None:
    story = "<p>" + "The train leaves at seven and arrives at nine. " * 8 + "</p>"
    page = (
        "<html><head><title>T</title></head><body><nav><a href='/'>Home</a> <a href='/x'>Menu</a></nav><article>"
        f"<h1>Trains</h1>{story}<h2>Fares</h2>{story}</article><footer>Imprint</footer></body></html>"
    )
    document = parse(page.encode(), "a.html")
    assert "Menu" not in document.text
    assert [(h.level, h.text) for h in document.headings] == [(1, "Trains"), (2, "Fares")]
    assert split(document, "a.html", size=200, overlap=0)[-1].heading == ("Trains", "Fares")
    assert "only this" in parse(b"<p>only this</p>", "b.htm").text


def test_pdf_knows_its_pages() -> None:
    document = parse(pdf("The first page.", "", "The third page."), "a.pdf")
    first, third = split(document, "a.pdf", size=20, overlap=0)
    assert (first.text, first.metadata["page"]) == ("The first page.", 1)
    assert (third.text, third.metadata["page"]) == ("The third page.", 3)
    assert len(PdfReader(io.BytesIO(pdf("x"))).pages) == 1


def test_pdf_that_only_forbids_copying_is_read() -> None:
    data = pdf("Anybody may read this.", owner="boss")
    assert "Anybody may read this." in parse(data, "a.pdf").text
    aes = b"/V 4\n/CF << /StdCF << /CFM /AESV2 /Length 16 >> >>\n/StmF /StdCF\n/StrF /StdCF"
    with pytest.raises(
        DocumentError, match="'a.pdf' (is encrypted with AES; run: pip install|cannot be read|has 1 page)"
    ):
        parse(data.replace(b"/V 2", aes).replace(b"/R 3", b"/R 4"), "a.pdf")


def test_csv_rows_are_chunks_that_can_be_filtered() -> None:
    text = 'id;name;price;zip\n1;"Tea; green";2.50;01234\n2;Coffee;3.0;\n'
    tea, coffee = split(parse(text.encode(), "a.csv"), "a.csv")
    assert tea.text == "id: 1\nname: Tea; green\nprice: 2.50\nzip: 01234"
    assert tea.metadata == {"row": 1, "id": 1, "name": "Tea; green", "price": 2.5, "zip": "01234"}
    assert coffee.metadata == {"row": 2, "id": 2, "name": "Coffee", "price": 3.0}
    assert len(split(parse(b"a\tb\n1\t2\n3\t4\n5\t6,7\n", "a.tsv"), "a.tsv")) == 3


def test_json_lines() -> None:
    lines = (
        '{"text": "one", "year": 2024, "tags": ["a"], "odd": {"x": 1}, "none": null, "nan": NaN}\n\n"two"\n'
        '{"content": "three\\r\\nfour"}\n'
    )
    one, two, three = split(parse(lines.encode(), "a.jsonl"), "a.jsonl")
    assert (one.text, one.metadata) == ("one", {"line": 1, "year": 2024, "tags": ["a"]})
    assert (two.text, three.text, three.metadata) == ("two", "three\nfour", {"line": 4})


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", b"", "'a.txt' holds no text"),
        ("a.txt", b"caf\xe9", "'a.txt' is not utf-8 (0xe9 at byte 3); convert it, or name its encoding"),
        ("a.txt", b"\xff\xfea", "'a.txt' is not utf-16"),
        ("a.md", b"\x7fELF\0\0\0", "'a.md' is binary"),
        ("a.html", b"\0\1\2", "'a.html' is binary"),
        ("a.html", b"<html><body></body></html>", "'a.html' holds no text"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "'a.png' is binary"),
        ("a.pdf", b"no pdf at all", "'a.pdf' cannot be read as PDF"),
        ("a.pdf", b"", "'a.pdf' cannot be read as PDF"),
        ("a.pdf", pdf("secret", password="x"), "'a.pdf' is encrypted"),
        ("a.pdf", pdf("", ""), "'a.pdf' has 2 pages and no text; if it is a scan"),
        ("a.pdf", pdf("text")[:200], "'a.pdf' cannot be read as PDF"),
        ("a.csv", b"a,b\n", "'a.csv' holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 of 'a.jsonl' is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 of 'a.jsonl' is not JSON"),
        ("a.jsonl", b"[1]", "is not an object"),
        ("a.jsonl", b'{"body": 3}', "has none of the fields text, content"),
        ("a.jsonl", b"[" * 100_000, "line 1 of 'a.jsonl' is not JSON"),
    ],
)  # fmt: skip
def test_bad_files(name: str, data: bytes, sentence: str) -> None:
    with pytest.raises(DocumentError) as told:
        parse(data, name)
    assert sentence in str(told.value)
    assert told.value.source == name
    assert pickle.loads(pickle.dumps(told.value)).source == name


def test_a_file_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"'no\.txt' cannot be read: No such file"):
        load_document(tmp_path / "no.txt")
    with pytest.raises(DocumentError, match="cannot be read: Is a directory"):
        load_document(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DocumentError, match=r"'pipe\.txt' is not a file"):
        load_document(tmp_path / "pipe.txt")
    big = tmp_path / "big.txt"
    with big.open("wb") as f:
        os.ftruncate(f.fileno(), 2 * 2**30)  # sparse: it takes no room
    with pytest.raises(DocumentError, match=r"'big\.txt' has 2048 MiB, more than the 64 MiB"):
        load_document(big)


def test_an_encoding_that_is_none() -> None:
    with pytest.raises(DocumentError, match="unknown encoding 'latin-99'"):
        decode(b"a", "a.txt", "latin-99")


def test_what_is_read_by_itself() -> None:
    assert [knows(n) for n in ("a.MD", "b.pdf", "c.png", "Makefile", ".env")] == [True, True, False, False, False]
