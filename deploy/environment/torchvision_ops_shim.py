"""Let a CUDA-built torchvision be imported beside a CPU-only torch.

Why it exists: the default package index carries only CUDA builds of torchvision for Linux. Beside
a CPU torch their C++ library does not load, so the operators it would have declared are missing
and `import torchvision` dies with "operator torchvision::nms does not exist". vLLM imports
torchvision (through transformers' image processors) before it loads any plugin, so the cure has to
sit in the interpreter itself. Declaring the operators' schemas is enough: torchvision's transforms,
which are all that vLLM's image processors use, are plain Python. Calling one of the declared
operators still fails, with torch's own "no kernel" error.

This is a property of an environment that has no CPU build of torchvision, not of promprune-vllm,
and the shipped package has no part in it: run as a script (`setup_env.py` does), this file copies
itself into its interpreter's site-packages, with a one-line .pth that imports it, if
`import torchvision` fails without it, and takes itself out of there if it does not. Every process
started with that interpreter then has it: API server, engine core, workers and the subprocesses
that inspect models. At interpreter start it costs one small import: torch is imported only when
torchvision is.
"""

import sys

# Schemas as torchvision's csrc/ops/*.cpp declares them. Importing torchvision needs those it
# registers Python functions for unconditionally (nms and qnms); roi_align completes the trio that
# models refer to by name.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
)
_libraries = []  # torch withdraws a library's declarations once the object is gone


def declare_operators():
    """Declare the operators that no loaded library has declared."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _libraries.append(library)


class TorchvisionFinder:
    """Finds torchvision where it is, and has the operators declared just before it runs."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module):
            declare_operators()
            run_module(module)

        spec.loader.exec_module = exec_module
        return spec


def install_where_needed():
    """Put this file and its .pth into site-packages, or take them out again."""
    import shutil
    from pathlib import Path
    from sysconfig import get_path

    source = Path(__file__).resolve()
    shim = Path(get_path("purelib"), source.name)
    hook = shim.with_suffix(".pth")
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ != source.stem]
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        if not (hook.exists() and shim.exists() and shim.read_bytes() == source.read_bytes()):
            shutil.copyfile(source, shim)
            hook.write_text(f"import {source.stem}\n")
            print(f"this torchvision is a CUDA build: its operators are declared by {shim}")
    else:
        hook.unlink(missing_ok=True)
        shim.unlink(missing_ok=True)


if __name__ == "__main__":
    install_where_needed()
else:
    sys.meta_path.insert(0, TorchvisionFinder)
