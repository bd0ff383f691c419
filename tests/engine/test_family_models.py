"""A tiny checkpoint of every model family: its bytes, its names, what it answers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from promprune_vllm import cli
from promprune_vllm.core.savings import read_decoder
from promprune_vllm.demo import model as demo
from promprune_vllm.demo.families import FAMILIES, build_family_model, has_remote_code
from promprune_vllm.planning.facts import read as read_facts
from tests.engine.family_prompts import GLM, INTERNVL, LLAVA_VIDEO, PHOTO, QWEN, TEXT, photo, processor_of, prompt

# Names as in the published checkpoints, up to the part that is a tower, a projector or a language model.
ROOTS = {
    "llava": {
        "vision_tower.vision_model",
        "multi_modal_projector",
        "language_model.model",
        "language_model.lm_head",
    },
    "qwen2_vl": {"visual", "model", "lm_head"},
    "qwen2_5_vl": {"visual", "model", "lm_head"},
    "qwen3_vl": {"model.visual", "model.language_model", "lm_head"},
    "internvl": {"vision_tower", "multi_modal_projector", "language_model.model", "language_model.lm_head"},
    "internvl_chat": {"vision_model", "mlp1", "language_model.model", "language_model.lm_head"},
}
ROOTS |= dict.fromkeys(("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", *GLM), ROOTS["qwen3_vl"])
ROOTS |= dict.fromkeys(("llava_next", *LLAVA_VIDEO), ROOTS["llava"] | {"image_newline"})

each_family = pytest.mark.parametrize("family", FAMILIES)
# transformers has no code for the others.
each_that_transformers_has = pytest.mark.parametrize(
    "family", [family for family in FAMILIES if not has_remote_code(family)]
)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def test_these_families_are_built() -> None:
    assert list(FAMILIES) == ["llava", "llava_next", *LLAVA_VIDEO, *QWEN, *INTERNVL, *GLM]


def test_importing_it_is_cheap() -> None:
    code = "import sys, promprune_vllm.demo.families; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@each_family
def test_the_formulas_count_the_weights_that_the_model_has(family: str, models: dict[str, Path]) -> None:
    config = config_of(models[family])
    read = AutoConfig.from_pretrained(models[family], trust_remote_code=has_remote_code(family)).to_dict()
    decoder = read_decoder(read["llm_config" if family == "internvl_chat" else "text_config"])
    counted = 0
    with safe_open(models[family] / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  not a dict
            is_matrix = ".layers." in name and "vis" not in name.split(".layers.")[0]
            if is_matrix and not re.search(r"norm\.weight$|norm\w*\.weight$|bias$|A_log$", name):
                counted += math.prod(file.get_slice(name).get_shape())
    assert decoder is not None, config
    assert decoder.weights == counted


# Their configurations take others, which have no defaults.
COMPOSED = {"musicgen", "musicgen_melody"}
# Layers with a state of another kind, by other names of sizes.
OTHER_STATES = ("minimax", "kimi_linear", "nemotron_h", "granitemoehybrid", "mamba", "falcon_mamba", "rwkv")


def test_the_formulas_refuse_a_language_model_of_another_kind_and_never_fail() -> None:
    """They are asked about every model that a server with the plugin serves, a text model too, as it starts."""
    found = {
        kind: read_decoder(AutoConfig.for_model(kind).get_text_config().to_dict())
        for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - COMPOSED
    }
    assert len(found) > 100
    assert {kind for kind in OTHER_STATES if found[kind] is not None} == set()
    assert all(found[kind] for kind in ("llama", "qwen2", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"))


@pytest.mark.parametrize(
    ("kind", "is_moe", "is_hybrid", "is_covered"),
    [
        *[("llama", False, False, True), ("qwen3_moe", True, False, True), ("qwen3_5", False, True, True)],
        *[("bamba", False, True, False), ("falcon_h1", False, True, False), ("deepseek_v2", True, False, False)],
        ("glm4v_moe_text", True, False, True),
    ],
)
def test_nothing_is_counted_where_vllm_sees_experts_or_states_that_the_formulas_do_not(
    kind: str, is_moe: bool, is_hybrid: bool, is_covered: bool
) -> None:
    from promprune_vllm.engine.api_server.prompt_savings import decoder

    text = AutoConfig.for_model(kind).get_text_config()
    seen_by_vllm = SimpleNamespace(hf_text_config=text, use_mla=False, is_moe=is_moe, is_hybrid=is_hybrid)
    assert (decoder(SimpleNamespace(model_config=seen_by_vllm)) is not None) == is_covered


@each_family
def test_the_seed_decides_the_bytes(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    first, again = models[family], build_family_model(family, tmp_path / "again")
    other = build_family_model(family, tmp_path / "other", seed=1)
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in again.iterdir())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert sum(file.stat().st_size for file in first.iterdir()) < 10_000_000


@each_family
def test_a_finished_model_is_not_built_again(
    family: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("write_weights", "save_checkpoint"):
        monkeypatch.setattr(demo, name, lambda *_: pytest.fail("built again"))
    assert build_family_model(family, models[family]) == models[family]


def test_another_dtype_is_another_model(models: dict[str, Path], tmp_path: Path) -> None:
    for family, full in models.items():
        half = build_family_model(family, tmp_path / family, dtype="bfloat16")
        assert config_of(half)["dtype"] == "bfloat16"
        sizes = [(directory / "model.safetensors").stat().st_size for directory in (half, full)]
        assert sizes[0] < 0.6 * sizes[1]


@each_family
def test_every_weight_has_its_published_name(family: str, models: dict[str, Path]) -> None:
    with safe_open(models[family] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {root for root in ROOTS[family] if any(f"{name}.".startswith(f"{root}.") for name in names)} == ROOTS[
        family
    ]
    assert all(any(f"{name}.".startswith(f"{root}.") for root in ROOTS[family]) for name in names)


@each_that_transformers_has
def test_transformers_finds_every_weight(family: str, models: dict[str, Path]) -> None:
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(models[family], output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == config_of(models[family])["architectures"][0]


@each_that_transformers_has
def test_the_answer_is_printable_and_depends_on_the_photo(family: str, models: dict[str, Path]) -> None:
    from transformers import AutoModelForImageTextToText

    model, processor = AutoModelForImageTextToText.from_pretrained(models[family]), processor_of(models[family])
    answers = []
    for name in ("coffee", "rocket"):
        inputs = processor(images=photo(name), text=prompt(processor, PHOTO, TEXT), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(tokens))
    assert answers[0] != answers[1]
    assert all(len(text) == 4 and text.isascii() and text.isprintable() for text in answers)


def test_every_family_keeps_what_makes_it_special(models: dict[str, Path]) -> None:
    windowed = config_of(models["qwen2_5_vl"])["vision_config"]
    last = windowed["depth"] - 1
    assert last in windowed["fullatt_block_indexes"]
    assert len(windowed["fullatt_block_indexes"]) < last
    deep = config_of(models["qwen3_vl"])
    assert len(deep["vision_config"]["deepstack_visual_indexes"]) <= deep["text_config"]["num_hidden_layers"]
    for family in (*QWEN, *GLM):
        text = config_of(models[family])["text_config"]
        head = text["hidden_size"] // text["num_attention_heads"]
        assert text.get("head_dim", head) == head
        rope = text["rope_parameters"]
        assert sum(rope["mrope_section"]) == head * rope.get("partial_rotary_factor", 1) // 2
    assert set(config_of(models["qwen3_5"])["text_config"]["layer_types"]) == {
        "linear_attention",
        "full_attention",
    }
    assert len(config_of(models["llava_next"])["image_grid_pinpoints"]) == 5


@pytest.mark.parametrize("family", GLM)
def test_a_plan_of_glm_counts_the_matrices_that_are_in_the_file(family: str, models: dict[str, Path]) -> None:
    """Their towers read the same sizes by different names."""
    small = re.compile(r"norm|bias$|patch_embed|visual\.embeddings")  # left out of plans
    with safe_open(models[family] / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if not small.search(name)]  # noqa: SIM118
    assert read_facts(str(models[family])).parameters == sum(map(math.prod, shapes))


def test_glm_has_a_dense_layer_and_layers_with_experts_that_are_apart(models: dict[str, Path]) -> None:
    with safe_open(models["glm4v_moe"] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layers = [f"model.language_model.layers.{i}.mlp" for i in range(4)]
    parts = ("gate_proj", "up_proj", "down_proj")
    expected = {f"{layers[0]}.{part}.weight" for part in parts}
    for layer in layers[1:]:
        owners = [*(f"{layer}.experts.{i}" for i in range(4)), f"{layer}.shared_experts"]
        expected |= {f"{owner}.{part}.weight" for owner in owners for part in parts}
        expected |= {f"{layer}.gate.weight", f"{layer}.gate.e_score_correction_bias"}
    assert {name for name in names if ".mlp." in name and "visual" not in name} == expected


def test_the_command_builds_a_model_and_says_how_to_serve_it(tmp_path: Path) -> None:
    out = tmp_path / "a model"
    done = CliRunner().invoke(cli.app, ["demo-model", "--family", "qwen3_vl", "--out", str(out), "--seed", "3"])
    assert done.exit_code == 0
    assert done.stdout == f"{out}\n"
    assert f"promprune serve '{out}' --dtype float32" in done.stderr
    assert config_of(out)["model_type"] == "qwen3_vl"


def test_the_command_serves_a_family_in_a_type_that_a_cpu_has_kernels_for(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["demo-model", "--family", "qwen3_5", "--out", str(tmp_path / "model")])
    assert "--dtype bfloat16" in done.stderr


def test_the_command_says_that_a_configuration_is_code(tmp_path: Path) -> None:
    told = {}
    for family in INTERNVL:
        done = CliRunner().invoke(cli.app, ["demo-model", "--family", family, "--out", str(tmp_path / family)])
        told[family] = "--trust-remote-code" in done.stderr
    assert told == {"internvl": False, "internvl_chat": True}


def test_the_command_refuses_what_it_cannot_build(tmp_path: Path) -> None:
    arguments = ["demo-model", "--out", str(tmp_path / "model"), "--family"]
    unknown = CliRunner().invoke(cli.app, [*arguments, "gpt"])
    assert unknown.exit_code == 2
    assert "there is no model family 'gpt'; choose from llava, llava_next, llava_onevision" in unknown.stderr
    assert not (tmp_path / "model").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "diary.txt").write_text("dear diary")
    assert "has files that are not a demo model" in CliRunner().invoke(cli.app, [*arguments, "llava"]).stderr
