"""No kernel waits without an end: loops count, and the waits of the hardware end with the kernel before or the block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = sorted([*ROOT.glob("t5_trt/**/*.cu"), *ROOT.glob("t5_trt/**/*.cuh")])
#: loops that count, and over what: a name, a member or a number against another one, perhaps with sums; nothing is read from memory
COUNTS = re.compile(r"^[\w.\s+*/%()&:-]+(<=|<|>=|>)[\w.\s+*/%()&:-]+$")
#: instructions that wait for what comes by itself: the kernel before, own copies and products, the blocks of a cluster and what they send (``cluster``
#: in the scope of a try_wait), as they run at the same time; and those that only say so
WAITS = re.compile(
    r"griddepcontrol\.wait|cp\.async\.wait_(group|all)|wgmma\.wait_group[\w.]*|barrier\.cluster\.(arrive|wait)\b.*"
    r"|mbarrier\.try_wait\.parity\.acquire\.cluster\.shared::cta\.b64"
    r"|mbarrier\.(init|arrive\.expect_tx)\.shared::cta\.b64|fence\.mbarrier_init\.release\.cluster|cluster\.mbarrier::complete_tx::bytes[\w.]*"
)
READS = re.compile(r"\b(atomic\w+|__ld\w+|volatile)\b|\[|\*\s*\(")


def endless(source: str) -> list[str]:
    """What of a CUDA source may wait for ever."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    words = [f"{word}: loops are written as counting ones" for word in re.findall(r"\b(while|do|goto)\b", code)]
    for head in re.findall(r"\bfor\s*\(((?:[^()]|\([^()]*\))*)\)", code):
        condition = head.split(";")[1].strip() if head.count(";") == 2 else head
        if not COUNTS.match(condition) or READS.search(condition):
            words.append(f"for ({head}): its condition does not count")
    waits = re.findall(
        r"[\w.]*(?:wait|mbarrier|barrier|nanosleep)[\w.:]*", " ".join(re.findall(r'asm[^"]*"([^"]*)"', code))
    )
    return words + [f"{name}: it may wait for what never comes" for name in waits if not WAITS.fullmatch(name)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_wait_in_a_kernel_ends(path: Path) -> None:
    assert endless(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "while (*flag == 0) {}",
        "do { seen = __ldcg(flag); } while (!seen);",
        "for (;;) if (flag[0]) break;",
        "for (int i = 0; __ldcg(flag) < 3; ++i) {}",
        "for (int i = 0; i < flag[0]; ++i) {}",
        "for (int i = 0; !done; ++i) {}",
        'asm volatile("mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;" :: "r"(at), "r"(phase));',
        'asm volatile("nanosleep.u32 100;");',
    ],
)
def test_wait_without_an_end_is_noticed(source: str) -> None:
    assert endless(f"__global__ void kernel(volatile int* flag) {{ {source} }}")


def test_sources_are_found() -> None:
    assert {"attention.cuh", "product.cuh", "beam_step.cu"} <= {path.name for path in SOURCES}
