"""One image file, of whatever kind and size, as 32x32 RGB: the same for training on folders and for predicting."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

SIZE = 32
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
"""What is decoded, told by content, never by name. Not all that PIL knows: its EPS, for one, starts Ghostscript."""

MAX_PIXELS = 89_478_485
"""An image with more is not decoded; PIL warns from here on, and a decoded one takes 270 MB."""

ORIENTATION = 0x0112
"""EXIF's tag; its values with what turns the image upright."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """A file that cannot be turned into an image; its text says why, in words that do not depend on the file's name."""


@dataclass(frozen=True)
class Decoded:
    """An image as the model takes it.

    Attributes:
        pixels: (3, 32, 32), RGB.
        size: Width and height in the file.
        notes: What had to be done to get there, apart from resizing.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    notes: tuple[str, ...]

    @property
    def resized(self) -> bool:
        """Whether the file's image was not 32x32."""
        return self.size != (SIZE, SIZE)


def decode(file: Path | BinaryIO) -> Decoded:
    """Decode an image and bring it to 32x32 RGB.

    Resizing is bicubic and antialiased; the aspect ratio is not kept. Transparency is laid over white, EXIF's
    orientation is applied, 16-bit grey is scaled to 8 bits, and of an animation the first frame is taken.

    Args:
        file: A path, or the file's content as a seekable stream.

    Raises:
        UnreadableImage: It is no image, broken, too large, or of a kind without a natural 8-bit form.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            size = image.size  # from the header: nothing is decoded yet
            if size[0] * size[1] > MAX_PIXELS:
                raise UnreadableImage(_too_large(f"{size[0]}x{size[1]}"))
            rgb, notes = _rgb(image)
        if rgb.size != (SIZE, SIZE):
            rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    except (UnreadableImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(_too_large("as its header has it")) from error  # PIL does not give the size
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"no image: its content is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # hostile files make decoders raise nearly anything: struct.error, SyntaxError, ...
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise UnreadableImage(f"broken image: {text}") from error
    return Decoded(np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)), size, tuple(notes))


def _too_large(size: str) -> str:
    return f"too large: {size}, more than {MAX_PIXELS:,} pixels (a decompression bomb?)"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a good image with broken EXIF data
        return 1


def _rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return an 8-bit RGB image of any size, and notes about what was done."""
    notes = ["first frame of several"] if getattr(image, "is_animated", False) else []
    image.load()
    if turn := UPRIGHT.get(_orientation(image)):
        image = image.transpose(turn)
        notes.append("turned as its EXIF says")
    if image.mode.startswith("I;16"):  # convert() would clip at 255 instead of scaling
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), [*notes, "16-bit grey scaled to 8 bits"]
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"32 bits per pixel (PIL mode {image.mode}): its range is unknown, convert it to 8 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB"), [*notes, "transparency over white"]
    if image.mode == "CMYK":
        notes.append("CMYK converted without its colour profile")
    return image.convert("RGB"), notes
