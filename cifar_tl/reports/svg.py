"""Figures as files and as parts of a page that is dark or light."""

import io
import re
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from cifar_tl.reports.figures import INK

DARK_INK = "#e6e9ee"
_OWN_STYLE = (
    f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}"
    "*{stroke-linejoin:round;stroke-linecap:butt}</style>"
)


def save(figure: Figure, folder: Path, name: str, alt: str) -> str:
    """Write a figure as PNG (on white) and SVG (see-through, letters light where the reader prefers dark).

    Args:
        figure: From `figures`.
        folder: Where to; made if need be.
        name: Of both files, without ending.
        alt: What the figure says, for those who do not see it.

    Returns:
        The SVG as a part of a page: it has the colour of the page's text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
    figure.set_layout_engine("none")  # everything has its place now; working it out again would cost as much again
    drawn = _draw(figure, name)
    open_tag, rest = drawn.split(">", 1)
    open_tag = re.sub(r' (width|height)="[^"]*"', "", open_tag)
    open_tag = f'{open_tag} role="img" aria-label="{escape(alt)}"'
    (folder / f"{name}.svg").write_text(f"{open_tag}>{_OWN_STYLE}{rest}")
    return f"{open_tag}>{rest}"


def _draw(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element without prologue, metadata, own style and ids that nothing refers to."""
    buffer = io.StringIO()
    # ids depend on the salt alone: they differ between the figures of a page, and not between two drawings of one
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\n\s*", "\n", text.replace(INK, "currentColor"))
