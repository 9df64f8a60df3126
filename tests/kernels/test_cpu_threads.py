"""How long threads of the C code look for one another before they sleep."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.kernels.test_cpu_compile import CC, needs_compiler

pytestmark = needs_compiler
SOURCE = """
#include "threads.h"
static Team team;
static void *come_late(void *unused) {
    usleep(50000);  // a thousand times as long as a thread looks
    announce(&team.phase);
    return unused;
}
// Wait at a barrier at which all others are, or one comes late.
void wait_once(int late) {
    team.looks = LOOKS_SPINNING;
    unsigned phase = team.phase.count;
    pthread_t other;
    if (late) pthread_create(&other, NULL, come_late, NULL);
    else announce(&team.phase);
    wait_at_barrier(&team, phase);
    if (late) pthread_join(other, NULL);
}
int brief(void) { return team.brief; }
int in_vain(void) { return IN_VAIN; }
int most_doubt(void) { return MOST_DOUBT; }
"""


@pytest.fixture
def team(tmp_path: Path) -> ctypes.CDLL:
    source, library = tmp_path / "wait.c", tmp_path / "wait.so"
    source.write_text(SOURCE)
    headers = ROOT / "t5_trt" / "kernels" / "cpu"
    assert CC is not None
    command = [CC, "-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread", f"-I{headers}", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(library))


def wait(team: ctypes.CDLL, *late: bool) -> list[int]:
    """The brief waits that are left after each of these."""
    left = []
    for each in late:
        team.wait_once(int(each))
        left.append(team.brief())
    return left


def test_one_late_thread_changes_nothing(team: ctypes.CDLL) -> None:
    forgotten = team.in_vain()
    for _ in range(2):
        assert wait(team, True, *[False] * forgotten) == [0] * (forgotten + 1)


def test_waits_are_brief_while_others_come_late_again_and_again(team: ctypes.CDLL) -> None:
    lengths = []
    for _ in range(4):
        left = wait(team, True)[0]
        lengths.append(left)
        assert wait(team, *[False] * left) == [*range(left)][::-1], "each brief wait is counted, on time or not"
    assert lengths == [0, *(lengths[1] << i for i in range(3))] and lengths[1] > 0, "each trial in vain doubles them"
    for _ in range(team.most_doubt() // team.in_vain() + 1):
        lengths.append(wait(team, True)[0])
        wait(team, *[False] * lengths[-1])
    assert lengths[-1] == lengths[-2] == max(lengths), "there is a most"


def test_threads_that_come_in_time_are_looked_for_again(team: ctypes.CDLL) -> None:
    wait(team, True, True)
    assert wait(team, *[False] * team.brief())[-1] == 0
    assert wait(team, *[False] * (2 * team.in_vain()), True) == [0] * (2 * team.in_vain() + 1), "all doubt is forgotten"
