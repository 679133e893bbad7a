"""`agentmesh run docs/examples/ask_docs.py` with the bundled model: whatever it says, the quotes stand in the documents."""

import re
from typing import Any

TEXTS = {
    "tea.md": "# Tea\n\nThe committee met in May and decided to buy green tea.\nIt costs ten euros a tin.\n",
    "coffee.md": "# Coffee\n\nCoffee was rejected because it keeps everybody awake.\n",
}
QUOTE = re.compile(r"^\[\d+\] “(.+)”\n    docs/(\S+):(\d+)$", re.MULTILINE)


def test_a_question_to_a_folder_is_answered_with_quotes_that_stand(answered: Any) -> None:
    out = answered("ask_docs.py", "What did the committee decide?", TEXTS, ASK_DOCS_FOLDER="docs")
    quotes = QUOTE.findall(out)
    assert quotes, out
    for words, name, start in quotes:
        assert TEXTS[name][int(start) :].startswith(words)
    assert any("decided to buy green tea" in words for words, _, _ in quotes)
