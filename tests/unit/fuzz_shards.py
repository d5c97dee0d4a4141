"""Damaged and hostile shards by the number, read as a worker reads them: `make fuzz`.

Run as a script it reads them in its own process and prints what became of them, so that a crash, a
hang or its memory is its own.
"""

import json
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from damaged_shards import KINDS, NUM_SAMPLES, fuzzed_shard

SECONDS_A_SHARD = 120


def main(folder: Path, first: int, count: int) -> None:
    """Reads shards `first` to `first + count` and prints a JSON object of what was seen."""
    from aclip.config.recipe import Recipe
    from aclip.config.sections import TextTowerConfig
    from aclip.data.batch import collate
    from aclip.data.lanes.order import Place
    from aclip.data.samples import SampleMaker
    from aclip.data.shards.counts import _scan_shard
    from aclip.data.shards.listing import Shard, Skip, read_shard
    from aclip.data.shards.remote import RemoteShards
    from aclip.data.tokenizer import build_tokenizer

    remote = RemoteShards(folder / "cache", 2**20, retries=0)
    tokenizer = build_tokenizer(TextTowerConfig())
    tokenizer.encode(["warm up"])
    seen: dict[str, Counter] = {}
    slowest = 0.0
    # Bombs among the first, or what they leave behind would look like growth.
    memory_before = _peak_mib()
    for seed in range(first, first + count):
        kind, content = fuzzed_shard(seed)
        path = folder / "shard.tar"
        path.write_bytes(content)
        signal.alarm(SECONDS_A_SHARD)  # a hang ends the process
        start = time.monotonic()
        # Each its own address, so that each goes through the cache.
        shard = Shard(f"file://{path}?{seed}", NUM_SAMPLES, 0, remote)
        path.rename(f"{path}?{seed}")
        recipe = Recipe(
            model={"image": {"resolution": 32, "kwargs": {"patch_size": 8}}},
            teacher={"resolution": 32},
            data={"crops": ("worker", "device")[seed // len(KINDS) % 2]},
        )
        maker = SampleMaker(recipe, [shard])
        counts = seen.setdefault(kind, Counter())
        counts["shards"] += 1
        counts["indexed"] += _scan_shard(shard.url, remote)
        samples, positions = [], []
        for position, raw in read_shard(shard):
            positions.append(position)
            place = Place(0, position, 0, position)
            sample = raw if isinstance(raw, Skip) else maker.make(0, place, raw)
            if isinstance(sample, Skip):
                counts[sample.kind] += 1
            else:
                samples.append(sample)
        assert positions[:NUM_SAMPLES] == list(range(NUM_SAMPLES)), (seed, kind, positions)
        if samples:
            batch = collate(samples, tokenizer, np.zeros((1, 2), dtype=np.int64), {})
            counts["usable"] += len(batch)
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
        Path(f"{path}?{seed}").unlink()
    result = {
        "kinds": seen,
        "memory_mib": round(_peak_mib() - memory_before),
        "slowest_seconds": round(slowest, 1),
    }
    print(json.dumps(result))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
