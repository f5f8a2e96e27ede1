"""How a recipe refers to a model: one text, or mergekit's mapping of path, revision and LoRA."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

TAG = "‹"
"""What the names of a union's branches begin with, to tell them from keys in the paths of errors."""


def wrong(what: str, fix: str = "") -> PydanticCustomError:
    """An error whose sentence, begun by the name of the key, is ours."""
    return PydanticCustomError("ours", "{what}", {"what": what, "fix": fix})


def text_kind(value: Any) -> str:
    """The branch of a union that is either a text or a mapping."""
    return TAG + ("mapping" if isinstance(value, dict) else "text")


Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A mapping whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PathEntry(Strict):
    """A folder or a repository, and its revision."""

    path: Text
    revision: Text | None = None


PathReference = Annotated[
    Annotated[Text, Tag(TAG + "text")] | Annotated[PathEntry, Tag(TAG + "mapping")], Discriminator(text_kind)
]


class ReferenceEntry(Strict):
    """A model reference spelled out."""

    model: PathReference | None = None
    lora: PathReference | None = None
    path: Text | None = None
    revision: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> ReferenceEntry:
        if (self.model is None) == (self.path is None):
            raise wrong("must have one of `model` and `path`")
        if self.model is not None and self.revision is not None:
            raise wrong("has a `revision` beside `model`", "put it beside the `path`, under `model`")
        return self


Reference = Annotated[
    Annotated[Text, Tag(TAG + "text")] | Annotated[ReferenceEntry, Tag(TAG + "mapping")],
    Discriminator(text_kind),
]


def label(reference: str | PathEntry | ReferenceEntry) -> str:
    """A reference as one text: ``path@revision+lora``."""
    if isinstance(reference, str):
        return reference
    if isinstance(reference, ReferenceEntry) and reference.model is not None:
        base = label(reference.model)
    else:
        base = str(reference.path) + (f"@{reference.revision}" if reference.revision else "")
    lora = reference.lora if isinstance(reference, ReferenceEntry) else None
    return base + (f"+{label(lora)}" if lora is not None else "")
