"""The text of HTML pages, for training and for perplexity."""

from html.parser import HTMLParser
from pathlib import Path


def page_text(page: Path) -> str:
    """The text of a page, one paragraph a line."""
    source = page.read_text(encoding="utf-8")
    if page.suffix != ".html":
        return source
    reader = _BodyText()
    reader.feed(source)
    lines = (" ".join(line.split()) for line in "".join(reader.pieces).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


class _BodyText(HTMLParser):
    """Collects a page's text without its head and its navigation."""

    BLOCKS = frozenset({"div", "p", "li", "dt", "dd", "pre", "tr", "h1", "h2", "h3", "h4", "h5"})

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._open: list[tuple[str, bool]] = []  # tag, and whether its text is dropped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        dropped = tag in {"head", "script", "style"} or ("id", "banner") in attrs
        navigation = any(name == "class" and "docnav" in (value or "") for name, value in attrs)
        self._open.append((tag, dropped or navigation or self._dropping()))
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:  # unclosed tags end with their parent
            pass

    def handle_data(self, data: str) -> None:
        if not self._dropping():
            self.pieces.append(data)

    def _dropping(self) -> bool:
        return bool(self._open) and self._open[-1][1]
