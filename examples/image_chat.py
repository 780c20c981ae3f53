"""A chat about a picture with a model of mlx-vlm, its language model's cache in pages.

    pip install mlx-vlm && python examples/image_chat.py

A small LLaVA with random weights looks at a random picture and is asked two things. With a real
model only the first lines differ: `model, processor = mlx_vlm.load(...)`. What is wrapped is
`model.language_model`, and the cache goes through the chat as `prompt_cache=`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import pagedkv

try:
    from mlx_vlm.generate.ar import generate_step
    from mlx_vlm.models import llava
except ImportError as e:
    raise SystemExit(f"this example needs mlx-vlm (pip install mlx-vlm): {e}") from e

VOCABULARY, IMAGE = 256, 255
"""Words, and the one that stands for a patch of a picture."""

SIDE, PATCH = 112, 8


def tiny_llava() -> Any:
    """A model that reads pictures of 112 x 112 pixels as 196 tokens."""
    mx.random.seed(0)
    text = llava.TextConfig(
        model_type="llama", vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    vision = llava.VisionConfig(
        model_type="clip_vision_model", image_size=SIDE, patch_size=PATCH, hidden_size=128,
        intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    return llava.Model(llava.ModelConfig(text, vision, "llava", image_token_index=IMAGE))


def main(prompt_tokens: int = 3000, new_tokens: int = 64) -> pagedkv.CacheStats:
    """Show a picture, ask about it, and ask again.

    Args:
        prompt_tokens: of both questions, the picture's included.
        new_tokens: of both answers.

    Returns:
        Statistics of the cache at the end.
    """
    config = pagedkv.TierConfig(
        hot_tokens=128, kv="K4V4", page_tokens=256, warm="200KB", cold="64MB"
    )
    model = tiny_llava()
    picture = mx.random.uniform(shape=(1, 3, SIDE, SIDE))
    patches = [IMAGE] * (SIDE // PATCH) ** 2
    first = [1, *patches, *(3 + i % 250 for i in range(prompt_tokens // 2 - len(patches) - 1))]
    second = [3 + i % 91 for i in range(prompt_tokens - len(first))]
    with pagedkv.wrap(model.language_model, config) as cache:
        for question, pixels in ((first, picture), (second, None)):
            ids = mx.array([question])
            steps = generate_step(
                ids, model, pixels, None, max_tokens=new_tokens // 2, prompt_cache=cache
            )
            answer = [int(token) for token, _ in steps]
            print(f"{len(question):,} tokens read, answered {answer}, {cache.offset:,} held")
        return cache.stats()


if __name__ == "__main__":
    print(main())
