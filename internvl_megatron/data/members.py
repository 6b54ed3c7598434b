"""A record that lies in a tar beside its media: the members of its sample, and which of them it names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_megatron.data.files import FileError, Span
from internvl_megatron.data.images import FRAME_ENDINGS
from internvl_megatron.data.video import ENDINGS as VIDEO_ENDINGS


@dataclass(frozen=True, slots=True)
class Members:
    """The members of one sample of a tar: those whose names are its key, a point and an extension of their own."""

    path: str
    """Of the tar."""
    key: str
    """Of the sample; may have folders in it."""
    spans: Mapping[str, Span]
    """By extension, which is all behind the first point: `jpg`, `0.jpg`."""

    def find(self, name: str) -> Span:
        """The member that a record calls by its extension, its full name, or its name without the folders.

        Raises:
            FileError: 'missing': there is none.
        """
        span = self.spans.get(name)
        if span is not None:
            return span
        for span in self.spans.values():
            if span.name == name or span.name.endswith(f"/{name}"):
                return span
        have = ", ".join(list(self.spans)[:10])
        raise FileError(
            "missing",
            f"{name!r} is not a member of the sample, which has {have}; name one of these (files beside the shard cannot be "
            "named)",
        )

    def images(self) -> list[str]:
        """Extensions of what looks like an image."""
        return [extension for extension in self.spans if f".{extension.lower()}".endswith(FRAME_ENDINGS)]

    def videos(self) -> list[str]:
        """Extensions of what looks like a video."""
        return [extension for extension in self.spans if f".{extension.lower()}".endswith(VIDEO_ENDINGS)]


class SampleRecord(dict[str, Any]):
    """The JSON object of a record, which knows its sample's other members. No JSON can claim to be one."""

    def __init__(self, fields: Mapping[str, Any], members: Members) -> None:
        """`fields` is the object, `members` all members of the sample."""
        super().__init__(fields)
        self.members = members
