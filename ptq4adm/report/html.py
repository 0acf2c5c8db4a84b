"""Pieces of HTML that several sections use."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def text(value: object) -> str:
    """Anything as escaped text."""
    return escape(str(value))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table whose cells are escaped.

    Args:
        header: of every column.
        rows: as wide.
        numbers: columns that are aligned to the right.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        right = ' class="n"'
        return "".join(
            f"<{tag}{scope}{right if i in numbers else ''}>{text(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{line(header, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def key(entries: Sequence[tuple[str, str]]) -> str:
    """What colours mean: CSS class and words."""
    items = "".join(
        f'<li class="{kind}"><span></span>{text(words)}</li>' for kind, words in entries
    )
    return f'<ul class="key">{items}</ul>'


def missing(what: str, command: str) -> str:
    """A section that was not measured, and how it is."""
    return f'<p class="quiet">{text(what)} Make it with <code>{text(command)}</code>.</p>'


def wide(chart: str, name: str) -> str:
    """A chart that keeps its size on a narrow screen and scrolls, by keyboard too."""
    label = text(name)
    return f'<div class="scroll wide" tabindex="0" role="group" aria-label="{label}">{chart}</div>'
