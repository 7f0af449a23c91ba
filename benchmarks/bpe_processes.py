"""Running benchmark tasks in fresh processes and measuring them from outside; rows are only ever appended."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
MIB = 1 << 20
SEPARATOR = b"<|endoftext|>"


def measure(python: str, arguments: list[str], timeout: float) -> dict[str, Any]:
    """Wall seconds, processor seconds and peak resident memory (MiB) of one process, with what its last line says.

    Bytecode is kept from one process to the next, as it is after installing, also where the caller has turned that off.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = os.path.join(tempfile.gettempdir(), f"cs336_bytecode_{os.getuid()}")
    command = [python, str(FOLDER / "bpe_peers.py"), *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    stopper = threading.Timer(timeout, process.kill)
    stopper.start()
    try:
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        stopper.cancel()
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    row: dict[str, Any] = {
        "wall_seconds": round(wall, 3),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_mib": round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB, 1),
    }
    if process.returncode != 0:
        late = f"stopped after {timeout:.0f} s" if wall >= timeout else ""
        return row | {"error": late or (lines or ["no output"])[-1][:300]}
    return row | json.loads(lines[-1])


def machine() -> dict[str, Any]:
    """What a reader needs to judge a row: processor, cores, load, versions."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    command = ["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def append_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def slice_of(corpus: Path, num_bytes: int, folder: Path) -> Path:
    """The first `num_bytes` of a corpus, cut after a document; a corpus that is too short goes on with changed words.

    Text that is repeated as it is would add no unique pretokens; in the n-th copy, words that end in e or s get another
    letter, so that unique pretokens keep growing.
    """
    path = folder / f"{corpus.stem}_{num_bytes}.txt"
    if path.exists():
        return path
    written = copy = 0
    with open(path, "wb") as out:
        while written < num_bytes:
            with open(corpus, "rb") as file:
                while written < num_bytes and (block := file.read(min(8 * MIB, num_bytes - written))):
                    if copy:
                        letter = bytes([ord("a") + copy - 1])
                        block = block.replace(b"e ", b"e" + letter + b" ").replace(b"s ", b"s" + letter + b" ")
                    written += out.write(block)
            copy += 1
    with open(path, "r+b") as file:
        start = max(0, written - MIB)
        file.seek(start)
        end = file.read().rfind(SEPARATOR)
        if end >= 0:
            file.truncate(start + end + len(SEPARATOR))
    return path
