"""No shard, however broken, crashes or hangs a worker, fills its memory or writes a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_shards.py")
MEMORY_MIB = 1200
"""That a worker may need on top of its own: an image of 89 million pixels, the most that is
decoded, takes 4 bytes a pixel in Pillow and 3 as an array, and its file comes on top."""


def read_fuzzed(tmp_path: Path, first: int, count: int) -> dict:
    sandbox = tmp_path / "sandbox"
    sandbox.mkdir()
    before = set(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(sandbox), str(first), str(count)],
        capture_output=True,
        text=True,
        cwd=sandbox,
        env={**os.environ, "HOME": str(sandbox), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    written = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {path for path in written if sandbox / "cache" not in path.parents} == set()
    assert result["memory_mib"] < MEMORY_MIB
    return result


def test_fuzzed_shards_are_read_to_their_end(tmp_path):
    kinds = read_fuzzed(tmp_path, 0, 80)["kinds"]
    assert len(kinds) == 10
    for kind, counts in kinds.items():
        assert counts["shards"] == 8, kind
    # What is damaged is counted, and what is not is used.
    assert kinds["truncated"]["truncated_shard"] > 0
    assert 8 * 4 < kinds["names outside"]["usable"] <= 8 * 6  # a file called .. is no sample
    assert kinds["bombs"]["unreadable_image"] > 0
    assert 8 * 5 <= kinds["bombs"]["usable"] < 8 * 6
    assert kinds["zero length"]["unreadable_image"] > 0
    assert sum(counts.get("usable", 0) for counts in kinds.values()) > 160


@pytest.mark.soak
def test_ten_thousand_fuzzed_shards(tmp_path):
    result = read_fuzzed(tmp_path, 1000, 10_000)
    print(json.dumps(result, indent=1))
    assert sum(counts["shards"] for counts in result["kinds"].values()) == 10_000
