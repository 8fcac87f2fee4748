"""`POST /tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from serve.api.schema.body import Body
from serve.api.schema.chat import Conversation
from serve.api.schema.sampling import Flag, ModelName
from serve.api.schema.text import Text, TokenIds

__all__ = ["DetokenizeBody", "TokenizeChatBody", "TokenizeTextBody"]


class TokenizeTextBody(Body):
    model: ModelName | None = None
    prompt: Text
    add_special_tokens: bool | None = None
    return_token_strs: Flag = False


class TokenizeChatBody(Conversation):
    model: ModelName | None = None
    return_token_strs: Flag = False


class DetokenizeBody(Body):
    model: ModelName | None = None
    tokens: TokenIds
