"""What the bytes of a part are, how large, and about how many tokens providers count for them.

Everything is read from the content: a name or a declared type may be wrong.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

from batchllm_celery.models.request import DialectName

#: Bytes of which one token is made in text, on average over languages and code.
BYTES_PER_TOKEN = 3
#: How much is read while pages are counted: of one compressed stream, of all, and how many.
_MOST_OF_STREAM, _MOST_UNPACKED, _MOST_STREAMS = 1_000_000, 20_000_000, 1_000

Size: TypeAlias = tuple[int, int]


# -- what it is


def media_type_of(data: bytes) -> str | None:
    """The media type that the content tells: PNG, JPEG, GIF, WebP, PDF, WAV, MP3 or plain text;
    None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav"}.get(data[8:12])
    if b"%PDF-" in data[:1024]:  # readers allow bytes before it
        return "application/pdf"
    if data.startswith(b"ID3") or _is_mp3_frame(data[:4]):
        return "audio/mpeg"
    return "text/plain" if _is_text(data) else None


def _is_text(data: bytes) -> bool:
    if not data or b"\x00" in data:
        return False
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    controls = sum(character < " " and character not in "\t\n\r\f\x1b" for character in text[:4096])
    return controls == 0


# -- images


def image_size(data: bytes) -> Size | None:
    """Width and height in pixels of a PNG, JPEG, GIF or WebP; None where they can't be read."""
    kind = media_type_of(data)
    try:
        if kind == "image/png":
            return struct.unpack(">II", data[16:24])
        if kind == "image/gif":
            return struct.unpack("<HH", data[6:10])
        if kind == "image/jpeg":
            return _jpeg_size(data)
        if kind == "image/webp":
            return _webp_size(data)
    except (struct.error, IndexError, ValueError):
        pass
    return None


_MOST_SEGMENTS = 10_000


def _jpeg_size(data: bytes) -> Size | None:
    position = 2
    for _ in range(_MOST_SEGMENTS):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD9 or marker == 0x01:  # fill, or no length
            position += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return width, height
        position += 2 + int(struct.unpack(">H", data[position + 2 : position + 4])[0])
    return None


def _webp_size(data: bytes) -> Size | None:
    form = data[12:16]
    if form == b"VP8X":
        return (
            int.from_bytes(data[24:27], "little") + 1,
            int.from_bytes(data[27:30], "little") + 1,
        )
    if form == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if form == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


# -- documents

_PAGE = re.compile(rb"/Type\s{0,8}/Page(?![a-zA-Z])")
_COUNT = re.compile(rb"/Count\s{1,8}(\d{1,6})(?!\d)")
_STREAM = re.compile(rb"stream\r?\n")


def pdf_pages(data: bytes) -> int:
    """Pages of a PDF, at least 1. Those of encrypted files can't be counted."""
    pages = _count_pages(data)
    if pages == 0:
        # PDF 1.5 packs its page objects into compressed streams.
        pages = sum(_count_pages(unpacked) for unpacked in _unpacked_streams(data))
    return max(pages, 1)


def _count_pages(data: bytes) -> int:
    """Page objects; where the page tree names more, its number (the objects are elsewhere)."""
    objects = len(_PAGE.findall(data))
    if b"/Pages" not in data:
        return objects
    return max([objects, *(int(count) for count in _COUNT.findall(data))])


def _unpacked_streams(data: bytes) -> Iterator[bytes]:
    left = _MOST_UNPACKED
    for match in islice(_STREAM.finditer(data), _MOST_STREAMS):
        # The dictionary before it says what it is; only object streams hold pages.
        if b"/ObjStm" not in data[max(0, match.start() - 400) : match.start()]:
            continue
        end = data.find(b"endstream", match.end(), match.end() + _MOST_OF_STREAM)
        if end < 0 or left <= 0:
            continue
        try:
            packed = data[match.end() : end]
            unpacked = zlib.decompressobj().decompress(packed, min(left, _MOST_OF_STREAM))
        except zlib.error:
            continue
        left -= len(unpacked)
        yield unpacked


# -- audio

_MP3_KBPS = {
    # (MPEG 1?, layer): by the frame header's bitrate index
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
}
_MP3_HERTZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def audio_seconds(data: bytes) -> float | None:
    """Length of a WAV or MP3 in seconds; None where it can't be read."""
    kind = media_type_of(data)
    try:
        if kind == "audio/wav":
            return _wav_seconds(data)
        if kind == "audio/mpeg":
            return _mp3_seconds(data)
    except (struct.error, IndexError, ValueError):
        pass
    return None


def _wav_seconds(data: bytes) -> float | None:
    position, rate = 12, 0
    while position + 8 <= len(data):
        name = data[position : position + 4]
        (size,) = struct.unpack("<I", data[position + 4 : position + 8])
        if name == b"fmt ":
            (rate,) = struct.unpack("<I", data[position + 16 : position + 20])
        elif name == b"data":
            # A recorder that streams writes 0 or the largest number there.
            size = min(size or len(data), len(data) - position - 8)
            return float(size / rate) if rate else None
        position += 8 + size + size % 2
    return None


def _is_mp3_frame(header: bytes) -> bool:
    return _mp3_frame(header) is not None


def _mp3_frame(header: bytes) -> tuple[int, int, int] | None:
    """Bits a second, samples a second and samples of the frame that begins here."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bitrate, hertz = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or hertz == 3:
        return None
    kbps = _MP3_KBPS[version == 3, layer][bitrate - 1]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    return kbps * 1000, _MP3_HERTZ[version][hertz], samples


def _mp3_seconds(data: bytes) -> float | None:
    start = 0
    if data.startswith(b"ID3"):
        a, b, c, d = data[6:10]
        start = 10 + (a << 21 | b << 14 | c << 7 | d)
    for position in range(start, min(start + 4096, len(data) - 4)):
        frame = _mp3_frame(data[position : position + 4])
        if frame is None:
            continue
        bits, hertz, samples = frame
        info = data[position : position + 200]
        for tag in (b"Xing", b"Info"):  # a variable bitrate's first frame counts the frames
            at = info.find(tag)
            if at >= 0 and info[at + 7] & 1:
                (frames,) = struct.unpack(">I", info[at + 8 : at + 12])
                return float(frames * samples / hertz)
        return (len(data) - position) * 8 / bits
    return None


# -- tokens, by the providers' published rules

Detail: TypeAlias = Literal["auto", "low", "high"]

#: Where an image's size can't be read.
_USUAL_SIZE: Size = (1024, 1024)
_USUAL_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Tiles:
    """OpenAI's images by tiles of 512 pixels: tokens of the image and of each tile."""

    base: int
    tile: int


_OTHER_TILES = _Tiles(85, 170)
_OPENAI_TILES = (
    ("gpt-4o-mini", _Tiles(2833, 5667)),
    ("gpt-4o", _Tiles(85, 170)),
    ("gpt-4.1", _Tiles(85, 170)),
    ("gpt-4.5", _Tiles(85, 170)),
    ("gpt-5", _Tiles(70, 140)),
    ("o1", _Tiles(75, 150)),
    ("o3", _Tiles(75, 150)),
)
#: The others: patches of 32 pixels, times the model's factor. A larger image is shrunk.
_MOST_PATCHES = 1536
_OPENAI_PATCHES = (
    ("gpt-4.1-nano", 2.46),
    ("gpt-5-nano", 2.46),
    ("o4-mini", 1.72),
    ("gpt-4.1-mini", 1.62),
    ("gpt-5-mini", 1.62),
)
_GEMINI_TILE, _GEMINI_TILE_PIXELS, _GEMINI_SMALL = 258, 768, 384
_ANTHROPIC_EDGE, _ANTHROPIC_PIXELS_PER_TOKEN, _ANTHROPIC_MOST = 1568, 750, 1600
_PDF_PAGE = {"gemini": 258, "anthropic": 2_250}
_AUDIO_SECOND = {"gemini": 32.0, "openai": 10.0, "responses": 10.0}
_VIDEO_SECOND = 300


def tokens_of_part(
    data: bytes,
    dialect: DialectName,
    *,
    model: str = "",
    media_type: str | None = None,
    detail: Detail | None = None,
) -> int:
    """About how many input tokens the provider counts for a part; at least 1.

    Args:
        data: the part's bytes.
        dialect: whose rule: `openai` and `responses` count images by tile or patch, `gemini` by
            tile, `anthropic` by area; a PDF counts by page, audio by second, text by its bytes.
        model: the model's name: OpenAI's rules differ by it.
        media_type: what the part is declared as; used where the content does not tell.
        detail: how closely the model looks; `low` makes OpenAI's images small.
    """
    kind = media_type_of(data)
    if kind in (None, "text/plain") and media_type is not None:
        kind = media_type
    if kind is not None and kind.startswith("image/"):
        tokens = _image_tokens(image_size(data) or _USUAL_SIZE, dialect, model, detail)
    elif kind == "application/pdf":
        tokens = _pdf_tokens(data, dialect, model)
    elif kind is not None and kind.startswith("audio/"):
        seconds = audio_seconds(data)
        rate = _AUDIO_SECOND.get(dialect, 32.0)
        tokens = math.ceil((_USUAL_SECONDS if seconds is None else seconds) * rate)
    elif kind is not None and kind.startswith("video/"):
        # A container tells its length in a hundred ways: 1 Mbit/s is a usual web video.
        tokens = math.ceil(len(data) / 125_000) * _VIDEO_SECOND
    else:
        tokens = math.ceil(len(data) / BYTES_PER_TOKEN)
    return max(tokens, 1)


def _image_tokens(size: Size, dialect: DialectName, model: str, detail: Detail | None) -> int:
    if dialect == "gemini":
        return _gemini_image(size)
    if dialect == "anthropic":
        return _anthropic_image(size)
    return _openai_image(size, model, detail)


def _gemini_image(size: Size) -> int:
    width, height = size
    if width <= _GEMINI_SMALL and height <= _GEMINI_SMALL:
        return _GEMINI_TILE
    unit = min(max(math.floor(min(size) / 1.5), 256), _GEMINI_TILE_PIXELS)
    return math.ceil(width / unit) * math.ceil(height / unit) * _GEMINI_TILE


def _anthropic_image(size: Size) -> int:
    width, height = size
    scale = min(1.0, _ANTHROPIC_EDGE / max(width, height, 1))
    tokens = math.ceil(width * scale * height * scale / _ANTHROPIC_PIXELS_PER_TOKEN)
    return min(tokens, _ANTHROPIC_MOST)


def _openai_image(size: Size, model: str, detail: Detail | None) -> int:
    width, height = size
    name = model.rpartition("/")[2]
    for prefix, factor in _OPENAI_PATCHES:
        if name.startswith(prefix):
            patches = math.ceil(width / 32) * math.ceil(height / 32)
            return math.ceil(min(patches, _MOST_PATCHES) * factor)
    tiles = next((t for prefix, t in _OPENAI_TILES if name.startswith(prefix)), _OTHER_TILES)
    if detail == "low":
        return tiles.base
    scale = min(1.0, 2048 / max(width, height, 1))  # into a square of 2,048
    scale *= min(1.0, 768 / max(min(width, height) * scale, 1))  # the shorter side to 768
    across, down = (math.ceil(side * scale / 512) for side in size)
    return tiles.base + max(across, 1) * max(down, 1) * tiles.tile


def _pdf_tokens(data: bytes, dialect: DialectName, model: str) -> int:
    pages = pdf_pages(data)
    if dialect in _PDF_PAGE:
        return pages * _PDF_PAGE[dialect]
    # OpenAI: the page's text and its image.
    return pages * (_openai_image((816, 1056), model, None) + 500)
