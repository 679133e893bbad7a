"""The Librarian answers from the documents, quotes them word for word, and says so when they contain no answer."""

from pathlib import Path
from typing import Any

import pytest

from agentmesh import Crew
from agentmesh.rag.search import Passage
from agentmesh.retriever import Retriever
from agentmesh.testing import FakeMesh, says
from agentmesh_agents import Librarian, QuotedAnswer
from agentmesh_agents.librarian import answer_from, checked, locate
from agentmesh_tools.retrieve import Consulted, Quote, in_store, occurs, quotable

PAY = "# Pay\n\nWages are paid on the last working day. Overtime is paid in the month after.\n"
LEAVE = "# Leave\n\n| who | how long |\n|---|---|\n| parents | sixteen weeks of paid leave |\n\nIs leave paid? Yes."


@pytest.fixture
def store(tmp_path: Path, write: Any) -> str:
    docs = write("docs", {"pay.md": PAY, "leave.md": LEAVE})
    agent, request = Retriever.open(tmp_path / "kb", embed="wordllama").ingest(docs)
    FakeMesh(Crew(agent)).run(request)
    return str(tmp_path / "kb")


def ask(store: str, question: str, *replies: Any, **fields: Any) -> QuotedAnswer:
    return FakeMesh(Crew(Librarian(store=store, **fields)), model=[says(r) for r in replies]).run(question)


def test_an_answer_has_quotes_of_the_documents(store: str) -> None:
    answer = ask(store, "When are wages paid?", "Wages are paid on the last working day [1].")
    assert answer.found
    assert answer.text == "Wages are paid on the last working day [1]."
    (quote,) = answer.quotes
    assert (quote.source, PAY[quote.start : quote.end]) == ("docs/pay.md", quote.text)
    assert quote.text == "Wages are paid on the last working day."
    assert "docs/pay.md:" in answer.page()


def test_its_model_is_asked_for_text(store: str) -> None:
    """A model that must meet the schema of a QuotedAnswer writes JSON, which is in no document."""
    outputs = []

    def model(prompt: Any) -> Any:
        outputs.append(prompt.output)
        return says("Wages are paid on the last working day [1].")

    assert FakeMesh(Crew(Librarian(store=store)), model=model).run("When are wages paid?").found
    assert outputs == [None]


@pytest.mark.parametrize(
    "invented",
    [
        "Wages are paid by the king of Spain every leap year.",
        "The handbook says “wages are paid in gold coins” [1].",
        "The answer to the question is:",
        "",
    ],
)
def test_a_sentence_that_is_not_in_the_quotes_is_dropped(store: str, invented: str) -> None:
    answer = ask(store, "When are wages paid?", invented)
    assert answer.text == "The documents say:"
    assert answer.quotes[0].text == "Wages are paid on the last working day."


def test_unknown_citations_are_dropped_and_the_others_renumbered(store: str) -> None:
    reply = "Overtime is paid in the month after [2] [9]. Wages are paid on the last working day."
    answer = ask(store, "When are wages and overtime paid?", reply)
    assert "[9]" not in answer.text
    assert answer.text.startswith("Overtime is paid in the month after [1].")
    assert len(answer.quotes) == 1


def test_a_quote_of_the_model_is_located_in_the_documents(store: str) -> None:
    answer = ask(store, "How long is leave for parents?", "Parents have “sixteen  weeks of paid leave” [1].")
    assert [LEAVE[q.start : q.end] == q.text for q in answer.quotes] == [True] * len(answer.quotes)
    assert any(q.text == "sixteen weeks of paid leave" for q in answer.quotes)


def test_without_a_similar_sentence_no_model_is_asked(store: str, tmp_path: Path) -> None:
    for where in (store, str(tmp_path / "empty")):
        answer = ask(where, "Who won the world cup in 1998?")
        assert (answer.found, answer.quotes) == (False, [])
        assert answer.page() == "The documents say nothing about this."
    assert not ask(store, "When are wages paid?", "Not found.").found


def test_the_tool_ranks_sentences_and_hides_its_filter(store: str) -> None:
    consulted = in_store(store, k=2)("when are wages paid")
    assert consulted.quotes[0].text == "Wages are paid on the last working day."
    assert checked(consulted) == consulted.quotes
    assert all(not q.text.endswith("?") for q in consulted.quotes)
    assert list(in_store(store, where={"source": "docs/leave.md"}).spec.parameters["properties"]) == ["question"]
    assert {p.source for p in in_store(store, where={"source": "docs/leave.md"})("wages").passages} == {"docs/leave.md"}


def test_a_quote_that_is_not_at_its_place_is_dropped() -> None:
    passage = Passage(source="a.md", start=100, text="One sentence of a text. Another sentence of it.")
    good = [quote for quote, _ in quotable(passage)]
    assert [(q.start, q.end, q.text) for q in good] == [
        (100, 123, "One sentence of a text."),
        (124, 147, "Another sentence of it."),
    ]
    bad = [
        good[0].model_copy(update={"start": 101, "end": 124}),
        good[0].model_copy(update={"source": "b.md"}),
        good[0].model_copy(update={"text": "One sentence of a test."}),
        Quote(text="One", source="a.md", start=0, end=3),
    ]
    assert checked(Consulted(passages=[passage], quotes=[*good, *bad])) == good
    assert not any(occurs(q, passage) for q in bad)
    assert locate("sentence of\n a  TEXT", [passage]) == Quote(
        text="sentence of a text", source="a.md", start=104, end=122
    )
    assert locate("...", [passage]) is None


def test_other_scripts_have_sentences_too() -> None:
    passage = Passage(
        source="z.md",
        start=0,
        text="员工每年有十五天的带薪年假和五天病假可以使用。工资在每月最后一个工作日支付给员工。",
    )
    quotes = [quote for quote, _ in quotable(passage)]
    assert [passage.text[q.start : q.end] == q.text for q in quotes] == [True, True]
    assert answer_from("", quotes, [passage], borne=0.6).quotes[0].text.endswith("。")


def test_a_wrapped_sentence_is_quoted_whole_and_before_rows(tmp_path: Path, write: Any) -> None:
    wrapped = "# Leave\n\n| leave | `leave_days_total` |\n|---|---|\n| parental leave | `leave_paid_total` |\n\n"
    wrapped += "Parents are on paid leave for\nsixteen weeks after a child is born, and\nfor two more when it is ill.\n"
    docs = write("docs", {"leave.md": wrapped})
    agent, request = Retriever.open(tmp_path / "kb", embed="wordllama").ingest(docs)
    FakeMesh(Crew(agent)).run(request)
    for question in ("What is paid leave?", "How long is leave paid?"):
        consulted = in_store(str(tmp_path / "kb"))(question)
        assert consulted.quotes[0].text.startswith("Parents are on paid leave for\nsixteen"), question
        assert consulted.quotes[0].text.endswith("when it is ill.")
        assert checked(consulted) == consulted.quotes
    answer = ask(str(tmp_path / "kb"), "How long is paid leave?", "Parents are on paid leave for sixteen weeks [1].")
    assert (
        "“Parents are on paid leave for sixteen weeks after a child is born, and for two more when it is ill.”"
        in answer.page()
    )
