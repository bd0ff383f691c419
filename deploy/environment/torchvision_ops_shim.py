"""Makes a CUDA build of torchvision importable with a CPU-only torch.

Why it exists: the default package index has only CUDA builds of torchvision for Linux. With a CPU
torch, their C++ library does not load, so the operators that it would declare are missing, and
`import torchvision` fails with "operator torchvision::nms does not exist". vLLM imports torchvision
(through transformers' image processors) before it loads any plugin, so the fix has to be in the
interpreter itself. Declaring the operators' schemas is enough: torchvision's transforms, which are
all that vLLM's image processors use, are plain Python. Calling one of the declared operators still
fails, with torch's own "no kernel" error.

Only environments without a CPU build of torchvision need this; it is not part of promprune-vllm.
Run as a script (by `setup_env.py`), this file copies itself into the interpreter's site-packages,
with a one-line .pth that imports it, if `import torchvision` fails without it; otherwise it removes
itself from there. Every process started with that interpreter then has it: API server, engine core,
workers and the subprocesses that inspect models. At interpreter start it costs one small import;
torch is imported only when torchvision is.
"""

import sys

# Schemas from torchvision's csrc/ops/*.cpp. Importing torchvision needs those for which it always
# registers Python functions (nms and qnms); models also refer to roi_align by name.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
)
_libraries = []  # torch drops a library's declarations when the object is deleted


def declare_operators():
    """Declare the operators that no loaded library has declared."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _libraries.append(library)


class TorchvisionFinder:
    """Finds torchvision as usual, but declares the operators just before it is executed."""

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
    """Install this file and its .pth in site-packages, or remove them if they are not needed."""
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
