"""Fetching a large file over HTTP: continued where it was cut off, checked, and there only when it is whole.

What has arrived lies in a hidden `.NAME.partial`; beside it is the address and the server's version of the file, so
that the halves of two versions are never joined. A connection that breaks is tried again as long as bytes arrive.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..text.files import sync_folder, write_json
from .errors import RunError
from .progress import Progress, Stage

BLOCK_BYTES = 1 << 20
ATTEMPTS = 5
"""Tries in a row that bring nothing before it is given up."""
FIRST_WAIT_SECONDS = 1.0
"""Doubled after every try that brings nothing."""
TIMEOUT_SECONDS = 60.0
FINAL = {401: "asks for a login", 403: "forbids it", 404: "has no such file", 410: "has it no more"}
"""Answers that another try does not change."""


class DownloadError(RunError):
    """A file that can't be had, or is not what it should be."""


@dataclass(frozen=True)
class Fetched:
    """A file that was downloaded. proven_by: whose checksum it has; None where none was known."""

    bytes: int
    sha256: str
    proven_by: str | None


def fetch(
    url: str,
    target: Path,
    progress: Progress,
    *,
    size: int | None = None,
    sha256: str | None = None,
    known_from: str = "the recipe",
) -> Fetched:
    """Download `url` to `target`, continuing what is there of it.

    size and sha256 are what the file must have, where that is known, and known_from says how it is. Raises
    DownloadError for a file that is not there, a server that can't be reached, and content that is not what it should
    be; OSError for a full disk.
    """
    return _Download(url, target, progress, size, sha256, known_from).run()


def digest(path: Path, progress: Progress, name: str = "checking") -> str:
    """The SHA-256 of a file's content."""
    found = hashlib.sha256()
    with open(path, "rb") as file, progress.stage(f"{name} {path.name}", path.stat().st_size, "B") as stage:
        while block := file.read(BLOCK_BYTES):
            found.update(block)
            stage.advance(len(block))
    return found.hexdigest()


class _Download:
    def __init__(
        self, url: str, target: Path, progress: Progress, size: int | None, sha256: str | None, known_from: str
    ) -> None:
        self.url, self.target, self.progress = url, target, progress
        self.size, self.sha256, self.known_from = size, sha256, known_from
        self.partial = target.with_name(f".{target.name}.partial")
        self.record = target.with_name(f".{target.name}.partial.json")
        self.claimed: str | None = None
        self.hash = hashlib.sha256()
        self.arrived = 0

    def run(self) -> Fetched:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._take_over()
        wait, failures = FIRST_WAIT_SECONDS, 0
        while True:
            before, problem = self.arrived, "the connection was closed early"
            try:
                if self._try():
                    return self._finish()
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                problem = _told(error)
            failures = 0 if self.arrived > before else failures + 1
            wait = FIRST_WAIT_SECONDS if self.arrived > before else 2 * wait
            kept = f"{self.arrived / 1e6:,.1f} MB are kept"
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{self.url} can't be downloaded ({problem}, {failures} times in a row); {kept}: run the same "
                    f"command again to continue, or pass --base-url for a mirror"
                )
            self.progress.say(f"{self.target.name}: {problem}; {kept}, going on in {wait:.0f} s")
            time.sleep(wait)

    def _take_over(self) -> None:
        """Go on from what another process left of this address."""
        try:
            same = json.loads(self.record.read_text(encoding="utf-8"))["url"] == self.url
        except (OSError, ValueError, KeyError):
            same = False
        if not same or not self.partial.is_file():
            self._begin_anew()
            return
        with open(self.partial, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                self.hash.update(block)
                self.arrived += len(block)
        if self.arrived:
            self.progress.say(f"{self.target.name}: continuing from {self.arrived / 1e6:,.1f} MB")

    def _begin_anew(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)
        self.hash, self.arrived = hashlib.sha256(), 0

    def _try(self) -> bool:
        """One request; whether the file is whole now."""
        version = self._version()
        try:
            with self._opened(version) as response:
                total = self._total(response, version)
                if self.size is not None and total is not None and total != self.size:
                    raise DownloadError(
                        f"{self.url} has {total:,} bytes, the recipe says {self.size:,}: the source was changed, or "
                        f"this is another file; correct the recipe or the address"
                    )
                self._check_room(total)
                write_json(self.record, {"url": self.url, "version": response.headers.get("ETag")})
                with self.progress.stage(f"fetching {self.target.name}", total, "B", self.arrived) as stage:
                    self._receive(response, stage)
        except urllib.error.HTTPError as error:
            with error:
                return self._answered(error)
        # Without a length, the end of the answer is the end of the file.
        return total is None or self.arrived == total

    def _version(self) -> str | None:
        """The server's mark of the version that has arrived in part."""
        return json.loads(self.record.read_text(encoding="utf-8")).get("version") if self.arrived else None

    @contextmanager
    def _opened(self, version: str | None) -> Iterator[Any]:
        headers = {"User-Agent": "cs336-registry", "Accept-Encoding": "identity"}
        if self.arrived:
            headers["Range"] = f"bytes={self.arrived}-"
            # Weak marks (W/"…") do not promise equal bytes, so servers ignore them here.
            headers |= {"If-Range": version} if version and not version.startswith("W/") else {}
        redirects = _Redirects()
        request = urllib.request.Request(self.url, headers=headers)
        with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_SECONDS) as response:
            for found in (*redirects.headers, response.headers):
                claim = (found.get("X-Linked-ETag") or "").strip('"')
                self.claimed = claim if re.fullmatch("[0-9a-f]{64}", claim) else self.claimed
            yield response

    def _total(self, response: Any, version: str | None) -> int | None:
        """The file's size as the server tells it. Starts over where the server does not go on from where it should."""
        if response.status == 206:
            told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            changed = version is not None and response.headers.get("ETag") not in (None, version)
            if told is None or int(told[1]) != self.arrived or changed:
                self._begin_anew()
                raise ConnectionError("the server has another version of the file")
            return None if told[2] == "*" else int(told[2])
        if self.arrived:
            self.progress.say(f"{self.target.name}: the server can't go on from where it was, so it starts over")
            self._begin_anew()
        length = response.headers.get("Content-Length")
        return None if length is None else int(length)

    def _receive(self, response: Any, stage: Stage) -> None:
        with open(self.partial, "ab") as file:
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                self.hash.update(block)
                self.arrived += len(block)
                stage.advance(len(block))
            file.flush()
            os.fsync(file.fileno())

    def _answered(self, error: urllib.error.HTTPError) -> bool:
        """What an answer that is no file means: whole already, start over, give up, or (by raising) try again."""
        if error.code == 416:
            # Nothing is left beyond what has arrived: it is whole, or it is too long.
            if self.size == self.arrived:
                return True
            self._begin_anew()
            raise ConnectionError("what had arrived does not fit the file") from None
        if error.code in FINAL:
            raise DownloadError(
                f"{self.url}: the server {FINAL[error.code]} (HTTP {error.code}): look at the source's page, or pass "
                f"--base-url for a mirror"
            ) from None
        raise error

    def _check_room(self, total: int | None) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if total is not None and total - self.arrived > free:
            raise DownloadError(
                f"{self.target.name} needs {(total - self.arrived) / 1e6:,.0f} MB more and {free / 1e6:,.0f} MB are "
                f"free in {self.target.parent}: make room, or choose --out on another disk"
            )

    def _finish(self) -> Fetched:
        found, size = self.hash.hexdigest(), self.arrived
        wanted, proven_by = (self.sha256, self.known_from) if self.sha256 else (self.claimed, "the server")
        if self.size not in (None, size):
            self._begin_anew()
            raise DownloadError(
                f"{self.url} ended after {size:,} bytes, the recipe says {self.size:,}: run the same command to "
                f"fetch it again"
            )
        if wanted not in (None, found):
            self._begin_anew()
            raise DownloadError(
                f"{self.url} has SHA-256 {found} ({size:,} bytes), {proven_by} says {wanted}: it was damaged on the "
                f"way or changed at its source, and was thrown away; run the same command to fetch it again"
            )
        os.replace(self.partial, self.target)
        self.record.unlink()
        sync_folder(self.target.parent)
        return Fetched(size, found, proven_by if wanted else None)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps their headers: Hugging Face names the checksum there."""

    def __init__(self) -> None:
        self.headers: list[Any] = []

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.headers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _told(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"{reason or type(error).__name__}"
