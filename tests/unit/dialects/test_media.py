"""What bytes are, and what they count as."""

from __future__ import annotations

import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_celery.dialects.estimates import tokens_of_prompt
from batchllm_celery.dialects.media import (
    audio_seconds,
    image_size,
    media_type_of,
    pdf_pages,
    tokens_of_part,
)
from batchllm_celery.models.request import DialectName, NativeRequest, Prompt, Request
from tests.unit.dialects.files import b64, data_url, gif, jpeg_head, mp3, pdf, png, wav, webp
from tests.unit.dialects.native_rows import chat, message


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (png(), "image/png"),
        (gif(), "image/gif"),
        (jpeg_head(4, 3), "image/jpeg"),
        (webp(4, 3, "VP8 "), "image/webp"),
        (pdf(), "application/pdf"),
        (b"\r\n" + pdf(), "application/pdf"),
        (wav(0.1), "audio/wav"),
        (mp3(0.1), "audio/mpeg"),
        (mp3(0.1, tagged=True), "audio/mpeg"),
        (b"hello", "text/plain"),
        ("Grüße".encode(), "text/plain"),
        ("Grüße".encode("latin-1"), None),
        (b"<svg/>", "text/plain"),
        (b"", None),
        (b"\x00\x01", None),
        (b"RIFF\x00\x00\x00\x00AVI ", None),
        (b"\xff\xfe\x00\x00", None),
    ],
)
def test_the_content_tells_the_media_type(data: bytes, media_type: str | None) -> None:
    assert media_type_of(data) == media_type


@pytest.mark.parametrize(
    "data",
    [
        png(640, 480),
        gif(640, 480),
        jpeg_head(640, 480),
        webp(640, 480, "VP8 "),
        webp(640, 480, "VP8L"),
        webp(640, 480, "VP8X"),
    ],
)
def test_the_size_of_an_image(data: bytes) -> None:
    assert image_size(data) == (640, 480)


def test_the_pages_of_a_pdf() -> None:
    assert pdf_pages(pdf(1)) == 1
    assert pdf_pages(pdf(12)) == 12
    assert pdf_pages(pdf(12, packed=True)) == 12
    assert pdf_pages(b"%PDF-1.7 nothing") == 1


def test_the_length_of_audio() -> None:
    assert audio_seconds(wav(2.5)) == pytest.approx(2.5)
    assert audio_seconds(mp3(20)) == pytest.approx(20, rel=0.02)
    assert audio_seconds(mp3(20, tagged=True)) == pytest.approx(20, rel=0.02)
    assert audio_seconds(b"RIFF\x00\x00\x00\x00WAVE") is None


@pytest.mark.parametrize(
    ("data", "dialect", "model", "tokens"),
    [
        # OpenAI's own examples of tiles: 1024 x 1024 is 765, 2048 x 4096 is 1105
        (png(1024, 1024), "openai", "gpt-4o", 765),
        (png(2048, 4096), "openai", "gpt-4o", 1105),
        (png(100, 100), "responses", "gpt-5", 210),
        # and of patches: 1024 x 1024 is 1024 of them
        (png(1024, 1024), "openai", "gpt-4.1-mini", 1659),
        (png(1024, 1024), "gemini", "", 1032),
        (png(384, 384), "gemini", "", 258),
        # Anthropic's table: 1092 x 1092 is about 1590 tokens
        (png(1092, 1092), "anthropic", "", 1590),
        (png(200, 200), "anthropic", "", 54),
        (png(4000, 4000), "anthropic", "", 1600),
        (pdf(10), "gemini", "", 2580),
        (wav(10), "gemini", "", 320),
        (wav(10), "openai", "gpt-4o-audio-preview", 100),
        (b"x" * 300, "gemini", "", 100),
    ],
)
def test_tokens_by_the_published_rules(data: bytes, dialect: str, model: str, tokens: int) -> None:
    assert tokens_of_part(data, dialect, model=model) == tokens  # type: ignore[arg-type]


IMAGE = png(1024, 1024)


@pytest.mark.parametrize(
    ("prompt", "dialect", "tokens"),
    [
        ("x" * 300, "openai", 100),
        ("", "openai", 1),
        (
            Request.of(
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "x" * 300},
                                {"type": "image", "data": b64(IMAGE)},
                                {"type": "image", "data": b64(IMAGE), "detail": "low"},
                                {"type": "image", "url": "https://example.com/a.png"},
                            ],
                        }
                    ]
                }
            ),
            "openai",
            100 + 765 + 85 + 765,
        ),
        (
            NativeRequest(
                dialect="openai",
                body=chat(
                    {
                        "content": [
                            {"type": "text", "text": "x" * 300},
                            {"image_url": {"url": data_url(IMAGE, "image/png"), "detail": "low"}},
                            {"image_url": {"url": "https://example.com/a.png"}},
                        ]
                    }
                ),
            ),
            "openai",
            100 + 85 + 765,
        ),
        (
            NativeRequest(
                dialect="gemini",
                body={
                    "contents": [
                        {
                            "parts": [
                                {"text": "x" * 30_000},
                                {"inlineData": {"mimeType": "image/png", "data": b64(IMAGE)}},
                                {"inlineData": {"mimeType": "image/png", "data": b64(IMAGE)}},
                                {"inline_data": {"data": b64(pdf(10))}},
                            ]
                        }
                    ]
                },
            ),
            "gemini",
            10_000 + 2 * 1032 + 2580,
        ),
        (
            NativeRequest(
                dialect="gemini",
                body={
                    "contents": [
                        {
                            "parts": [
                                {"text": "AAAA" * 3000},  # a text that could be base64
                                {"inlineData": {"mimeType": "text/csv", "data": b64(b"a,b" * 100)}},
                                {"inlineData": {"mimeType": "video/mp4", "data": b64(b"\0" * 900)}},
                            ]
                        }
                    ]
                },
            ),
            "gemini",
            4000 + 100 + 300,
        ),
        (
            NativeRequest(
                dialect="anthropic",
                body=message({"content": [{"source": {"data": b64(png(200, 200))}}]}),
            ),
            "anthropic",
            54,
        ),
    ],
)
def test_tokens_of_a_prompt(prompt: Prompt, dialect: DialectName, tokens: int) -> None:
    """Text and parts, of any form; an image twice counts twice, and no text as an image."""
    assert tokens_of_prompt(prompt, dialect, model="gpt-4o") == tokens


def test_a_low_detail_is_cheap_at_openai() -> None:
    assert tokens_of_part(png(1024, 1024), "openai", model="gpt-4o", detail="low") == 85


def test_an_image_that_can_not_be_read_counts_as_a_usual_one() -> None:
    broken = png()[:12]
    assert image_size(broken) is None
    assert tokens_of_part(broken, "gemini") == tokens_of_part(png(1024, 1024), "gemini")


@settings(max_examples=200, deadline=None)
@given(
    head=st.sampled_from(
        [b"", png()[:20], gif()[:7], jpeg_head(9, 9)[:30], pdf()[:60], mp3(0.1)[:8]]
    ),
    tail=st.binary(max_size=60),
)
def test_broken_files_raise_nothing(head: bytes, tail: bytes) -> None:
    data = head + tail
    for dialect in ("openai", "gemini", "anthropic"):
        assert tokens_of_part(data, dialect) >= 1
    for kind in ("RIFF\0\0\0\0WAVE", "RIFF\0\0\0\0WEBPVP8X", "RIFF\0\0\0\0WEBPVP8L"):
        tokens_of_part(kind.encode() + tail, "gemini")


def test_hostile_files_take_no_time() -> None:
    """Counting is linear and bounded: a file of a stranger freezes nothing."""
    started = time.process_time()
    pdf_pages(b"%PDF-1.5 " + b"/ObjStm stream\n" * 200_000)
    bomb = zlib.compress(b"/Type /Page " * 100_000)
    pdf_pages(b"%PDF-1.5 " + (b"/ObjStm stream\n" + bomb + b"endstream") * 1000)
    pdf_pages(b"%PDF-1.5 " + b"/Type " * 500_000)
    image_size(b"\xff\xd8" + b"\xff" * 2_000_000)
    audio_seconds(b"ID3\x04\x00\x00\x00\x00\x00\x00" + b"\xff" * 2_000_000)
    assert time.process_time() - started < 5
