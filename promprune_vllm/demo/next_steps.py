"""Text with commands to try on the server that ``promprune demo`` leaves running."""

from pathlib import Path

from promprune_vllm.core.budget import FIELD
from promprune_vllm.demo.scenes import Question
from promprune_vllm.demo.trained import CARD


def next_steps(url: str, model: str, image: Path, question: Question) -> str:
    """Return commands that ask the demo's question with curl and with the OpenAI SDK.

    Args:
        url: Base address of the server.
        model: Model name at the server.
        image: PNG file to ask about.
        question: Question to ask.
    """
    return f"""
The server keeps running at {url} (Ctrl-C stops it). Try it with curl:

curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d @- <<EOF
{{"model": "{model}", "{FIELD}": 64, "max_tokens": 8, "messages": [{{"role": "user", "content": [
  {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,$(base64 < {image} | tr -d '\\n')"}}}},
  {{"type": "text", "text": "{question.text}"}}]}}]}}
EOF

or with the OpenAI SDK:

import base64
from openai import OpenAI
image = base64.b64encode(open("{image}", "rb").read()).decode()
reply = OpenAI(base_url="{url}/v1", api_key="none").chat.completions.create(
    model="{model}", max_tokens=8, extra_body={{"{FIELD}": 64}},
    messages=[{{"role": "user", "content": [
        {{"type": "image_url", "image_url": {{"url": f"data:image/png;base64,{{image}}"}}}},
        {{"type": "text", "text": "{question.text}"}}]}}])
print(reply.choices[0].message.content, reply.usage.prompt_tokens, "prompt tokens")

The model was trained only on scenes like this (the answer here is {question.answer}). What you can ask it:
{CARD}
Metrics: curl -s {url}/metrics | grep promprune
"""
