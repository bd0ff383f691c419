"""The demo model: its bytes, its names, its 576 tokens; and the photographs it looks at."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from promprune_vllm.demo import PHOTOS, photo_path
from promprune_vllm.demo import model as demo
from promprune_vllm.demo.processing import IMAGE_ID, SPECIAL_TOKENS, byte_tokenizer, llava_processor

TINY = demo.DemoModelSpec(
    image_px=56,
    vision_hidden=32,
    vision_heads=2,
    vision_mlp=64,
    vision_layers=3,
    hidden=64,
    heads=2,
    mlp=64,
    layers=1,
)
SIGLIP = replace(TINY, vision="siglip")


def photo(name: str) -> Image.Image:
    with Image.open(photo_path(name)) as image:
        return image.convert("RGB")


def weights_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.build_demo_model(tmp_path_factory.mktemp("demo") / "tiny", TINY)


@pytest.fixture(scope="module")
def processor():
    spec = demo.DEFAULT_SPEC
    return llava_processor(spec.image_px, spec.patch_px, byte_tokenizer(spec.max_tokens))


def test_importing_it_is_cheap():
    code = "import sys, promprune_vllm.demo.model; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_spec_decides_the_bytes(tiny: Path, tmp_path: Path):
    again = demo.build_demo_model(tmp_path / "again", TINY)
    other = demo.build_demo_model(tmp_path / "other", replace(TINY, seed=1))
    files = sorted(file.name for file in tiny.iterdir())
    assert files == sorted(file.name for file in again.iterdir())
    assert all((tiny / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert weights_of(other) != weights_of(tiny)


def test_half_precision_holds_the_same_weights_rounded(tiny: Path, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    half = load_file(
        demo.build_demo_model(tmp_path / "half", replace(TINY, dtype="bfloat16")) / "model.safetensors"
    )
    full = load_file(tiny / "model.safetensors")
    assert half.keys() == full.keys()
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


def test_a_finished_model_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROMPRUNE_CACHE", str(tmp_path))
    first = demo.find_or_build_demo_model(TINY)
    assert first.parent == tmp_path
    monkeypatch.setattr(demo, "write_weights", lambda *_: pytest.fail("built again"))
    assert demo.find_or_build_demo_model(TINY) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]  # no temporary directory is left


def test_another_demo_model_is_replaced_and_anything_else_is_not(tmp_path: Path):
    model = demo.build_demo_model(tmp_path / "model", TINY)
    before = weights_of(model)
    assert weights_of(demo.build_demo_model(model, replace(TINY, seed=1))) != before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match="mine has files that are not a demo model"):
        demo.build_demo_model(tmp_path / "mine", TINY)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(demo, "write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.build_demo_model(tmp_path / "model", TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", [TINY, SIGLIP], ids=["clip", "siglip"])
def test_transformers_finds_every_weight_under_its_published_name(spec: demo.DemoModelSpec, tmp_path: Path):
    from safetensors import safe_open
    from transformers import LlavaForConditionalGeneration

    directory = demo.build_demo_model(tmp_path / "model", spec)
    with safe_open(directory / "model.safetensors", "pt") as file:
        roots = {".".join(name.split(".")[:2]) for name in file.keys()}  # noqa: SIM118
    assert roots == {
        "vision_tower.vision_model",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "language_model.model",
        "language_model.lm_head",
    }
    model, report = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.vision_feature_select_strategy == ("default" if spec.vision == "clip" else "full")


@pytest.mark.parametrize("spec", [TINY, SIGLIP], ids=["clip", "siglip"])
def test_a_photo_becomes_features_and_a_printable_answer(spec: demo.DemoModelSpec, tmp_path: Path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    directory = demo.build_demo_model(tmp_path / "model", spec)
    model = LlavaForConditionalGeneration.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    inputs = processor(images=photo("coffee"), text="<s>USER: <image>\nWhat?", return_tensors="pt")
    assert int((inputs["input_ids"] == IMAGE_ID).sum()) == spec.visual_tokens == 16
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(answer)
    assert len(text) == 8
    assert text.isascii()
    assert text.isprintable()


def test_the_text_model_has_no_vision(tmp_path: Path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    directory = demo.build_text_model(tmp_path / "text")
    model, report = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.architectures == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer.encode("grüß Gott, 猫")) == "grüß Gott, 猫"


def test_one_photo_is_576_image_tokens_whatever_its_shape(processor):
    assert demo.DEFAULT_SPEC.visual_tokens == 576
    for name in PHOTOS:
        inputs = processor(images=photo(name), text="<image>\nWhat?", return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 336, 336)
        assert int((inputs["input_ids"] == IMAGE_ID).sum()) == 576


def test_a_byte_is_a_token(processor):
    ids = processor.tokenizer.encode("é<image>")
    assert ids == [len(SPECIAL_TOKENS) + 0xC3, len(SPECIAL_TOKENS) + 0xA9, IMAGE_ID]
    assert len(processor.tokenizer) <= 320


@pytest.mark.parametrize(
    ("content", "rendered"),
    [
        ("Hello", "<s>USER: Hello ASSISTANT:"),
        ([{"type": "text", "text": "Hello"}], "<s>USER: Hello ASSISTANT:"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "<s>USER: <image>\nWhat? ASSISTANT:"),
        ([{"type": "text", "text": "What?"}, {"type": "image"}], "<s>USER: <image>\nWhat? ASSISTANT:"),
        (
            [
                {"type": "image"},
                {"type": "text", "text": "One"},
                {"type": "image"},
                {"type": "text", "text": "two"},
            ],
            "<s>USER: <image>\n<image>\nOnetwo ASSISTANT:",
        ),
    ],
)
def test_the_chat_template_renders_parts(processor, content, rendered: str):
    messages = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == rendered


def test_the_chat_template_renders_a_conversation(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    assert processor.apply_chat_template(messages) == "<s>Be brief. USER: Hello ASSISTANT: Hi</s>USER: Bye "


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_are_small_and_in_colour(name: str):
    with Image.open(photo_path(name)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert max(image.size) <= 640
    assert photo_path(name).stat().st_size <= 90_000


def test_photos_have_every_shape_and_a_licence():
    shapes = {(width > height) - (width < height) for width, height in (photo(n).size for n in PHOTOS)}
    assert shapes == {-1, 0, 1}
    licences = photo_path("coffee").with_name("LICENSES.md").read_text()
    assert all(f"`{name}.jpg`" in licences for name in PHOTOS)
    with pytest.raises(ValueError, match="no photo is called 'mona_lisa'; there are astronaut"):
        photo_path("mona_lisa")


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="image_px=60 is not a multiple of patch_px=14"):
        replace(TINY, image_px=60)
    with pytest.raises(ValueError, match="a width of 64 cannot be split over 3 heads"):
        replace(TINY, heads=3)
