"""Choices in the decode loop and in its graph, each measured against its alternative on a GPU.

Stage ``launch``: one CUDA graph for a step, launched by the host for every token, or one for the whole sentence, whose WHILE
node runs the step until a small kernel finds the report set. Stage ``reorder``: rows of the K/V cache change places after a
step of beam search by a copy there and back, or the step reads them through an index. ``reorder`` needs no TensorRT. Stage
``scores``: the product of a step's queries with its cached keys, and a cache of half the length.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.gpu import (
    BASE,
    NEW_TOKENS,
    SOURCE_TOKENS,
    Records,
    events_ms,
    gpu_environment,
    kernels,
    main,
    our_model,
    replay_us,
    request,
)
from t5_trt.engine.profiles import SMALLEST
from t5_trt.graph.builders import DeviceGraphBuilder
from t5_trt.tools.environment import environment
from t5_trt.tools.random_models import SHAPES, random_t5

#: of CUDA's own device functions; the driver supplies it when the module is loaded
KERNEL = b"""
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);
extern "C" __global__ void go_on(unsigned long long handle, const long long* report, const long long* position, long long end) {
    cudaGraphSetConditional(handle, report[0] == 0 && position[0] < end);
}
"""


def checked(result: Any) -> Any:
    """The value of a call of cuda.bindings.

    Raises:
        RuntimeError: it failed.
    """
    if int(result[0]):
        raise RuntimeError(f"CUDA: {result[0]}")
    return result[1] if len(result) == 2 else result[1:]


def go_on_kernel() -> Any:
    """The kernel that decides whether another step follows, for this GPU."""
    from cuda.bindings import driver, nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(KERNEL, b"go_on.cu", 0, [], []))
    major, minor = torch.cuda.get_device_capability()
    options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
    if int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0]):
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode())
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    module = checked(driver.cuModuleLoadData(code))
    go_on_kernel.module = module  # type: ignore[attr-defined]  # it must outlive its function
    return checked(driver.cuModuleGetFunction(module, b"go_on"))


def sentence_graph(step: int, report: torch.Tensor, position: torch.Tensor, end: int) -> Any:
    """A graph that repeats another one (a CUgraph) until report[0] is set or the position reaches `end`; instantiated."""
    from cuda.bindings import driver

    graph, context = checked(driver.cuGraphCreate(0)), checked(driver.cuCtxGetCurrent())
    # the handle is 1 whenever the graph is launched
    handle = checked(driver.cuGraphConditionalHandleCreate(graph, context, 1, driver.CU_GRAPH_COND_ASSIGN_DEFAULT))
    loop = driver.CUgraphNodeParams()
    loop.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    loop.conditional.handle = handle
    loop.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
    loop.conditional.size = 1
    loop.conditional.ctx = context
    checked(driver.cuGraphAddNode(graph, None, None, 0, loop))
    body = loop.conditional.phGraph_out[0]
    once = checked(driver.cuGraphAddChildGraphNode(body, None, 0, driver.CUgraph(step)))
    parameters = driver.CUDA_KERNEL_NODE_PARAMS()
    parameters.func = go_on_kernel()
    parameters.gridDimX = parameters.gridDimY = parameters.gridDimZ = 1
    parameters.blockDimX = parameters.blockDimY = parameters.blockDimZ = 1
    values = (int(handle), report.data_ptr(), position.data_ptr(), end)
    parameters.kernelParams = (values, (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64))
    checked(driver.cuGraphAddKernelNode(body, [once], 1, parameters))
    return checked(driver.cuGraphInstantiate(graph, 0))


def stage_launch(store: Path, precision: str) -> Records:
    """99 steps with their token selection: launched one by one, and as one graph with a WHILE node."""
    from cuda.bindings import driver

    from t5_trt.runtime.step_buffers import run_step

    ours = our_model(store, precision)
    for rows, beams in ((1, 1), (1, 4), (32, 1)):
        arguments = request(rows, num_beams=beams)
        ours.generate(**arguments)
        gc.collect()
        session = ours.session
        shapes = session.engines.bucket(B=rows, N=beams, S=SOURCE_TOKENS, T=NEW_TOKENS + 1)
        slot = session._slots.idle[shapes][-1]
        selector = next(step.selector for key, step in reversed(slot.steps.items()) if key is not None)
        prompt = torch.zeros((rows * beams, 1), dtype=torch.long, device="cuda")
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=session._steps.memory.take()):
            run_step(slot, selector, session._steps.enqueue)
        graph.instantiate()
        whole = sentence_graph(graph.raw_cuda_graph(), selector.report, slot.position, NEW_TOKENS)

        def begin(selector: Any = selector, slot: Any = slot, prompt: Any = prompt, beams: int = beams) -> None:
            selector.begin(prompt) if beams == 1 else selector.begin(prompt, NEW_TOKENS + 1, NEW_TOKENS + 1)
            slot.tokens.zero_()
            slot.position.zero_()
            torch.cuda.synchronize()

        def one_by_one(graph: Any = graph) -> None:
            for _ in range(NEW_TOKENS):
                graph.replay()

        def at_once(whole: Any = whole) -> None:
            checked((*driver.cuGraphLaunch(whole, torch.cuda.current_stream().cuda_stream), None))

        tokens, found = [], {}
        for name, work in (("graph_per_step", one_by_one), ("while_node", at_once)):
            times = []
            for _ in range(7):
                begin()
                start = time.perf_counter()
                work()
                launched = time.perf_counter()
                torch.cuda.synchronize()
                times.append(((time.perf_counter() - start) * 1e3, (launched - start) * 1e3))
            total, host = sorted(times[2:])[2]
            found |= {f"{name}_ms": round(total, 3), f"{name}_host_ms": round(host, 3)}
            tokens.append(selector.tokens.clone())
        slot.position_host = -1
        yield {
            "model": BASE,
            "precision": precision,
            "batch": rows,
            "num_beams": beams,
            "new_tokens": NEW_TOKENS,
            "compared": "launches of 99 steps with their token selection",
            **found,
            "tokens_equal": bool(torch.equal(*tokens)),
            **gpu_environment(),
        }


def stage_reorder(store: Path, precision: str) -> Records:
    """T5-base's K/V cache of one bucket: rows change places, several ways."""
    for entries, beams, tokens in ((1, 4, 128), (8, 4, 128), (32, 4, 128), (1, 4, 512)):
        rows = entries * beams
        kv = torch.randn((12, 2, rows, 12, tokens, 64), dtype=torch.float16, device="cuda")
        within = torch.randint(0, beams, (entries, beams), device="cuda")
        parents = (within + torch.arange(entries, device="cuda")[:, None] * beams).flatten()
        spare, expected = torch.empty_like(kv), kv.index_select(2, parents)
        found: dict[str, float] = {}
        for name, work in ways(kv, spare, parents).items():
            kept = kv.clone()
            work()
            if name.startswith("copy") and not torch.equal(kv, expected):
                raise RuntimeError(f"{name} moved rows to wrong places")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            found[name] = round(events_ms(graph.replay, 50) * 1e3, 1)
            kv.copy_(kept)
        yield {
            "compared": "rows of T5-base's float16 K/V cache change places, microseconds for a step",
            "batch": entries,
            "num_beams": beams,
            "cache_tokens": tokens,
            "cache_mb": round(kv.numel() * 2 / 1e6),
            "us": found,
            **environment(),
        }
        del kv, spare, expected


def ways(kv: torch.Tensor, spare: torch.Tensor, parents: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Name -> what is captured. "copy" leaves the rows in their new places; "index" is a read in order before every step."""

    def by(count: int, of: torch.Tensor) -> Callable[[], None]:
        pieces = of.flatten(0, 1)

        def work() -> None:
            for start in range(0, len(pieces), count):
                piece = pieces[start : start + count]
                piece.copy_(piece.index_select(1, parents))

        return work

    wide, wider = kv.view(torch.int64), kv.view(torch.complex128)
    return {
        "index, through a second cache": lambda: torch.index_select(kv, 2, parents, out=spare),
        "index, 16 bytes at a time": lambda: torch.index_select(
            wider, 2, parents, out=spare.view(torch.complex128)
        ),
        "copy, a layer at a time": by(2, kv),
        "copy, all at once": by(24, kv),
        "copy, a layer at a time, 8 bytes": by(2, wide),
        "copy, K or V of a layer at a time, 16 bytes": by(1, wider),
        "copy, a layer at a time, 16 bytes": by(2, wider),
        "copy, 4 layers at a time, 16 bytes": by(8, wider),
        "copy, all at once, 16 bytes": by(24, wider),
    }  # fmt: skip


#: (batch, beams, cache tokens) of the steps that `stage_scores` compares
SCORE_CASES = ((32, 4, 128), (32, 4, 64), (8, 4, 128))
SCORE_LAYERS = 3


def score_forms() -> dict[str, Callable[[Any, Any, Any], Any]]:
    """Name -> how a step multiplies its queries with the cached keys; `DeviceGraphBuilder.key_product` is "keys times query"."""

    def several_rows(count: int) -> Callable[[Any, Any, Any], Any]:
        def product(graph: Any, query: Any, keys: Any) -> Any:
            wide = graph.op("Concat", *[query] * count, axis=1)
            scores = graph.op("MatMul", wide, graph.transpose(keys, 0, 2, 1))  # [R*H, count, T]
            return graph.op("Slice", scores, graph.ints(0), graph.ints(1), graph.ints(1))

        return product

    def query_first(graph: Any, query: Any, keys: Any) -> Any:
        return graph.op("MatMul", query, graph.transpose(keys, 0, 2, 1))

    def as_a_sum(graph: Any, query: Any, keys: Any) -> Any:
        return graph.op("ReduceSum", graph.op("Mul", query, keys), graph.ints(2), keepdims=0)

    return {
        "query times keys": query_first,
        "keys times query": DeviceGraphBuilder.key_product,
        "2 equal queries": several_rows(2),
        "8 equal queries": several_rows(8),
        "product and sum": as_a_sum,
    }


def stage_scores(store: Path, precision: str) -> Records:
    """A decoder step of `SCORE_LAYERS` layers of T5-base with its queries and cached keys multiplied in several ways."""
    from t5_trt import TRTT5ForConditionalGeneration
    from t5_trt.graph.signature import STEP
    from t5_trt.runtime.kv_buffers import CrossStates

    SHAPES["t5-base"] = {**SHAPES["t5-base"], "num_layers": SCORE_LAYERS}
    SMALLEST["T"] = min(tokens for _, _, tokens in SCORE_CASES)
    first: dict[Any, torch.Tensor] = {}
    for name, form in score_forms().items():
        DeviceGraphBuilder.key_product = form  # type: ignore[method-assign]
        ours = TRTT5ForConditionalGeneration.from_model(
            random_t5("t5-base"),
            backend="tensorrt",
            decode="engine",
            precision=precision,
            engine_cache_dir=store / name.replace(" ", "-"),  # the graph is not part of an engine's key
            check_engines=False,
        )
        session, arch = ours.session, ours.session.arch
        bucket, start = session.engines.bucket, time.perf_counter()
        shapes = [bucket(B=entries, N=beams, S=SOURCE_TOKENS, T=tokens) for entries, beams, tokens in SCORE_CASES]
        session.engines.prefetch([(STEP, each.for_graph(STEP)) for each in shapes])
        print(f"{name}: built in {time.perf_counter() - start:.1f} s", flush=True)
        for entries, beams, tokens in SCORE_CASES:
            generator = torch.Generator().manual_seed(0)
            cross, past = (
                0.5
                * torch.randn((arch.decoder_layers, 2, rows, arch.num_heads, length, arch.d_kv), generator=generator)
                for rows, length in ((entries, SOURCE_TOKENS), (entries * beams, 40))
            )
            state = session.start(CrossStates(cross.to(session.device, session.dtype), beams), tokens)
            state.append(past.to(session.device, session.dtype))
            ids = torch.randint(2, 32000, (entries * beams, 1), generator=generator)
            logits = session.decode(state, ids.to(session.device)).float()
            expected = first.setdefault((entries, beams), logits)
            slot = state.binding.slot
            found = kernels(slot)
            yield {
                "compared": f"a step of {SCORE_LAYERS} layers of T5-base: how queries meet the cached keys",
                "form": name,
                "precision": precision,
                "batch": entries,
                "num_beams": beams,
                "cache_tokens": tokens,
                "step_us": round(min(replay_us(slot, steps=20) for _ in range(9)), 1),
                "error": round(float((logits - expected).norm() / expected.norm()), 6),
                **found,
                **gpu_environment(),
            }


STAGES = {"launch": stage_launch, "reorder": stage_reorder, "scores": stage_scores}

if __name__ == "__main__":
    main(__doc__, STAGES, "fp16")
