"""An item's request: chat turns, parts, tools and parameters, in no provider's format.

A prompt is one of three: a `str`, a `Request`, or a `NativeRequest`, which is a body in a
provider's own format. `dialects` translates a `Request` into each provider's body.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from batchllm_celery.errors import InputError
from batchllm_celery.models.base import Model

#: Version of a request's JSON. A reader refuses a newer one.
REQUEST_VERSION = 1

#: Fields that no `extra` may name: they would change the model, the form of the answer, or make
#: the answer depend on something that is not in the request.
NEVER_EXTRA = frozenset({"model", "stream", "stream_options", "background", "previous_response_id"})

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
DialectName: TypeAlias = Literal["openai", "responses", "embeddings", "gemini", "anthropic"]


#: Levels of objects and lists that JSON in a request may have. Far more would reach the limits of
#: the decoders that it passes on its way to a worker, and take other rows along.
MOST_LEVELS = 100


def too_deep(value: Any) -> bool:
    """Whether JSON is nested deeper than `MOST_LEVELS`; needs no recursion itself."""
    level = [value]
    for _ in range(MOST_LEVELS):
        containers = [each for each in level if isinstance(each, dict | list | tuple)]
        level = [
            inner
            for each in containers
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return any(isinstance(each, dict | list | tuple) for each in level)


def _check_depth(value: Any) -> Any:
    if too_deep(value):
        raise ValueError(f"is nested deeper than {MOST_LEVELS} levels")
    return value


#: An object of JSON that is carried as it is.
_Object = Annotated[dict[str, Any], BeforeValidator(_check_depth)]


class _RequestModel(Model):
    # Errors name the field and never quote the value: it is the user's prompt.
    model_config = ConfigDict(hide_input_in_errors=True)


# -- parts


def _decode_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("must be bytes, or text in base64") from None


def _encode_base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


_Data = Annotated[
    bytes, BeforeValidator(_decode_base64), PlainSerializer(_encode_base64, when_used="json")
]


class TextPart(_RequestModel):
    type: Literal["text"] = "text"
    text: str


class MediaPart(_RequestModel):
    """Bytes beside the text: exactly one of `url`, `data` and `path` says where they are.

    Args:
        url: passed to providers that fetch it themselves; a `data:` URL becomes `data`.
        data: the bytes; base64 in JSON.
        path: a file that the producer reads before the item is enqueued.
        media_type: `image/png`; None: found by content.
    """

    url: str | None = None
    data: _Data | None = None
    path: str | None = None
    media_type: str | None = Field(default=None, pattern=r"^[\w.+-]+/[\w.+-]+$")

    @model_validator(mode="before")
    @classmethod
    def _take_data_url(cls, value: Any) -> Any:
        url = value.get("url") if isinstance(value, Mapping) else None
        if not isinstance(url, str) or not url.startswith("data:"):
            return value
        head, comma, text = url.partition(",")
        media_type, *options = head.removeprefix("data:").split(";")
        if not comma or options != ["base64"] or not media_type:
            raise ValueError("a data: URL must begin with data:TYPE;base64,")
        rest = {name: given for name, given in value.items() if name != "url"}
        return {"media_type": media_type, **rest, "data": text}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        given = [name for name in ("url", "data", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of url, data and path (found {found})")
        return self


class ImagePart(MediaPart):
    """An image; `detail` is the resolution that the model uses, for providers that have it."""

    type: Literal["image"] = "image"
    detail: Literal["auto", "low", "high"] | None = None


class FilePart(MediaPart):
    """A PDF, audio, video or text; `name` is the file's name, where a provider wants one."""

    type: Literal["file"] = "file"
    name: str | None = None


Part: TypeAlias = Annotated[TextPart | ImagePart | FilePart, Discriminator("type")]


def _content_tag(value: Any) -> str:
    return "string" if isinstance(value, str) else "parts"


def _one_text(value: Any) -> Any:
    """One text part is the text: providers read both the same."""
    if isinstance(value, list | tuple) and len(value) == 1:
        part = value[0]
        if isinstance(part, TextPart):
            return part.text
        if isinstance(part, Mapping) and part.keys() == {"type", "text"} and part["type"] == "text":
            return part["text"]
    return value


_Texts = Annotated[
    Annotated[str, Tag("string")] | Annotated[tuple[TextPart, ...], Tag("parts")],
    Discriminator(_content_tag),
    BeforeValidator(_one_text),
]
_Parts = Annotated[
    Annotated[str, Tag("string")] | Annotated[tuple[Part, ...], Tag("parts")],
    Discriminator(_content_tag),
    BeforeValidator(_one_text),
]


# -- messages


class FunctionCall(_RequestModel):
    """`arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(_RequestModel):
    """A call that the assistant made, in the form of OpenAI's chat completions."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(_RequestModel):
    role: Literal["system"] = "system"
    content: _Texts


class UserMessage(_RequestModel):
    role: Literal["user"] = "user"
    content: _Parts


class AssistantMessage(_RequestModel):
    role: Literal["assistant"] = "assistant"
    content: _Texts = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _null_content(cls, value: Any) -> Any:
        # OpenAI's answers say `"content": null` beside tool calls; people send them back.
        if isinstance(value, Mapping) and value.get("content", "") is None:
            return {**value, "content": ""}
        return value

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if not self.content and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolMessage(_RequestModel):
    """What a tool answered to the call of this id."""

    role: Literal["tool"] = "tool"
    tool_call_id: str
    content: _Parts


Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Discriminator("role")
]


# -- tools and parameters


class Tool(_RequestModel):
    """A function that the model may call; OpenAI's `{"type": "function", "function": ..}` too.

    Args:
        name: its name.
        description: what it does, for the model.
        parameters: JSON Schema of its arguments; None: it has none.
        strict: whether arguments must follow the schema exactly, where a provider has that.
    """

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: _Object | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _take_nested(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.keys() == {"type", "function"}:
            if value["type"] != "function":
                raise ValueError("only tools of type 'function' can be carried")
            return value["function"]
        return value


class NamedTool(_RequestModel):
    """The one tool that the model must call."""

    name: str


_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Whole = Annotated[int, Field(strict=True)]


class Parameters(_RequestModel):
    """How the model answers. None leaves a parameter to the provider's default.

    Args:
        temperature: sampling temperature.
        top_p: probability mass that is sampled from.
        top_k: tokens that are sampled from.
        seed: for answers that repeat, as far as the provider can.
        stop: texts that end the answer.
        max_output_tokens: tokens after which the answer is cut, which fails it as `truncated`.
        presence_penalty: against tokens that have occurred.
        frequency_penalty: against tokens, by how often they have occurred.
        logprobs: alternatives listed with each token's probability; 0: the token alone.
        reasoning_effort: `low`, `medium`, `high` and others that the provider knows.
        thinking_budget: tokens for thinking.
        service_tier: the provider's name of a tier.
        n: answers to one request; more than one make the output a list.
        json_output: answer any JSON; `Request.schema` asks for a shape.
    """

    temperature: _Number | None = None
    top_p: _Number | None = None
    top_k: _Whole | None = None
    seed: _Whole | None = None
    stop: tuple[str, ...] = ()
    max_output_tokens: Annotated[_Whole, Field(ge=1)] | None = None
    presence_penalty: _Number | None = None
    frequency_penalty: _Number | None = None
    logprobs: Annotated[_Whole, Field(ge=0)] | None = None
    reasoning_effort: str | None = None
    thinking_budget: Annotated[_Whole, Field(ge=-1)] | None = None
    service_tier: str | None = None
    n: Annotated[_Whole, Field(ge=1)] = 1
    json_output: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("logprobs", mode="before")
    @classmethod
    def _flag(cls, value: Any) -> Any:
        return (0 if value else None) if isinstance(value, bool) else value

    def given(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, by name."""
        fields = type(self).model_fields
        return {name: value for name, value in self if value != fields[name].default}


with warnings.catch_warnings():
    # `schema` is the field's name for users; pydantic's method of that name is deprecated.
    warnings.filterwarnings("ignore", message='Field name "schema"', category=UserWarning)

    class Request(_RequestModel):
        """One request to a model, whichever provider it goes to.

            Request(messages=(UserMessage(content="Say hello"),))
            Request.of({"messages": [{"role": "user", "content": "Say hello"}]})

        Args:
            messages: the chat's turns, oldest first; at least one.
            parameters: how the model answers.
            tools: functions that the model may call.
            tool_choice: `auto`, `none`, `required`, or the one that must be called.
            schema: JSON Schema (or pydantic model) of the output.
            schema_name: label of the schema, for providers that want one; None: its title.
            schema_strict: whether the provider must enforce the schema, where it can choose.
            extra: further fields of the provider's own body, merged last. One that the
                translation wrote itself is refused, and so are `model` and `stream`.
            version: of this form.

        Raises:
            ValueError: (pydantic's ValidationError) naming the field; `of` gives plainer words.
        """

        messages: tuple[Message, ...]
        parameters: Parameters = Parameters()
        tools: tuple[Tool, ...] = ()
        tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
        schema: _Object | None = None  # type: ignore[assignment]
        schema_name: str | None = Field(default=None, pattern=r"^[\w-]{1,64}$")
        schema_strict: bool | None = None
        extra: _Object = Field(default_factory=dict)
        version: int = REQUEST_VERSION

        FORM: ClassVar[str] = "request"

        @field_validator("version")
        @classmethod
        def _check_version(cls, version: int) -> int:
            if version > REQUEST_VERSION:
                raise ValueError(f"version {version} is newer than {REQUEST_VERSION}: upgrade")
            return version

        @field_validator("messages")
        @classmethod
        def _check_messages(cls, messages: tuple[Any, ...]) -> tuple[Any, ...]:
            if not messages:
                raise ValueError("there must be at least one")
            return messages

        @field_validator("schema", mode="before")
        @classmethod
        def _take_model(cls, value: Any) -> Any:
            if isinstance(value, type) and issubclass(value, BaseModel):
                return value.model_json_schema()
            return value

        @field_validator("extra")
        @classmethod
        def _check_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
            refused = sorted(NEVER_EXTRA & extra.keys())
            if refused:
                raise ValueError(f"must not name {', '.join(refused)}")
            return extra

        @model_validator(mode="after")
        def _check_tool_choice(self) -> Self:
            choice = self.tool_choice
            if isinstance(choice, NamedTool) and choice.name not in {t.name for t in self.tools}:
                raise ValueError("tool_choice names a tool that is not among the tools")
            return self

        @classmethod
        def of(cls, value: Any) -> Request:
            """Read plain JSON values.

            Raises:
                InputError: naming each field that is wrong (`messages[2].content[0].url`), never
                    its value.
            """
            try:
                return cls.model_validate(value)
            except ValidationError as error:
                raise InputError(_explain(error, value)) from None

        def to_json(self) -> dict[str, Any]:
            """Plain JSON values that `of` reads back: equal to this request."""
            return self.model_dump(mode="json", exclude_none=True)

        def media(self) -> Iterator[tuple[str, ImagePart | FilePart]]:
            """Each image and file with its path (`messages[0].content[1]`)."""
            for i, message in enumerate(self.messages):
                for j, part in enumerate(message.content):
                    if isinstance(part, ImagePart | FilePart):
                        yield f"messages[{i}].content[{j}]", part

        def map_media(
            self, change: Callable[[str, ImagePart | FilePart], ImagePart | FilePart]
        ) -> Request:
            """This request with each image and file replaced by what `change(path, part)` gives:
            a file that was read in place of its path, for example."""
            messages = [
                _with_content(message, i, change) for i, message in enumerate(self.messages)
            ]
            return self.model_copy(update={"messages": tuple(messages)})

        def with_user_text(self, text: str) -> Request:
            """This request and a further user message: how a rejected answer is fed back."""
            return self.model_copy(update={"messages": (*self.messages, UserMessage(content=text))})


def _with_content(message: Any, index: int, change: Callable[..., Any]) -> Any:
    if isinstance(message.content, str):
        return message
    parts = tuple(
        part if isinstance(part, TextPart) else change(f"messages[{index}].content[{j}]", part)
        for j, part in enumerate(message.content)
    )
    return message.model_copy(update={"content": parts})


class NativeRequest(_RequestModel):
    """A body in a provider's own format, sent as it is by a strategy that speaks the dialect.

    Args:
        dialect: `openai` (chat completions), `responses`, `embeddings`, `gemini`, `anthropic`.
        body: the body, unchanged.
        version: of this form.
    """

    dialect: DialectName
    body: _Object
    version: int = REQUEST_VERSION

    FORM: ClassVar[str] = "native"

    @field_validator("version")
    @classmethod
    def _check_version(cls, version: int) -> int:
        if version > REQUEST_VERSION:
            raise ValueError(f"version {version} is newer than {REQUEST_VERSION}: upgrade")
        return version

    @classmethod
    def of(cls, value: Any) -> NativeRequest:
        """Read plain JSON values.

        Raises:
            InputError: naming each field that is wrong, never its value.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise InputError(_explain(error, value)) from None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `of` reads back; the body is the same object."""
        return {"dialect": self.dialect, "body": self.body, "version": self.version}


#: What an item's prompt may be.
Prompt: TypeAlias = str | Request | NativeRequest


# -- text of any prompt

#: Where native bodies hold text for the model.
TEXT_FIELDS = frozenset(
    {"text", "content", "input", "instructions", "system", "arguments", "output", "description"}
)


def text_of(prompt: Prompt) -> str:
    """The text in a prompt of any form, turns separated by blank lines, without images and files:
    for token estimates and rehearsals, never to send."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, NativeRequest):
        return "\n\n".join(_native_texts(prompt.body, field=None))
    return "\n\n".join(text for message in prompt.messages for text in _message_texts(message))


def _message_texts(message: Any) -> Iterator[str]:
    if isinstance(message.content, str):
        if message.content:
            yield message.content
    else:
        yield from (part.text for part in message.content if isinstance(part, TextPart))
    for call in getattr(message, "tool_calls", ()):
        yield call.function.arguments


def _native_texts(value: Any, field: str | None) -> Iterator[str]:
    if isinstance(value, str):
        if field in TEXT_FIELDS and value and not value.startswith("data:"):
            yield value
    elif isinstance(value, list):
        for element in value:
            yield from _native_texts(element, field)
    elif isinstance(value, dict):
        for name, element in value.items():
            yield from _native_texts(element, name)


# -- errors


def _explain(error: ValidationError, value: Any) -> str:
    lines = [
        f"{path_of(detail['loc'], value, missing=detail['type'] == 'missing') or 'the request'}: "
        f"{_words(detail)}"
        for detail in error.errors(include_url=False, include_input=False)
    ]
    return "; ".join(dict.fromkeys(lines))


_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is unknown",
    "tuple_type": "must be a text or a list",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "model_attributes_type": "must be an object",
    "union_tag_not_found": "has no role or type",
}


def _words(detail: Any) -> str:
    if detail["type"] == "union_tag_invalid":
        return f"must be one of {detail['ctx']['expected_tags']}"
    words = str(detail["msg"]).removeprefix("Value error, ")
    return _WORDS.get(detail["type"], words.replace("Input should be", "must be"))


def path_of(location: tuple[int | str, ...], value: Any, *, missing: bool = False) -> str:
    """`messages[2].content[0].url`: pydantic's location without the names of union members, which
    are not in the value. `missing`: its last step is a field that is not there."""
    path, current = "", value
    for place, step in enumerate(location):
        named = missing and place == len(location) - 1
        if isinstance(current, list | tuple) and isinstance(step, int):
            path += f"[{step}]"
            current = current[step] if step < len(current) else None
        elif isinstance(current, Mapping) and (step in current or named):
            path += f".{step}" if path else str(step)
            current = current.get(step)
    return path
