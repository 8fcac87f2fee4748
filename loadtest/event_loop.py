"""The event loop that generators run on, and the process limits they need."""

import asyncio
import sys

if sys.platform != "win32":
    import resource


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it is installed: the same results with less work per read."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def raise_descriptor_limit() -> None:
    """Every request in flight holds a connection; the soft limit is often 1024."""
    if sys.platform != "win32":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
