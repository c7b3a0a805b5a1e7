"""`torch.compile` of a sparse pipeline: attention is one operator, so a graph serves all layers and steps."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dit_sparse import sparsify, statistics, unsparsify
from dit_sparse.pipelines import attend_operator
from dit_sparse.pipelines.families import adapter_for
from tests.pipelines.composed import HALF, composed, is_close
from tests.pipelines.families import FAMILIES, METHODS, Family
from tests.pipelines.test_composition_caches import CACHES


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def deepened(family: Family) -> Any:
    """A pipeline with every block twice: the graph of one must serve the next."""
    pipe = family.make()
    for blocks in block_lists(pipe):
        blocks.extend([copy.deepcopy(block) for block in blocks])
    return pipe


def counter() -> CompileCounterWithBackend:
    """A compiler that counts its graphs and runs them as they are."""
    return CompileCounterWithBackend("eager")


def block_lists(pipe: Any) -> list[Any]:
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [blocks for name in names if (blocks := getattr(pipe.transformer, name, None)) is not None]


def compile_blocks(pipe: Any, backend: Any) -> Any:
    """What `compile_repeated_blocks` does; diffusers has none for CogVideoX."""
    for blocks in block_lists(pipe):
        for block in blocks:
            block.compile(fullgraph=True, backend=backend)
    return pipe


def is_same(family: Family, got: Tensor, want: Tensor) -> bool:
    """Bit for bit; Wan's fused block, which is not compiled, rounds otherwise where it merges prompts."""
    return is_close(got, want) if family.name == "wan" else torch.equal(got, want)


def test_one_graph_serves_all_layers_and_steps(family) -> None:
    """As many graphs as without us: one a class of blocks, and one more where a later block gets other strides.

    Another method on a pipeline that is compiled may need other ones, because moved tokens have strides of their own.
    """
    plain = counter()
    dense = family.run(compile_blocks(deepened(family), plain))
    torch._dynamo.reset()
    backend = counter()
    pipe = compile_blocks(deepened(family), backend)
    for method in (METHODS[0], HALF):
        eager = sparsify(deepened(family), method)
        want = family.run(eager)
        assert is_same(family, family.run(sparsify(pipe, method)), want)
        assert statistics(pipe).calls == statistics(eager).calls
        assert set(statistics(pipe).dense_calls) == {"warm-up"}
        assert statistics(pipe).sparse_density < 0.7
        if method is METHODS[0]:
            assert backend.frame_count == plain.frame_count
        graphs = backend.frame_count
        family.run(pipe, steps=6)
        assert backend.frame_count == graphs, "compiled again"
    assert torch.equal(family.run(unsparsify(pipe)), dense)


def test_diffusers_own_way_to_compile(family) -> None:
    pipe = sparsify(family.make(), HALF)
    want = family.run(pipe)
    if family.name == "cogvideox":
        with pytest.raises(ValueError, match="`_repeated_blocks` attribute is empty"):
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
        return
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert is_same(family, family.run(pipe), want)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_generated_code() -> None:
    """Inductor checks the strides that the operator promised, and fuses what stands around it."""
    (family,) = (family for family in FAMILIES if family.name == "ltx_video")
    pipe = sparsify(family.make(), METHODS[0])
    want = family.run(pipe)
    assert is_close(family.run(compile_blocks(pipe, "inductor")), want)
    assert statistics(pipe).sparse_density < 0.7


@pytest.mark.parametrize(("name", "by"), [("wan", "method"), ("hunyuan_video", "wrapper")])
def test_a_whole_transformer_compiles_with_breaks_around_its_hook(name: str, by: str) -> None:
    """Also one whose tokens are moved once a forward, by hooks that no graph has seen."""
    (family,) = (family for family in FAMILIES if family.name == name)
    dense, want = family.dense(), family.run(sparsify(family.make(), METHODS[0]))
    pipe = family.make()
    if by == "method":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert is_close(family.run(pipe), dense)
    sparsify(pipe, METHODS[0])
    for _ in range(2):
        assert is_close(family.run(pipe), want)
        assert statistics(pipe).sparse_density < 0.7
    assert is_close(family.run(unsparsify(pipe)), dense)


@pytest.mark.parametrize("cache", ["FirstBlockCache", "PAB"])
def test_caches_beside_compiled_blocks(cache: str) -> None:
    """Their hooks on blocks break the graph, with and without us."""

    def enable(pipe: Any) -> None:
        pipe.transformer.enable_cache(CACHES[cache](pipe))

    eager, pipe = (composed(FAMILIES[0], enable, HALF) for _ in range(2))
    want = FAMILIES[0].run(eager, steps=6)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    for _ in range(2):
        assert is_same(FAMILIES[0], FAMILIES[0].run(pipe, steps=6), want)
        assert statistics(pipe).calls == statistics(eager).calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
def test_cuda_graphs_do_not_replay_what_one_step_decided() -> None:
    pipe = sparsify(FAMILIES[0].make().to("cuda"), METHODS[0])
    want = FAMILIES[0].run(pipe)
    calls = statistics(pipe).calls
    pipe.transformer.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
    # Plain diffusers needs it too: without it torch takes a block's output for garbage when the next one runs.
    pipe.transformer.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    for _ in range(3):
        assert is_close(FAMILIES[0].run(pipe), want)
        assert statistics(pipe).calls == calls


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name in ("wan", "flux")], ids=str)
def test_a_compiled_copy_has_attention_of_its_own(family) -> None:
    """A family whose block is fused, and one with two classes of blocks."""
    pipe = sparsify(family.make(), HALF)
    want = family.run(pipe)
    twin = compile_blocks(copy.deepcopy(pipe), "eager")
    calls = statistics(pipe).calls
    family.run(pipe, steps=2)
    assert is_same(family, family.run(twin), want)
    assert statistics(twin).calls == calls
    assert statistics(pipe).calls == calls // 2


def test_processors_are_forgotten_with_their_pipeline() -> None:
    gc.collect()
    before = len(attend_operator._processors)
    pipe = sparsify(FAMILIES[0].make(), HALF)
    assert len(attend_operator._processors) == before + 2
    FAMILIES[0].run(compile_blocks(pipe, "eager"))
    unsparsify(pipe)
    gc.collect()
    assert len(attend_operator._processors) == before


@pytest.mark.parametrize("contiguous", [False, True])
def test_the_operator_is_what_it_promises(family, contiguous: bool) -> None:
    """Its strides whatever the input's are, and that it changes nothing that it is given."""
    pipe = sparsify(family.make(), HALF, strict=False)
    processor = next(iter(adapter_for(pipe).attention_modules(pipe.transformer).values())).processor
    q, k, v = (torch.randn(2, 6, 2, 16).transpose(1, 2) for _ in range(3))
    if contiguous:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    torch.library.opcheck(attend_operator._attend, (q, k, v, None, processor._number))


def test_gradients_through_a_compiled_graph_are_refused() -> None:
    pipe = sparsify(FAMILIES[0].make(), HALF)
    processor = next(iter(adapter_for(pipe).attention_modules(pipe.transformer).values())).processor
    q = torch.randn(1, 2, 6, 12, requires_grad=True)
    compiled = torch.compile(lambda x: processor.attend(x, x, x), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        compiled(q)
