"""What is remembered of messages is bounded, whatever producers send."""

from streams import memo
from streams.memo import Memo


def test_a_memo_keeps_small_keys_and_gives_the_value_back():
    known: Memo[bytes, str] = Memo()
    assert known.get(b"a") is None
    assert known.keep(b"a", "first", 1) == "first" and known.get(b"a") == "first"


def test_a_memo_keeps_no_large_key_and_no_more_than_its_number():
    known: Memo[bytes, int] = Memo()
    large = bytes(memo._LARGEST + 1)
    assert known.keep(large, 1, len(large)) == 1 and large not in known
    for number in range(3 * memo._MOST):
        known.keep(b"%d" % number, number, 5)
        assert len(known) <= memo._MOST
    assert known[b"%d" % number] == number
