"""Downloads from a server on this machine that does what servers do: cuts off, forgets ranges, changes files, fails."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cs336_registry.cli.data import download as command
from cs336_registry.errors import ConfigurationError
from cs336_registry.pipeline import acquisition, recipes
from cs336_registry.pipeline import download as module
from cs336_registry.pipeline.acquisition import acquire
from cs336_registry.pipeline.download import DownloadError, fetch
from cs336_registry.pipeline.errors import RunError
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.recipes import Recipe, RemoteFile
from cs336_registry.pipeline.run_folder import RunFolder

QUIET = Progress(quiet=True)
CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Source:
    """One file and how it is served. cuts: bytes after which each answer ends; answers: statuses before the file."""

    content: bytes = CONTENT
    ranges: bool = True
    etag: str | None = '"one"'
    cuts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    claim: str | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    length: bool = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    source: Source

    def do_GET(self):
        source = self.source
        source.requests.append((self.path, self.headers.get("Range")))
        if source.answers:
            self.send_error(source.answers.pop(0))
            return
        if self.path.startswith("/redirected/"):
            self.send_response(302)
            self.send_header("Location", "/" + self.path.rpartition("/")[2])
            self.send_header("X-Linked-ETag", f'"{source.claim}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path != "/file.txt":
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and source.ranges else 0
        if start and self.headers.get("If-Range") not in (None, source.etag):
            start = 0
        if start >= len(source.content):
            self.send_error(416)
            return
        rest = source.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(source.content) - 1}/{len(source.content)}")
        if source.etag:
            self.send_header("ETag", source.etag)
        if source.length:
            self.send_header("Content-Length", str(len(rest)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(rest[: source.cuts.pop(0)] if source.cuts else rest)
        self.close_connection = True

    def log_message(self, *_):
        """Tests are quiet."""


@pytest.fixture
def source(monkeypatch) -> Source:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 14)
    return Source()


@pytest.fixture
def address(source):
    handler = type("OneSource", (Handler,), {"source": source})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_file_is_fetched_and_nothing_else_is_left(address, tmp_path):
    found = fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET, size=len(CONTENT), sha256=SHA256)
    assert (tmp_path / "file.txt").read_bytes() == CONTENT
    assert (found.bytes, found.sha256, found.proven_by) == (len(CONTENT), SHA256, "the recipe")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_connection_that_is_cut_goes_on_where_it_was(address, source, tmp_path):
    source.cuts = [100_000, 50_000, 1]
    fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET, sha256=SHA256)
    assert (tmp_path / "file.txt").read_bytes() == CONTENT
    assert [asked for _, asked in source.requests] == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]


def test_another_process_goes_on_where_one_was_killed(address, source, tmp_path, monkeypatch):
    source.cuts = [100_000]

    def killed(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET)
    assert not (tmp_path / "file.txt").exists()
    found = fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET)
    assert source.requests[-1][1] == "bytes=100000-"
    assert (found.sha256, found.proven_by) == (SHA256, None)


def test_a_server_without_ranges_starts_over(address, source, tmp_path, capsys):
    source.ranges, source.cuts = False, [100_000]
    assert fetch(f"{address}file.txt", tmp_path / "file.txt", Progress()).sha256 == SHA256
    assert "file.txt: the server can't go on from where it was, so it starts over" in capsys.readouterr().err


@pytest.mark.parametrize("etag", ['"two"', 'W/"two"'])
def test_halves_of_two_versions_are_never_joined(address, source, tmp_path, monkeypatch, etag):
    source.etag, source.cuts = etag.replace("two", "one"), [100_000]

    def changes(seconds):
        source.content, source.etag = CONTENT[::-1], etag

    monkeypatch.setattr(module.time, "sleep", changes)
    fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET)
    assert (tmp_path / "file.txt").read_bytes() == CONTENT[::-1]


def test_what_is_already_complete_is_not_asked_for_again(address, source, tmp_path):
    (tmp_path / ".file.txt.partial").write_bytes(CONTENT)
    (tmp_path / ".file.txt.partial.json").write_text(json.dumps({"url": f"{address}file.txt", "version": '"one"'}))
    assert fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET, size=len(CONTENT)).sha256 == SHA256
    (tmp_path / ".file.txt.partial").write_bytes(CONTENT + b"more")
    (tmp_path / ".file.txt.partial.json").write_text(json.dumps({"url": f"{address}file.txt", "version": '"one"'}))
    assert fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET).sha256 == SHA256


def test_a_part_of_another_address_is_not_continued(address, source, tmp_path):
    (tmp_path / ".file.txt.partial").write_bytes(b"something else")
    (tmp_path / ".file.txt.partial.json").write_text(json.dumps({"url": "http://127.0.0.1/other", "version": None}))
    assert fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET).sha256 == SHA256
    assert source.requests[0][1] is None


def test_a_wrong_checksum_is_thrown_away(address, tmp_path):
    wrong = "0" * 64
    with pytest.raises(
        DownloadError, match=f"has SHA-256 {SHA256} .* the recipe says {wrong}: it was damaged on the way"
    ):
        fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET, sha256=wrong)
    assert not list(tmp_path.iterdir())


def test_the_checksum_that_a_redirect_names_is_checked(address, source, tmp_path):
    source.claim = SHA256
    found = fetch(f"{address}redirected/file.txt", tmp_path / "file.txt", QUIET)
    assert found.proven_by == "the server"
    source.claim = "f" * 64
    with pytest.raises(DownloadError, match=f"the server says {'f' * 64}"):
        fetch(f"{address}redirected/file.txt", tmp_path / "other.txt", QUIET)


def test_another_size_than_the_recipes_is_refused(address, source, tmp_path):
    with pytest.raises(DownloadError, match=r"has 512,000 bytes, the recipe says 7: the source was changed"):
        fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET, size=7)
    source.length = False
    with pytest.raises(DownloadError, match=r"ended after 512,000 bytes, the recipe says 7"):
        fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET, size=7)


@pytest.mark.parametrize(
    ("status", "told"), [(404, "has no such file"), (403, "forbids it"), (401, "asks for a login")]
)
def test_what_another_try_does_not_change_is_told_at_once(address, source, tmp_path, status, told):
    source.answers = [status]
    with pytest.raises(DownloadError, match=rf"the server {told} \(HTTP {status}\): look at .* or pass --base-url"):
        fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET)
    assert len(source.requests) == 1


def test_a_busy_server_is_asked_again(address, source, tmp_path):
    source.answers = [503, 429, 500]
    assert fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET).sha256 == SHA256
    source.answers = [503] * 99
    with pytest.raises(
        DownloadError, match=r"\(the server answered 503 .*, 5 times in a row\); 0.0 MB are kept: run the"
    ):
        fetch(f"{address}file.txt", tmp_path / "again.txt", QUIET)


def test_a_server_that_is_not_there(source, tmp_path):
    with pytest.raises(DownloadError, match=r"can't be downloaded \(.*refused.*, 5 times in a row\)"):
        fetch("http://127.0.0.1:9/file.txt", tmp_path / "file.txt", QUIET)


def test_a_disk_without_room_is_told_before_anything_is_written(address, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"file.txt needs 1 MB more and 0 MB are free"):
        fetch(f"{address}file.txt", tmp_path / "file.txt", QUIET)


def recipe(address, **known) -> Recipe:
    file = RemoteFile(path="file.txt", **known)
    return Recipe(title="a file", source="here", licence="none", base_url=address, files=(file,))


def test_the_first_download_is_trusted_and_the_later_ones_held_against_it(address, source, tmp_path, capsys):
    acquire(recipe(address), tmp_path, Progress())
    assert f"SHA-256 {SHA256}, taken on trust: nothing was known before" in capsys.readouterr().err
    kept = json.loads((tmp_path / acquisition.RECORD).read_text())["file.txt"]
    assert (kept["sha256"], kept["bytes"], kept["proven_by"]) == (SHA256, len(CONTENT), None)
    acquire(recipe(address), tmp_path, Progress())
    assert len(source.requests) == 1 and "by its first download, says" in capsys.readouterr().err
    (tmp_path / "file.txt").unlink()
    source.content = CONTENT[::-1]
    with pytest.raises(DownloadError, match=r"checksums.json, by its first download, says"):
        acquire(recipe(address), tmp_path, QUIET)
    (tmp_path / "file.txt").write_bytes(b"changed")
    with pytest.raises(DownloadError, match="it was changed; delete it to fetch it again"):
        acquire(recipe(address), tmp_path, QUIET)


def test_only_one_process_downloads_into_a_folder(address, tmp_path):
    with RunFolder(tmp_path).locked(), pytest.raises(RunError, match="another process is working in"):
        acquire(recipe(address), tmp_path, QUIET)


def test_the_command_takes_a_recipe_and_a_mirror(address, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(
        'title = "mine"\nsource = "here"\nlicence = "CC0-1.0"\nbase_url = "http://127.0.0.1:9/"\n'
        f'[[files]]\npath = "file.txt"\nsha256 = "{SHA256}"\n'
    )
    assert command(str(path), out=tmp_path / "out", base_url=address) == 0
    assert (tmp_path / "out" / "file.txt").read_bytes() == CONTENT
    told = capsys.readouterr().err
    assert "licence: CC0-1.0" in told and f"SHA-256 {SHA256}, as the recipe says" in told
    with pytest.raises(ValueError, match="it must begin with http:// or https://"):
        command(str(path), out=tmp_path / "out", base_url="file:///etc/")


def test_the_shipped_recipes_are_sound():
    assert recipes.names() == ("owt", "tinystories")
    for name in recipes.names():
        _, found = recipes.load(name)
        assert found.base_url.startswith("https://") and found.base_url.endswith("/") and found.licence


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("x", "is not a recipe"),
        ('titel = "x"', "unknown key 'titel': did you mean 'title'"),
        ('title = "x"', "is not a recipe: Object missing required field"),
        (
            'title="x"\nsource="x"\nlicence="x"\nbase_url="x"\n[[files]]\npath="../../evil"',
            "'../../evil' leads out of the folder",
        ),
        (
            'title="x"\nsource="x"\nlicence="x"\nbase_url="x"\n[[files]]\npath="a"\nsha256="abc"',
            "is not a recipe: Expected `str` matching regex",
        ),
    ],
)
def test_recipes_that_are_wrong_are_told(tmp_path, content, told):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=told):
        recipes.load(str(path))
    with pytest.raises(
        ConfigurationError, match="there is no recipe 'tinystory': pass a TOML file, or did you mean 'tinys"
    ):
        recipes.load("tinystory")
