"""Rules that two packages need and neither may import of the other are the same in both."""

import pytest

from agent.config.kafka import KafkaImages
from exporter import image_header
from exporter.instruments import REASONS
from streams import record
from streams.claims import check_prefix
from streams.record import Reason


def test_the_narrowest_image_and_the_most_scans_are_the_same_at_intake_and_at_decoding():
    assert record.MAX_ASPECT == image_header.MAX_ASPECT
    assert record.MAX_SCANS == image_header.MAX_SCANS


def test_the_reasons_of_the_metrics_are_those_of_the_stream():
    assert set(REASONS) == set(Reason)


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
