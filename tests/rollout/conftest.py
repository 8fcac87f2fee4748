"""A PostgreSQL server of the tests' own, where its programs are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest

from tests.running import free_port


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a server without a database's name. Skips where there is none to start."""
    pytest.importorskip("psycopg")
    programs = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which("initdb", path=os.pathsep.join([*map(str, programs), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip("no PostgreSQL here (Debian: postgresql)")
    as_user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to be run by root
        if not shutil.which("runuser"):
            pytest.skip("PostgreSQL does not run as root, and there is no runuser")
        as_user = ["runuser", "-u", "postgres", "--"]
    with TemporaryDirectory(prefix="halftone-postgresql-", dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        bin_folder, data, port = Path(found).parent, f"{folder}/data", free_port()

        def run(program: str, *arguments: str) -> None:
            subprocess.run([*as_user, str(bin_folder / program), *arguments], check=True, capture_output=True)

        run("initdb", "-D", data, "-U", "halftone", "--auth=trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://halftone@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.fixture
def postgresql(postgresql_server: str) -> str:
    """The URL of a new database."""
    from sqlalchemy import create_engine, text

    name = f"halftone_{uuid4().hex[:12]}"
    engine = create_engine(f"{postgresql_server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as db:
        db.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{postgresql_server}/{name}"
