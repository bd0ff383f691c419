"""The pieces at the seam with vLLM, one by one: checks, wraps, families, micro-batches."""

from __future__ import annotations

import asyncio
import importlib
import re
from types import SimpleNamespace
from typing import Any

import pytest

from promprune_vllm.core.budget import FIELD, BudgetRequest
from promprune_vllm.engine import families, keys, plugin
from promprune_vllm.engine.api_server import admission, endpoints, request_hooks
from promprune_vllm.engine.api_server.pruning_request import PruningRequest, remember_admitted
from promprune_vllm.engine.api_server.request_fields import read_field, remember_http_fields
from promprune_vllm.engine.compat import parts, versions
from promprune_vllm.engine.compat.seam import Seam
from promprune_vllm.engine.compat.seams import SEAMS
from promprune_vllm.engine.families.contract import ModelFamily, ProcessorFamily
from promprune_vllm.engine.patches import PATCHES
from promprune_vllm.errors import BudgetError, IncompatibleVllmError
from tests.engine.conftest import DEMO, Engine

pytestmark = pytest.mark.engine
TOGETHER = DEMO


def test_every_seam_is_there() -> None:
    """By import; tests/unit/test_seams.py reads them from the files."""
    minor = versions.installed_minor()
    called = [seam for seam in SEAMS if seam.use == "call" and seam.in_minor(minor)]
    assert len(called) > 60
    for seam in called:
        seam.require()


@pytest.mark.parametrize(
    ("path", "parameters", "complaint"),
    [
        ("vllm.no_such_module:X", (), "which this vLLM lacks"),
        ("vllm.renderers.base:BaseRenderer.no_such_method", (), "which this vLLM lacks"),
        ("vllm.renderers.base:BaseRenderer._apply_prompt_extras", ("extras",), "taking extras"),
    ],
)
def test_a_changed_name_is_refused_with_the_cure(path: str, parameters: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(IncompatibleVllmError, match=complaint) as refused:
        Seam(path, "call", parameters).require()
    assert path in str(refused.value)
    assert "PROMPRUNE_ENABLED=false" in str(refused.value)


def _request(top: Any = None, nested: Any = None) -> Any:
    return SimpleNamespace(
        model_extra={} if top is None else {"visual_token_budget": top},
        vllm_xargs=None if nested is None else {"visual_token_budget": nested},
    )


def test_reading_the_field() -> None:
    assert read_field(_request(), FIELD) is None
    assert read_field(_request(top=64), FIELD) == 64
    assert read_field(_request(nested=64), FIELD) == 64
    assert read_field(_request(64, 64), FIELD) == 64
    assert read_field(SimpleNamespace(), FIELD) is None
    with pytest.raises(BudgetError, match="send it once"):
        read_field(_request(64, 65), FIELD)


def test_gpt_oss_requests_are_refused_on_their_own_path() -> None:
    """gpt-oss models have no chat template and no images; vLLM renders them elsewhere."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.online_renderer import OnlineRenderer

    plugin.register()
    config = SimpleNamespace(
        model="gpt-oss", served_model_name="gpt-oss", architectures=["GptOssForCausalLM"], hf_config=None
    )
    inner = SimpleNamespace(mm_processor=None, model_config=config)
    renderer = SimpleNamespace(parser=None, renderer=inner, model_config=config)
    if not versions.before("0.31"):  # earlier, the same method goes on to render
        OnlineRenderer.adjust_harmony_request(renderer, _request())  # type: ignore[arg-type]
    doors = [each for each in PATCHES if each.wrapper.endswith(":refuse_harmony") and each.applies]
    assert doors
    for owner, name in (each.owner() for each in doors):
        with pytest.raises(VLLMValidationError, match="gpt-oss cannot be pruned, it takes no images"):
            getattr(owner, name)(renderer, _request(top=64))


def test_families_give_the_reason_they_cannot_prune(engine: Engine) -> None:
    from transformers import LlavaConfig

    assert families.unsupported_reason(engine.llm.llm_engine.vllm_config) is None
    reason = families.unsupported_reason(_server("Qwen9ForConditionalGeneration", None))
    assert (
        reason == f"no model family for Qwen9ForConditionalGeneration (supported: {', '.join(families.FAMILIES)})"
    )
    assert "LlavaNextForConditionalGeneration" in reason
    for changed, said in (
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "no CLS token"),
        ({"vision_feature_layer": [-2, -3]}, "mixes the vision layers"),
        ({"vision_feature_select_strategy": "full"}, "feeds the CLS token"),
    ):
        for name in ("Llava", "LlavaNext", "LlavaNextVideo"):
            server = _server(f"{name}ForConditionalGeneration", LlavaConfig(**changed))
            assert said in (families.unsupported_reason(server) or "")


def test_what_llava_onevision_refuses() -> None:
    from transformers import LlavaOnevisionConfig

    def reason(**changed: Any) -> str:
        server = _server("LlavaOnevisionForConditionalGeneration", LlavaOnevisionConfig(**changed))
        return families.unsupported_reason(server) or ""

    assert reason() == ""
    assert "only SigLIP is supported" in reason(vision_config={"model_type": "clip_vision_model"})
    assert "mixes the vision layers" in reason(vision_feature_layer=[-1, -2])
    assert "drops the first patch" in reason(vision_feature_select_strategy="default")


@pytest.mark.parametrize("architecture", families.FAMILIES)
def test_adapters_on_the_tower_are_refused(architecture: str) -> None:
    server = _server(architecture, None)
    server.lora_config = SimpleNamespace(enable_tower_connector_lora=True)
    assert "--enable-tower-connector-lora" in (families.unsupported_reason(server) or "")


@pytest.mark.parametrize("architecture", ["InternVLChatModel", "InternVLForConditionalGeneration"])
def test_what_internvl_families_refuse(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {"downsample_ratio": 0.5, "ps_version": "v2", "use_thumbnail": True}

    def reason(options: dict[str, Any] | None = None, **changed: Any) -> str:
        server = _server(architecture, SimpleNamespace(**{**layout, **changed}))
        server.model_config.multimodal_config.mm_processor_kwargs = options
        return families.unsupported_reason(server) or ""

    assert reason() == ""
    assert "ps_version v1" in reason(ps_version="v1")
    assert "downsample_ratio=0.25" in reason(downsample_ratio=0.25)
    assert reason(use_thumbnail=False) == ""
    monkeypatch.setenv("PROMPRUNE_TILES", "base")
    assert reason() == ""
    for without in (reason(use_thumbnail=False), reason({"use_thumbnail": False})):
        assert "PROMPRUNE_TILES=base needs a tile with the whole image" in without


@pytest.mark.parametrize("architecture", parts.MROPE.architectures)
@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("parallel_config", {"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ("multimodal_config", {"video_pruning_rate": 0.5}, "--video-pruning-rate"),
    ],
)
def test_what_mrope_families_refuse(architecture: str, part: str, change: dict[str, Any], said: str) -> None:
    server = _server(architecture, None)
    assert families.unsupported_reason(server) is None
    owner = server if part == "parallel_config" else server.model_config
    for name, value in change.items():
        setattr(getattr(owner, part), name, value)
    assert said in (families.unsupported_reason(server) or "")


def _server(architecture: str, hf_config: Any) -> Any:
    from vllm.config import MultiModalConfig

    return SimpleNamespace(
        model_config=SimpleNamespace(
            architectures=[architecture], hf_config=hf_config, multimodal_config=MultiModalConfig()
        ),
        lora_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


def test_another_implementation_of_a_model_we_know_refuses_a_budget() -> None:
    """As with --model-impl transformers: the architecture is ours, the processor is not."""
    server = _server("Qwen2VLForConditionalGeneration", None)
    server.model_config.served_model_name = "M"
    renderer = SimpleNamespace(mm_processor=object(), config=server, model_config=server.model_config)
    with pytest.raises(BudgetError, match=r"M cannot be pruned, .*--model-impl"):
        admission.admit(renderer, PruningRequest(BudgetRequest.parse(64), sent=True))


def test_a_model_without_a_family_refuses_a_budget() -> None:
    server = _server("Qwen9ForConditionalGeneration", None)
    server.model_config.served_model_name = "M"
    renderer = SimpleNamespace(mm_processor=object(), config=server, model_config=server.model_config)
    admission.admit(renderer, PruningRequest())
    with pytest.raises(BudgetError, match="M cannot be pruned, no model family for Qwen9"):
        admission.admit(renderer, PruningRequest(BudgetRequest.parse(64), sent=True))


@pytest.mark.parametrize(
    ("seen", "limit", "sizes"),
    [
        ([576] * 5, 1200, [2, 2, 1]),
        ([576] * 3, 100, [1, 1, 1]),
        ([10, 10, 2000, 10], 100, [2, 1, 1]),
        ([], 100, []),
        ([576], 4096, [1]),
    ],
)
def test_micro_batches(seen: list[int], limit: int, sizes: list[int]) -> None:
    from promprune_vllm.engine.worker.encode import micro_batches

    batches = list(micro_batches(seen, limit))
    assert [len(seen[batch]) for batch in batches] == sizes
    assert [count for batch in batches for count in seen[batch]] == seen


def test_the_profile_run_is_not_pruned(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory must be profiled with every token, whatever requests will ask for and the server keeps by default."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    monkeypatch.setenv("PROMPRUNE_BUDGET", "5")
    monkeypatch.setenv("PROMPRUNE_MAX", "9")
    processor = MULTIMODAL_REGISTRY.create_processor(engine.llm.model_config)
    if versions.before("0.31"):
        dummy = MULTIMODAL_REGISTRY.get_dummy_mm_inputs(engine.llm.model_config, {"image": 1}, processor=processor)
    else:
        dummy = processor.get_dummy_mm_inputs({"image": 1})
    assert [place.length for place in dummy["mm_placeholders"]["image"]] == [576]


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=lambda family: family.model)
def test_every_family_implements_its_contract(family: families.Family) -> None:
    """None of its members may be left to vLLM's class, nor to the contract, which does nothing."""
    path, _, name = family.target.partition(":")
    module = importlib.import_module(path)
    (processor,) = (each for key, each in vars(module).items() if re.fullmatch(r"Pruned\w+Processor", key))
    assert callable(module.unsupported_reason)
    for contract, ours in ((ModelFamily, getattr(module, name)), (ProcessorFamily, processor)):
        assert contract not in ours.__mro__, "it would answer before vLLM's class"
        members = {each for each in (*vars(contract), *contract.__annotations__) if not each.startswith("_")}
        assert members >= {"capture", "project"} or members >= {"image_tokens", "boxes", "supplies"}
        for member in members:
            definers = [each for each in ours.__mro__ if member in vars(each)]
            assert definers, member
            assert definers[0].__module__.startswith("promprune_vllm."), member


@pytest.mark.parametrize("architecture", families.FAMILIES)
def test_a_familys_class_is_called_as_vllms_is(architecture: str) -> None:
    """vLLM compares names of classes: by another, Qwen-VL would not load beside an EAGLE head on Runner V1."""
    path, _, name = families.FAMILIES[architecture].target.partition(":")
    ours = getattr(importlib.import_module(path), name)
    assert ours.__name__ == ours.__bases__[-1].__name__
    assert architecture.startswith("InternVL") or ours.__name__ == architecture
    assert ours.__qualname__ == name  # by which Python finds it


def test_a_budget_of_http_is_parsed_and_admitted_once_when_its_body_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed: list[object] = []
    parse = BudgetRequest.parse
    monkeypatch.setattr(BudgetRequest, "parse", lambda value: parsed.append(value) or parse(value))
    for module in (endpoints, request_hooks):
        monkeypatch.setattr(module, "admit", lambda _, request: parsed.append(request.budget.total))
    monkeypatch.setattr(request_hooks, "_has_our_processor", lambda _: True)
    renderer = SimpleNamespace(model_config=None, mm_processor=SimpleNamespace(reads_text=False))
    backend = SimpleNamespace(_renderer=renderer)
    body = {FIELD: {"total": 64}, "messages": []}

    async def handle() -> Any:
        remember_http_fields(body)
        remember_admitted(endpoints.EngineBackend.check_fields(backend, body, "/v1/chat/completions"))
        process = request_hooks.attach_request(lambda _, prompt: prompt)
        return process(renderer, {"multi_modal_data": {"image": object()}, "mm_processor_kwargs": {"other": 1}})

    options = asyncio.run(handle())["mm_processor_kwargs"]
    assert parsed == [{"total": 64}, 64]
    assert options == {"other": 1, keys.REQUEST: PruningRequest(parse({"total": 64}), sent=True)}
