"""The wire format: messages of a topic to items, and records and marks to messages. Pure.

A message is one of, told apart in this order (deploy/wire-format.md is the same for producers in any language):

    header gapstream.control              a mark: `task-boundary` or `flush`; key and value are ignored
    header image-url                      a claim check: headers `label`, `image-sha256`, `image-size` (optional)
    content-type application/json, or     an envelope: `label`, and `image` (base64), or `image_url` with `sha256`
      none and a value that begins with {   and `size` (optional); or `control` alone
    application/cloudevents+json          a structured CloudEvent with an envelope (`data`) or image (`data_base64`)
    image/*, octet-stream or none         the value is the image, header `label` (or `ce_label`) its class name
"""

from __future__ import annotations

import binascii
import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streams.memo import Memo
from streams.record import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_KEY_BYTES,
    Control,
    ControlKind,
    Item,
    Partition,
    Raw,
    Reason,
    Record,
    Rejected,
    Unreachable,
    Unusable,
    canonical_label,
    check_image,
)

# Header names, which producers in any language set: with another name their messages would be read as something else.
# Those with `ce_` are the CloudEvents attributes of the Kafka binding's binary mode.
CONTROL = "gapstream.control"
LABEL, CE_LABEL = "label", "ce_label"
CONTENT_TYPE = "content-type"
CE_VERSION = "ce_specversion"
IMAGE_URL, IMAGE_SHA256, IMAGE_SIZE = "image-url", "image-sha256", "image-size"

JSON, CLOUDEVENTS, OCTETS = "application/json", "application/cloudevents+json", "application/octet-stream"
"""Values of the header `content-type` that are understood, beside `image/...`."""

_CE_VERSION = "1.0"
"""What CloudEvents of version 1.0 and its corrections say; another version may mean anything, so it is rejected."""

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
"""A digest as producers write it, in either case."""

_ENVELOPE_EXTRA = 2**16
"""Bytes that an envelope may have beside its image in base64: label, URL, fields of others. Chosen by hand; it bounds
what is parsed, and an envelope beyond it is rejected as too large."""

MAX_JSON_DEPTH = 32
"""Levels that an envelope's JSON may be nested. Ours has two, a CloudEvent three; the rest is for
fields of others."""

MAX_JSON_PARTS = 10_000
"""Values of an envelope's JSON, about: its commas and opening brackets. Each takes some 50 bytes or more in memory, so
that 21 MB of small ones took 530 MB. Chosen by hand; an image is one value, however large."""

MAX_URL_CHARS = 8192
"""Characters of an image's URL. Web servers refuse more than about 8,000 by default."""

_JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
"""A string or a bracket; what is in a string is no bracket. Possessive, so that no text makes it slow."""

_MEDIA_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"BM": "image/bmp"}
"""First bytes of an image -> what `encode_image` declares. For readers of others: ours go by the bytes themselves."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A record whose image is elsewhere (a claim check): `Codec.fetch` turns it into a Record or a Rejected."""

    partition: Partition
    offset: int
    label: str
    url: str
    sha256: str
    """The digest the image must have: 64 lower-case hexadecimal digits."""
    size: int | None
    """The bytes the image must have; None when the message does not say."""
    timestamp_s: float | None
    raw: Raw


class Codec:
    """It decodes messages within given limits. What cannot be used comes out as Rejected, and not as an exception."""

    def __init__(
        self, *, max_image_bytes: int, max_image_pixels: int, max_label_chars: int, labelled: bool = True
    ) -> None:
        """`max_image_bytes` and `max_image_pixels` bound an encoded image, `max_label_chars` a class name.

        Without `labelled` images need no class name, and one they have is not looked at.
        """
        self._max_bytes = max_image_bytes
        self._max_pixels = max_image_pixels
        self._max_label = max_label_chars
        self._labelled = labelled
        self._image_labels: Memo[tuple[tuple[str, bytes | None], ...], str] = Memo()
        """Class names, by headers that say all but the image: that it is the value, and the name."""

    def decode(self, partition: Partition, offset: int, raw: Raw, timestamp_s: float | None) -> Item | Claim:
        """Decode the item a message stands for; of an image only the first bytes are looked at (see `check_image`)."""
        try:
            self._check_bounds(raw)
            image = raw.value or b""
            label = self._image_labels.get(raw.headers)
            if label is not None:
                check_image(image, self._max_bytes, self._max_pixels)
                return Record(partition, offset, label, image, timestamp_s, raw)
            headers = dict(raw.headers)  # of a repeated header the last one counts, as Kafka's lastHeader has it
            if CONTROL in headers:
                return Control(partition, offset, _control(headers[CONTROL]))
            if IMAGE_URL in headers:
                fields = _claim_fields(headers)
                return self._claim(partition, offset, self._label(headers, None), fields, timestamp_s, raw)
            if self._is_image(headers, raw.value):
                label = self._label(headers, None)
                if CONTENT_TYPE in headers:  # or else what begins with { is none
                    self._image_labels.keep(raw.headers, label, raw.header_bytes)
            else:
                envelope = self._envelope(headers, image)
                if "control" in envelope:
                    return Control(partition, offset, _control(envelope["control"]))
                label = self._label(headers, envelope)
                if "image_url" in envelope:
                    return self._claim(partition, offset, label, envelope, timestamp_s, raw)
                image = self._base64(envelope)
            check_image(image, self._max_bytes, self._max_pixels)
        except Unusable as why:
            return Rejected(partition, offset, why.reason, why.detail, raw)
        return Record(partition, offset, label, image, timestamp_s, raw)

    def fetch(self, claim: Claim, get: Callable[[str], bytes] | None) -> Record | Rejected:
        """Give the record of a claim, whose image `get` brings for its URL. Without `get` no image may be elsewhere.

        Raises Unreachable where `get` does: the claim stays as good as it was.
        """
        try:
            if get is None:
                raise Unusable(Reason.FETCH_FORBIDDEN, f"{claim.url[:500]!r}: no prefix is allowed")
            return self.redeem(claim, get(claim.url))
        except Unusable as why:
            return Rejected(claim.partition, claim.offset, why.reason, why.detail, claim.raw)
        except Unreachable:
            raise
        except Exception as error:  # whatever a network brings: a record's image never ends the stream
            detail = f"{claim.url[:500]!r}: {type(error).__name__}: {str(error)[:400]}"
            return Rejected(claim.partition, claim.offset, Reason.FETCH_FAILED, detail, claim.raw)

    def redeem(self, claim: Claim, image: bytes) -> Record | Rejected:
        """Give the record of a claim whose image has been fetched; its hash and size are checked."""
        try:
            digest = hashlib.sha256(image).hexdigest()
            if claim.size is not None and len(image) != claim.size:
                raise Unusable(
                    Reason.FETCH_FAILED, f"{claim.url[:500]!r} has {len(image)} bytes, announced were {claim.size}"
                )
            if digest != claim.sha256:
                detail = f"{claim.url[:500]!r} has sha256 {digest}, announced was {claim.sha256}"
                raise Unusable(Reason.FETCH_FAILED, detail)
            check_image(image, self._max_bytes, self._max_pixels)
        except Unusable as why:
            return Rejected(claim.partition, claim.offset, why.reason, why.detail, claim.raw)
        return Record(claim.partition, claim.offset, claim.label, image, claim.timestamp_s, claim.raw)

    @staticmethod
    def _check_bounds(raw: Raw) -> None:
        """Raise Unusable for a message of which some part is beyond its bound."""
        if raw.dropped:
            detail = f"{raw.dropped}, at most {MAX_HEADERS} of {MAX_HEADER_BYTES} bytes in all"
            raise Unusable(Reason.TOO_LARGE, detail)
        if raw.key is not None and len(raw.key) > MAX_KEY_BYTES:
            raise Unusable(Reason.TOO_LARGE, f"key of {len(raw.key)} bytes, at most {MAX_KEY_BYTES}")

    @staticmethod
    def _is_image(headers: Mapping[str, bytes | None], value: bytes | None) -> bool:
        if CE_VERSION in headers and headers[CE_VERSION] != _CE_VERSION.encode():
            version = headers[CE_VERSION]
            detail = f"CloudEvents specversion {reprlib.repr(version)}; only {_CE_VERSION} is understood"
            raise Unusable(Reason.BAD_SCHEMA, detail)
        declared = headers.get(CONTENT_TYPE)
        if declared is None:
            return not (value and value.startswith(b"{"))
        if declared.startswith(b"image/"):  # nearly all: without the work below
            return True
        kind = declared.partition(b";")[0].strip().lower()
        if kind.startswith(b"image/") or kind == OCTETS.encode():
            return True
        if kind.decode("latin-1") in (JSON, CLOUDEVENTS):
            return False
        raise Unusable(
            Reason.BAD_SCHEMA,
            f"content-type {declared[:100]!r}; understood are image/*, {OCTETS}, {JSON}, {CLOUDEVENTS}",
        )

    def _label(self, headers: Mapping[str, bytes | None], envelope: Mapping[str, Any] | None) -> str:
        if not self._labelled:
            return ""
        found: Any = headers.get(LABEL)
        if found is not None:
            return canonical_label(found, self._max_label)
        found = headers.get(CE_LABEL)
        if found is None and envelope:
            found = envelope.get("label")
        if found is None:
            raise Unusable(Reason.MISSING_LABEL, f"no header `{LABEL}` or `{CE_LABEL}`, and no `label` in an envelope")
        if not isinstance(found, str | bytes):
            raise Unusable(Reason.LABEL_TYPE, f"label is {type(found).__name__} {reprlib.repr(found)}, expected text")
        return canonical_label(found, self._max_label)

    def _envelope(self, headers: Mapping[str, bytes | None], value: bytes) -> dict[str, Any]:
        if not value:
            raise Unusable(Reason.EMPTY, "no value, expected a JSON envelope")
        longest = self._max_bytes * 4 // 3 + _ENVELOPE_EXTRA  # base64 has 4 characters for 3 bytes
        if len(value) > longest:
            raise Unusable(Reason.TOO_LARGE, f"envelope of {len(value)} bytes, at most {longest}")
        _check_json(value)
        try:
            # Decoded here, as json.loads would also take UTF-16, in which `_check_json` finds nothing.
            parsed = json.loads(value.decode("utf-8-sig", "surrogatepass"))
        except ValueError as error:
            raise Unusable(Reason.BAD_ENVELOPE, f"not JSON: {str(error)[:200]}") from None
        if not isinstance(parsed, dict):
            raise Unusable(Reason.BAD_ENVELOPE, f"JSON {type(parsed).__name__}, expected an object")
        if (headers.get(CONTENT_TYPE) or b"").lower().startswith(CLOUDEVENTS.encode()):
            return _event_envelope(parsed)
        return parsed

    def _base64(self, envelope: Mapping[str, Any]) -> bytes:
        text = envelope.get("image")
        if text is None:
            raise Unusable(Reason.BAD_SCHEMA, "envelope has neither `image` nor `image_url` nor `control`")
        if not isinstance(text, str):
            raise Unusable(Reason.BAD_SCHEMA, f"`image` is {type(text).__name__}, expected base64 text")
        if len(text) // 4 * 3 > self._max_bytes + 2:  # before it is decoded; the last 3 bytes may be 2 of padding
            raise Unusable(Reason.TOO_LARGE, f"about {len(text) // 4 * 3} bytes of image, at most {self._max_bytes}")
        try:
            return binascii.a2b_base64(text, strict_mode=True)
        except ValueError as error:
            raise Unusable(Reason.BAD_ENVELOPE, f"`image` is not base64: {error}") from None

    def _claim(
        self,
        partition: Partition,
        offset: int,
        label: str,
        fields: Mapping[str, Any],
        timestamp_s: float | None,
        raw: Raw,
    ) -> Claim:
        url, sha256, size = fields.get("image_url"), fields.get("sha256"), fields.get("size")
        if not isinstance(url, str) or not url:
            raise Unusable(Reason.BAD_SCHEMA, f"image URL is {reprlib.repr(url)}, expected text")
        if len(url) > MAX_URL_CHARS:
            raise Unusable(Reason.BAD_SCHEMA, f"image URL of {len(url)} characters, at most {MAX_URL_CHARS}")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            detail = f"sha256 of {url[:200]!r} is {reprlib.repr(sha256)}, expected 64 hexadecimal digits"
            raise Unusable(Reason.BAD_SCHEMA, detail)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
            detail = f"size of {url[:200]!r} is {reprlib.repr(size)}, expected a number of bytes"
            raise Unusable(Reason.BAD_SCHEMA, detail)
        if size is not None and size > self._max_bytes:
            raise Unusable(Reason.TOO_LARGE, f"{url[:200]!r} has {size} bytes, at most {self._max_bytes}")
        return Claim(partition, offset, label, url, sha256.lower(), size, timestamp_s, raw)


def _check_json(value: bytes) -> None:
    """Raise Unusable for JSON with more parts or levels than an envelope has; nothing of it is parsed."""
    opened = value.count(b"[") + value.count(b"{")
    parts = opened + value.count(b",")
    if parts > MAX_JSON_PARTS:
        raise Unusable(Reason.BAD_ENVELOPE, f"JSON of about {parts} values, at most {MAX_JSON_PARTS}")
    if opened <= MAX_JSON_DEPTH:  # nearly all: without a look at every byte
        return
    depth = 0
    for token in _JSON_TOKEN.finditer(value):
        first = value[token.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise Unusable(Reason.BAD_ENVELOPE, f"JSON nested more than {MAX_JSON_DEPTH} levels deep")
        elif first in b"]}":
            depth -= 1


def _control(value: Any) -> ControlKind:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    try:
        return ControlKind(text)
    except ValueError:
        known = ", ".join(ControlKind)
        raise Unusable(Reason.BAD_SCHEMA, f"control mark {reprlib.repr(text)}, expected one of {known}") from None


def _claim_fields(headers: Mapping[str, bytes | None]) -> dict[str, Any]:
    """Give the headers of a claim check, under the names that an envelope has for them."""
    fields: dict[str, Any] = {}
    for name, key in ((IMAGE_URL, "image_url"), (IMAGE_SHA256, "sha256"), (IMAGE_SIZE, "size")):
        value = headers.get(name)
        if value is not None:
            text = value.decode("utf-8", "backslashreplace")
            # 18 digits at most: Python refuses to read a number of thousands of digits.
            fields[key] = int(text) if key == "size" and re.fullmatch("[0-9]{1,18}", text, re.ASCII) else text
    return fields


def _event_envelope(event: dict[str, Any]) -> dict[str, Any]:
    """Give the envelope inside a structured CloudEvent; its `label` extension counts when the data has none."""
    version = event.get("specversion")
    if version != _CE_VERSION:
        detail = f"CloudEvents specversion {reprlib.repr(version)}; only {_CE_VERSION} is understood"
        raise Unusable(Reason.BAD_SCHEMA, detail)
    label = {"label": event["label"]} if "label" in event else {}
    if "data_base64" in event:
        return label | {"image": event["data_base64"]}
    if isinstance(event.get("data"), dict):
        return label | event["data"]
    raise Unusable(Reason.BAD_SCHEMA, "CloudEvent has neither `data_base64` nor an object in `data`")


def encode_image(label: str, image: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Encode the value and headers of a labelled image in the default format."""
    media = next((name for magic, name in _MEDIA_TYPES.items() if image.startswith(magic)), OCTETS)
    return image, [(LABEL, label.encode()), (CONTENT_TYPE, media.encode())]


def encode_control(kind: ControlKind) -> tuple[None, list[tuple[str, bytes]]]:
    """Encode the value and headers of a mark. Its message needs a key: kafka-python sends none without both key and
    value.
    """
    return None, [(CONTROL, kind.value.encode())]
