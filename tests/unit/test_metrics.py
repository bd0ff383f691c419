"""The catalogue's form, and the recorder's files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector

from promprune_vllm.core.savings import Decoder, read_decoder, saved_blocks
from promprune_vllm.errors import SettingsError
from promprune_vllm.metrics import mapped_files
from promprune_vllm.metrics import recorder as module
from promprune_vllm.metrics.catalog import CATALOG
from promprune_vllm.metrics.metric import LABELS, UNPRUNED, Metric
from promprune_vllm.metrics.recorder import Build, Recorder, Saving

METHODS = ["promprune", "random"]


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert metric.name.startswith("promprune_")
    assert ":" not in metric.name
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help.endswith(".")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert metric.labels[0] == "model_name"
    assert set(metric.labels) <= set(LABELS)
    assert metric.unpruned <= ("method" in metric.labels)


def samples(directory: Path) -> dict[tuple[str, ...], float]:
    """Return the value of every series by its name and its labels but the model's, sorted by label."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return {
        (each.name, *(each.labels[label] for label in sorted(each.labels) if label != "model_name")): each.value
        for family in registry.collect()
        for each in family.samples
    }


def label_values(metric: Metric, methods: Sequence[str]) -> list[list[str]]:
    """Return what each label but the model's can be, sorted by label."""
    known = {label: list(LABELS[label][1]) for label in metric.labels}
    known["method"] = [*methods, UNPRUNED] if metric.unpruned else list(methods)
    return [known[label] for label in sorted(metric.labels) if label != "model_name"]


def test_everything_is_there_at_zero(tmp_path: Path) -> None:
    Recorder(str(tmp_path), "demo").create(CATALOG, METHODS)
    shown = samples(tmp_path)
    assert set(shown.values()) == {0}
    for metric in CATALOG:
        name = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
        # A gauge shows the lowest of what was set, so nothing before that.
        expected = () if metric.kind == "gauge" else product(*label_values(metric, METHODS))
        assert {key[1:] for key in shown if key[0] == name} == set(expected), metric.name


def test_a_prompt_is_counted_by_what_prunes_its_images(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path), "demo")
    images = [("image", 576, 64, False), ("image", 576, 576, True)]
    recorder.prompt("promprune", images, Saving(kv_bytes=4096, flops=10**12))
    recorder.prompt("promprune", [("image", 576, 576, True)], Saving(kv_bytes=0, flops=0))
    assert {key: value for key, value in samples(tmp_path).items() if value and key[0].endswith("_total")} == {
        ("promprune_requests_total", "pruned"): 1,
        ("promprune_requests_total", "full"): 1,
        ("promprune_images_total", "false", "promprune", "image"): 1,
        ("promprune_images_total", "true", UNPRUNED, "image"): 2,
        ("promprune_visual_tokens_seen_total", "promprune", "image"): 576,
        ("promprune_visual_tokens_seen_total", UNPRUNED, "image"): 1152,
        ("promprune_visual_tokens_kept_total", "promprune", "image"): 64,
        ("promprune_visual_tokens_kept_total", UNPRUNED, "image"): 1152,
        ("promprune_visual_tokens_saved_total", "promprune", "image"): 512,
        ("promprune_kv_cache_saved_bytes_total", "promprune"): 4096,
        ("promprune_prefill_flops_avoided_total", "promprune"): 1e12,
    }
    shown = samples(tmp_path)
    assert shown["promprune_image_kept_tokens_count", "promprune", "image"] == 1
    assert shown["promprune_image_kept_tokens_sum", UNPRUNED, "image"] == 1152


def test_a_video_is_counted_apart_from_the_image_beside_it(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path), "demo")
    recorder.prompt("promprune", [("video", 2000, 320, False), ("image", 576, 576, False)], None)
    recorder.budget("per_frame")
    assert {key: value for key, value in samples(tmp_path).items() if value and key[0].endswith("_total")} == {
        ("promprune_requests_total", "pruned"): 1,
        ("promprune_budgets_total", "per_frame"): 1,
        ("promprune_images_total", "false", "promprune", "video"): 1,
        ("promprune_images_total", "false", UNPRUNED, "image"): 1,
        ("promprune_visual_tokens_seen_total", "promprune", "video"): 2000,
        ("promprune_visual_tokens_seen_total", UNPRUNED, "image"): 576,
        ("promprune_visual_tokens_kept_total", "promprune", "video"): 320,
        ("promprune_visual_tokens_kept_total", UNPRUNED, "image"): 576,
        ("promprune_visual_tokens_saved_total", "promprune", "video"): 1680,
    }


def test_the_other_counts_and_observations(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path), "demo")
    recorder.refused("limits")
    recorder.outcome("failed")
    recorder.budget("share")
    recorder.selection("promprune", "choose", 0.003)
    recorder.entropy("promprune", 0.42)
    recorder.saliency_share("promprune", 0.25)
    recorder.encoder_batch(1152)
    recorder.build("promprune", Build("0.1", "0.34.0", False, {"resending": True, "usage": False}))
    shown = samples(tmp_path)
    assert shown["promprune_requests_total", "refused"] == 1
    assert shown["promprune_refused_requests_total", "limits"] == 1
    assert shown["promprune_requests_total", "failed"] == 1
    assert shown["promprune_budgets_total", "share"] == 1
    assert shown["promprune_selection_seconds_sum", "promprune", "choose"] == 0.003
    assert shown["promprune_spectral_entropy_sum", "promprune"] == 0.42
    assert shown["promprune_saliency_share_sum", "promprune"] == 0.25
    assert shown["promprune_encoder_batch_tokens_sum",] == 1152
    assert shown["promprune_build_info", "promprune", "0.1", "false", "0.34.0"] == 1
    assert (shown["promprune_part_off", "resending"], shown["promprune_part_off", "usage"]) == (1, 0)


STORES = """
import sys
from promprune_vllm.metrics.recorder import Recorder

recorder = Recorder(sys.argv[1], "demo")
recorder.feature_lookups(hits=3, misses=1)
recorder.feature_store_bytes(500)
recorder.feature_store_bytes(300)
"""


def test_the_feature_caches_of_several_engines_add_up(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path), "demo")
    recorder.feature_lookups(hits=0, misses=2)
    recorder.feature_store_bytes(1000)
    subprocess.run([sys.executable, "-c", STORES, str(tmp_path)], check=True)
    shown = samples(tmp_path)
    assert shown["promprune_feature_store_bytes",] == 1300
    assert shown["promprune_feature_store_images_total", "hit"] == 3
    assert shown["promprune_feature_store_images_total", "miss"] == 3


def test_every_bucket_means_something(tmp_path: Path) -> None:
    """The bounds of a share are inclusive: exactly all, and exactly none, land where they belong."""
    recorder = Recorder(str(tmp_path), "demo")
    for value in (0.0, 1.0):
        recorder.saliency_share("promprune", value)
    shown = samples(tmp_path)
    assert shown["promprune_saliency_share_bucket", "0.05", "promprune"] == 1
    assert shown["promprune_saliency_share_bucket", "0.95", "promprune"] == 1
    assert shown["promprune_saliency_share_bucket", "1.0", "promprune"] == 2


LLAMA_7B = Decoder(layers=32, hidden=4096, heads=32, kv_heads=32, head=128, intermediate=11008)


def test_prefill_flops_of_a_known_model() -> None:
    # 2 x 6.476e9 weights of Llama-7B's layers, without embedding and output head, and one position's scores.
    assert LLAMA_7B.prefill_flops(1) == 2 * 6_476_005_376 + 4 * 32 * 4096


# Of published configurations: what the formulas read.
QWEN3_VL_30B = {
    **{"num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128},
    **{"num_attention_heads": 32, "num_key_value_heads": 4},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    **{"decoder_sparse_step": 1, "mlp_only_layers": []},
}
QWEN3_5_4_LAYERS = {
    **{"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 16},
}


def test_a_token_passes_through_some_of_the_experts() -> None:
    """Qwen3-VL-30B-A3B: 29.9 of its 30.5 billion weights are in the layers, 2.7 are used by a token."""
    model = read_decoder(QWEN3_VL_30B)
    assert model is not None
    assert (model.experts, model.used_experts, model.intermediate, model.shared) == (128, 8, 768, 0)
    assert model.weights == 29_909_581_824
    assert model.prefill_flops(1) == 2 * 2_730_491_904 + 4 * 48 * 32 * 128


def test_layers_with_a_state_read_and_update_it_once_per_token() -> None:
    model = read_decoder(QWEN3_5_4_LAYERS)
    assert model is not None
    assert model.attention_layers == 1
    attention = 64 * 32 * (3 * 4 + 2 * 2)  # q with its gate, o; k, v
    # q, k: 16; v, its gate, the output: 64; decay and strength of 4 heads; a convolution over q, k, v.
    linear = 64 * (2 * 16 + 3 * 64 + 2 * 4) + (2 * 16 + 64) * 4
    assert model.weights == attention + 3 * linear + 4 * 3 * 64 * 96
    states = 3 * 4 * 8 * 16  # numbers in all states
    assert model.prefill_flops(10) == 10 * (2 * model.weights + 6 * states) + 4 * 4 * 32 * sum(range(1, 11))


@pytest.mark.parametrize(
    ("model", "other"),
    [
        (QWEN3_VL_30B, {"mlp_only_layers": [0]}),
        (QWEN3_VL_30B, {"decoder_sparse_step": 2}),
        (QWEN3_VL_30B, {"n_shared_experts": 1}),
        (QWEN3_VL_30B, {"num_experts_per_tok": None}),
        (QWEN3_5_4_LAYERS, {"layer_types": ["sliding_attention"] * 4}),
    ],
    ids=str,
)
def test_what_the_formulas_do_not_cover_is_not_counted(model: dict[str, object], other: dict[str, object]) -> None:
    assert read_decoder(model | other) is None


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_flops_count_every_pair_of_positions_once(first: int, more: int) -> None:
    """A prefill in two chunks, the second on top of the first one's cache, is the same arithmetic."""
    pairs = 4 * 32 * 4096
    second = LLAMA_7B.prefill_flops(more) + pairs * first * more
    assert LLAMA_7B.prefill_flops(first + more) == LLAMA_7B.prefill_flops(first) + second


@pytest.mark.parametrize(
    ("before", "after", "blocks"), [(618, 106, 16), (64, 33, 0), (65, 64, 1), (64, 64, 0), (33, 1, 1)]
)
def test_only_whole_blocks_are_saved(before: int, after: int, blocks: int) -> None:
    assert saved_blocks(before, after, 32) == blocks


def test_recording_leaves_prometheus_client_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    before = values.ValueClass
    Recorder(str(tmp_path), "demo").outcome("full")
    assert values.ValueClass is before
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


def test_vllms_directory_is_used_where_it_made_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "vllm"
    shared.mkdir()
    monkeypatch.setenv("PROMPRUNE_METRICS_DIR", str(tmp_path))
    monkeypatch.setenv("PROMPRUNE_METRICS_OWNER", str(os.getpid()))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared))
    module.recorder("demo").outcome("full")
    assert samples(shared)["promprune_requests_total", "full"] == 1
    assert not list(tmp_path.glob("*.db"))


WITH_VLLM = """
import sys
from prometheus_client import CollectorRegistry, Counter
from promprune_vllm.metrics.recorder import Recorder

theirs = Counter("vllm_things", "Of vLLM.", ["kind"], registry=None)
theirs.labels("early").inc(3)
ours = Recorder(sys.argv[1], "demo")
ours.outcome("full")
for i in range(200):  # each a new line in a file
    theirs.labels(f"late {i}").inc(5)
    Recorder(sys.argv[1], f"model {i}").outcome("pruned")
ours.outcome("full")
"""


def test_vllms_values_and_ours_do_not_overwrite_each_other(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", WITH_VLLM, str(tmp_path)], env=environment, check=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    found = [sample for family in registry.collect() for sample in family.samples]
    late = [sample.value for sample in found if sample.labels.get("kind", "").startswith("late")]
    assert late == [5] * 200
    assert [sample.value for sample in found if sample.labels.get("kind") == "early"] == [3]
    requests = {sample.labels["model_name"]: sample.value for sample in found if "outcome" in sample.labels}
    assert requests == {"demo": 2, **{f"model {i}": 1 for i in range(200)}}


def test_series_take_no_files_of_their_own(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path), "some/model-of-7-billion")
    before = len(os.listdir("/proc/self/fd"))
    recorder.create(CATALOG, [f"method-{i}" for i in range(16)])
    assert len(os.listdir("/proc/self/fd")) <= before + 6  # three files, and their mappings
    # They never grow, so a disk that fills up later has their room.
    assert {file.stat().st_size for file in tmp_path.iterdir()} == {mapped_files._FILE_BYTES}
    assert all(file.stat().st_blocks * 512 >= mapped_files._FILE_BYTES for file in tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"Metrics cannot be kept in .*No such file.*TMPDIR"):
        Recorder(str(tmp_path / "gone"), "demo")
    small = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
    code = small + "from promprune_vllm.metrics.recorder import Build, Recorder; Recorder(sys.argv[1], 'demo')"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "SettingsError: Metrics cannot be kept in" in run.stderr


ON_A_DISK = """
import sys
from pathlib import Path
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from promprune_vllm.metrics.recorder import Recorder

directory = sys.argv[1]
recorder = Recorder(directory, "demo")
recorder.outcome("full")
try:
    with open(Path(directory) / "logs-of-somebody", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError as error:
    print(error.strerror)
for _ in range(1000):
    recorder.outcome("full")
registry = CollectorRegistry()
MultiProcessCollector(registry, path=directory)
samples = [sample for family in registry.collect() for sample in family.samples]
print(sum(sample.value for sample in samples if sample.name == "promprune_requests_total"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which takes root")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("size=64k", "Metrics cannot be kept in .*No space left"),
        ("size=64m,ro", "Metrics cannot be kept in .*Read-only file system"),
        ("size=64m", "No space left on device\n1001.0"),
    ],
    ids=["full", "read-only", "full later"],
)
def test_a_disk_that_is_full_or_read_only(tmp_path: Path, options: str, said: str) -> None:
    """At the start it is said at once; later it does not matter, since the room is ours."""
    mounted = 'mount -t tmpfs -o "$1" none "$2"; exec "$3" -c "$4" "$2"'
    command = ["unshare", "--mount", "sh", "-ec", mounted, "sh", options, str(tmp_path), sys.executable, ON_A_DISK]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if "permission denied" in run.stderr.lower() or "not permitted" in run.stderr:
        pytest.skip(f"mounts a file system, which this machine does not let root do: {run.stderr}")
    assert re.search(said, run.stdout + run.stderr), run.stderr


SPAWNS = """
import multiprocessing, os
from promprune_vllm.metrics.recorder import prepare_directory

def show():
    prepare_directory()
    print(os.environ["PROMPRUNE_METRICS_DIR"], flush=True)

if __name__ == "__main__":
    show()
    show()
    worker = multiprocessing.get_context("spawn").Process(target=show)
    worker.start()
    worker.join()
"""


def test_a_server_shares_its_directory_with_its_workers_and_with_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "spawns.py").write_text(SPAWNS)
    inherited = {**os.environ, "PROMPRUNE_METRICS_DIR": str(tmp_path), "PROMPRUNE_METRICS_OWNER": "1"}
    run = [sys.executable, str(tmp_path / "spawns.py")]
    shown = subprocess.run(run, env=inherited, capture_output=True, text=True, check=True).stdout.split()
    assert len(shown) == 3
    assert len(set(shown)) == 1
    assert shown[0] != str(tmp_path)
    assert not Path(shown[0]).exists(), "the first process removes the directory when it ends"
