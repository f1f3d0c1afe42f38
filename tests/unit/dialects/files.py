"""Small real files, made here: images, PDFs, audio."""

from __future__ import annotations

import base64
import io
import math
import struct
import wave
import zlib


def png(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = b"\x00" + bytes((seed + x) % 256 for x in range(width * 3))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(row * height)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def gif(width: int = 40, height: int = 30) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x00\x00\x00\x3b"


def jpeg_head(width: int, height: int) -> bytes:
    """The segments of a JPEG up to its frame header: a thumbnail's stands in an APP1 before it."""
    thumbnail = b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 1, 1) + b"\x01\x11\x00"
    exif = b"Exif\x00\x00" + thumbnail
    return (
        b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
        + b"\xff\xe1"
        + struct.pack(">H", len(exif) + 2)
        + exif
        + b"\xff\xff\xc2\x00\x11\x08"
        + struct.pack(">HH", height, width)
        + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    )


def webp(width: int, height: int, form: str) -> bytes:
    if form == "VP8X":
        body = b"\x00" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif form == "VP8L":
        body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        body = b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height)
    chunk = form.encode().ljust(4) + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def pdf(pages: int = 1, packed: bool = False) -> bytes:
    """A PDF of empty pages; `packed` keeps its page objects in a compressed stream, as 1.5 does."""
    kids = " ".join(f"{i + 3} 0 R" for i in range(pages))
    tree = f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>"
    leaves = ["<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] >>"] * pages
    catalog = "1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\n"
    if packed:
        stream = zlib.compress(" ".join([tree, *leaves]).encode())
        head = f"9 0 obj\n<< /Type /ObjStm /N {pages + 1} /First 0 /Length {len(stream)} >>\n"
        catalog = catalog.replace("/Pages 2 0 R", "/P 2 0 R")
        body = catalog.encode() + head.encode() + b"stream\n" + stream + b"\nendstream\nendobj\n"
    else:
        objects = "".join(f"{i + 2} 0 obj\n{o}\nendobj\n" for i, o in enumerate([tree, *leaves]))
        body = (catalog + objects).encode()
    return b"%PDF-1.5\n" + body + b"trailer << /Root 1 0 R >>\n%%EOF\n"


def wav(seconds: float = 1.0, rate: int = 8000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        samples = (int(9000 * math.sin(i / 9)) for i in range(int(seconds * rate)))
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return out.getvalue()


def mp3(seconds: float = 1.0, tagged: bool = False) -> bytes:
    """Silent frames of 128 kbit/s at 44.1 kHz: 417 bytes and 1,152 samples each."""
    frames = round(seconds * 44100 / 1152)
    frame = b"\xff\xfb\x90\x00".ljust(417, b"\x00")
    tag = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + b"\x00" * 10
    return (tag if tagged else b"") + frame * frames


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{b64(data)}"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
