"""Request bodies: what each route takes, checked to the last field before anything else hears of it."""

from serve.api.schema.admin import ExperimentBody, OrderBody, RolloutBody, TrafficBody
from serve.api.schema.body import Body, parse
from serve.api.schema.chat import ChatBody
from serve.api.schema.completions import CompletionBody
from serve.api.schema.sampling import GenerationBody
from serve.api.schema.tokens import DetokenizeBody, TokenizeChatBody, TokenizeTextBody

__all__ = [
    "Body",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "ExperimentBody",
    "GenerationBody",
    "OrderBody",
    "RolloutBody",
    "TokenizeChatBody",
    "TokenizeTextBody",
    "TrafficBody",
    "parse",
]
