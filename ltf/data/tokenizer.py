"""Text to token ids and back: bytes by default, or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ltf.data.errors import DataError

BYTES = "bytes"
# What published tokenizers call the token that ends a document.
KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end_of_sentence|>")


class Tokenizer(Protocol):
    """``vocabulary`` counts the ids with the specials; ``end_of_document`` is one of them."""

    @property
    def identity(self) -> str:
        """Equal for tokenizers that give the same ids."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """The ids of each text, without specials."""

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One id for each byte of UTF-8, 0 to 255; 256 ends a document, 257 pads."""

    identity = BYTES
    vocabulary = 258
    end_of_document = 256
    padding = 257

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Specials are left out; bytes that are no UTF-8 become U+FFFD."""
        return bytes(number for number in ids if number < 256).decode(errors="replace")


class FileTokenizer:
    """A ``tokenizer.json`` as the ``tokenizers`` package writes it."""

    def __init__(self, file: str | Path, end_of_document: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as HuggingFaceTokenizer
        except ImportError as error:
            raise DataError(
                "a tokenizer file needs the package `tokenizers`: pip install tokenizers"
            ) from error
        try:
            content = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read as a tokenizer.json ({error})", file) from error
        try:
            self._tokenizer: Any = HuggingFaceTokenizer.from_str(content)
        except Exception as error:
            raise DataError(f"not a tokenizer.json ({error})", file) from error
        # Lengths of a file made for inference would cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.identity = f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(ids.values(), default=-1) + 1
        names = (end_of_document,) if end_of_document else KNOWN_ENDS
        end = next((ids[name] for name in names if name in ids), None)
        if end is None:
            raise DataError(
                f"has no token {' or '.join(names)} to end documents with: name one of its tokens with --eod",
                file,
            )
        self.end_of_document = end

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def token(self, number: int) -> str:
        """The name of that id, such as `</s>`."""
        name: str = self._tokenizer.id_to_token(number)
        return name

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


def load(name: str, end_of_document: str | None = None) -> Tokenizer:
    """``bytes``, or the path of a ``tokenizer.json`` (or of the folder that holds one)."""
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name)
    return FileTokenizer(path / "tokenizer.json" if path.is_dir() else path, end_of_document)
