"""The ops page at `/dashboard`: static files that ask the server's own routes for everything they show.

The files hold no data and may be read without a key; what the page then asks for may not. Nothing is loaded from
elsewhere, and a strict Content-Security-Policy says so to the browser. Knows HTTP and nothing of models, Ray or torch.
"""

from serve.dashboard.routes import PAGE_PATHS, dashboard_routes

__all__ = ["PAGE_PATHS", "dashboard_routes"]
