"""The routes by subject. Each is a function of the backend; none holds state of its own."""

from serve.api.routes.admin import admin_routes
from serve.api.routes.experiments import experiment_routes
from serve.api.routes.generation import generation_routes
from serve.api.routes.models import model_routes
from serve.api.routes.operations import index_routes, operation_routes
from serve.api.routes.rollouts import rollout_routes
from serve.api.routes.tokens import token_routes

__all__ = [
    "admin_routes",
    "experiment_routes",
    "generation_routes",
    "index_routes",
    "model_routes",
    "operation_routes",
    "rollout_routes",
    "token_routes",
]
