"""Reads the pickled docstore of LangChain's old FAISS folder without running code in it. Run as a separate process.

`python unpickle.py FOLDER NAME OUT` writes OUT/vectors.npy, OUT/documents.jsonl and OUT/about.json. It imports neither
LangChain nor agentmesh: every class that a docstore may name is a stand-in made here, and any other is refused.
"""

import json
import pickle
import sys
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import faiss
import numpy as np


class _State:
    """The state of a pickled object, without its code."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # pydantic keeps the fields in __dict__ of its state, a plain class is its own state
        fields = state.get("__dict__", state) if isinstance(state, dict) else {}
        vars(self).update(fields)


STAND_INS = {
    ("langchain_community.docstore.in_memory", "InMemoryDocstore"),
    ("langchain.docstore.in_memory", "InMemoryDocstore"),
    ("langchain_classic.docstore.in_memory", "InMemoryDocstore"),
    ("langchain_core.documents.base", "Document"),
    ("langchain.schema.document", "Document"),
    ("langchain.schema", "Document"),
    ("langchain.docstore.document", "Document"),
}
VALUES = {
    ("builtins", "set"): set, ("builtins", "frozenset"): frozenset, ("builtins", "bytearray"): bytearray,
    ("datetime", "datetime"): datetime, ("datetime", "date"): date, ("datetime", "time"): time,
    ("datetime", "timedelta"): timedelta, ("datetime", "timezone"): timezone, ("uuid", "UUID"): UUID,
}  # fmt: skip


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return _State
        if (module, name) in VALUES:
            return VALUES[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a docstore does not need")


def _json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value.isoformat() if isinstance(value, datetime | date | time) else str(value)


def main(folder: Path, name: str, out: Path) -> str:
    """What is wrong with the folder, or ""."""
    try:
        index = faiss.read_index(str(folder / f"{name}.faiss"))
        vectors = index.reconstruct_n(0, index.ntotal)  # (n, d)
        with (folder / f"{name}.pkl").open("rb") as file:
            docstore, rows = _Restricted(file).load()
        texts = vars(docstore)["_dict"]
    except (RuntimeError, OSError) as e:
        return f"the index cannot be read: {str(e).splitlines()[0][:300]}"
    except Exception as e:  # a pickle can be anything
        return f"the docstore cannot be read: {type(e).__name__}: {e}"
    if sorted(rows) != list(range(len(vectors))):
        return f"the index has {len(vectors)} vectors and the docstore {len(rows)} rows"
    np.save(out / "vectors.npy", vectors)
    with (out / "documents.jsonl").open("w") as file:
        for row in range(len(vectors)):
            state = vars(texts.get(rows[row], _State()))
            if "page_content" not in state:
                return f"row {row} has no document"
            record = {"id": str(rows[row]), "text": str(state["page_content"]), "metadata": state.get("metadata") or {}}
            file.write(json.dumps(record, default=_json) + "\n")
    metric = "l2" if index.metric_type == faiss.METRIC_L2 else "cosine"
    (out / "about.json").write_text(json.dumps({"metric": metric, "n": len(vectors), "d": int(index.d)}))
    return ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])) or None)
