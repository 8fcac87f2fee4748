"""The HTTP rim: OpenAI's API, the admin routes, keys and server-sent events over a `Backend`.

`create_app` lives in `serve.api.app`: importing this package loads no web framework, so the router may name the seam.
"""

from serve.api.auth import Keys
from serve.api.backend import Answer, Backend, Call, Experiments, ModelCard, ModelState, Rollouts
from serve.api.limits import Limits
from serve.api.settings import ApiSettings

__all__ = [
    "Answer",
    "ApiSettings",
    "Backend",
    "Call",
    "Experiments",
    "Keys",
    "Limits",
    "ModelCard",
    "ModelState",
    "Rollouts",
]
