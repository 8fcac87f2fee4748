"""The HTTP rim: OpenAI's API, the admin routes, keys and server-sent events over a `Backend`.

`create_app` lives in `serve.api.app`: importing this package loads no web framework, so the router may name the seam.
"""

from serve.api.backend import Answer, Backend, Call, ModelCard, ModelState, Tokenized

__all__ = ["Answer", "Backend", "Call", "ModelCard", "ModelState", "Tokenized"]
