"""Turns names into embeddings with a release's text part: clean-up, tokenizer, text tower. Needs no torch.

What only this needs (tokenizers, ftfy) is imported where it is used: most who serve a release score no other names.
"""

from __future__ import annotations

import functools
import html
import string
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.release import TEXT, TEXT_ROWS, TOKENIZER, Release, ReleaseError, TextPart
from exporter.session import Device, open_session

KEPT_NAMES = 1024
"""Names whose embeddings are kept, those used last. Chosen by hand: 2 to 4 MB for embeddings of 512 to 1024 numbers;
fewer only encode names again that come back."""

_TESTED_NAMES = 4
"""Learned classes whose embeddings are compared when a text part is opened. Chosen by hand: it is a test that tower and
tokenizer are the ones of the release and run here; all names were compared when it was made."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP's tokenizer splits a text into words before byte pairs are merged: its own pattern, in the notation of the
library `tokenizers`."""


def clip_tokenizer(
    merges: Sequence[tuple[str, str]],
    vocabulary: Mapping[str, int],
    start: str,
    end: str,
    context: int,
    *,
    whole: bool,
) -> str:
    """Write CLIP's byte-pair tokenizer as the JSON that the library `tokenizers` reads, in any of its languages.

    `merges`: pairs of tokens in the order they are merged; `vocabulary`: token -> id; `start` and `end`: the tokens put
    around a text, which is cut to `context` tokens with both kept. `whole`: every text is filled up with zeros to
    `context` tokens, for towers that read them all.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE(dict(vocabulary), list(merges), end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),  # the words are split above
        ]
    )
    # Not normalized: a name that spells such a token out has that token, as in open_clip.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (start, end)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, vocabulary[token]) for token in (start, end)]
    )
    tokenizer.enable_truncation(context)
    return filled_tokenizer(tokenizer.to_str(), context, 0) if whole else tokenizer.to_str()


def filled_tokenizer(tokenizer: str, context: int, pad: int) -> str:
    """Change a tokenizer's JSON so that every text is cut or filled up to `context` tokens with the id `pad`."""
    from tokenizers import Tokenizer

    changed = Tokenizer.from_str(tokenizer)
    changed.enable_truncation(context)
    changed.enable_padding(length=context, pad_id=pad, pad_token=changed.id_to_token(pad))
    return changed.to_str()


def _basic(text: str) -> str:
    import ftfy

    # Twice, as open_clip does it: `&amp;lt;` is `<`.
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _canonical(text: str) -> str:
    plain = _basic(text).replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(plain.lower().split())


CLEANUPS: Mapping[str, Callable[[str], str]] = {
    "lower": lambda text: _basic(text).lower(),
    "whitespace": _basic,
    "canonicalize": _canonical,
}
"""What open_clip's tokenizers do to a text first, by open_clip's names for it. Releases on disk have these names."""


Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""A function from names (n >= 1) to their embeddings float32 [n, D], L2-normalised."""


class NameEmbeddings:
    """Embeddings of names by the text part of a release, which is opened and tested when it is first needed.

    The newest embeddings are kept. Any thread may call any method.
    """

    def __init__(self, release: Release, part: TextPart, device: Device, threads: int) -> None:
        """`part`: the text part of `release`; `device` and `threads` as in exporter.session.open_session."""
        self._release = release
        self._part = part
        self._device: Device = device
        self._threads = threads
        self._encode: Encode | None = None
        self._failure = ""
        self._learned: frozenset[str] = frozenset()
        self._rows = np.zeros((0, 0), np.float32)
        self._kept: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()
        """Held for a moment, by whoever looks into or changes what is kept."""
        self._encoding = threading.Lock()
        """Held while the text tower opens or runs: names of many requests wait for each other, not for a core each."""

    @property
    def opened(self) -> bool:
        """Whether `open` has succeeded."""
        return self._encode is not None

    def open(self) -> Encode:
        """Open and test the text part, which the first name would wait for; gives what encodes.

        Raises ReleaseError when the text part cannot be used; once it has, it does so for good.
        """
        if self._encode is not None:  # without the lock: names that are kept do not wait for others being encoded
            return self._encode
        with self._encoding:
            if self._failure:  # files of the size of a text tower are not read again for every request
                raise ReleaseError(self._failure)
            if self._encode is None:
                try:
                    self._encode = self._open()
                except ReleaseError as error:
                    self._failure = str(error)
                    raise
            return self._encode

    def rows(self, names: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
        """Give those n of `names` that are no learned class, each once, and embeddings float32 [C + n, D]: of the C
        learned classes, then of these n names.

        Names are the same when the tokenizer cannot tell them apart. Raises ReleaseError as `open` does.
        """
        encode = self.open()
        asked: dict[str, str] = {}
        for name in names:
            if (text := CLEANUPS[self._part.clean](name)) not in self._learned:
                asked.setdefault(text, name)
        found = self._look_up(asked)
        if len(found) < len(asked):
            with self._encoding:  # another thread that asks for the same names waits, and then finds them
                found = self._look_up(asked)
                missing = [text for text in asked if text not in found]
                new = dict(zip(missing, encode([asked[text] for text in missing]), strict=True)) if missing else {}
            with self._lock:
                self._kept.update(new)
                while len(self._kept) > KEPT_NAMES:  # from the one that was used longest ago
                    self._kept.popitem(last=False)
            found |= new
        return list(asked.values()), np.concatenate([self._rows, *(found[text][None] for text in asked)])

    def _look_up(self, texts: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Give the embeddings that are kept of these cleaned texts, which count as used now."""
        with self._lock:
            found = {text: self._kept[text] for text in texts if text in self._kept}
            for text in found:
                self._kept.move_to_end(text)
        return found

    def _open(self) -> Encode:
        release, part = self._release, self._part
        release.verify(release.text_files)
        try:
            encode = name_encoder(release.path, part.prompt, part.clean, self._device, self._threads)
            rows = np.load(release.path / TEXT_ROWS, allow_pickle=False)
            got = encode(release.classes[:_TESTED_NAMES])
        except Exception as error:  # onnxruntime and tokenizers share no base class
            raise ReleaseError(f"the text part of release {release.path} cannot be run: {error}") from error
        difference = float(np.abs(got - rows[: len(got)]).max())
        if not difference <= part.atol:
            raise ReleaseError(
                f"the text part of release {release.path} fails its own test: embeddings of class names differ by "
                f"{difference:.3g}, at most {part.atol:g} is allowed; it is not used"
            )
        self._learned = frozenset(map(CLEANUPS[part.clean], release.classes))
        self._rows = rows
        return encode


def name_encoder(folder: Path, prompt: str, clean: str, device: Device, threads: int) -> Encode:
    """Make what encodes names with the text part in a release's folder; nothing is verified or tested here.

    Raises OSError, and what onnxruntime and tokenizers raise.
    """
    tokenizer = _tokenizer((folder / TOKENIZER).read_text(encoding="utf-8"))
    session = open_session(folder / TEXT, device, threads)

    def encode(names: Sequence[str]) -> NDArray[np.float32]:
        found = [tokenizer.encode(CLEANUPS[clean](prompt.format(name))).ids for name in names]
        # The zeros after the end of a shorter text change nothing: a causal tower answers at its end token, which does
        # not see what comes later, and for any other tower the tokenizer has filled up every text by itself.
        ids = np.zeros((len(found), max(map(len, found))), np.int64)
        for row, one in zip(ids, found, strict=True):
            row[: len(one)] = one
        return session.run(None, {"ids": ids})[0]

    return encode


@functools.lru_cache(maxsize=2)
def _tokenizer(text: str) -> Any:
    """Make the tokenizer of this JSON, read once for all releases that have the same: it takes a tenth of a second, in
    which no other thread runs. Two are kept, those of the release that answers and of the next one."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)
