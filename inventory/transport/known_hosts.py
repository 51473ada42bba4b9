"""Host keys: strict by default, learned only when asked, and a changed key is never accepted.

Reads OpenSSH's format (patterns, negation, ports, hashed names, ``@cert-authority``, ``@revoked``), keeps the
place of every entry so that a refusal can name it, and appends new keys under a lock.
"""

from __future__ import annotations

import base64
import binascii
import enum
import fcntl
import fnmatch
import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from inventory.errors import UsageError


class Trust(enum.Enum):
    KNOWN = "known"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a known_hosts file. `key` is OpenSSH's text, ``TYPE BASE64``."""

    file: str
    line: int
    patterns: str
    key: str
    marker: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is known about a host's key, and the entry that says so."""

    trust: Trust
    entry: Entry | None = None


class KnownHosts:
    """Several files read as one. Missing files are empty; an unreadable one is the person's mistake."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files = tuple(os.path.expanduser(file) for file in files)
        self._exact: dict[str, list[Entry]] = {}
        self._patterned: list[Entry] = []
        self.has_authorities = False
        for file in self.files:
            self._read(file)

    def entries(self, names: Iterable[str], port: int) -> list[Entry]:
        """Everything said about a host under any of its names. As in OpenSSH, lines for ``[host]:port`` come
        first, and lines without a port count only where there are none."""
        names = [name for name in names if name]
        if port != 22:
            found = self._matching([f"[{name}]:{port}" for name in names])
            if any(entry.marker != "revoked" for entry in found):
                return found
            return found + self._matching(names)
        return self._matching(names)

    def judge(self, names: Iterable[str], port: int, key: str) -> Judgement:
        """Whether `key` (``TYPE BASE64``) may be believed. A key of a type that the files lack for
        a host that they do know is a changed key: the server was asked for the types that are known."""
        entries = self.entries(names, port)
        for entry in entries:
            if entry.marker == "revoked" and entry.key == key:
                return Judgement(Trust.REVOKED, entry)
        plain = [entry for entry in entries if not entry.marker]
        for entry in plain:
            if entry.key == key:
                return Judgement(Trust.KNOWN, entry)
        return Judgement(Trust.CHANGED, plain[0]) if plain else Judgement(Trust.UNKNOWN)

    def learn(self, names: Iterable[str], port: int, key: str) -> Judgement:
        """Append an unknown host's key to the first file, whole or not at all.

        Under the lock the file is read again: another process may have learned the host meanwhile, and
        if it saw another key, this one is CHANGED. Raises UsageError if the file cannot be written.
        """
        name = next(name for name in names if name)
        path = Path(self.files[0])
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written, so no host key can be learned: {error.strerror}"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            judgement = KnownHosts(self.files).judge([name], port, key)
            if judgement.trust is not Trust.UNKNOWN:
                return judgement
            size = os.fstat(handle).st_size
            unfinished = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            host = name if port == 22 else f"[{name}]:{port}"
            line = f"{host} {key}\n"
            os.write(handle, (("\n" if unfinished else "") + line).encode())
            os.fsync(handle)
            number = _lines(path)
        finally:
            os.close(handle)
        entry = Entry(str(path), number, host, key)
        self._exact.setdefault(host, []).append(entry)
        return Judgement(Trust.KNOWN, entry)

    def _matching(self, hosts: list[str]) -> list[Entry]:
        found = [entry for host in hosts for entry in self._exact.get(host.lower(), ())]
        found += [entry for entry in self._patterned if any(_matches(entry.patterns, host) for host in hosts)]
        return found

    def _read(self, file: str) -> None:
        try:
            text = Path(file).read_text(encoding="utf-8", errors="surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UsageError(f"{file}: known_hosts file cannot be read: {error.strerror}") from error
        for number, line in enumerate(text.splitlines(), 1):
            entry = _entry(file, number, line)
            if entry is None:
                continue
            self.has_authorities |= entry.marker == "cert-authority"
            if any(sign in entry.patterns for sign in "*?|!"):
                self._patterned.append(entry)
            else:
                for host in entry.patterns.lower().split(","):
                    self._exact.setdefault(host, []).append(entry)


def fingerprint(key: str) -> str:
    """``SHA256:...`` as ssh-keygen -l prints it, of ``TYPE BASE64``."""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _entry(file: str, number: int, line: str) -> Entry | None:
    """The entry of a line; None for blank lines, comments and what OpenSSH would skip too."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    marker = words.pop(0)[1:] if words[0].startswith("@") else ""
    if len(words) < 3 or marker not in ("", "cert-authority", "revoked"):
        return None
    return Entry(file, number, words[0], f"{words[1]} {words[2]}", marker)


def _matches(patterns: str, host: str) -> bool:
    if patterns.startswith("|"):
        return _hash_matches(patterns, host)
    chosen = False
    for pattern in patterns.split(","):
        # fnmatch gives [ a meaning of its own; in known_hosts it only brackets a host with a port.
        wanted = pattern.lstrip("!").lower().replace("[", "[[]")
        if fnmatch.fnmatchcase(host.lower(), wanted):
            if pattern.startswith("!"):
                return False
            chosen = True
    return chosen


def _hash_matches(hashed: str, host: str) -> bool:
    parts = hashed.split("|")
    if len(parts) != 4 or parts[1] != "1":
        return False
    try:
        salt, expected = base64.b64decode(parts[2]), base64.b64decode(parts[3])
    except binascii.Error:
        return False
    # HMAC-SHA1 is what the file format prescribes; it hides names, it protects no key.
    return hmac.compare_digest(hmac.digest(salt, host.encode(), "sha1"), expected)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")
