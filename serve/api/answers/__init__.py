"""Answers in OpenAI's shapes: the whole body, and the same as a stream of chunks. Knows events and JSON, no HTTP."""

from serve.api.answers.chunks import Chunks, chunks
from serve.api.answers.plan import Plan, Usage, new_call_id
from serve.api.answers.whole import Transcript, body

__all__ = ["Chunks", "Plan", "Transcript", "Usage", "body", "chunks", "new_call_id"]
