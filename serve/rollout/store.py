"""Memory that lasts: an append-only journal, the evidence as it came, and a lease; SQLite, or any database by URL.

* `journal`: every transition, verdict and order, one row each, never changed. History is told from it alone.
* `parcels`: what ingresses sent, as it came, written *before* it is counted. Old ones are dropped beyond a limit.
* `checkpoints`: one whole `Rollout` per id, written in the same transaction as the journal entries that led to it.
  Resuming is the checkpoint and the parcels after it: the same step, the same evidence, to the last digit.
* `leases`: one row that names the controller in office. Each change of office raises its `fence`, and every write
  checks the fence in its own transaction: a controller that slept through its lease writes nothing, whatever its clock
  says, and two never both act. (Kleppmann 2016, "How to do distributed locking".)

Calls block: from async code, call them in a thread. Times are the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from serve.errors import ConfigError, SetupError
from serve.rollout.outcome import Batch, Outcome
from serve.rollout.rollout import Entry, Rollout

__all__ = ["Lease", "LeaseLost", "Record", "Store", "StoreUnavailable", "open_database"]

_KEPT_PARCELS: Final = 20_000
_ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only on INTEGER

_SCHEMA: Final = MetaData()
_JOURNAL: Final = Table(
    "halftone_journal",
    _SCHEMA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("rollout", String(64), nullable=False, index=True),
    Column("at_s", Float, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("sentence", Text, nullable=False),
    Column("facts", Text, nullable=False),
)
_PARCELS: Final = Table(
    "halftone_parcels",
    _SCHEMA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("rollout", String(64), nullable=False, index=True),
    Column("parcel", Text, nullable=False),
)
_CHECKPOINTS: Final = Table(
    "halftone_checkpoints",
    _SCHEMA,
    Column("rollout", String(64), primary_key=True),
    Column("phase", String(32), nullable=False),
    Column("started_at_s", Float, nullable=False),
    Column("last_parcel", _ID, nullable=False),
    Column("whole", Text, nullable=False),
)
_LEASES: Final = Table(
    "halftone_leases",
    _SCHEMA,
    Column("name", String(64), primary_key=True),
    Column("holder", String(255), nullable=False),
    Column("fence", _ID, nullable=False),
    Column("expires_at_s", Float, nullable=False),
)


class StoreUnavailable(SetupError):
    """The database does not answer, or refuses. What was asked for has not happened."""


class LeaseLost(StoreUnavailable):
    """Another controller is in office. Stop acting; ask for the lease again."""


@dataclass(frozen=True)
class Lease:
    holder: str
    fence: int


@dataclass(frozen=True)
class Record:
    """One row of the journal."""

    id: int
    rollout: str
    at_s: float
    kind: str
    sentence: str
    facts: Mapping[str, Any]


class Store:
    """Opens or creates the tables at a URL such as `sqlite:///rollouts.db` or `postgresql+psycopg://user@host/name`."""

    def __init__(self, url: str = "sqlite://", *, kept_parcels: int = _KEPT_PARCELS) -> None:
        self._kept_parcels = kept_parcels
        try:
            self._engine = open_database(url)
            _SCHEMA.create_all(self._engine)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise ConfigError("rollouts.store", f"is no usable database URL: {error}") from error
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"the rollout store cannot be opened: {_first_line(error)}") from error

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """All of the block or nothing. The database's own errors become StoreUnavailable, here and nowhere else."""
        try:
            with self._engine.begin() as db:
                yield db
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"the rollout store does not answer: {_first_line(error)}") from error

    def acquire(self, holder: str, now_s: float, ttl_s: float = 15.0) -> Lease | None:
        """Take or renew the office until `now_s + ttl_s`; None while another holder's lease runs."""
        with self._transaction() as db:
            row = db.execute(select(_LEASES).where(_LEASES.c.name == "controller")).first()
            if row is None:
                return self._first_lease(db, holder, now_s + ttl_s)
            if row.holder != holder and row.expires_at_s > now_s:
                return None
            fence = row.fence + (row.holder != holder)
            changed = db.execute(
                update(_LEASES)
                .where(_LEASES.c.name == "controller", _LEASES.c.fence == row.fence, _LEASES.c.holder == row.holder)
                .values(holder=holder, fence=fence, expires_at_s=now_s + ttl_s)
            )
            return Lease(holder, fence) if changed.rowcount else None

    def release(self, lease: Lease) -> None:
        """Leave office, so that a successor need not wait."""
        with self._transaction() as db:
            mine = (_LEASES.c.holder == lease.holder) & (_LEASES.c.fence == lease.fence)
            db.execute(update(_LEASES).where(mine).values(expires_at_s=float("-1e300")))

    def commit(self, lease: Lease, rollout: Rollout, entries: Iterable[Entry] = ()) -> None:
        """Journal the entries and the rollout as it stands now, together or not at all. Before acting on them."""
        with self._transaction() as db:
            self._check(db, lease)
            if rows := [_row(rollout.id, entry) for entry in entries]:
                db.execute(insert(_JOURNAL), rows)
            self._checkpoint(db, rollout)

    def keep(self, lease: Lease, rollout: str, parcels: Sequence[Batch]) -> None:
        """Write parcels down; count them (`Rollout.take`) afterwards."""
        with self._transaction() as db:
            self._check(db, lease)
            rows = [{"rollout": rollout, "parcel": json.dumps(parcel.to_dict())} for parcel in parcels]
            if rows:
                db.execute(insert(_PARCELS), rows)

    def note(self, lease: Lease, subject: str, entry: Entry) -> None:
        """A line of the journal that belongs to no rollout: traffic that was moved by hand."""
        with self._transaction() as db:
            self._check(db, lease)
            db.execute(insert(_JOURNAL), [_row(subject, entry)])

    def prune(self, lease: Lease, subject: str, kept: int) -> None:
        """Keep the newest parcels of that subject, and drop the rest."""
        with self._transaction() as db:
            self._check(db, lease)
            self._prune(db, subject, kept)

    def load(self, rollout: str) -> Rollout | None:
        """The rollout as it stood when the last write returned."""
        with self._transaction() as db:
            row = db.execute(select(_CHECKPOINTS).where(_CHECKPOINTS.c.rollout == rollout)).first()
            if row is None:
                return None
            after = (_PARCELS.c.rollout == rollout) & (_PARCELS.c.id > row.last_parcel)
            parcels = db.execute(select(_PARCELS.c.parcel).where(after).order_by(_PARCELS.c.id)).scalars().all()
        whole = Rollout.from_dict(json.loads(row.whole))
        for parcel in parcels:
            whole.take(Batch.from_dict(json.loads(parcel)))
        return whole

    def ids(self) -> list[str]:
        """All rollouts, in the order in which they began."""
        with self._transaction() as db:
            return list(db.execute(select(_CHECKPOINTS.c.rollout).order_by(_CHECKPOINTS.c.started_at_s)).scalars())

    def latest(self) -> str | None:
        """The id of the rollout that was begun last, ended or not."""
        query = select(_CHECKPOINTS.c.rollout).order_by(_CHECKPOINTS.c.started_at_s.desc()).limit(1)
        with self._transaction() as db:
            return db.execute(query).scalar()

    def journal(self, rollout: str | None = None) -> list[Record]:
        """All rows, oldest first, of one rollout or of all."""
        query = select(_JOURNAL).order_by(_JOURNAL.c.id)
        if rollout is not None:
            query = query.where(_JOURNAL.c.rollout == rollout)
        with self._transaction() as db:
            rows = db.execute(query).all()
        return [Record(row.id, row.rollout, row.at_s, row.kind, row.sentence, json.loads(row.facts)) for row in rows]

    def recorded(self, rollout: str) -> list[Outcome]:
        """The ends of requests in the parcels that are still kept, for `certify`."""
        query = select(_PARCELS.c.parcel).where(_PARCELS.c.rollout == rollout).order_by(_PARCELS.c.id)
        with self._transaction() as db:
            parcels = db.execute(query).scalars().all()
        outcomes = (outcome for parcel in parcels for outcome in Batch.from_dict(json.loads(parcel)).outcomes)
        return [outcome for outcome in outcomes if not outcome.is_open]

    def _first_lease(self, db: Connection, holder: str, expires_at_s: float) -> Lease | None:
        try:
            with db.begin_nested():
                row = {"name": "controller", "holder": holder, "fence": 1, "expires_at_s": expires_at_s}
                db.execute(insert(_LEASES).values(**row))
        except IntegrityError:  # another was first
            return None
        return Lease(holder, 1)

    def _check(self, db: Connection, lease: Lease) -> None:
        """Touch the lease's row: no other holder can take it before this transaction ends."""
        mine = (_LEASES.c.name == "controller") & (_LEASES.c.holder == lease.holder) & (_LEASES.c.fence == lease.fence)
        if not db.execute(update(_LEASES).where(mine).values(fence=lease.fence)).rowcount:
            raise LeaseLost(f"{lease.holder} is no longer the controller in office")

    def _checkpoint(self, db: Connection, rollout: Rollout) -> None:
        last = db.execute(select(func.max(_PARCELS.c.id)).where(_PARCELS.c.rollout == rollout.id)).scalar() or 0
        values = {
            "phase": rollout.state.phase,
            "started_at_s": rollout.created_at_s,
            "last_parcel": last,
            "whole": json.dumps(rollout.to_dict()),
        }
        known = _CHECKPOINTS.c.rollout == rollout.id
        if not db.execute(update(_CHECKPOINTS).where(known).values(**values)).rowcount:
            db.execute(insert(_CHECKPOINTS).values(rollout=rollout.id, **values))
        self._prune(db, rollout.id, self._kept_parcels)

    def _prune(self, db: Connection, subject: str, kept: int) -> None:
        mine = _PARCELS.c.rollout == subject
        oldest = select(_PARCELS.c.id).where(mine).order_by(_PARCELS.c.id.desc()).offset(kept).limit(1)
        if (bound := db.execute(oldest).scalar()) is not None:
            db.execute(delete(_PARCELS).where(mine & (_PARCELS.c.id <= bound)))


def _row(subject: str, entry: Entry) -> dict[str, Any]:
    facts = json.dumps(entry.facts)
    return {"rollout": subject, "at_s": entry.at_s, "kind": entry.kind, "sentence": entry.sentence, "facts": facts}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def open_database(url: str) -> Engine:
    """For any database whose URL a configuration may give. Connects when it is first used."""
    if url in ("sqlite://", "sqlite:///:memory:"):
        engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
    else:
        engine = create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _sqlite_settings)
        event.listen(engine, "begin", _sqlite_begin)
    return engine


def _sqlite_settings(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # our own BEGIN below: the driver's would come too late to lock a read
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
