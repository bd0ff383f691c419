"""What a user of the stack runs on the Docker host: one photograph with and without a budget, in JSON."""

from __future__ import annotations

import base64
import json
import sys

from openai import OpenAI

from promprune_vllm.demo import photo_path

BUDGETS = (None, 64)


def main(url: str, key: str) -> None:
    photo = "data:image/jpeg;base64," + base64.b64encode(photo_path("astronaut").read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": photo}}
    question = {"type": "text", "text": "What is in the picture?"}
    client = OpenAI(base_url=url, api_key=key, timeout=120)
    usages = []
    for budget in BUDGETS:
        reply = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": [image, question]}],  # type: ignore[list-item, misc]
            max_tokens=4,
            extra_body={"visual_token_budget": budget} if budget else {},
        )
        assert reply.usage is not None
        usages.append(reply.usage.model_dump())
    print(json.dumps(usages))


if __name__ == "__main__":
    main(*sys.argv[1:])
