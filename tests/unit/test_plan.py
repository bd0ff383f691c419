"""`promprune plan`: what budgets are worth, from a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.errors import PlanError
from promprune_vllm.planning import videos
from promprune_vllm.planning.capacity import GPUS, Gpu, Server, Traffic, kv_memory, plan
from promprune_vllm.planning.facts import Facts, read
from tests.documents import README, ROOT

GIB = 2**30


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations with the published models' sizes."""
    from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig, Qwen3_5Config, Qwen3_5MoeConfig

    folder = tmp_path_factory.mktemp("models")
    vicuna: dict[str, Any] = {"model_type": "llama", "vocab_size": 32064}
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    qwen = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    }
    tower = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    LlavaConfig(text_config=vicuna, dtype="float16").save_pretrained(folder / "llava")
    LlavaNextConfig(text_config=vicuna, dtype="float16", image_grid_pinpoints=pinpoints).save_pretrained(
        folder / "next"
    )
    Qwen2_5_VLConfig(text_config=qwen, vision_config=tower, dtype="bfloat16").save_pretrained(folder / "qwen")
    hybrid = {
        "num_hidden_layers": 40,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 248320,
        "mamba_ssm_dtype": "float32",
    }
    Qwen3_5MoeConfig(
        text_config=hybrid, vision_config={"out_hidden_size": 2048}, dtype="bfloat16"
    ).save_pretrained(folder / "hybrid")
    dense = {
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 17408,
        "linear_num_value_heads": 48,
        "vocab_size": 248320,
        "mamba_ssm_dtype": "float32",
    }
    Qwen3_5Config(text_config=dense, vision_config={"out_hidden_size": 5120}, dtype="bfloat16").save_pretrained(
        folder / "dense"
    )
    return folder


@pytest.fixture(scope="module")
def llava(models: Path) -> Facts:
    return read(str(models / "llava"))


@pytest.mark.parametrize(
    ("name", "billions", "kib_a_token"),
    [("llava", 7.06, 512), ("next", 7.06, 512), ("qwen", 8.29, 56), ("hybrid", 35.1, 20), ("dense", 27.35, 64)],
)
def test_published_models_have_the_sizes_they_are_known_for(
    models: Path, name: str, billions: float, kib_a_token: int
) -> None:
    facts = read(str(models / name))
    assert facts.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert facts.kv_bytes_per_token() == kib_a_token * 1024
    assert facts.kv_bytes_per_token(1) == kib_a_token * 512


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("llava", (1024, 768), 576),
        ("next", (1024, 768), 576 + 36 * 48 + 36),  # unpadded, and a newline after each row
        ("next", (336, 336), 576 + 24 * 24 + 24),  # the canvas that wastes least
        ("qwen", (1024, 768), 37 * 27),
        ("qwen", (28, 28), 4),  # enlarged to the least it takes
        ("qwen", (8000, 6000), 110 * 147),  # shrunk to the most
    ],
)
def test_tokens_of_an_image(models: Path, name: str, size: tuple[int, int], tokens: int) -> None:
    assert read(str(models / name)).visual_tokens(*size) == tokens


def test_a_processor_beside_the_configuration_has_its_say(models: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((models / "qwen" / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 200_704}))
    for model in (tmp_path, tmp_path / "config.json"):
        assert read(str(model)).visual_tokens(1024, 768) <= 256


def test_a_plan_adds_up(llava: Facts) -> None:
    server = Server(Gpu(80, 989), utilisation=0.9, reserve_gib=2)
    full, half, few = plan(llava, server, Traffic((640, 480), 2, 64, 128), ["50%", 64])
    assert (full.kept, half.kept, few.kept) == (576, 288, 64)
    assert (full.prompt_tokens, few.prompt_tokens) == (1216, 192)
    assert full.kv_bytes_per_image == 576 * 512 * 1024
    assert kv_memory(llava, server) == round(70 * GIB) - 2 * llava.parameters
    assert full.chats == kv_memory(llava, server) // (1344 * 512 * 1024)
    assert full.arithmetic == 1
    assert full.arithmetic > half.arithmetic > few.arithmetic > 0.1  # the encoder stays
    for row in (half, few):
        assert row.images_per_s == pytest.approx(full.images_per_s / row.arithmetic)


def test_more_ranks_hold_more_chats_and_a_smaller_cache_type_twice_as_many(llava: Facts) -> None:
    traffic = Traffic((640, 480))
    one, two = (plan(llava, Server(GPUS["l4"], ranks), traffic, [64]) for ranks in (1, 2))
    assert two[0].chats > 2 * one[0].chats  # the weights are held once
    assert two[0].images_per_s == pytest.approx(2 * one[0].images_per_s)
    (small, *_) = plan(llava, Server(GPUS["l4"], cache_bytes=1), traffic, [])
    assert small.chats in (2 * one[0].chats, 2 * one[0].chats + 1)


def test_a_chat_of_a_hybrid_takes_long_blocks_and_a_state_in_each_linear_layer(models: Path) -> None:
    """Qwen3.5-35B-A3B: 32 heads of 128 x 128 numbers in float32, and three tokens of 8,192 channels."""
    facts = read(str(models / "hybrid"))
    state = 32 * 128 * 128 * 4 + 3 * 8192 * 2
    assert facts.state_bytes == state
    a_token = 2 * 2 * 256 * 2  # in one of the ten layers with attention
    block = facts.block_tokens(16)
    assert (block - 16) * a_token < state <= block * a_token
    for tokens, blocks in ((1, 1), (block, 1), (block + 1, 2)):
        assert facts.chat_bytes(tokens, 16) == block * a_token * (10 * blocks + 30)
    shown = " ".join(CliRunner().invoke(app, ["plan", "--model", str(models / "hybrid")]).stdout.split())
    said = f"30 of 40 layers keep a state instead of a KV cache, as large as a block of {block:,} tokens"
    assert said in shown


def test_blocks_of_the_dense_hybrid_are_as_long_as_vllm_logs_for_it(models: Path) -> None:
    """LMCache's recipe for Qwen3.6-27B has vLLM's line: "Setting attention block size to 784 tokens"."""
    assert read(str(models / "dense")).block_tokens(16) == 784


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", ""),
        ("next", ""),
        ("qwen", ""),
        ("dense", "--image 1024x1024"),
        ("dense", "--image 1024x1024 --images 4 --budgets 25%,64"),
        ("qwen", "--video 180x640x360 --budgets 25%,2880,720"),
    ],
)
def test_the_tables_of_the_documents_are_what_the_command_prints(models: Path, name: str, options: str) -> None:
    call = ["plan", "--model", str(models / name), "--gpu", "h100", "--markdown", *options.split()]
    printed = [line for line in CliRunner().invoke(app, call).stdout.splitlines() if line.startswith("| ")]
    page = (ROOT / "docs" / "deployment.md").read_text()
    assert len(printed) > 3
    assert "\n".join(printed[2:]) in page


@pytest.mark.parametrize("name", ["llava", "dense"])
def test_the_savings_of_the_readme_are_what_the_command_calculates(models: Path, name: str) -> None:
    options = ["--gpu", "h100", "--image", "1024x1024", "--budgets", "25%,64", "--json"]
    told = json.loads(CliRunner().invoke(app, ["plan", "--model", str(models / name), *options]).stdout)
    readme = README.read_text()
    for row in told["budgets"]:
        kept = f"{row['kept']:,}" + (", all" if row["budget"] == "full" else "")
        kv = f"{row['kv_bytes_per_image'] / 2**20:.0f} MiB"
        assert f"| {kept} | {kv} | {row['chats']} | {row['arithmetic'] * 100:.0f}% |" in readme, row


def test_windows_of_a_tower_cost_less_than_looking_everywhere(models: Path) -> None:
    tower = read(str(models / "qwen")).tower
    assert (tower.window_patches, tower.full_layers, tower.layers) == (64, 4, 32)
    assert tower.flops(4 * 999) < 2 * tower.weights * 3996 + 4 * 1280 * 32 * 3996**2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere"], "/nowhere has no configuration"),
        (["--gpu", "b12"], "--gpu must be one of h200, h100, a100, l40s, l4, rtx4090, got 'b12'"),
        (["--gpu-memory", "8"], "13.1 GiB of weights"),
        (["--image", "large"], "'large' is not a size"),
        (["--image", "0x10"], "'0x10' is not a size"),
        (["--budgets", "64,few"], "visual_token_budget"),
        (["--kv-cache-dtype", "int2"], "--kv-cache-dtype must be one of auto"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(models: Path, arguments: list[str], said: str) -> None:
    model = [] if "--model" in arguments else ["--model", str(models / "llava")]
    result = CliRunner().invoke(app, ["plan", *model, *arguments])
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_is_not_known_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="'llama'; supported types are llava"):
        read(str(tmp_path))


def test_the_command_prints_a_table_json_and_markdown(models: Path) -> None:
    call = ["plan", "--model", str(models / "llava"), "--budgets", "64"]
    shown = CliRunner().invoke(app, call)
    assert "7.05 billion weights" in " ".join(shown.stdout.split())
    told = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert [row["kept"] for row in told["budgets"]] == [576, 64]
    lines = CliRunner().invoke(app, [*call, "--markdown"]).stdout.splitlines()
    assert lines[0].startswith("| budget | kept |")
    assert lines[3].startswith("| 64 | 64 | 32.0 MiB |")


VIDEO_PROCESSORS = {
    "qwen2_5_vl": ("Qwen2VLVideoProcessor", {"shortest_edge": 3136, "longest_edge": 50_000}),
    "qwen3_vl": ("Qwen3VLVideoProcessor", {"shortest_edge": 4096, "longest_edge": 400_000}),
    "glm4v": ("Glm4vVideoProcessor", {"shortest_edge": 12_544, "longest_edge": 300_000}),
}


@pytest.mark.parametrize("kind", VIDEO_PROCESSORS)
@pytest.mark.parametrize(("frames", "width", "height"), [(2, 96, 64), (5, 300, 120), (8, 90, 250)])
def test_a_videos_tokens_are_those_of_the_processor(kind: str, frames: int, width: int, height: int) -> None:
    import numpy as np
    import transformers

    name, size = VIDEO_PROCESSORS[kind]
    processor = getattr(transformers, name)(size=size, do_sample_frames=False)
    made = processor([np.zeros((frames, height, width, 3), np.uint8)], return_tensors="pt")["video_grid_thw"]
    count, rows, columns = made[0].tolist()
    vision = {"patch_size": processor.patch_size, "spatial_merge_size": 2, "temporal_patch_size": 2}
    found = videos.grid({"model_type": kind, "vision_config": vision}, {"size": size}, frames, width, height)
    assert found == (count, rows * columns // 4)


def test_a_plan_for_videos_adds_up(models: Path) -> None:
    facts = read(str(models / "qwen"))
    traffic = Traffic((1280, 720), images=1, text_tokens=64, answer_tokens=128, frames=32)
    full, few = plan(facts, Server(GPUS["h100"]), traffic, [1024])
    each = facts.visual_tokens(1280, 720)
    assert facts.video_grid(32, 1280, 720) == (16, each)
    assert (full.kept, few.kept, few.prompt_tokens) == (16 * each, 1024, 1024 + 64)
    assert few.arithmetic < full.arithmetic == 1
    assert facts.video_encoder_flops(32, 1280, 720) == 16 * facts.encoder_flops(1280, 720)
    with pytest.raises(PlanError, match="take no videos"):
        plan(read(str(models / "llava")), Server(GPUS["h100"]), traffic, [])


def test_the_command_plans_for_videos(models: Path) -> None:
    options = ["plan", "--model", str(models / "qwen"), "--budgets", "1024,10%"]
    done = CliRunner().invoke(app, [*options, "--video", "32x1280x720"])
    assert done.exit_code == 0
    assert "32 frames of 1280 x 720 px" in done.output
    assert "videos/s" in done.output
    for wrong in ("1280x720", "0x1280x720", "32x1280", "32x12x80x720"):
        refused = CliRunner().invoke(app, [*options, "--video", wrong])
        assert refused.exit_code == 1
        assert "1280x720" in refused.output or "1024x768" in refused.output
