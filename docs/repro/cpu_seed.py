"""vLLM 0.33: on a CPU, one request with a seed and a prompt of several steps ends the engine.

``_bookkeeping_sync`` (vllm/v1/worker/gpu_model_runner.py) moves the offset of its generator, and a CPU's has none.

    python cpu_seed.py     # no download: a tiny Llama with random weights; exits with 1 where the engine ends
"""

from __future__ import annotations

import os
import sys
import tempfile

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")  # stock vLLM, and its own exception
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from transformers import LlamaConfig
from vllm import LLM, SamplingParams, TokensPrompt

STEP_TOKENS = 64


def make_engine(directory: str) -> LLM:
    """Return an engine that reads 64 tokens of a prompt in a step."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        dtype="float32",
    ).save_pretrained(directory)
    return LLM(
        directory,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=4,
    )


def main() -> int:
    """Send a prompt of one step and one of three."""
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        llm = make_engine(directory)
        sampling = SamplingParams(seed=7, temperature=0.8, max_tokens=2, detokenize=False)
        for tokens in (STEP_TOKENS // 2, 3 * STEP_TOKENS):
            try:
                llm.generate([TokensPrompt(prompt_token_ids=[5] * tokens)], sampling, use_tqdm=False)
                print(f"{tokens} tokens: answered")
            except RuntimeError as error:
                failed = True
                print(f"{tokens} tokens: {type(error).__name__}: {str(error).splitlines()[0]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
