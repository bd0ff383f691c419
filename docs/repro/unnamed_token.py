"""vLLM 0.33: the logprob of a token id that the tokenizer has no name for ends the server, with status 0.

Many models have more rows in their last layer than their tokenizer has tokens. vLLM accepts such ids in prompts
and emits them. ``convert_ids_list_to_tokens`` in vllm/tokenizers/detokenizer_utils.py takes the ``None`` that the
tokenizer returns for one as text, where the tokenizer is of Llama's kind (a Metaspace pre-tokenizer). The
``TypeError`` ends the task that handles the outputs of all requests.

    python unnamed_token.py      # a CPU is enough, and no download: a tiny Llama with random weights and
                                 # transformers' own tokenizer for Llama; exits with 1 where the server ends
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaTokenizer, Qwen2Tokenizer
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

NAMES = ["<unk>", "<s>", "</s>", *(f"▁{letter}" for letter in "abcdefgh")]
ROWS = 64
UNNAMED = ROWS - 1
STOCK = {
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as `vllm serve` sets it
}


def write_model(directory: Path) -> None:
    """Write a configuration and a tokenizer; weights are made up by ``--load-format dummy``."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=ROWS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        dtype="float32",
    ).save_pretrained(directory)
    LlamaTokenizer(vocab={name: i for i, name in enumerate(NAMES)}).save_pretrained(directory)


def explain(tokenizer: Any) -> None:
    """Print what the tokenizer returns for an id that it has no name for, and what vLLM makes of it."""
    name, text = type(tokenizer).__name__, tokenizer.decode([UNNAMED])
    piece = tokenizer.convert_ids_to_tokens(UNNAMED)
    print(f"{name}, {len(tokenizer)} tokens: the piece of {UNNAMED} is {piece}, its text {text!r}")
    try:
        print("  convert_ids_list_to_tokens:", convert_ids_list_to_tokens(tokenizer, [UNNAMED]))
    except TypeError as error:
        print(f"  convert_ids_list_to_tokens: TypeError: {error}")


def status(url: str, body: object = None) -> int:
    """Return the HTTP status of an answer, or 0 where there is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def main() -> int:
    """Serve the model, ask for the logprob of one prompt token, and look at the server."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that the server does not outlive this
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
        write_model(Path(scratch))
        explain(LlamaTokenizer.from_pretrained(scratch))
        explain(Qwen2Tokenizer(vocab={name: i for i, name in enumerate(["<|endoftext|>", *NAMES[1:]])}, merges=[]))
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        options = f"--model {scratch} --host 127.0.0.1 --port {port} --served-model-name tiny --load-format dummy"
        options += " --enforce-eager --distributed-executor-backend uni --max-num-seqs 4"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
        with (Path(scratch) / "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **STOCK})
        try:
            return ask(server, f"http://127.0.0.1:{port}")
        finally:
            server.terminate()
            server.wait()


def ask(server: subprocess.Popen[bytes], url: str) -> int:
    """Send the request, and return 1 where the server ends of it."""
    while server.poll() is None and status(f"{url}/health") != 200:
        time.sleep(0.5)
    # Not shorter: on a CPU with AMX, vllm-cpu 0.32 ended at prompts of two and three tokens (illegal instruction).
    body = {"model": "tiny", "prompt": [1, UNNAMED] * 10, "max_tokens": 1}
    print("without logprobs: HTTP", status(f"{url}/v1/completions", body))
    print("with prompt_logprobs: HTTP", status(f"{url}/v1/completions", {**body, "prompt_logprobs": 0}))
    try:
        print("the server ended with status", server.wait(30))
    except subprocess.TimeoutExpired:
        print("the server lives: HTTP", status(f"{url}/v1/completions", body))
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
