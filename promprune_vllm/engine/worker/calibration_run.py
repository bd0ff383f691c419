"""Measures the entropy of images under a model, in an engine inside this process.

Each image takes the same path as in a server: the same decoding, processor, precision and ``capture``. The budget
is one token, so the language model has almost nothing to do.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from promprune_vllm.config import PREFIX, Settings
from promprune_vllm.core.budget import FIELD, IMAGE, VIDEO
from promprune_vllm.core.calibration import CalibrationReport, MeasuredImage, SkippedImage
from promprune_vllm.core.registry import options_of
from promprune_vllm.engine import families
from promprune_vllm.errors import CalibrationError, SettingsError, UnsupportedModelError

# The prompt is one image of one token and a few words; a small context keeps the KV cache small.
_DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 1,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,
    "disable_log_stats": True,
}
_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is reserved for the result
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}


def calibrate(
    model: str,
    directories: Sequence[Path],
    *,
    limit: int | None,
    arguments: Sequence[str],
    tell: Callable[[str], None],
) -> CalibrationReport:
    """Load a model and measure the images of some directories.

    Args:
        model: Name or path, as for vLLM.
        directories: Directories of images, one per kind of image. Other files and subdirectories are ignored.
        limit: Measure at most this many images per directory, spread evenly over the sorted names.
        arguments: Further options of vLLM's engine, as on the command line.
        tell: Called with a progress message.

    Raises:
        CalibrationError: No image could be measured, or vLLM cannot load the model.
        SettingsError: The configured method has no ``mu``.
        UnsupportedModelError: The model cannot be pruned.
    """
    settings = Settings.from_environment()
    if settings.method != "promprune":
        raise SettingsError(
            f"Only method 'promprune' has a mu to calibrate, and {PREFIX}METHOD is {settings.method!r}. Unset it."
        )
    files = [(directory, file) for directory in directories for file in image_files(directory, limit)]
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with _stdout_to_stderr():
        tell(f"Loading {model} …")
        with load_model(model, arguments) as llm:
            images: list[MeasuredImage] = []
            skipped: list[SkippedImage] = []
            for i, (directory, file) in enumerate(files):
                tell(f"Encoding image {i + 1} of {len(files)} …")
                result = measure(llm, file)
                if isinstance(result, SkippedImage):
                    skipped.append(result)
                else:
                    images.append(replace(result, folder=str(directory) if len(directories) > 1 else ""))
            calibration = families.calibration(llm.model_config)
    if not images:
        raise CalibrationError(
            f"None of the {len(files)} images of {_join(directories)} could be measured. The first one, "
            f"{skipped[0].file}: {skipped[0].reason}"
        )
    options = options_of(settings.selector(calibration))
    return CalibrationReport(model, images, skipped, options, settings.method_options, settings.tiles)


def _join(directories: Sequence[Path]) -> str:
    return ", ".join(map(str, directories))


def image_files(directory: Path, limit: int | None = None) -> list[Path]:
    """Return the image files of a directory, sorted by name.

    Args:
        directory: A directory; files without the extension of an image that servers accept are ignored.
        limit: Return at most this many, spread evenly.

    Raises:
        CalibrationError: There is no such directory, or no image in it.
    """
    from PIL import Image

    if not directory.is_dir():
        raise CalibrationError(f"There is no directory {directory}. Give --images a directory of image files.")
    extensions = Image.registered_extensions()
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix.lower() in extensions)
    if not files:
        raise CalibrationError(
            f"No file in {directory} has the extension of an image (.jpg, .png, .webp and others)."
        )
    if limit is None or limit >= len(files):
        return files
    return [files[i * len(files) // limit] for i in range(limit)]


@contextmanager
def load_model(model: str, arguments: Sequence[str]) -> Iterator[Any]:
    """Start vLLM in this process, and free its memory at the end of the block.

    Yields:
        vLLM's ``LLM``, whose model records the entropies of its images.

    Raises:
        CalibrationError: vLLM cannot load the model.
        UnsupportedModelError: The model cannot be pruned.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from promprune_vllm.engine import plugin

    os.environ[f"{PREFIX}FEATURE_CACHE_GB"] = "0"  # each image is encoded once, and vLLM's caches are off
    plugin.install()  # even if VLLM_PLUGINS or PROMPRUNE_ENABLED excludes it
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="promprune calibrate"))
    parser.set_defaults(**_DEFAULTS)
    options = parser.parse_args(["--model", model, *arguments])
    try:
        engine_arguments = EngineArgs.from_cli_args(options)
        config = engine_arguments.create_engine_config()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"vLLM cannot load {model}: {error}") from error
    if (reason := families.unsupported_reason(config)) is not None:
        raise UnsupportedModelError(f"The visual tokens of {model} cannot be pruned: {reason}.")
    if _kind(config.model_config) == VIDEO:
        engine_arguments.limit_mm_per_prompt = {VIDEO: 1}
    llm = LLM.from_engine_args(engine_arguments)
    try:
        llm.apply_model(_record_entropies)
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def measure(llm: Any, file: Path) -> MeasuredImage | SkippedImage:
    """Encode one image; a model that takes only videos gets it as a frame.

    Args:
        llm: From ``load_model``.
        file: The image.
    """
    import numpy as np
    from PIL import Image
    from vllm import SamplingParams
    from vllm.model_executor.model_loader import get_model_cls
    from vllm.multimodal.media import ImageMediaIO

    kind = _kind(llm.model_config)
    placeholder = get_model_cls(llm.model_config).get_placeholder_str(kind, 0)
    try:
        image = ImageMediaIO().load_file(file)
        prompt = {
            "prompt": f"{placeholder}\n",
            # A copy, because torch warns of arrays that cannot be written.
            "multi_modal_data": {kind: image if kind == IMAGE else [np.array(image)[None]]},
            "multi_modal_uuids": {kind: uuid.uuid4().hex},  # so that no image comes from a cache
            "mm_processor_kwargs": {FIELD: 1},
        }
        llm.generate(prompt, SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return SkippedImage(file.name, " ".join(str(error).split()))
    measured = llm.apply_model(_pop_measured)[0]
    if len(measured) != 1:
        return SkippedImage(file.name, "it has a single visual token, so it has no entropy")
    return MeasuredImage(file.name, *measured[0])


def _kind(model_config: Any) -> str:
    """Return what a model is measured with: images, or videos of one frame if it takes no images."""
    family = families.family_of(model_config.architectures)
    return VIDEO if family is not None and family.megapixel_tokens is None else IMAGE


def _record_entropies(model: Any) -> None:
    """Make a model record ``(tokens, entropies)`` of every image that it captures. Runs in the worker."""
    capture = model.capture
    model.measured = []

    def capture_and_record(*args: Any) -> Any:
        images = capture(*args)
        model.measured += [(len(image.rows), _entropies(model, image)) for image in images]
        return images

    model.capture = capture_and_record


def _pop_measured(model: Any) -> list[tuple[int, tuple[float, ...]]]:
    measured: list[tuple[int, tuple[float, ...]]] = model.measured
    model.measured = []
    return measured


def _entropies(model: Any, image: Any) -> tuple[float, ...]:
    shared = image.groups[0].features.entropy
    if shared is not None:  # all tiles have the entropy of the whole image
        return (float(shared),)
    return tuple(float(model._methods[0].entropy_of(group.features)) for group in image.groups)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect standard output to standard error, also for libraries not written in Python."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
