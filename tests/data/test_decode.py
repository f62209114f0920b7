"""One image of every kind, as 32x32 RGB."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from cifar_tl.data.decode import FORMATS, NoImage, UnreadableImage, decode

ROWS, COLUMNS = np.mgrid[0:60, 0:100]
UPRIGHT = Image.fromarray(np.stack([COLUMNS * 2.5, ROWS * 4, 200 - COLUMNS], -1).astype(np.uint8))
RAMP = (COLUMNS * 655).astype(np.uint16)
"""0 to 64,845 from left to right."""


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    stream.seek(0)
    return stream


def pgm(values, highest):
    return io.BytesIO(b"P5 100 60 %d\n" % highest + values.astype(">u2").tobytes())


def tiff(pixels, samples, bits, *more):
    """Return an uncompressed TIFF of kinds that PIL does not write: pixels are (height, width, samples)."""
    height, width = pixels.shape[:2]
    content = pixels.tobytes()
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, samples, 8 if samples > 2 else bits), (259, 3, 1, 1)]
    entries += [(262, 3, 1, 2 if samples > 2 else 1), (273, 4, 1, 16), (277, 3, 1, samples), (278, 3, 1, height)]
    entries += [(279, 4, 1, len(content)), *more]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return io.BytesIO(b"II*\0" + struct.pack("<I4H", 16 + len(content), *[bits] * 4) + content + directory)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_every_orientation_of_exif_shows_the_same_picture(orientation):
    turn = Image.Transpose
    stored = {
        **{2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE},
        **{6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270},
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(UPRIGHT.transpose(stored[orientation]), "PNG", exif=exif))
    assert np.array_equal(image.pixels, decode(encoded(UPRIGHT, "PNG")).pixels)
    assert image.notes == ("turned as its EXIF says",)


def test_an_image_with_broken_exif_is_taken_as_it_is():
    stream = encoded(UPRIGHT, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12")
    assert np.array_equal(decode(stream).pixels, decode(encoded(UPRIGHT, "PNG")).pixels)


@pytest.mark.parametrize(
    ("stream", "note"),
    [
        (encoded(Image.fromarray(RAMP), "PNG"), "16-bit grey scaled to 8 bits"),
        (encoded(Image.fromarray(RAMP), "TIFF"), "16-bit grey scaled to 8 bits"),
        (encoded(Image.fromarray(RAMP // 257 * 257), "PNG"), "16-bit grey scaled to 8 bits"),
        (encoded(Image.fromarray(RAMP >> 2), "TIFF"), "grey of at most 16211 taken for 14-bit, scaled to 8 bits"),
        (encoded(Image.fromarray(RAMP >> 4), "TIFF"), "grey of at most 4052 taken for 12-bit, scaled to 8 bits"),
        (encoded(Image.fromarray(RAMP >> 4), "PNG"), "grey of at most 4052 taken for 12-bit, scaled to 8 bits"),
        (
            encoded(Image.fromarray(RAMP // 13), "TIFF", tiffinfo={281: 5041}),
            "grey of 0 to 5041, as its tags say, scaled to 8 bits",
        ),
        (pgm(RAMP, 65535), "16-bit grey scaled to 8 bits"),
        (pgm(RAMP >> 4, 4095), "16-bit grey scaled to 8 bits"),
    ],
    ids=["PNG", "TIFF", "PNG of 8 bits", "14 bits", "12 bits", "PNG, 12 bits", "a stated range", "PGM", "12-bit PGM"],
)
def test_grey_of_more_than_8_bits_is_scaled_by_its_true_range(stream, note):
    image = decode(stream)
    expected = decode(encoded(Image.fromarray((RAMP / 257).round().astype(np.uint8)), "PNG"))
    assert abs(image.pixels.astype(int) - expected.pixels).max() <= 1
    assert image.notes == (note,)


def test_a_16_bit_tiff_in_which_0_is_white_shows_the_same_picture():
    negative = Image.fromarray(RAMP.max() - RAMP)
    stream = encoded(negative, "TIFF", tiffinfo={262: 0, 281: int(RAMP.max())})
    with Image.open(stream) as opened:
        assert np.array_equal(opened, negative)  # PIL neither turns such values over nor says so
    image = decode(stream)
    expected = decode(encoded(Image.fromarray(RAMP), "TIFF", tiffinfo={281: int(RAMP.max())}))
    assert abs(image.pixels.astype(int) - expected.pixels).max() <= 1


def test_a_dark_png_of_8_bits_in_16_stays_dark():
    dark = np.linspace(0, 59, 1024).reshape(32, 32).astype(np.uint16)
    decoded = decode(encoded(Image.fromarray(dark * 257), "PNG"))
    assert np.array_equal(decoded.pixels, np.stack([dark] * 3))


@pytest.mark.parametrize(("kind", "tags", "value"), [("TIFF", {262: 0}, 255), ("TIFF", {}, 0), ("PNG", None, 0)])
def test_16_bit_grey_without_a_value_above_0_is_all_white_or_all_black(kind, tags, value):
    options = {} if tags is None else {"tiffinfo": tags}
    assert (decode(encoded(Image.fromarray(np.zeros_like(RAMP)), kind, **options)).pixels == value).all()


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.fromarray(RAMP.astype(np.int32)), "signed or 32-bit integers as pixels"),
        (Image.fromarray(RAMP.astype(np.float32)), "floating-point pixels"),
    ],
    ids=["integers", "floats"],
)
def test_pixels_of_unknown_range_are_refused_in_true_words(image, said):
    with pytest.raises(UnreadableImage, match=f"{said}.*convert it to 8 bits"):
        decode(encoded(image, "TIFF"))


def with_alpha(values):
    pixels = np.stack([values] * 3 + [np.full_like(values, 65535)], axis=-1).astype("<u2")
    return tiff(pixels, 4, 16, (338, 3, 1, 2))


def deep_png(values, alpha):
    pixels = np.stack([values] * 3 + [np.full_like(values, 65535)] * alpha, axis=-1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    height, width = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, 6 if alpha else 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("made", [with_alpha, lambda v: deep_png(v, alpha=True), lambda v: deep_png(v, alpha=False)])
def test_16_bit_colours_of_which_fewer_are_used_are_refused(made):
    expected = decode(encoded(Image.fromarray((RAMP / 257).round().astype(np.uint8)), "PNG"))
    assert abs(decode(made(RAMP)).pixels.astype(int) - expected.pixels).max() <= 1
    with pytest.raises(UnreadableImage, match="16-bit colours of which fewer bits are used"):
        decode(made(RAMP >> 4))


def test_a_hot_pixel_changes_how_many_bits_are_guessed_and_this_is_said():
    dim = np.full((32, 32), 500, dtype=np.uint16)
    dim[0, 0] = 1023
    hot = dim.copy()
    hot[0, 0] = 1024
    assert [decode(encoded(Image.fromarray(values), "TIFF")).guessed_bits for values in (dim, hot)] == [10, 12]
    assert decode(encoded(Image.fromarray(dim), "PNG")).guessed_bits == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (encoded(UPRIGHT, "PNG").getvalue()[:33], "broken PNG"),
        (encoded(UPRIGHT, "JPEG").getvalue()[:20], "broken JPEG"),
    ],
    ids=["PNG", "JPEG"],
)
def test_an_image_that_is_cut_short_is_not_called_something_else(content, said):
    with pytest.raises(UnreadableImage, match=said) as raised:
        decode(io.BytesIO(content))
    assert not isinstance(raised.value, NoImage)


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")
def test_avif_is_read():
    image = decode(encoded(UPRIGHT, "AVIF", quality=100))
    assert abs(image.pixels.astype(int) - decode(encoded(UPRIGHT, "PNG")).pixels).mean() < 3


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "HEIC",
            "HEIC, which cannot be decoded here: convert it to JPEG or PNG",
        ),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC", "HEIC, which cannot be decoded here"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL", "JPEG XL, which cannot be decoded here"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "video", "video, no image"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG", "SVG, no image"),
        (b"%PDF-1.7", "PDF", "PDF, no image"),
        (
            tiff(np.zeros((8, 8, 1), dtype="<f8"), 1, 64, (339, 3, 1, 3)).getvalue(),
            "TIFF",
            "TIFF that is broken, or of",
        ),
        (b"just text", "", "no image: its content is none of PNG, JPEG"),
        (b"", "", "empty: 0 bytes"),
    ],
    ids=["HEIC", "HEIC as mif1", "JPEG XL", "video", "SVG", "PDF", "TIFF of 64-bit floats", "text", "empty"],
)
def test_what_is_no_image_of_ours_is_named(content, kind, said):
    with pytest.raises(NoImage) as raised:
        decode(io.BytesIO(content))
    assert raised.value.kind == kind
    assert str(raised.value).startswith(said)


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 128), (0, 0, 16, 32))
    pixels = decode(encoded(image, "PNG")).pixels.astype(int)
    assert (pixels[..., 16:] == 255).all()
    assert abs(pixels[..., :16] - 127).max() <= 1


def test_a_fourth_byte_of_a_bmp_that_is_not_used_hides_nothing():
    header = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)

    def bmp(alpha):
        pixels = bytes([0, 0, 200, 0]) + bytes([0, 0, 200, alpha])
        head = struct.pack("<2sIHHI", b"BM", 122 + len(pixels), 0, 0, 122)
        return io.BytesIO(head + header + masks + pixels)

    assert Image.open(bmp(0)).mode == "RGBA"
    assert (decode(bmp(0)).pixels == np.array([200, 0, 0])[:, None, None]).all()
    assert decode(bmp(255)).pixels[:, 0, 0].tolist() == [255, 255, 255]  # which has a transparent pixel, for once


def test_resizing_is_bicubic_as_torch_has_it():
    noise = np.random.default_rng(0).integers(64, 192, (60, 100, 3), dtype=np.uint8)
    images = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    expected = interpolate(images, size=(32, 32), mode="bicubic", antialias=True)[0].numpy()
    assert abs(decode(encoded(Image.fromarray(noise), "PNG")).pixels - expected).max() <= 2  # PIL rounds in between
