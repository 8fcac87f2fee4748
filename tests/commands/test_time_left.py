"""Long work says how much time is left, however slow a layer is, and anew for each of its stages."""

from __future__ import annotations

import io
import time

from rich.console import Console

from serve.commands.terminal import Steps


class Screen(io.StringIO):
    def wait_for(self, text: str) -> None:
        """The bar is drawn ten times a second by a thread of its own."""
        deadline = time.monotonic() + 10
        while text not in self.getvalue():
            assert time.monotonic() < deadline, self.getvalue()[-300:]
            time.sleep(0.02)


def test_time_left_is_shown_for_slow_layers_and_estimated_anew_for_each_stage() -> None:
    screen, clock = Screen(), [0.0]
    console = Console(file=screen, force_terminal=True, width=120, get_time=lambda: clock[0])
    with Steps(1, console)("compress") as tell:
        for layer in range(3):
            tell("sensitivity", layer, 10)
            clock[0] += 100
        screen.wait_for("0:13:20")  # eight layers of 100 s
        for layer in range(3):
            tell("compress", layer, 10)
            clock[0] += 10
        screen.wait_for("0:01:20")
