"""A pytest plugin that makes diffusers' own pipeline tests run our pipelines, without the hub.

Used by `run_upstream_tests.py`. `--pipelines sparse` takes sparse pipelines at density 1 in place of diffusers' own:
our `Sparse*Pipeline` classes, and subclasses made here where we have none; `--pipelines upstream` changes nothing.
Either way, tokenizers and configs that the tests would fetch from the hub are made here: character tokenizers, and a T5
config of the sizes that the tests' models expect.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from dit_sparse import Schedule, sparsify
from dit_sparse.methods import find_method
from dit_sparse.pipelines import sparse_pipelines
from dit_sparse.pipelines.installed import transformers_of

# Special tokens by the numbers that the tests' text encoders have for them.
_SPECIAL_TOKENS = {
    "hf-internal-testing/tiny-random-t5": ("<pad>", "</s>", "<unk>"),
    "hf-internal-testing/tiny-random-clip": ("<s>", "<pad>", "</s>", "<unk>"),
    "finetrainers/dummy-hunyaunvideo": ("<s>", "<pad>", "</s>", "<unk>"),
}
_MODEL_MAX_LENGTH = {"hf-internal-testing/tiny-random-clip": 77}
_SPARSE = pytest.StashKey["SparseClasses"]()
_T5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pipelines", choices=("upstream", "sparse"), default="sparse")
    parser.addoption("--method", default="adaspa", help="which method runs at density 1")
    parser.addoption("--backend", default="auto", help="kernel backend of the sparse calls")


def pytest_configure(config: pytest.Config) -> None:
    for name in ("AutoTokenizer", "CLIPTokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "AutoConfig"):
        cls = getattr(transformers, name)
        cls.from_pretrained = _without_the_hub(cls.from_pretrained, config=name == "AutoConfig")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("pipelines") == "upstream":
        return
    method = find_method(config.getoption("method"))(density=1.0)  # type: ignore[call-arg]
    # Some tests call a transformer by itself, where it is dense.
    schedule = Schedule(method, warmup=0, strict=False, never_slower=False)
    sparse = config.stash[_SPARSE] = SparseClasses(schedule, config.getoption("backend"))
    for item in items:
        module, cls = item.module, item.cls  # type: ignore[attr-defined]
        tested = getattr(cls, "pipeline_class", None)
        if not isinstance(tested, type) or tested in sparse.made:
            continue
        cls.pipeline_class = sparse.of(tested)
        for name, value in list(vars(module).items()):
            if value is tested:
                setattr(module, name, cls.pipeline_class)


def pytest_sessionfinish(session: pytest.Session) -> None:
    sparse = session.config.stash.get(_SPARSE, None)
    if sparse is not None and not sparse.pipelines:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR  # all would pass on diffusers' own pipelines


class SparseClasses:
    """Makes diffusers' pipeline classes sparse under a schedule, as soon as they are built."""

    def __init__(self, schedule: Schedule, backend: str) -> None:
        self.schedule = schedule
        self.backend = backend
        mixin = sparse_pipelines.SparsePipelineMixin
        ours = [cls for cls in vars(sparse_pipelines).values() if isinstance(cls, type) and issubclass(cls, mixin)]
        self._ours = {sparse_pipelines._dense_class(cls): cls for cls in ours if cls is not mixin}
        self.made: set[type] = set()
        self.pipelines = 0

    @functools.cache  # noqa: B019  # one object a session
    def of(self, upstream: type) -> type:
        """The sparse class that stands for `upstream`."""
        base = self._ours.get(upstream, upstream)
        bases = (base,) if base is not upstream else (sparse_pipelines.SparsePipelineMixin, upstream)
        # Some tests look their class's source up by its name.
        cls = type(upstream.__name__, bases, {"__init__": self._sparsified(upstream.__init__)})
        self.made.add(cls)
        return cls

    def _sparsified(self, init: Any) -> Any:
        @functools.wraps(init)
        def __init__(pipe: Any, *args: Any, **kwargs: Any) -> None:
            init(pipe, *args, **kwargs)
            if transformers_of(pipe):
                sparsify(pipe, self.schedule, backend=self.backend)
                self.pipelines += 1

        return __init__


def _without_the_hub(load: Any, *, config: bool) -> Any:
    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        if config and name == "hf-internal-testing/tiny-random-t5":
            return transformers.T5Config(**_T5, is_encoder_decoder=True)
        if not config and name in _SPECIAL_TOKENS:
            return character_tokenizer(_SPECIAL_TOKENS[name], _MODEL_MAX_LENGTH.get(name, 512))
        return load(name, *args, **kwargs)

    return from_pretrained


def character_tokenizer(special: tuple[str, ...], max_length: int) -> transformers.PreTrainedTokenizerFast:
    """A token a printable ASCII character; `special` tokens have the first numbers."""
    characters = [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *characters])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    start = "<s> " if "<s>" in special else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}$A </s>", special_tokens=[(token, i) for i, token in enumerate(special)]
    )
    names = {"bos_token": "<s>"} if start else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        **names,
    )
