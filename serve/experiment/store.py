"""Experiments that outlast the controller: one table beside the rollouts' own, in the same database. Calls block."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Column, Integer, MetaData, String, Table, Text, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from serve.rollout.store import open_database

__all__ = ["DatabaseShelf"]

_LOG = logging.getLogger(__name__)
_SCHEMA: Final = MetaData()
_EXPERIMENTS: Final = Table(
    "halftone_experiments",
    _SCHEMA,
    Column("name", String(64), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("document", Text, nullable=False),
)


class DatabaseShelf:
    """A `Shelf`. A database that does not answer ends no experiment: it goes on in memory, and the log says so."""

    def __init__(self, url: str) -> None:
        self._database = open_database(url)

    def put(self, name: str, document: str) -> None:
        named = _EXPERIMENTS.c.name == name
        try:
            _SCHEMA.create_all(self._database)
            with self._database.begin() as db:
                if not db.execute(update(_EXPERIMENTS).where(named).values(document=document)).rowcount:
                    number = (db.execute(select(func.max(_EXPERIMENTS.c.number))).scalar() or 0) + 1
                    db.execute(insert(_EXPERIMENTS).values(name=name, number=number, document=document))
        except SQLAlchemyError as error:
            _LOG.error("experiment %s is kept in memory alone: %s", name, str(error).splitlines()[0])

    def documents(self) -> Sequence[Mapping[str, Any]]:
        try:
            _SCHEMA.create_all(self._database)
            with self._database.begin() as db:
                rows = db.execute(select(_EXPERIMENTS.c.document).order_by(_EXPERIMENTS.c.number)).scalars().all()
        except SQLAlchemyError as error:
            _LOG.error("earlier experiments cannot be read: %s", str(error).splitlines()[0])
            return []
        return [json.loads(row) for row in rows]

    def close(self) -> None:
        self._database.dispose()
