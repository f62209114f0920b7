"""Figures as files and as parts of a page that is dark or light."""

import io
import re
from pathlib import Path

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from cifar_tl.files import replacing, write_text
from cifar_tl.reports.figures import INK, quiet_about_glyphs

DARK_INK = "#e6e9ee"
_OWN_STYLE = (
    f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}"
    "*{stroke-linejoin:round;stroke-linecap:butt}</style>"
)


def save(figure: Figure, folder: Path, name: str, alt_text: str) -> Markup:
    """Write a figure as PNG (on white) and SVG (transparent, text light where the reader prefers dark).

    Args:
        figure: From `figures`.
        folder: Gets both files; is made if it is not there.
        name: Of both files, without ending.
        alt_text: Says what the figure shows; screen readers read it.

    Returns:
        The SVG as an element of a page, whose text colour it takes.
    """
    with quiet_about_glyphs():
        with replacing(folder / f"{name}.png") as partial:
            figure.savefig(partial, dpi=150, facecolor="white")
        figure.set_layout_engine("none")  # the layout is done; computing it again would take as long again
        drawn = _draw(figure, name)
    open_tag, rest = drawn.split(">", 1)
    open_tag = re.sub(r' (width|height)="[^"]*"', "", open_tag)
    open_tag = f'{open_tag} role="img" aria-label="{escape(alt_text)}"'
    write_text(folder / f"{name}.svg", f"{open_tag}>{_OWN_STYLE}{rest}")
    return Markup(f"{open_tag}>{rest}")  # matplotlib escapes the texts in it


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
