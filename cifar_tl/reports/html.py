"""Parts of a page that stands alone: no script, no request, dark or light as its reader prefers."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def text(value: object) -> str:
    """Return a value as HTML."""
    return value if isinstance(value, Markup) else escape(str(value))


def page(title: str, sections: Sequence[tuple[str, str]], head: str, foot: str) -> str:
    """Return a page.

    Args:
        title: Plain text.
        sections: Heading and HTML of each.
        head: HTML above the sections.
        foot: Plain text at the end.
    """
    links = "".join(f'<a href="#s{number}">{escape(name)}</a>' for number, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{number}" aria-labelledby="h{number}"><h2 id="h{number}">{escape(name)}</h2>{html}</section>'
        for number, (name, html) in enumerate(sections)
    )
    css = Path(__file__).with_name("report.css").read_text()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<style>{css}</style></head>\n<body><header>{head}"
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f"<footer>{escape(foot)}</footer></body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]], label: str, words: Sequence[int] = (0,)) -> str:
    """Return a table; the first cell of a row is its heading.

    Args:
        head: Of the columns.
        rows: Plain values or Markup.
        label: What the table is about, for those who do not see it.
        words: Columns that hold words; all others hold figures and are aligned to the right.
    """
    kind = ["" if column in words else ' class="number"' for column in range(len(head))]
    top = "".join(f'<th scope="col"{k}>{text(cell)}</th>' for k, cell in zip(kind, head, strict=True))
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td{k}>{text(cell)}</td>" for k, cell in zip(kind[1:], others, strict=True))
        body += f'<tr><th scope="row"{kind[0]}>{text(first)}</th>{cells}</tr>'
    return _scrolling(f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>", label)


def _scrolling(rows: str, label: str) -> str:
    """Return a table that scrolls by itself where it is wider than a phone; the keyboard reaches it."""
    region = f'class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"'
    return f"<div {region}><table>{rows}</table></div>"


def facts(rows: Sequence[tuple[str, object]], label: str) -> str:
    """Return a table of names and what they are."""
    body = "".join(f'<tr><th scope="row">{escape(n)}</th><td class="long">{text(v)}</td></tr>' for n, v in rows)
    return _scrolling(f"<tbody>{body}</tbody>", label)


def figure(svg: str, caption: str = "") -> str:
    """Return a drawn figure with a caption, both of them HTML."""
    return f"<figure>{svg}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"


def figures(*drawn: str) -> str:
    """Return figures side by side where there is room."""
    return f'<div class="grid">{"".join(drawn)}</div>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Return figures in tiles: the value, what it is."""
    each = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in values)
    return f'<div class="tiles">{"".join(each)}</div>'


def notes(lines: Sequence[str]) -> str:
    """Return what a reader should know first; nothing for no lines."""
    each = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="notes" role="note">{each}</div>' if lines else ""


def thumbnail(image: NDArray[np.uint8] | None, alt: str) -> Markup:
    """Return a small image inside the page, or a grey square where there is none."""
    if image is None:
        return Markup(f'<span class="thumb" role="img" aria-label="{escape(alt)} (no image)"></span>')
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.shape[1]}" height="{image.shape[0]}"'
    return Markup(f'<img class="thumb" {size} alt="{escape(alt)}" src="data:image/png;base64,{data}">')


def gallery(items: Sequence[tuple[Markup, Markup]]) -> str:
    """Return thumbnails with captions."""
    return f'<ul class="gallery">{"".join(f"<li>{image}{caption}</li>" for image, caption in items)}</ul>'
