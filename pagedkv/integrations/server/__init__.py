"""An OpenAI-compatible server: a door of our own in front of mlx-lm's generation and parsing.

`access` says who may ask and how much, `schema` what, `app` is the door, `handler` mlx-lm's own
handler without a socket, `requests` the generation thread with `batch_generator` and `answers`,
`provider` the model that is served, `prompt_cache` what is kept for reuse, and `server` puts them
together. `docs/serving.md` says what is promised.
"""
