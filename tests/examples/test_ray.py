"""`examples/ray_batch.py` on a real Ray cluster of this machine, with the shipped model."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, SHIPPED
from tests.ray_cluster import example, local_cluster, processes, ray

pytest.importorskip("ray.data", reason="ray is installed without Ray Data: pip install 't5-trt[ray]'")

LINES = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]
TIMES = 5
SHARD_LINES = 4
SHARDS = len(LINES) * TIMES // SHARD_LINES
OPTIONS = ["--workers", "2", "--shard-lines", str(SHARD_LINES), "--batch-size", "4", "--max-new-tokens", "90"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    with local_cluster() as address:
        yield address


@pytest.fixture(scope="module")
def expected(shipped: tuple[Any, Any, Any]) -> list[str]:
    """What the Hugging Face class makes of LINES."""
    tokenizer, hugging_face, _ = shipped
    inputs = tokenizer(LINES, return_tensors="pt", padding=True)
    return tokenizer.batch_decode(hugging_face.generate(**inputs, max_new_tokens=90), skip_special_tokens=True)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a while; the output is `tmp_path` / out.txt."""
    source = tmp_path / "in.txt"
    source.write_text("\n".join(LINES * TIMES) + "\n", encoding="utf-8")
    return [str(SHIPPED), str(source), str(tmp_path / "out.txt"), *OPTIONS]


def test_actors_get_the_model_itself(shipped: tuple[Any, Any, Any]) -> None:
    """Pickled once into Ray's store; every actor opens engines of its own, and the driver's model goes on."""
    tokenizer, hugging_face, ours = shipped
    inputs = tokenizer(LINES[:6], return_tensors="pt", padding=True)
    expected = hugging_face.generate(**inputs, max_new_tokens=30, num_beams=2).tolist()

    class Holder:
        def __init__(self, model: Any) -> None:
            self.model = model

        def answer(self, inputs: Any) -> Any:
            return self.model.generate(**inputs, max_new_tokens=30, num_beams=2).tolist()

    assert ours.generate(**inputs, max_new_tokens=30, num_beams=2).tolist() == expected
    model = ray.put(ours)
    actors = [ray.remote(num_cpus=1)(Holder).remote(model) for _ in range(2)]
    try:
        waiting = [actor.answer.remote(dict(inputs)) for _ in range(3) for actor in actors]
        assert ray.get(waiting, timeout=120) == [expected] * 6
    finally:
        for actor in actors:
            ray.kill(actor)
    assert ours.generate(**inputs, max_new_tokens=30, num_beams=2).tolist() == expected


def output_of(folder: Path) -> list[str]:
    return (folder / "out.txt").read_text(encoding="utf-8").split("\n")[:-1]


def wait_for_shards(folder: Path, count: int) -> list[Path]:
    until = time.monotonic() + 90
    while len(found := sorted((folder / "out.txt.shards").glob("shard-*.txt"))) < count:
        assert time.monotonic() < until, "no shards were made"
        time.sleep(0.005)
    return found


def test_killed_worker(
    command: list[str], tmp_path: Path, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    batch = example("ray_batch")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(batch.main, command)
        wait_for_shards(tmp_path, 2)
        victim = processes("ray::MapWorker")[0]
        victim.send_signal(signal.SIGKILL)
        there = len(wait_for_shards(tmp_path, 2))
        run.result()
    assert there < SHARDS, "the worker was killed too late to show anything"
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
    assert output_of(tmp_path) == expected * TIMES
    printed = capsys.readouterr()
    assert f"{SHARDS} shards made, 0 were there" in printed.out
    assert f"{len(LINES) * TIMES}/{len(LINES) * TIMES}" in printed.err  # the bar
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_driver_and_resumed_run(
    command: list[str], tmp_path: Path, expected: list[str], cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), *command, "--address", cluster]
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(script, stdout=log, stderr=log)
        wait_for_shards(tmp_path, 3)
        first.kill()
        first.wait()
    finished = wait_for_shards(tmp_path, 3)
    assert len(finished) < SHARDS and not (tmp_path / "out.txt").exists()
    assert all(path.read_text(encoding="utf-8").count("\n") == SHARD_LINES for path in finished)
    finished[0].write_text("kept\n" * SHARD_LINES, encoding="utf-8")  # a shard made again would lose this

    batch = example("ray_batch")
    batch.main(command)
    assert f"{SHARDS - len(finished)} shards made, {len(finished)} were there" in capsys.readouterr().out
    wanted = expected * TIMES
    place = int(finished[0].stem.split("-")[1]) * SHARD_LINES
    wanted[place : place + SHARD_LINES] = ["kept"] * SHARD_LINES
    assert output_of(tmp_path) == wanted

    batch.main(command)  # all is there: no worker is started
    assert f"0 shards made, {SHARDS} were there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="different: num_beams"):
        batch.main([*command, "--num-beams", "2"])
