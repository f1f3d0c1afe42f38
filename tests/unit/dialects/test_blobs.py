"""Large values lifted out of bodies and put back with the same bytes."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_celery.dialects.blobs import BlobMissingError, Place, lift, restore
from batchllm_celery.models.request import Request
from tests.unit.dialects import native_rows as rows
from tests.unit.dialects.files import b64, data_url, pdf, png


def back(lifted: Any) -> Any:
    """Through a payload's JSON, as workers get it."""
    payload = json.loads(json.dumps([lifted.body, [place.to_json() for place in lifted.places]]))
    places = tuple(Place.of(place) for place in payload[1])
    return restore(payload[0], places, lifted.blobs)


@pytest.mark.parametrize(
    "row", [*rows.openai_rows(), *rows.gemini_rows(), *rows.anthropic_rows()], ids=str
)
def test_every_row_comes_back_equal(row: dict[str, Any]) -> None:
    before = copy.deepcopy(row)
    lifted = lift(row)
    assert row == before
    assert json.dumps(back(lifted)) == json.dumps(row)


def test_media_of_any_dialect_are_lifted_as_their_bytes() -> None:
    """The same image is one blob, whoever's form it has."""
    image = png(60, 60)
    bodies = [
        rows.chat(
            {"role": "user", "content": [{"image_url": {"url": data_url(image, "image/png")}}]}
        ),
        rows.respond(
            [{"content": [{"type": "input_image", "image_url": data_url(image, "image/png")}]}]
        ),
        rows.generate({"parts": [{"inlineData": {"mimeType": "image/png", "data": b64(image)}}]}),
        rows.generate({"parts": [{"inline_data": {"mime_type": "image/png", "data": b64(image)}}]}),
        rows.message({"content": [{"source": {"type": "base64", "data": b64(image)}}]}),
        Request.of(
            {"messages": [{"role": "user", "content": [{"type": "image", "data": b64(image)}]}]}
        ).to_json(),
    ]
    for body in bodies:
        lifted = lift(body)
        assert list(lifted.blobs) == [hashlib.sha256(image).hexdigest()]
        assert list(lifted.blobs.values()) == [image]
        assert b64(image) not in json.dumps(lifted.body)
        assert back(lifted) == body


def test_rows_that_share_a_part_share_its_blob() -> None:
    shared = data_url(pdf(3), "application/pdf")
    lifted = [
        lift(rows.chat({"content": [{"file": {"file_data": shared}}, {"text": f"row {i}"}]}))
        for i in range(3)
    ]
    assert len({sha for one in lifted for sha in one.blobs}) == 1


def test_base64_that_is_not_canonical_comes_back_as_it_was() -> None:
    """Padding left out, other alphabets, line ends, leftover bits: none is rewritten."""
    data = b"\xfb\xff\xfe" * 2000
    plain = b64(data)
    texts = [
        plain.replace("+", "-").replace("/", "_"),
        plain[:-4] + "/x==",
        plain + "\n",
        plain[:-1],
        "=" * 8000,
        "data:image/png;base64,!!!" + plain,
        "data:image/png," + plain,
        "DATA:image/png;base64," + plain,
    ]
    for text in texts:
        body = {"data": text, "url": f"data:image/png;base64,{text}"}
        lifted = lift(body)
        assert back(lifted) == body
        assert len(json.dumps(lifted.body)) < 200


def test_long_texts_are_lifted_and_short_ones_stay() -> None:
    body = rows.chat(
        {"role": "user", "content": "long " * 2000}, {"role": "user", "content": "short"}
    )
    lifted = lift(body)
    assert lifted.body["messages"][0]["content"] is None
    assert lifted.body["messages"][1]["content"] == "short"
    assert back(lifted) == body


def test_a_body_of_many_small_values_is_lifted_whole() -> None:
    """A payload is at most 64 kB, whatever a row is made of."""
    turns = [{"role": "user", "content": f"turn {i}"} for i in range(5000)]
    body = rows.chat(
        *turns, {"role": "user", "content": [{"image_url": {"url": data_url(png(), "image/png")}}]}
    )
    lifted = lift(body)
    assert lifted.body is None
    assert len(lifted.places) == 2
    assert back(lifted) == body


def test_a_text_can_not_be_taken_for_a_place() -> None:
    """A body that has been lifted once is a body like any other."""
    once = lift(rows.chat({"content": "x" * 5000}))
    payload = {"body": once.body, "places": [place.to_json() for place in once.places]}
    assert back(lift(payload)) == payload


def test_a_blob_that_is_gone_is_named() -> None:
    lifted = lift({"content": "x" * 5000})
    with pytest.raises(BlobMissingError) as caught:
        restore(lifted.body, lifted.places, {})
    assert caught.value.args == (lifted.places[0].sha,)


def test_restoring_does_not_change_what_is_shared() -> None:
    lifted = lift({"a": [{"data": b64(b"x" * 9)}, 1]})
    before = copy.deepcopy(lifted.body)
    restore(lifted.body, lifted.places, lifted.blobs)
    assert lifted.body == before


TEXTS = st.one_of(
    st.text(st.characters(), max_size=30),  # lone surrogates included: JSON can carry them
    st.binary(max_size=20).map(b64),
    st.binary(max_size=20).map(lambda data: data_url(data, "image/png")),
    st.text("ABab+/-_=", max_size=20),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["data", "url", "text", "0", "file_data"]), inner, max_size=4
        ),
    ),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(body=JSON, long_text=st.integers(0, 20), most=st.sampled_from([1, 40, 10_000]))
def test_any_body_comes_back_equal(body: Any, long_text: int, most: int) -> None:
    lifted = lift(body, most_bytes=most, long_text=long_text)
    assert json.dumps(back(lifted)) == json.dumps(body)
    rest = json.dumps(lifted.body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert len(rest) <= max(most, 4)
    for sha, data in lifted.blobs.items():
        assert hashlib.sha256(data).hexdigest() == sha
