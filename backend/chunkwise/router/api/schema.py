"""The bodies of TGI's REST requests: their shape only. Ranges and limits are `validation`'s.

As in TGI, unknown keys are ignored; an explicit null means that the key is absent.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Unsigned = Annotated[int, Field(ge=0, lt=2**32)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class RegexGrammar(_Body):
    """A regular expression that the whole answer matches."""

    type: Literal["regex"]
    value: str


class JsonGrammar(_Body):
    """A JSON schema that the answer fits, as an object or as its text."""

    type: Literal["json", "json_object"]
    value: dict[str, Any] | str


class NamedSchema(_Body):
    """A JSON schema with a name that nobody uses."""

    name: str | None = None
    content: dict[str, Any] = Field(alias="schema")


class JsonSchemaGrammar(_Body):
    """A named JSON schema that the answer fits."""

    type: Literal["json_schema"]
    value: NamedSchema


GrammarBody = Annotated[RegexGrammar | JsonGrammar | JsonSchemaGrammar, Field(discriminator="type")]


class GenerateParameters(_Body):
    """``parameters`` of a generate request. ``chunk_details`` is ours, all else is TGI's."""

    best_of: Unsigned | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: Unsigned | None = None
    return_full_text: bool | None = None
    stop: list[str] = Field(default_factory=list)
    truncate: Unsigned | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: Seed | None = None
    top_n_tokens: Unsigned | None = None
    grammar: GrammarBody | None = None
    adapter_id: str | None = None
    chunk_details: bool = False


class GenerateBody(_Body):
    """Body of ``/generate``, ``/generate_stream`` and ``/tokenize``. Without ``parameters`` the answer is sampled; with
    them it is not, unless they say so."""

    inputs: str
    parameters: GenerateParameters = Field(default_factory=lambda: GenerateParameters(do_sample=True))


class CompatBody(GenerateBody):
    """Body of ``POST /``."""

    stream: bool = False
