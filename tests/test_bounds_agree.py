"""Rules that two packages need and neither may import of the other are the same in both."""

import random
import struct
from contextlib import suppress

import pytest

from agent.config.kafka import KafkaImages
from exporter import image_header
from exporter.image_header import ImageError
from exporter.instruments import REASONS
from streams import record
from streams.claims import check_prefix
from streams.record import Reason, Unusable
from tests.bad_images import MAX_PIXELS, all_images, encoded, picture


def test_the_narrowest_image_and_the_most_scans_are_the_same_at_intake_and_at_decoding():
    assert record.MAX_ASPECT == image_header.MAX_ASPECT
    assert record.MAX_SCANS == image_header.MAX_SCANS


def headers() -> list[bytes]:
    """Images of all kinds and the same with a few bytes of their beginning changed."""
    chance = random.Random(0)
    found = [image.data for image in all_images() if image.reason is not Reason.TOO_LARGE]
    found += [encoded(picture(), "TIFF", big_tiff=True), encoded(picture(), "AVIF"), b"P5 # a comment\n48 32\n65535\n"]
    for data in tuple(found):
        for _ in range(60):
            changed = bytearray(data)
            for _ in range(min(2, len(data))):
                changed[chance.randrange(min(len(data), 200))] = chance.randrange(256)
            found.append(bytes(changed))
    return found


def test_the_size_that_an_image_claims_is_read_alike():
    for data in headers():
        sizes = []
        with suppress(ImageError, struct.error, IndexError, OverflowError):
            header = image_header._read(data)
            sizes.append((header.width, header.height))
        with suppress(Unusable, struct.error, IndexError, OverflowError):
            sizes.append(record._dimensions(data)[:2])
        assert len(set(sizes)) <= 1, data[:100]


def test_what_is_taken_at_intake_is_left_to_a_decoder_by_its_header():
    for data in headers():
        with suppress(Unusable):
            record.check_image(data, 10**7, MAX_PIXELS)
            try:
                image_header.check_header(data, MAX_PIXELS)
            except ImageError as error:
                # What a JPEG or a PPM costs is looked at more closely there.
                assert error.reason == "bomb", (error, data[:100])


def test_the_reasons_of_the_metrics_are_those_of_the_stream():
    assert set(REASONS) == set(Reason)
    assert set(image_header.REASONS) <= set(Reason)


@pytest.mark.parametrize(
    ("prefix", "allowed"),
    [
        ("https://images.example.com/", True),
        ("s3://bucket/path/", True),
        ("file:///data/", True),
        ("https://images.example.com", False),
        ("ftp://images.example.com/", False),
        ("https://", False),
        ("data/", False),
    ],
)
def test_a_prefix_that_the_configuration_allows_is_one_that_the_store_takes(prefix, allowed):
    for check in (check_prefix, lambda prefix: KafkaImages(allowed=(prefix,))):
        if allowed:
            check(prefix)
        else:
            with pytest.raises(ValueError):
                check(prefix)
