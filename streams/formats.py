"""The wire format: messages of a topic to items and back, and dead letters with what is needed to replay them. Pure.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streams.record import (
    Control,
    ControlKind,
    Item,
    Partition,
    Raw,
    Reason,
    Record,
    Rejected,
    Unusable,
    canonical_label,
    check_image,
)

CONTROL = "gapstream.control"
IMAGE_URL, IMAGE_SHA256, IMAGE_SIZE = "image-url", "image-sha256", "image-size"
JSON, CLOUDEVENTS = "application/json", "application/cloudevents+json"

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_ENVELOPE_EXTRA = 2**16
_MEDIA_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"BM": "image/bmp"}


@dataclass(frozen=True, slots=True)
class Claim:
    """A record whose image is elsewhere: to be fetched, then handed to `Codec.redeem`."""

    partition: Partition
    offset: int
    label: str
    url: str
    sha256: str
    """64 lower-case hexadecimal digits."""
    size: int | None
    """Bytes, when the message says."""
    timestamp_s: float | None
    raw: Raw


class Codec:
    """Decodes messages within given limits. Never raises: what cannot be used comes out as Rejected."""

    def __init__(
        self, *, max_image_bytes: int, max_image_pixels: int, max_label_chars: int, labelled: bool = True
    ) -> None:
        """`labelled` False: images need no class name, and one they have is not looked at."""
        self._max_bytes = max_image_bytes
        self._max_pixels = max_image_pixels
        self._max_label = max_label_chars
        self._labelled = labelled

    def decode(self, partition: Partition, offset: int, raw: Raw, timestamp_s: float | None) -> Item | Claim:
        """The item a message stands for; of an image only the header is looked at."""
        try:
            headers = dict(raw.headers)  # of a repeated header the last one counts, as Kafka's lastHeader has it
            if CONTROL in headers:
                return Control(partition, offset, _control(headers[CONTROL]))
            if IMAGE_URL in headers:
                fields = _claim_fields(headers)
                return self._claim(partition, offset, self._label(headers, None), fields, timestamp_s, raw)
            if self._is_image(headers, raw.value):
                label = self._label(headers, None)
                image = raw.value or b""
            else:
                envelope = self._envelope(headers, raw.value or b"")
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

    def fetched(self, claim: Claim, fetch: Callable[[str], bytes] | None) -> Record | Rejected:
        """The record of a claim; its image is fetched here. Without a store no image may be elsewhere."""
        try:
            if fetch is None:
                raise Unusable(Reason.FETCH_FORBIDDEN, f"{claim.url[:500]!r}: no prefix is allowed")
            return self.redeem(claim, fetch(claim.url))
        except Unusable as why:
            return Rejected(claim.partition, claim.offset, why.reason, why.detail, claim.raw)
        except Exception as error:
            detail = f"{claim.url[:500]!r}: {type(error).__name__}: {str(error)[:400]}"
            return Rejected(claim.partition, claim.offset, Reason.FETCH_FAILED, detail, claim.raw)

    def redeem(self, claim: Claim, image: bytes) -> Record | Rejected:
        """The record of a claim whose image has been fetched. Its hash and size are checked here."""
        try:
            digest = hashlib.sha256(image).hexdigest()
            if claim.size is not None and len(image) != claim.size:
                raise Unusable(
                    Reason.FETCH_FAILED, f"{claim.url!r} has {len(image)} bytes, announced were {claim.size}"
                )
            if digest != claim.sha256:
                raise Unusable(Reason.FETCH_FAILED, f"{claim.url!r} has sha256 {digest}, announced was {claim.sha256}")
            check_image(image, self._max_bytes, self._max_pixels)
        except Unusable as why:
            return Rejected(claim.partition, claim.offset, why.reason, why.detail, claim.raw)
        return Record(claim.partition, claim.offset, claim.label, image, claim.timestamp_s, claim.raw)

    @staticmethod
    def _is_image(headers: Mapping[str, bytes | None], value: bytes | None) -> bool:
        if "ce_specversion" in headers and headers["ce_specversion"] != b"1.0":
            version = headers["ce_specversion"]
            raise Unusable(Reason.BAD_SCHEMA, f"CloudEvents specversion {version!r}; only 1.0 is understood")
        declared = headers.get("content-type")
        if declared is None:
            return not (value and value.startswith(b"{"))
        if declared.startswith(b"image/"):
            return True
        kind = declared.partition(b";")[0].strip().lower()
        if kind.startswith(b"image/") or kind == b"application/octet-stream":
            return True
        if kind.decode("latin-1") in (JSON, CLOUDEVENTS):
            return False
        raise Unusable(
            Reason.BAD_SCHEMA,
            f"content-type {declared[:100]!r}; understood are image/*, application/octet-stream, {JSON}, {CLOUDEVENTS}",
        )

    def _label(self, headers: Mapping[str, bytes | None], envelope: Mapping[str, Any] | None) -> str:
        if not self._labelled:
            return ""
        found: Any = headers.get("label")
        if found is not None:
            return canonical_label(found, self._max_label)
        found = headers.get("ce_label")
        if found is None and envelope:
            found = envelope.get("label")
        if found is None:
            raise Unusable(Reason.MISSING_LABEL, "no header `label` or `ce_label`, and no `label` in an envelope")
        if not isinstance(found, str | bytes):
            raise Unusable(Reason.LABEL_TYPE, f"label is {type(found).__name__} {str(found)[:80]}, expected text")
        return canonical_label(found, self._max_label)

    def _envelope(self, headers: Mapping[str, bytes | None], value: bytes) -> dict[str, Any]:
        if not value:
            raise Unusable(Reason.EMPTY, "no value, expected a JSON envelope")
        longest = self._max_bytes * 4 // 3 + _ENVELOPE_EXTRA
        if len(value) > longest:
            raise Unusable(Reason.TOO_LARGE, f"envelope of {len(value)} bytes, at most {longest}")
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unusable(Reason.BAD_ENVELOPE, f"not JSON: {str(error)[:200]}") from None
        if not isinstance(parsed, dict):
            raise Unusable(Reason.BAD_ENVELOPE, f"JSON {type(parsed).__name__}, expected an object")
        if (headers.get("content-type") or b"").lower().startswith(CLOUDEVENTS.encode()):
            return _event_envelope(parsed)
        return parsed

    def _base64(self, envelope: Mapping[str, Any]) -> bytes:
        text = envelope.get("image")
        if text is None:
            raise Unusable(Reason.BAD_SCHEMA, "envelope has neither `image` nor `image_url` nor `control`")
        if not isinstance(text, str):
            raise Unusable(Reason.BAD_SCHEMA, f"`image` is {type(text).__name__}, expected base64 text")
        if len(text) // 4 * 3 > self._max_bytes + 2:
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
            raise Unusable(Reason.BAD_SCHEMA, f"image URL is {url!r}, expected text")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise Unusable(Reason.BAD_SCHEMA, f"sha256 of {url[:200]!r} is {sha256!r}, expected 64 hexadecimal digits")
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
            raise Unusable(Reason.BAD_SCHEMA, f"size of {url[:200]!r} is {size!r}, expected a number of bytes")
        if size is not None and size > self._max_bytes:
            raise Unusable(Reason.TOO_LARGE, f"{url[:200]!r} has {size} bytes, at most {self._max_bytes}")
        return Claim(partition, offset, label, url, sha256.lower(), size, timestamp_s, raw)


def _control(value: Any) -> ControlKind:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    try:
        return ControlKind(text)
    except ValueError:
        known = ", ".join(ControlKind)
        raise Unusable(Reason.BAD_SCHEMA, f"control mark {str(text)[:80]!r}, expected one of {known}") from None


def _claim_fields(headers: Mapping[str, bytes | None]) -> dict[str, Any]:
    """The headers of a claim check under the names an envelope has."""
    fields: dict[str, Any] = {}
    for name, key in ((IMAGE_URL, "image_url"), (IMAGE_SHA256, "sha256"), (IMAGE_SIZE, "size")):
        value = headers.get(name)
        if value is not None:
            text = value.decode("utf-8", "backslashreplace")
            fields[key] = int(text) if key == "size" and re.fullmatch("[0-9]{1,18}", text, re.ASCII) else text
    return fields


def _event_envelope(event: dict[str, Any]) -> dict[str, Any]:
    """The envelope inside a structured CloudEvent; its `label` extension counts when the data has none."""
    if event.get("specversion") != "1.0":
        version = event.get("specversion")
        raise Unusable(Reason.BAD_SCHEMA, f"CloudEvents specversion {version!r}; only 1.0 is understood")
    label = {"label": event["label"]} if "label" in event else {}
    if "data_base64" in event:
        return label | {"image": event["data_base64"]}
    if isinstance(event.get("data"), dict):
        return label | event["data"]
    raise Unusable(Reason.BAD_SCHEMA, "CloudEvent has neither `data_base64` nor an object in `data`")


def encode_image(label: str, image: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Value and headers of a labelled image in the default format."""
    media = next((name for magic, name in _MEDIA_TYPES.items() if image.startswith(magic)), "application/octet-stream")
    return image, [("label", label.encode()), ("content-type", media.encode())]


def encode_control(kind: ControlKind) -> tuple[None, list[tuple[str, bytes]]]:
    """Value and headers of a mark. Its message needs a key, as a client may refuse to send neither key nor value."""
    return None, [(CONTROL, kind.value.encode())]
