"""Pages that stand alone: one file without scripts and requests, drawn by the Jinja2 templates from plain data."""

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from cifar_tl.files import write_text
from cifar_tl.reports import svg

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,  # class names, overrides and folders may hold < and &
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        heading: Also the text of the link to it.
        macro: Of the page's template; it draws the section.
        data: What the macro takes.
    """

    heading: str
    macro: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as an SVG element, with its caption."""

    svg: Markup
    caption: str


def write_page(path: Path, template: str, **data: Any) -> None:
    """Fill a template and write the page in one step.

    Args:
        path: Of the page.
        template: Name of a file in templates.
        data: What the template draws.

    Raises:
        OSError: It cannot be written there.
    """
    write_text(path, TEMPLATES.get_template(template).render(data))


class FigureFolder:
    """Draws figures into a folder. One that cannot be drawn is a problem to be named, and costs nothing else.

    Args:
        folder: Gets a PNG and an SVG file per figure.

    Attributes:
        problems: Sentences on the figures that could not be drawn.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def draw(self, name: str, draw: Callable[[], Figure], alt_text: str, caption: str = "") -> DrawnFigure | None:
        """Return a figure for the page; None if it could not be drawn."""
        try:
            return DrawnFigure(svg.save(draw(), self.folder, name, alt_text), caption)
        except OSError:
            raise  # a full or write-protected disk is not the figure's fault
        except Exception as error:  # whatever it is, the tables and the other figures are worth having
            self.problems.append(f"The figure '{name}' could not be drawn: {type(error).__name__}: {error}.")
            return None


@dataclass(frozen=True)
class Thumbnail:
    """A small image inside the page.

    Attributes:
        alt_text: Says what the image is and how it was predicted.
        source: Its data as a URI; None where there is no image.
        width: In pixels.
        height: In pixels.
    """

    alt_text: str
    source: str | None = None
    width: int = 0
    height: int = 0


def thumbnail(image: NDArray[np.uint8] | None, alt_text: str) -> Thumbnail:
    """Return an image, (height, width, 3), as a part of a page; None as a grey square."""
    if image is None:
        return Thumbnail(f"{alt_text} (no image)")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(alt_text, f"data:image/png;base64,{data}", image.shape[1], image.shape[0])
