"""Words that CONTRIBUTING.md bans (rule 8), in documentation, help texts and comments.

Files in ``wording_waiting.txt`` still have such words. The list may only get shorter;
``python -m tests.test_wording`` writes it again.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_docs_links import ROOT, markdown_files

WAITING = Path(__file__).with_name("wording_waiting.txt")
BANNED = re.compile(
    r"\b(tells?|told|telling|anew|beside|whoever|bears?|dear|at hand|in hands?|by turns"
    r"|of today|grown|go(?:es)? on|so many|(?:is|are) due|goes by|comes? of)\b",
    re.IGNORECASE,
)
_CODE = re.compile(r"^```.*?^```$|`[^`]*`", re.MULTILINE | re.DOTALL)


def _python_texts(source: str) -> Iterator[str]:
    """Yield comments, docstrings, help texts and key descriptions of a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.keyword) and node.arg in ("help", "description"):
            yield " ".join(re.findall(r"[\w ]+", ast.unparse(node.value)))


def banned_words(path: Path) -> list[str]:
    """Return the banned words of a file; code and program output may have them."""
    text = path.read_text()
    texts = [_CODE.sub("", text)] if path.suffix == ".md" else _python_texts(text)
    return BANNED.findall(" ".join(" ".join(texts).split()))


def _files() -> dict[str, Path]:
    code = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("kd_train/**/*.py")]
    return {str(path.relative_to(ROOT)): path for path in [*markdown_files(), *code]}


@pytest.mark.parametrize("name", sorted({*_files(), *WAITING.read_text().split()}))
def test_only_waiting_files_have_banned_words(name: str) -> None:
    words, waits = banned_words(_files()[name]), name in WAITING.read_text().split()
    assert waits or not words, f"{name}: replace {words} (CONTRIBUTING.md, rule 8)"
    assert words or not waits, f"{name} is free: remove it from {WAITING.name}"


if __name__ == "__main__":
    names = [name for name, path in sorted(_files().items()) if banned_words(path)]
    WAITING.write_text("".join(f"{name}\n" for name in names))
