from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import psutil

from serve.place import Place, has_died, here


def test_a_neighbour_that_dies_is_seen_at_once_even_before_it_is_buried() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    place = Place(here().machine, child.pid, psutil.Process(child.pid).create_time())
    assert not has_died(place)
    child.kill()
    psutil.wait_procs([psutil.Process(child.pid)], timeout=0.01)
    while psutil.pid_exists(child.pid) and psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert has_died(place)
    child.communicate()
    assert has_died(place)


def test_a_number_that_another_process_has_now_is_not_the_one_that_died() -> None:
    assert not has_died(here())
    assert has_died(replace(here(), born_s=1.0))


def test_of_another_machine_nothing_is_known() -> None:
    assert not has_died(Place("elsewhere", 2**22 + 1, 0.0))
    assert not has_died(Place("", 2**22 + 1, 0.0))
