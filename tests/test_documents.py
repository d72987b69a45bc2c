"""What the documents show is true: their examples run, their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Pages whose Python examples are complete and run in the order of the page.
RUNNABLE = ("docs/embedding.md", "docs/endpoints.md")


def code_blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Return the line number and the text of each block of ``language`` on a page."""
    text = PAGES[page]
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_python_examples_of_a_page_run(page: str) -> None:
    namespace: dict[str, object] = {"__name__": page}
    blocks = code_blocks(page, "python")

    assert blocks
    for line, block in blocks:
        # Blank lines in front: a traceback shows the line of the page.
        exec(compile("\n" * line + block, page, "exec"), namespace)  # our own text
