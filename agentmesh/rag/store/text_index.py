"""Full-text search: BM25 by tantivy over the texts of one segment, on disk or in memory. Nothing else imports tantivy.

An index is derived data: for a segment without one, or with a damaged one, it is built in memory from the texts.
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

from agentmesh.errors import ExtraMissing, well_formed

try:
    import tantivy
    from tantivy import Filter, Index, Occur, Query, SchemaBuilder, TextAnalyzerBuilder, Tokenizer
except ImportError:
    raise ExtraMissing(
        "a search by words needs tantivy, which is not installed", hint="pip install 'agentmesh-celery[rag]'"
    ) from None

TOKENIZER = "en-1"  # named in the schema of each index: rename it when text becomes terms in another way
HEAP_BYTES = 15_000_000  # the minimum of tantivy
MAX_TERM_BYTES = 100  # longer ones are not words
MAX_QUERY_TERMS = 256  # only the first ones count: a query may be a whole page
# scripts written without spaces, and Hangul, whose words carry their particles: their terms are pairs of characters
_UNSPACED_SCRIPTS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]+"
)

STOP_WORDS = (
    "a an and are as at be been but by can could did do does for from had has have how i if in into is it its me my of on "
    "or our should so than that the their them then there these they this to us was we were what when where which who "
    "why will with would you your"
)

RowScores = list[tuple[int, float]]  # (row, score), best first


def space_out(text: str) -> str:
    """A text in which scripts without spaces have become pairs of neighbouring characters; a single one stays.

    >>> space_out("学机器学习 now")
    ' 学机 机器 器学 学习  now'
    """
    if text.isascii():
        return text
    return _UNSPACED_SCRIPTS.sub(lambda m: f" {' '.join(_pairs(m[0]))} ", text)


def _pairs(run: str) -> Iterable[str]:
    return (run[i : i + 2] for i in range(len(run) - 1)) if len(run) > 1 else (run,)


def terms(query: str) -> list[str]:
    """The distinct terms of a query, in its order. A query has no syntax: any text is valid.

    Stop words are left out unless there are no others: in a small store `how do I` would weigh as much as the subject.

    >>> terms("C++: how do cats?"), terms("机器学习"), terms("who are we?")
    (['c', 'cat'], ['机器', '器学', '学习'], ['who', 'are', 'we'])
    """
    distinct = list(dict.fromkeys(_ANALYZER.analyze(space_out(well_formed(query)))))
    return ([t for t in distinct if t not in _STOP_TERMS] or distinct)[:MAX_QUERY_TERMS]


def build_text_index(folder: Path, rows: Iterable[tuple[int, str]]) -> None:
    """Build an index of (row, text) in a folder; it is on disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    _add_rows(_register_tokenizer(Index(_SCHEMA, path=str(folder))), rows, merge=True)
    for file in folder.iterdir():
        if file.suffix == ".lock":
            file.unlink()


class TextIndex:
    """The terms of the rows of one segment or memtable. Any thread may search; one at a time may add."""

    def __init__(self) -> None:
        self.n = 0  # rows
        self._index: Any = _register_tokenizer(Index(_SCHEMA))
        self._lock = threading.Lock()
        self._searcher: Any = self._index.searcher()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an index made by `build_text_index`, through a temporary folder: tantivy writes beside what it reads.

        Large files are linked there, not copied; once the index is open, the originals may be removed.

        Raises:
            ValueError: it is damaged, or was made with another tokenizer.
        """
        temporary = tempfile.mkdtemp(prefix="agentmesh-text-")
        index = cls.__new__(cls)
        weakref.finalize(index, _remove_folder, temporary, os.getpid())
        for file in folder.iterdir():
            if file.suffix == ".json":
                shutil.copyfile(file, Path(temporary) / file.name)
            else:
                (Path(temporary) / file.name).symlink_to(file.resolve())
        index._index = _register_tokenizer(Index.open(temporary))
        if index._index.schema != _SCHEMA:
            raise ValueError("the index was made with another tokenizer")
        index._index.config_reader("manual", 0)
        index._lock, index._searcher = threading.Lock(), index._index.searcher()
        index.n = index._searcher.num_docs
        return index

    def extend(self, rows: Sequence[tuple[int, str]]) -> None:
        """Add rows; the next search finds them."""
        if rows:
            with self._lock:
                _add_rows(self._index, rows, merge=False)
                self._index.reload()
                self._searcher = self._index.searcher()
                self.n += len(rows)

    def frequencies(self, query_terms: Sequence[str]) -> tuple[int, list[int]]:
        """The number of rows, and for each term the number of rows that have it."""
        searcher = self._searcher
        return searcher.num_docs, [searcher.doc_freq("text", t) for t in query_terms]

    def search(self, weights: Mapping[str, float], limit: int, *, among: Sequence[int] | None = None) -> RowScores:
        """The best rows that have any of the terms, best first.

        Args:
            weights: by term, its inverse document frequency among all rows of the store, as `weigh` computes it.
            among: only these rows; costs about 2.5 us for each.
        """
        searcher = self._searcher
        index_rows = searcher.num_docs
        if not index_rows or limit < 1:
            return []
        clauses = []
        for term, weight in weights.items():
            if frequency := searcher.doc_freq("text", term):
                # tantivy weighs a term by the rows of this index; the boost turns that into the weight among all rows
                query = Query.term_query(_SCHEMA, "text", term, index_option="freq")
                clauses.append((Occur.Should, Query.boost_query(query, weight / idf(index_rows, frequency))))
        if not clauses:
            return []
        whole_query = Query.boolean_query(clauses)
        if among is not None:
            only = Query.const_score_query(Query.term_set_query(_SCHEMA, "row", list(among)), 0.0)
            whole_query = Query.boolean_query([(Occur.Must, whole_query), (Occur.Must, only)])
        hits = searcher.search(whole_query, min(limit, index_rows), count=False).hits
        rows = searcher.fast_field_values("row", [address for _, address in hits])
        return [(row, score) for row, (score, _) in zip(rows, hits, strict=True)]


def idf(n: int, frequency: int) -> float:
    """The inverse document frequency of a term that `frequency` of n rows have.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009, section 3.1; tantivy adds the 1.
    """
    return math.log(1 + (n - frequency + 0.5) / (frequency + 0.5))


def weigh(query_terms: Sequence[str], indexes: Iterable[TextIndex]) -> dict[str, float]:
    """The inverse document frequency of each term among the rows of all indexes; terms that no row has are left out."""
    n, frequencies = 0, [0] * len(query_terms)
    for index in indexes:
        rows, counts = index.frequencies(query_terms)
        n += rows
        frequencies = [a + b for a, b in zip(frequencies, counts, strict=True)]
    return {term: idf(n, f) for term, f in zip(query_terms, frequencies, strict=True) if f}


def _add_rows(index: Any, rows: Iterable[tuple[int, str]], *, merge: bool) -> None:
    # one thread, and the writer does not outlive this call: its threads would not exist in a forked child
    writer = index.writer(HEAP_BYTES if not merge else 8 * HEAP_BYTES, 1)
    for row, text in rows:
        document = tantivy.Document()
        document.add_text("text", space_out(text))
        document.add_unsigned("row", row)
        writer.add_document(document)
    writer.commit()
    writer.wait_merging_threads()


def _remove_folder(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked child shares the folder with its parent
        shutil.rmtree(folder, ignore_errors=True)


def _register_tokenizer(index: Any) -> Any:
    index.register_tokenizer(TOKENIZER, _ANALYZER)
    return index


def _analyzer() -> Any:
    builder = TextAnalyzerBuilder(Tokenizer.simple())
    filters = Filter.remove_long(MAX_TERM_BYTES), Filter.lowercase(), Filter.ascii_fold(), Filter.stemmer("english")
    for token_filter in filters:
        builder = builder.filter(token_filter)
    return builder.build()


def _schema() -> Any:
    schema = SchemaBuilder()
    schema.add_text_field("text", stored=False, tokenizer_name=TOKENIZER, index_option="freq")
    schema.add_unsigned_field("row", indexed=True, fast=True)
    return schema.build()


_ANALYZER, _SCHEMA = _analyzer(), _schema()
_STOP_TERMS = frozenset(_ANALYZER.analyze(STOP_WORDS))
