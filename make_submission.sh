#!/usr/bin/env bash
# Runs the tests and packs a course submission: ./make_submission.sh [FILE.zip]
set -euo pipefail
cd "$(dirname "$0")"
archive=${1:-cs336-submission.zip}

uv run pytest -n auto -q
rm -f "$archive" "$archive.partial"
# What git tracks, and nothing else: no data, no runs, no environments.
git archive --format=zip --output="$archive.partial" HEAD
mv "$archive.partial" "$archive"
if [ -n "$(git status --porcelain)" ]; then
    echo "note: uncommitted changes are not in the archive" >&2
fi
echo "wrote $archive ($(du -h "$archive" | cut -f1))"
