"""One image file, of whatever kind and size, as 32x32 RGB: the same for training on folders and for predicting."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cifar_tl.errors import first_line

SIZE = 32
FORMATS = (
    *("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF"),
    *(("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()),  # Pillow 11.3 and later
)
"""What is decoded, told by content, never by name. Not all that PIL knows: its EPS, for one, starts Ghostscript."""

SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
}
"""Endings of files that claim to be one of FORMATS: one that is none is broken, not just something else."""

MAX_PIXELS = 89_478_485
"""An image with more is not decoded; PIL warns from here on, and a decoded one takes 270 MB."""

TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_MAX_SAMPLE_VALUE = 258, 262, 281


class UnreadableImage(Exception):
    """A file that cannot be turned into an image; its text says why, in words that do not depend on the file's name."""


class NoImage(UnreadableImage):
    """A file whose content is nothing that is decoded here.

    Attributes:
        kind: What it is, where it can be named, such as `HEIC`; empty otherwise.
    """

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Decoded:
    """An image as the model takes it.

    Attributes:
        pixels: (3, 32, 32), RGB.
        size: Width and height in the file.
        notes: What had to be done to get there, apart from resizing.
        guessed_bits: How many bits of grey were taken to be used, where the file does not say it; 0 where it does.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    notes: tuple[str, ...]
    guessed_bits: int = 0

    @property
    def resized(self) -> bool:
        """Whether the file's image was not 32x32."""
        return self.size != (SIZE, SIZE)


def decode(file: Path | BinaryIO) -> Decoded:
    """Decode an image and bring it to 32x32 RGB.

    Resizing is bicubic and antialiased; the aspect ratio is not kept. Transparency is laid over white, EXIF's
    orientation is applied, grey of more than 8 bits is scaled to 8, and of an animation the first frame is taken.

    Args:
        file: A path, or the file's content as a seekable stream.

    Raises:
        NoImage: Its content is none of FORMATS.
        UnreadableImage: It is broken, too large, or of a kind without a natural 8-bit form.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            size = image.size  # from the header: nothing is decoded yet
            if size[0] * size[1] > MAX_PIXELS:
                raise UnreadableImage(_too_large(f"{size[0]}x{size[1]}"))
            rgb, notes, guessed_bits = _rgb(image)
        if rgb.size != (SIZE, SIZE):
            rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    except (UnreadableImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(_too_large("as its header has it")) from error  # PIL does not give the size
    except UnidentifiedImageError as error:
        raise _no_image(file) from error
    except Exception as error:  # hostile files make decoders raise nearly anything: struct.error, SyntaxError, ...
        raise UnreadableImage(f"broken image: {first_line(error)}") from error
    return Decoded(np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)), size, tuple(notes), guessed_bits)


def _too_large(size: str) -> str:
    return f"too large: {size}, more than {MAX_PIXELS:,} pixels (a decompression bomb?)"


def _no_image(file: Path | BinaryIO) -> UnreadableImage:
    """Say what a file is that PIL does not know, or may not open."""
    try:
        if isinstance(file, Path):
            with file.open("rb") as stream:
                start = stream.read(512)
        else:
            file.seek(0)
            start = file.read(512)
    except OSError:
        start = b""
    kind = _kind(start)
    if kind in ("HEIC", "AVIF", "JPEG XL"):
        return NoImage(f"{kind}, which cannot be decoded here: convert it to JPEG or PNG", kind)
    if kind in ("PNG", "JPEG"):
        return UnreadableImage(f"broken {kind}")
    if kind == "TIFF":
        return NoImage("TIFF that is broken, or of a kind that is not decoded here: convert it to 8 bits", kind)
    if kind:
        return NoImage(f"{kind}, no image: its content is none of {', '.join(FORMATS)}", kind)
    return NoImage(f"no image: its content is none of {', '.join(FORMATS)}" if start else "empty: 0 bytes")


def _kind(start: bytes) -> str:
    """Name what a file is, by its first bytes, as far as people keep it among their photos; empty for the rest."""
    if start[4:8] == b"ftyp":  # ISO base media: the brand tells a photo from a film
        brand = start[8:12]
        if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
            return "AVIF" if b"avif" in start[16:64] else "HEIC"
        return "AVIF" if brand in (b"avif", b"avis") else "video"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"\x89PNG\r\n"):
        return "PNG"
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if start.startswith(b"%PDF"):
        return "PDF"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return "SVG" if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text else ""


def _upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Turn an image as its EXIF data says."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9):
            return image, []
        return ImageOps.exif_transpose(image), ["turned as its EXIF says"]
    except Exception:  # a good image with broken EXIF data; which kind of error says nothing
        return image, ["EXIF data broken, not turned"]


def _rgb(image: Image.Image) -> tuple[Image.Image, list[str], int]:
    """Return an 8-bit RGB image of any size, notes about what was done, and the bits that were guessed."""
    notes = ["first frame of several"] if getattr(image, "is_animated", False) else []
    stored_as = str(getattr(image, "tile", ""))  # gone once the pixels are loaded
    png_bits = 16 if image.format == "PNG" and ";16" in stored_as else 8
    image.load()
    highest, how, guessed_bits = _highest_value(image, png_bits)
    # PIL turns such values over at 1 to 8 bits, and leaves 16 as they are
    white_is_zero = getattr(image, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == 0
    image, turned = _upright(image)
    notes += turned
    if highest:  # convert() would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.float32) * (255 / highest)
        grey = (255 - values if white_is_zero else values).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), [*notes, how], guessed_bits
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if image.format == "BMP" and not np.asarray(rgba)[..., 3].any():  # a fourth byte that is not used, no alpha
            return rgba.convert("RGB"), notes, 0
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB"), [*notes, "transparency over white"], 0
    if image.mode == "CMYK":
        notes.append("CMYK converted without its colour profile")
    return image.convert("RGB"), notes, 0


def _highest_value(image: Image.Image, png_bits: int) -> tuple[int, str, int]:
    """Return which value of a grey image of more than 8 bits is white, a note, and the guessed bits; 0 for others.

    PIL has scaled PGM's values to 16 bits. A TIFF says how many bits its values have room for, rarely how many they
    use: 10, 12 and 14 bits of cameras, microscopes and scanners come in 16. Many PNGs are written in the same way, and
    not scaled to 16 bits as their standard asks for; those that are made of 8 bits are.

    Args:
        image: Loaded.
        png_bits: Bits of a sample of a PNG with colours, 8 for everything else.

    Raises:
        UnreadableImage: Nothing says what white is.
    """
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels: what is white is unknown, convert it to 8 bits")
    tags = getattr(image, "tag_v2", {})
    bits = max(np.atleast_1d(tags.get(TIFF_BITS_PER_SAMPLE, png_bits)))
    colours = image.mode in ("RGB", "RGBA")
    if colours and bits > 8 and np.asarray(image)[..., :3].max() < 64:  # PIL has kept the upper 8 of 16 bits
        raise UnreadableImage("16-bit colours of which fewer bits are used, or all but black: convert it to 8 bits")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UnreadableImage("signed or 32-bit integers as pixels: what is white is unknown, convert it to 8 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return 0, "", 0
    stated = int(max(np.atleast_1d(tags.get(TIFF_MAX_SAMPLE_VALUE, 0))))
    used = int(np.asarray(image).max())
    of_8_bits = image.format == "PNG" and not (np.asarray(image) % 257).any()
    if image.format == "PPM" or of_8_bits or not used:
        return 65535, "16-bit grey scaled to 8 bits", 0
    if used <= stated <= 65535:
        return stated, f"grey of 0 to {stated}, as its tags say, scaled to 8 bits", 0
    guessed = bits == 16 or image.format == "PNG"
    if guessed:
        bits = next(bits for bits in (8, 10, 12, 14, 16) if used < 2**bits)
    words = f"{bits}-bit grey" if bits == 16 else f"grey of at most {used} taken for {bits}-bit,"
    return 2**bits - 1, f"{words} scaled to 8 bits", bits if guessed else 0


def default_threads() -> int:
    """Return how many threads decode: PIL decodes outside Python's lock, but small images spend most time inside."""
    return min(4, os.cpu_count() or 1)
