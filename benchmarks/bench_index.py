"""The cost of many images: the second start, the memory per image, and the first scan compared with decoding only.

pytest benchmarks/bench_index.py --benchmark-only

PHOTOS is a folder of images for the scan; without it, they are generated.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrm.data import open_source
from fastrm.data.scan import scan
from fastrm.data.stored import examined

FEW, MANY, CLASSES = 36, 200_000, 1000
PER_SHARD = 10_000
KINDS = ("folders", "shards")
WORKERS, ROUNDS = 4, 5

START = """
import itertools, json, os, re, sys, time
from pathlib import Path
from fastrm.data import make_loader, open_source
from fastrm.data.inventory import inventory
from fastrm.data.scan import scan

def held():
    '''Bytes that this process and those that it started hold alone, and what they hold of the index together.'''
    own = index = 0
    for pid in [os.getpid(), *map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())]:
        mapped = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
                mapped = ".index" in line
            elif line.startswith("Private_Dirty:"):
                own += 1024 * int(line.split()[1])
            elif mapped and line.startswith("Pss:"):
                index += 1024 * int(line.split()[1])
    return {"own": own, "index": index}

def start(data, workers):
    begin = time.perf_counter()
    source, broken = scan(open_source(data), workers=2)
    kept = inventory(source.train, left_out=len(broken), steps_per_epoch=1)
    loader = make_loader(source, method="mocov2", image_size=32, batch_size=4, device="cpu", workers=workers, seed=0,
                         loader="torch")
    return time.perf_counter() - begin, source, kept, loader

start(sys.argv[1], 0)  # what is made once for any number of files
seconds, source, kept, loader = start(sys.argv[2], int(sys.argv[3]))
batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epochs, so that all sizes make as many
for _ in range(36):
    next(batches)
names = [source.train.name(i) for i in range(0, len(source.train), max(1, len(source.train) // 99))]
print(json.dumps({"seconds": seconds, **held(), "names": names, "hashes": int(kept.hashes.sum()),
                  "about": source.about}))
"""


def start(few: Path, data: Path, workers: int) -> dict[str, Any]:
    """Start in a separate process; returns its seconds, and the memory of all processes after 36 batches."""
    command = [sys.executable, "-c", START, str(few), str(data), str(workers)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Path]]]:
    """A few images and many images, the latter being 64 images repeated: in folders, as links, and in shards."""
    root = tmp_path_factory.mktemp("index")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    pictures = [root / "pictures" / f"{i}.jpg" for i in range(64)]
    for path in pictures:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    for name, count, classes in (("few", FEW, 6), ("many", MANY, CLASSES)):
        for label in range(classes):
            (root / "folders" / name / f"n{label:08d}").mkdir(parents=True)
        for i in range(count):
            os.link(pictures[i % 64], root / "folders" / name / f"n{i % classes:08d}" / f"n{i % classes:08d}_{i}.JPEG")
        (root / "shards" / name).mkdir(parents=True)
        for first in range(0, count, PER_SHARD):
            shard = root / "shards" / name / f"{first:09d}.tar"
            with tarfile.open(shard, "w") as tar:
                for i in range(first, min(count, first + PER_SHARD)):
                    for ending, content in (("jpg", pictures[i % 64].read_bytes()), ("cls", b"%d" % (i % classes))):
                        info = tarfile.TarInfo(f"{i:09d}.{ending}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
            os.utime(shard, (1e9, 1e9))
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    yield {kind: (root / kind / "few", root / kind / "many") for kind in KINDS}
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.mark.parametrize("kind", KINDS)
def test_second_start_and_memory(kind: str, sets: dict[str, tuple[Path, Path]], enter: Any, note: Any) -> None:
    few, many = sets[kind]
    first = start(few, many, 0)
    seconds, memory = {}, {}
    for name, data in (("few", few), ("many", many)):
        found = [start(few, data, WORKERS) for _ in range(ROUNDS)]
        if name == "many":
            said = ("names", "hashes", "about")
            assert all([again[key] for key in said] == [first[key] for key in said] for again in found)
        seconds[name] = [one["seconds"] for one in found]
        memory[name] = {part: statistics.median(one[part] for one in found) for part in ("own", "index")}
    each = {part: (memory["many"][part] - memory["few"][part]) / MANY for part in ("own", "index")}
    note(
        f"{kind}, {MANY:,} images: first start {first['seconds']:.1f} s; bytes per image: {each['own']:.0f} that "
        f"{WORKERS + 1} processes hold alone, {each['index']:.0f} of the index, which they share"
    )
    counts = {"few": FEW, "many": MANY}
    enter(f"second start, {kind}", {f"{counts[name]:,} images": times for name, times in seconds.items()})
    assert sum(each.values()) <= 100


def test_first_scan_against_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enter: Any) -> None:
    """Time scan and decoding in turn over the same files, with a new cache for each scan."""
    data = Path(os.environ.get("PHOTOS", "")) if "PHOTOS" in os.environ else made_up(tmp_path / "photos")
    source = open_source(str(data), keep=False)
    paths = [source.train.name(i) for i in range(len(source.train))]
    threads = 2

    def alone() -> float:
        begin = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            looks = list(pool.map(lambda path: examined(Path(path).read_bytes()), paths))
        assert len(looks) == len(paths)
        return time.perf_counter() - begin

    def first(number: int) -> float:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{number}"))
        begin = time.perf_counter()
        found, broken = scan(open_source(str(data)), workers=threads)
        assert (len(found.train), broken) == (len(paths), {})
        return time.perf_counter() - begin

    alone()
    pairs = [(first(number), alone()) for number in range(ROUNDS)]
    scans, floors = zip(*pairs, strict=True)
    enter(f"first scan of {len(paths)} files", {"scan": scans, "decoding alone": floors})


def made_up(folder: Path) -> Path:
    """JPEGs with edges, gradients and noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(256):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse).astype(np.int64) + rng.integers(-12, 13, (375, 500, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return folder
