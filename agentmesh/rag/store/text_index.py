"""Search by words: BM25 by tantivy over the texts of a segment, on disk or in memory. tantivy is imported here.

An index is derived data: of a segment without one, or with a damaged one, it is made in memory from the texts.
"""

import math
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from agentmesh.errors import ExtraMissing
from agentmesh.rag.documents import without_surrogates

try:
    import tantivy
    from tantivy import Filter, Index, Occur, Query, SchemaBuilder, TextAnalyzerBuilder, Tokenizer
except ImportError:
    raise ExtraMissing(
        "a search by words needs tantivy, which is not installed: pip install 'agentmesh-celery[rag]'"
    ) from None

TOKENS = "en-1"  # how text becomes terms, in the schema of each index: another way is another name
HEAP_BYTES = 15_000_000  # the least that tantivy takes
LONGEST_TERM = 100  # bytes; longer ones are no words
MOST_TERMS = 256  # of a query, the first ones: a whole page may be pasted
# scripts that write without spaces, and Hangul, whose words carry their particles: every two neighbours are a term
_UNSPACED_SCRIPTS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]+"
)

STOP_WORDS = (
    "a an and are as at be been but by can could did do does for from had has have how i if in into is it its me my of on "
    "or our should so than that the their them then there these they this to us was we were what when where which who "
    "why will with would you your"
)

RowScores = list[tuple[int, float]]  # rows and their scores, the best first


def space_out(text: str) -> str:
    """A text in which scripts without spaces have become pairs of neighbours; a lone character stays.

    >>> spaced("学机器学习 now")
    ' 学机 机器 器学 学习  now'
    """
    if text.isascii():
        return text
    return _UNSPACED_SCRIPTS.sub(lambda m: f" {' '.join(_pairs(m[0]))} ", text)


def _pairs(run: str) -> Iterable[str]:
    return (run[i : i + 2] for i in range(len(run) - 1)) if len(run) > 1 else (run,)


def terms(query: str) -> list[str]:
    """The different terms of a query, in its order; any text will do, there is no syntax.

    What English questions are made of is left out: in a small store `how do I` would weigh as much as what is asked.

    >>> terms("C++: how do cats?"), terms("机器学习"), terms("who are we?")
    (['c', 'cat'], ['机器', '器学', '学习'], ['who', 'are', 'we'])
    """
    said = list(dict.fromkeys(_ANALYZER.analyze(space_out(without_surrogates(query)))))
    return ([t for t in said if t not in _STOP_TERMS] or said)[:MOST_TERMS]


def build(folder: Path, rows: Iterable[tuple[int, str]]) -> None:
    """An index of rows and their texts, in a new folder; it is on disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    _fill(_registered(Index(_SCHEMA, path=str(folder))), rows, merge=True)
    for file in folder.iterdir():
        if file.suffix == ".lock":
            file.unlink()


class TextIndex:
    """The terms of one run of rows. Searches come from any thread; one at a time adds."""

    def __init__(self) -> None:
        self.n = 0  # rows added, for an index in memory
        self._index: Any = _registered(Index(_SCHEMA))
        self._lock = threading.Lock()
        self._searcher: Any = self._index.searcher()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """An index that `build` made, opened in a scratch folder: tantivy writes beside what it reads.

        The large files are linked there, not copied; once open, they may go from where they were.

        Raises:
            ValueError: it is damaged, or of other tokens.
        """
        scratch = tempfile.mkdtemp(prefix="agentmesh-text-")
        made = cls.__new__(cls)
        weakref.finalize(made, _remove, scratch, os.getpid())
        for file in folder.iterdir():
            if file.suffix == ".json":
                shutil.copyfile(file, Path(scratch) / file.name)
            else:
                (Path(scratch) / file.name).symlink_to(file.resolve())
        made._index = _registered(Index.open(scratch))
        if made._index.schema != _SCHEMA:
            raise ValueError("the index was made with other tokens")
        made._index.config_reader("manual", 0)
        made._lock, made._searcher = threading.Lock(), made._index.searcher()
        made.n = made._searcher.num_docs
        return made

    def extend(self, rows: Sequence[tuple[int, str]]) -> None:
        """More rows, found by the next search."""
        if rows:
            with self._lock:
                _fill(self._index, rows, merge=False)
                self._index.reload()
                self._searcher = self._index.searcher()
                self.n += len(rows)

    def frequencies(self, wanted: Sequence[str]) -> tuple[int, list[int]]:
        """How many rows there are, and how many have each term."""
        searcher = self._searcher
        return searcher.num_docs, [searcher.doc_freq("text", t) for t in wanted]

    def search(self, weights: Mapping[str, float], limit: int, *, among: Sequence[int] | None = None) -> RowScores:
        """The best rows that have any of the terms.

        Args:
            weights: a term's inverse document frequency among all rows of the store, as `weigh` gives it.
            among: only these rows; costs 2.5 us each.
        """
        searcher = self._searcher
        own_n = searcher.num_docs
        if not own_n or limit < 1:
            return []
        asked = []
        for term, weight in weights.items():
            if own := searcher.doc_freq("text", term):
                # tantivy weighs by its own rows; what it says is brought to the weight among all
                query = Query.term_query(_SCHEMA, "text", term, index_option="freq")
                asked.append((Occur.Should, Query.boost_query(query, weight / idf(own_n, own))))
        if not asked:
            return []
        whole = Query.boolean_query(asked)
        if among is not None:
            rows = Query.const_score_query(Query.term_set_query(_SCHEMA, "row", list(among)), 0.0)
            whole = Query.boolean_query([(Occur.Must, whole), (Occur.Must, rows)])
        hits = searcher.search(whole, min(limit, own_n), count=False).hits
        rows = searcher.fast_field_values("row", [address for _, address in hits])
        return [(row, score) for row, (score, _) in zip(rows, hits, strict=True)]


def idf(n: int, having: int) -> float:
    """What a term weighs that `having` of n rows have.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009, section 3.1; tantivy adds the 1.
    """
    return math.log(1 + (n - having + 0.5) / (having + 0.5))


def weigh(wanted: Sequence[str], indexes: Iterable[TextIndex]) -> dict[str, float]:
    """The terms that any row has, and what each weighs among the rows of all indexes together."""
    n, having = 0, [0] * len(wanted)
    for index in indexes:
        more, counts = index.frequencies(wanted)
        n += more
        having = [a + b for a, b in zip(having, counts, strict=True)]
    return {t: idf(n, h) for t, h in zip(wanted, having, strict=True) if h}


def _fill(index: Any, rows: Iterable[tuple[int, str]], *, merge: bool) -> None:
    # one thread; and no writer outlives this call: its threads would not be there after a fork
    writer = index.writer(HEAP_BYTES if not merge else 8 * HEAP_BYTES, 1)
    for row, text in rows:
        document = tantivy.Document()
        document.add_text("text", space_out(text))
        document.add_unsigned("row", row)
        writer.add_document(document)
    writer.commit()
    writer.wait_merging_threads()


def _remove(scratch: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked child reads its parent's copy
        shutil.rmtree(scratch, ignore_errors=True)


def _registered(index: Any) -> Any:
    index.register_tokenizer(TOKENS, _ANALYZER)
    return index


def _analyzer() -> Any:
    chain = TextAnalyzerBuilder(Tokenizer.simple())
    for step in (Filter.remove_long(LONGEST_TERM), Filter.lowercase(), Filter.ascii_fold(), Filter.stemmer("english")):
        chain = chain.filter(step)
    return chain.build()


def _schema() -> Any:
    schema = SchemaBuilder()
    schema.add_text_field("text", stored=False, tokenizer_name=TOKENS, index_option="freq")
    schema.add_unsigned_field("row", indexed=True, fast=True)
    return schema.build()


_ANALYZER, _SCHEMA = _analyzer(), _schema()
_STOP_TERMS = frozenset(_ANALYZER.analyze(STOP_WORDS))
