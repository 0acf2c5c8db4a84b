"""The page: one HTML file that needs nothing else.

It reads without JavaScript; a script of its own runs the blind test. Whatever comes from outside
(prompts, names, messages) is escaped where it is put in.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from ptq4adm.calibration.files import check_output_file, write_whole
from ptq4adm.report.data import Report
from ptq4adm.report.html import text
from ptq4adm.report.listening import blind_test, listening
from ptq4adm.report.numbers import coverage, metrics, pareto, ranges, sensitivity, settings, sizes

# id, heading, and what makes it
_SECTIONS: tuple[tuple[str, str, Callable[[Report], str]], ...] = (
    ("listen", "Listen", listening),
    ("blind", "Blind test", blind_test),
    ("metrics", "Metrics", metrics),
    ("size", "Size", sizes),
    ("sensitivity", "Sensitivity of the layers", sensitivity),
    ("pareto", "Size against error", pareto),
    ("ranges", "Activation ranges", ranges),
    ("coverage", "Calibration prompts", coverage),
    ("settings", "Settings", settings),
)


def render(report: Report) -> str:
    """The page as HTML.

    Args:
        report: what is on it.

    Raises:
        MissingComponentError: if matplotlib is not installed.
    """
    links = "".join(f'<li><a href="#{name}">{text(title)}</a></li>' for name, title, _ in _SECTIONS)
    sections = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{text(title)}'
        f"</h2>{make(report)}</section>"
        for name, title, make in _SECTIONS
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(report.title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n"
        f"<body>\n<header><h1>{text(report.title)}</h1>"
        f'<p class="lead">{text(_lead(report))}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>{sections}</main>\n'
        "<footer><p>Written by ptq4adm. This file holds its pictures and sounds, and loads nothing."
        f"</p></footer>\n<script>\n{_asset('blind.js')}</script>\n</body>\n</html>\n"
    )


def write_report(report: Report, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the page, whole or not at all.

    Args:
        report: what is on it.
        path: of the HTML file.
        overwrite: whether an existing file may be replaced.

    Returns:
        The file's absolute path.

    Raises:
        OutputError: if the file exists, or cannot be written.
        MissingComponentError: if matplotlib is not installed.
    """
    path = Path(path)
    check_output_file(path, overwrite=overwrite)
    content = render(report)
    write_whole(path, lambda p: p.write_text(content, encoding="utf-8"), "the report")
    return path.absolute()


def _lead(report: Report) -> str:
    first, last = report.sizes[0], report.sizes[-1]
    share = 1.0 - last.bytes / first.bytes
    return (
        f"The UNet in {last.name}: {last.bytes / 1e6:.1f} MB, {share:.1%} less than in float16, "
        f"heard on {len(report.samples)} prompts beside the float model."
    )


def _asset(name: str) -> str:
    return files("ptq4adm.report").joinpath(name).read_text(encoding="utf-8")
