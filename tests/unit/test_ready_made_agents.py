"""The ready-made agents and tools, and the crew of the demo: every file cited, every piece read, no note empty."""

import os
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Crew, RunFailedError, TryAgain
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeMesh, ScriptedModel, says
from agentmesh_agents import Note, Reader, Writer
from agentmesh_tools import Piece, in_folder

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "briefing.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "tea.md").write_text("Tea is green. " * 400)
    (notes / "cake.md").write_text("Cake is sweet and has cream on it.")
    (notes / "empty.md").write_text("")
    (notes / "picture.md").write_bytes(b"\0\1\2")
    (tmp_path / "secret.md").write_text("secret")
    os.symlink(tmp_path / "secret.md", notes / "link.md")
    return notes


def test_list_files_stays_inside(folder: Path) -> None:
    list_files, _ = in_folder(folder)
    assert list_files("*.md") == ["cake.md", "empty.md", "tea.md"]
    for pattern in ("../*", "/etc/*"):
        with pytest.raises(TryAgain, match="must stay inside the folder"):
            list_files(pattern)


def test_read_file_stays_inside(folder: Path) -> None:
    _, read_file = in_folder(folder)
    assert read_file("cake.md", 0, 4) == Piece(path="cake.md", text="Cake", start=0, end=4, size=34)
    assert read_file("cake.md", 30, 999).end == 34
    for path in ("../secret.md", "link.md", "/etc/passwd"):
        with pytest.raises(TryAgain, match="leads out of the folder"):
            read_file(path, 0, 10)
    with pytest.raises(TryAgain, match="there is no file 'teas.md'; near it are tea.md"):
        read_file("teas.md", 0, 10)
    with pytest.raises(TryAgain, match="is not text"):
        read_file("picture.md", 0, 10)


def test_a_reader_sends_every_piece(folder: Path) -> None:
    model = ScriptedModel(lambda prompt: says("noted"))
    mesh = FakeMesh(Crew(Reader(folder=str(folder), piece_chars=1000)), model=model)
    text = (folder / "tea.md").read_text()
    note = mesh.run(Reader(folder=str(folder), piece_chars=1000), "tea.md")
    assert note == Note(source="tea.md", lines=["noted"] * 6)
    asked = [prompt.messages[-1].text for prompt in model.prompts]
    assert len(asked) == 6
    for i, question in enumerate(asked):
        assert text[i * 1000 : (i + 1) * 1000] in question


def test_a_reader_never_gives_an_empty_note(folder: Path) -> None:
    reader = Reader(folder=str(folder))
    mesh = FakeMesh(Crew(reader), model=lambda prompt: says("  \n "))
    assert mesh.run(reader, "cake.md").lines == ["(its own words) Cake is sweet and has cream on it."]
    assert mesh.run(reader, "empty.md").lines == ["the file is empty"]


def test_a_writer_cites_every_source_itself() -> None:
    notes = [Note(source=f"{i}.md", lines=["x" * 1000]) for i in range(7)]
    model = ScriptedModel(lambda prompt: says("a paragraph\n\nand more"))
    page = FakeMesh(Crew(Writer()), model=model).run(Writer(question="what?"), notes)
    assert page.sources == [n.source for n in notes]
    assert all(f"{i}. {n.source}" in page.text for i, n in enumerate(notes, 1))
    assert len(model.prompts) == 4  # two notes a question: no prompt outgrows the model


def briefing(folder: Path, monkeypatch: pytest.MonkeyPatch, model: Any) -> tuple[str, ScriptedModel]:
    monkeypatch.setenv("BRIEFING_FOLDER", str(folder))
    crew = load_crew(str(EXAMPLE))
    scripted = ScriptedModel(model)
    return FakeMesh(crew, model=scripted).run("What is there?"), scripted


def test_the_demo_cites_every_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, model = briefing(folder, monkeypatch, lambda prompt: says(f"note {len(prompt.messages[-1].text)}"))
    for name in ("cake.md", "empty.md", "tea.md"):
        assert f"- **{name}**: " in page
        assert page.count(name) == 2
    sent = "".join(prompt.messages[-1].text for prompt in model.prompts)
    text = (folder / "tea.md").read_text()
    assert all(text[i : i + 3000] in sent for i in range(0, len(text), 3000))


def test_the_demo_says_when_there_is_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailedError, match="set BRIEFING_FOLDER to a folder that has some"):
        briefing(tmp_path, monkeypatch, [])
